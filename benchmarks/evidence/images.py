"""The images of docker/, built over a Debian of our own making, and what runs in each as the user it names.

    python -m benchmarks.evidence.images device jetson train --out docs/results/images.json

Needs root and Debian's buildah and debootstrap; no engine. In the device image the bundle of this repository is verified and
measured, by ONNX Runtime and by OpenVINO; in the train image the quickstart runs. A Debian with numpy stands in for NVIDIA's base,
which could not be fetched: the Jetson image shows there what it does without TensorRT. `device-arm64` and `jetson-arm64` run under
an emulator over the root that `make build/arm` unpacks. `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.evidence.buildah import Buildah, Container, Ended, Volumes, native_arch, require_tools
from benchmarks.evidence.emulated import Emulation, arm64_programs
from targets.base import CompiledModel, Exported, read_json, write_json
from targets.errors import DeviceError, EdgestillError, TargetError

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "tests/fixtures/bundle-quickstart"
ARM_ROOT = ROOT / "build/arm/root"
BASE, BUILD_BASE, NUMPY_BASE = (f"localhost/edgestill-{name}" for name in ("base", "build", "numpy"))
ARM_BASES = {f"{BASE}-arm64": (), f"{NUMPY_BASE}-arm64": ("numpy", "numpy.libs")}  # with what of the board's packages
ARM_PACKAGES = "usr/lib/python3/dist-packages"
PIP_SETTINGS, UV_SETTINGS = Path("/etc/pip.conf"), Path("~/.config/uv/uv.toml").expanduser()
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TRAIN_GIB = 40  # vfs holds the train image several times while it is made
BUILD_TOOLS = ("gcc", "g++", "cc", "c++", "clang", "make", "ninja", "cmake", "ld", "pip", "pip3", "git")
FACTS = f"""\
import json, os, platform, shutil
tools = [name for name in {BUILD_TOOLS} if shutil.which(name)]
print(json.dumps({{"uid": os.getuid(), "gid": os.getgid(), "python": platform.python_version(), "machine": platform.machine(),
"tools": tools, "may_write": [path for path in ("/", "/opt/edgestill", os.path.expanduser("~")) if os.access(path, os.W_OK)]}}))
"""
DIGESTS = """\
import sys; sys.path.insert(0, "/opt/edgestill/edgestill-device.pyz")
from pathlib import Path; from benchmarks.device.verify import check_files
print(len(check_files(Path("/bundle"))["files"]), "digests hold")
"""


@dataclass(frozen=True)
class Check:
    """A command line in an image: arguments of its entrypoint, or with `whole` all of it."""

    says: str
    argv: tuple[str, ...]
    exit_code: int = 0
    expect: str = ""  # stands in what it prints
    whole: bool = False
    user: str = ""  # another than the image's

    @property
    def shown(self) -> list[str]:
        return [*self.argv[:2], "..."] if self.whole else list(self.argv)


@dataclass(frozen=True)
class Image:
    """What is built from `docker/KIND.Dockerfile`, over what, and what it must do."""

    kind: str
    base: str
    base_in_words: str
    checks: tuple[Check, ...]
    arch: str = ""  # this machine's own

    @property
    def dockerfile(self) -> Path:
        return ROOT / "docker" / f"{self.kind}.Dockerfile"


FLIPPED = Check("the same with one byte flipped is refused", ("verify", "/flipped"), 5, "has changed")
VERIFY = Check("the committed bundle: every byte, then its golden input", ("verify", "/bundle"), expect="answers as")
ANYBODY = Check("the same as a user that the image does not know", ("verify", "/bundle"), user="12345:12345")
MEASURE = Check(
    "one launch of its model", ("measure", "--compiled", "/bundle/model", "--out", "/tmp/samples.npy"), expect="lat_us"
)
FIRST_RUN = Check(
    "a kit's first run, each step a process of its own: its float graph is measured, and refused as the INT8 that it is not",
    ("first-run", "/kit", "--target", "onnxruntime-cpu", "--launches", "1", "--out", "/tmp/result.json"),
    5,
    "built fp32; not built int8",
)
OPENVINO = (
    Check(
        "OpenVINO compiles its graph",
        ("compile", "--target", "openvino-cpu", "--exported", "/kit/float", "--precision", "fp32", "--out", "/tmp/ov"),
    ),
    Check("and one launch of that", ("measure", "--compiled", "/tmp/ov", "--out", "/tmp/samples.npy"), expect="lat_us"),
)
JETSON = (
    Check("every digest of the committed bundle", ("python3", "-c", DIGESTS), expect="digests hold", whole=True),
    Check("its runtime, which is not there", ("verify", "/bundle"), 5, "onnxruntime 1.32.0, here is none"),
    FLIPPED,
    Check("a kit's first run without TensorRT", ("first-run", "/kit", "--out", "/tmp/result.json"), 5, "tensorrt"),
)
TRAIN = (
    Check("this machine and its runtimes", ("doctor",), expect="onnxruntime-cpu"),
    Check("the committed bundle: every byte, then its golden input", ("verify", "/bundle")),
    Check("the quickstart, from teacher to bundles", ("run", "recipes/quickstart.yaml"), expect="report"),
)
DEBIAN, DEBIAN_NUMPY = "Debian 12, python3", "Debian 12, python3, numpy (in place of NVIDIA's)"
IMAGES = {
    "device": Image("device", BASE, DEBIAN, (VERIFY, ANYBODY, MEASURE, FLIPPED, *OPENVINO, FIRST_RUN)),
    "jetson": Image("jetson", NUMPY_BASE, DEBIAN_NUMPY, JETSON),
    "train": Image("train", BASE, DEBIAN, TRAIN),
    "device-arm64": Image("device", f"{BASE}-arm64", DEBIAN, (VERIFY, MEASURE, FLIPPED, *OPENVINO), "arm64"),
    "jetson-arm64": Image("jetson", f"{NUMPY_BASE}-arm64", DEBIAN_NUMPY, JETSON, "arm64"),
}


def main(argv: Sequence[str]) -> int:
    """Build, run, write one JSON file, print the tables; an image that is not asked for keeps what the file has of it."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return 0
    try:
        require_tools()
        builder = Buildah((ROOT / "build/images").resolve())
        _check_space(builder, arguments.images)
        for name in arguments.images:
            found = _tried(builder, name, IMAGES[name], keep=arguments.keep)
            before = read_json(arguments.out)["images"] if arguments.out.is_file() else {}
            write_json(arguments.out, {"schema_version": 1, "images": {**before, name: found}})
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text(read_json(arguments.out)))
    return 0


def _check_space(builder: Buildah, names: Sequence[str]) -> None:
    free_gib = shutil.disk_usage(builder.directory).free / 2**30
    if "train" in names and free_gib < TRAIN_GIB:
        raise DeviceError(
            f"{builder.directory}: {free_gib:.0f} GiB are free, and the train image needs {TRAIN_GIB} while it is built. "
            "Free some, or name the other images."
        )


def _tried(builder: Buildah, name: str, image: Image, *, keep: bool) -> dict[str, Any]:
    """Build it and run its checks; raises DeviceError with the words of what went otherwise than it must."""
    tag, arch = f"localhost/edgestill-{name}", image.arch or native_arch()
    emulated = arch == "arm64" != native_arch()
    try:
        with arm64_programs(builder.directory / "cpuinfo") if emulated else nullcontext() as emulation:
            _say(f"{name}: build over {image.base_in_words}")
            _make_bases(builder, image.base)
            _build(builder, image, arch, tag)
            with builder.container(image.base) as base:
                base_bytes = base.size_bytes()
            with builder.container(tag) as container, tempfile.TemporaryDirectory(dir=builder.directory) as scratch:
                size_bytes, user = container.size_bytes(), container.config["User"]
                facts, rows = _run_checks(container, name, image, Path(scratch), emulation)
    finally:
        if not keep:
            builder.remove(tag)
    return {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "builder": builder.must(["--version"]).strip(),
        "arch": arch,
        "emulated_on": native_arch() if emulated else None,
        "base": image.base_in_words,
        "base_bytes": base_bytes,
        "size_bytes": size_bytes,
        "user": user,
        **facts,
        "runs": rows,
    }


def _make_bases(builder: Buildah, wanted: str) -> None:
    """Those that are not there: kept from one call to the next, for debootstrap takes minutes."""
    if not builder.has(BASE):
        builder.debian(BASE, ["python3"])
    if not builder.has(BUILD_BASE):
        builder.install(BASE, BUILD_BASE, ["python3-pip", "python3-venv", "ca-certificates"])
    if wanted == NUMPY_BASE and not builder.has(NUMPY_BASE):
        builder.install(BASE, NUMPY_BASE, ["python3-numpy"])
    if wanted in ARM_BASES and not builder.has(wanted):
        if not ARM_ROOT.is_dir():
            raise TargetError(f"{ARM_ROOT} is not there, over which an ARM64 image is tried. Run: make build/arm.")
        with tempfile.TemporaryDirectory(dir=builder.directory) as scratch:
            root = shutil.copytree(ARM_ROOT, Path(scratch) / "root", symlinks=True)
            for path in (root / ARM_PACKAGES).iterdir():
                if path.is_dir() and path.name not in ARM_BASES[wanted]:
                    shutil.rmtree(path)
            builder.import_root(root, wanted, "arm64")


def _build(builder: Buildah, image: Image, arch: str, tag: str) -> None:
    settings = builder.directory / "uv.toml"
    settings.write_text("system-certs = true\n")
    own = {"pip": PIP_SETTINGS, "uv": UV_SETTINGS if UV_SETTINGS.is_file() else settings, "ca": CERTIFICATES}
    builder.build(
        image.dockerfile,
        tag,
        arch=arch,
        arguments={"BASE": image.base, "BUILD_BASE": BUILD_BASE},
        secrets={name: path for name, path in own.items() if path.is_file()},
    )


def _run_checks(
    container: Container, name: str, image: Image, scratch: Path, emulation: Emulation | None
) -> tuple[dict[str, Any], list[Any]]:
    """(who and what is in there, a row a check)."""
    volumes, rows = _volumes(scratch), []
    facts = _done(container, Check("facts", ("python3", "-c", FACTS), whole=True), volumes, emulation).answer
    for check in image.checks:
        _say(f"{name}: {check.says}")
        ended = _done(container, check, volumes, emulation)
        error = ended.answer.get("error") if isinstance(ended.answer, dict) else None
        rows.append({"says": check.says, "argv": check.shown, "exit_code": ended.exit_code, "error": error})
    return facts, rows


def _done(container: Container, check: Check, volumes: Volumes, emulation: Emulation | None) -> Ended:
    entrypoint = [] if check.whole else container.config["Entrypoint"]
    ended = container.run([*entrypoint, *check.argv], volumes, user=check.user, emulation=emulation)
    if ended.exit_code != check.exit_code or check.expect not in ended.stdout + ended.stderr:
        raise DeviceError(
            f"{check.says}: {' '.join(check.argv)} ended with {ended.exit_code}, expected were {check.exit_code} "
            f"and '{check.expect}':\n{ended.stdout[-1500:]}{ended.stderr[-1500:]}"
        )
    return ended


def _volumes(scratch: Path) -> dict[Path, str]:
    """The committed bundle, the same with a flipped byte, and a kit for TensorRT of its model."""
    flipped, kit = scratch / "flipped", scratch / "kit"
    shutil.copytree(BUNDLE, flipped)
    weights = bytearray((flipped / "model/model.onnx").read_bytes())
    weights[len(weights) // 2] ^= 1
    (flipped / "model/model.onnx").write_bytes(weights)
    compiled = CompiledModel.load(BUNDLE / "model")
    for part in ("int8", "float"):  # float in both: it is there to be refused, or to show that each step runs
        (kit / part).mkdir(parents=True)
        shutil.copy(BUNDLE / "model/model.onnx", kit / part)
        Exported(
            name=compiled.name,
            onnx_path="model.onnx",
            inputs=compiled.inputs,
            outputs=compiled.outputs,
            preprocessing=compiled.preprocessing,
            directory=kit / part,
        ).save()
    kit_json = {
        "schema_version": 1,
        "name": compiled.name,
        "target": "tensorrt",
        "float": ["fp32"],
        "min_int8_share": 0.0,
    }
    write_json(kit / "kit.json", kit_json)
    return {BUNDLE: "/bundle", flipped: "/flipped", kit: "/kit"}


def text(document: Mapping[str, Any]) -> str:
    """Markdown: a table of the images, and one of what ran in them, with the words of what was refused."""
    lines = [
        "| image | built | architecture | over | MiB in all | MiB of the base | user | Python | build tools in it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in document["images"].items():
        emulated = f", emulated on {found['emulated_on']}" if found["emulated_on"] else ""
        cells = [name, found["utc"][:10], f"{found['arch']}{emulated}", found["base"]]
        cells += [f"{found[size] / 2**20:,.0f}" for size in ("size_bytes", "base_bytes")]
        cells += [found["user"], found["python"], ", ".join(found["tools"]) or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| image | command | exit code | what for |", "| --- | --- | --- | --- |"]
    for name, found in document["images"].items():
        for run in found["runs"]:
            says = f"{run['says']}: *{run['error']}*" if run["error"] else run["says"]
            lines.append(f"| {name} | `{' '.join(run['argv'])}` | {run['exit_code']} | {says} |")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the images in build/images")
    parser.add_argument("--show", type=Path, help="print a stored result")
    arguments = parser.parse_args(argv)
    if not arguments.show and not (arguments.images and arguments.out):
        parser.error("IMAGE... and --out are needed, or --show FILE.json")
    if unknown := [name for name in arguments.images if name not in IMAGES]:
        parser.error(f"{unknown[0]} is no image. Known: {', '.join(IMAGES)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
