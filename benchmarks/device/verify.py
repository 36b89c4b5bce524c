"""Is this bundle the one that was written, can it run here, and does it answer as it did?

Reads a bundle, writes nothing. In this order: every file against the manifest, architecture and runtime version against
this machine, then the golden input through the model. Nothing of the bundle runs before the first two have passed.
"""

from __future__ import annotations

import platform
import re
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from targets import make_target
from targets.base import Array, CompiledModel, read_json, sha256_file
from targets.errors import IntegrityError, TargetError

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it: one line over manifest.json, which covers every other file
SCHEMA_VERSION = 1


def verify_bundle(bundle: Path, *, replay: bool = True) -> dict[str, Any]:
    """Verify a bundle directory; returns {"files", "max_abs_delta" a golden output}.

    Raises IntegrityError with the file's name for any flipped byte, missing, added, renamed or symlinked file and for a
    golden output that is not met, TargetError where this machine is not what the model was compiled for.
    """
    manifest = check_files(bundle)
    compiled = CompiledModel.load(bundle / "model")
    check_machine(compiled)
    deltas = replay_golden(bundle, manifest, compiled) if replay else {}
    return {"name": manifest["name"], "files": len(manifest["files"]) + 2, "max_abs_delta": deltas}


def check_files(bundle: Path) -> dict[str, Any]:
    """The manifest, after every file of the bundle has been held against it."""
    found = _regular_files(bundle)
    for name in (MANIFEST, SEAL):
        if name not in found:
            raise _refused(bundle / name, "is missing")
    if (bundle / SEAL).read_bytes() != seal_of(bundle / MANIFEST):
        raise _refused(bundle / MANIFEST, f"does not match {SEAL}")
    manifest: dict[str, Any] = read_json(bundle / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise TargetError(
            f"{bundle / MANIFEST}: schema_version={manifest.get('schema_version')!r}, this program reads {SCHEMA_VERSION}. "
            "Verify with the edgestill-device.pyz of the bundle."
        )
    expected: Mapping[str, str] = manifest["files"]
    if missing := sorted(expected.keys() - found):
        raise _refused(bundle / missing[0], "is missing")
    if added := sorted(found - expected.keys() - {MANIFEST, SEAL}):
        raise _refused(bundle / added[0], "was added")
    for name, digest in expected.items():
        if sha256_file(bundle / name) != digest:
            raise _refused(bundle / name, "has changed: its sha256 differs")
    return manifest


def seal_of(manifest_path: Path) -> bytes:
    """The exact content of manifest.sha256."""
    return f"{sha256_file(manifest_path)}  {MANIFEST}\n".encode()


def check_machine(compiled: CompiledModel) -> None:
    """Refuse another architecture, or another version of the runtime, than the model was compiled and proved with."""
    here = platform.machine()
    if (built := compiled.built_for.get("arch", here)) != here:
        raise TargetError(
            f"{compiled.name} was compiled for {built}, this machine is {here}. Compile it on such a machine."
        )
    needed = _runtime(compiled)
    if needed is None:
        return
    package, version = needed
    installed = _installed(package)
    if installed is None or not _same_release(version, installed):
        raise TargetError(
            f"{compiled.name} was compiled and proved with {package} {version}, here is {installed or 'none'}. "
            f"Install {package}=={version.partition('-')[0]}, or compile the model again."
        )


def replay_golden(bundle: Path, manifest: Mapping[str, Any], compiled: CompiledModel) -> dict[str, float]:
    """Run the golden input; returns max |delta| an output. Raises IntegrityError beyond the tolerance of the manifest."""
    golden = manifest["golden"]
    session = make_target(compiled.target, compiled.options).load(compiled, batch=golden["batch"])
    outputs = session.run({name: _array(bundle / file) for name, file in golden["inputs"].items()})
    deltas = {}
    for name, file in golden["outputs"].items():
        expected, tolerance = _array(bundle / file), golden["tolerance"][name]
        delta = max_abs_delta(outputs[name], expected)
        if not delta <= tolerance:  # a NaN is refused as well
            raise IntegrityError(
                f"{bundle / file}: output '{name}' differs by {delta:g}, {tolerance:g} is allowed. "
                "This machine computes something else than was proved: measure the model here before it is used."
            )
        deltas[name] = delta
    return deltas


def max_abs_delta(actual: Array, expected: Array) -> float:
    """Largest absolute difference; infinite where the shapes differ, NaN where a value is no number."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0))


def _regular_files(bundle: Path) -> set[str]:
    """Relative paths of all files; a symlink, a device or an empty folder is refused by name."""
    if not bundle.is_dir():
        raise _refused(bundle, "is no directory")
    files: set[str] = set()
    folders: set[str] = set()
    parents: set[str] = set()
    for path in sorted(bundle.rglob("*")):
        name, mode = path.relative_to(bundle).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            folders.add(name)
        elif stat.S_ISREG(mode):
            files.add(name)
            parents.update(parent.as_posix() for parent in Path(name).parents)
        else:
            raise _refused(path, "is a symlink" if stat.S_ISLNK(mode) else "is no regular file")
    if empty := sorted(folders - parents):
        raise _refused(bundle / empty[0], "is an empty folder that was added")
    return files


def _runtime(compiled: CompiledModel) -> tuple[str, str] | None:
    """(package, version) out of a toolchain such as "openvino 2026.4.1"; None where the target names none."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+) (\d\S*)", compiled.toolchain)
    return (match[1], match[2]) if match else None


def _installed(module: str) -> str | None:
    """Version of the distribution that brings `module`, whatever it is called (onnxruntime, onnxruntime-gpu)."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(module, [])
        return metadata.version(names[0]) if names else None


def _same_release(built: str, installed: str) -> bool:
    """Whether both name the same release; a build suffix (2026.4.1-22982-abc) does not count."""
    return built.partition("-")[0] == installed.partition("-")[0]


def _array(path: Path) -> Array:
    array: Array = np.load(path, allow_pickle=False)
    return array


def _refused(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} {why}. Do not use this bundle: copy it again from where it was written.")
