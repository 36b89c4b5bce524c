"""Is this bundle the one that was written, by whom, can it run here, and does it answer as it did?

Reads a bundle (a folder, or its .tar), writes nothing. In this order: every file against the manifest; the signature, where
a public key is given; GPU, architecture and runtime version against this machine; then the golden input through the model.
Nothing of the bundle runs, and no runtime reads of it, before the others have passed.
"""

from __future__ import annotations

import json
import platform
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.archive import extract_archive
from benchmarks.device.json_schema import first_fault
from benchmarks.device.manifest import SCHEMA, SCHEMA_VERSION
from benchmarks.device.signature import SIGNATURE, check_signature, fingerprint, load_public_key
from targets import make_target
from targets.base import Array, CompiledModel, Target, installed_version, sha256_file
from targets.errors import IntegrityError, TargetError

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it: manifest.json, which covers every other file, and the signature
DESCRIPTION = "model/compiled.json"


@dataclass(frozen=True)
class Signer:
    """The public key that a bundle must be signed with; `fingerprint` is what names it."""

    key: Any
    fingerprint: str

    @classmethod
    def load(cls, path: Path) -> Signer:
        key = load_public_key(path)
        return cls(key, fingerprint(key))


def verify_bundle(bundle: Path, *, public_key: Path | None = None, replay: bool = True) -> dict[str, Any]:
    """Verify a bundle; returns {"name", "files", "signature", "max_abs_delta" a golden output, "checked", "not_checked"}.

    With `public_key`, a PEM file, the bundle must be signed with its private half. Raises IntegrityError with the file's name
    for any flipped byte, missing, added, renamed or symlinked file, for a signature that does not hold and for a golden
    output that is not met, TargetError where this machine is not what the model was compiled for.
    """
    signer = Signer.load(public_key) if public_key is not None else None
    if not bundle.is_file():
        return _verify(bundle, signer, replay)
    with tempfile.TemporaryDirectory() as scratch:
        return _verify(extract_archive(bundle, Path(scratch) / bundle.name), signer, replay)


def check_files(bundle: Path, signer: Signer | None = None) -> dict[str, Any]:
    """The manifest, after every file of the bundle has been held against it and all of them against the signer's key."""
    found = _regular_files(bundle)
    _check_seal(bundle, found)
    digests = {name: sha256_file(bundle / name) for name in sorted(found - {SEAL, SIGNATURE})}
    if signer is not None:
        if SIGNATURE not in found:
            raise IntegrityError(
                f"{bundle} is not signed: it has no {SIGNATURE}, and a public key was given. "
                "Ask for a signed bundle; or leave the key out, which checks the digests alone."
            )
        check_signature(bundle / SIGNATURE, signer.key, digests)
    manifest = _read_manifest(bundle / MANIFEST)
    expected: Mapping[str, str] = manifest["files"]
    if missing := sorted(expected.keys() - digests):
        raise _refused(bundle / missing[0], "is missing")
    if added := sorted(digests.keys() - expected.keys() - {MANIFEST}):
        raise _refused(bundle / added[0], "was added")
    for name, digest in expected.items():
        if digests[name] != digest:
            raise _refused(bundle / name, "has changed: its sha256 differs")
    return manifest


def seal_of(bundle: Path, *, signed: bool = False) -> bytes:
    """The exact content of manifest.sha256."""
    names = (MANIFEST, SIGNATURE) if signed else (MANIFEST,)
    return b"".join(_sealed(bundle / name) for name in names)


def check_machine(compiled: CompiledModel) -> None:
    """Refuse another GPU, another architecture, or another version of the runtime, than the model was compiled and proved
    with. What `built_for` does not name may be any: a portable bundle names nothing, and its golden output decides."""
    here = platform.machine()
    if (built := compiled.built_for.get("arch", here)) != here:
        raise TargetError(
            f"{compiled.name} was compiled for {built}, this machine is {here}. Compile it on such a machine, "
            f"or take the bundle that was made for {here}."
        )
    needed = _runtime(compiled)
    if needed is not None:
        _check_runtime(compiled, *needed)
    if "sm" in compiled.built_for:
        _check_gpu(compiled)


def _check_runtime(compiled: CompiledModel, package: str, version: str) -> None:
    installed = installed_version(package)
    any_version = "runtime" not in compiled.built_for
    if installed is not None and (any_version or _same_release(version, installed)):
        return
    wanted = package if any_version else f"{package}=={_release(version)}"
    install = "take the JetPack or the wheel that has it" if package == "tensorrt" else f"pip install {wanted}"
    raise TargetError(
        f"{compiled.name} was compiled and proved with {package} {version}, here is {installed or 'none'}. "
        f"Install that ({install}), or compile the model with what is here."
    )


def _check_gpu(compiled: CompiledModel) -> None:
    """An engine runs on the GPU architecture (SM) and model that it was built on."""
    here = gpu_facts()
    for fact, words in (("sm", "SM"), ("gpu", "the GPU")):
        built = compiled.built_for.get(fact, here[fact])
        if built != here[fact]:
            raise TargetError(
                f"{compiled.name}: the engine was built for {words} {built}, here is {words} {here[fact]}. An engine runs only "
                "where it was built: compile the exported model on this machine, or take the bundle that was made on one like it."
            )


def runtime_facts(target: Target) -> dict[str, str]:
    """What a model that is compiled here depends on besides the hardware's own facts: the runtime's version, and for what runs on a
    GPU, which one."""
    facts = {"version": installed_version(target.package) or ""}
    return facts if target.on_cpu else {**facts, **gpu_facts()}


def gpu_facts() -> dict[str, str]:
    """SM and name of the GPU here; TargetError where the CUDA runtime is absent or finds none."""
    from targets.cuda import open_cuda

    cuda = open_cuda()
    return {"sm": cuda.compute_capability(), "gpu": cuda.device_name()}


def replay_golden(bundle: Path, manifest: Mapping[str, Any], compiled: CompiledModel) -> dict[str, float]:
    """Run the golden input; returns max |delta| an output. Raises IntegrityError beyond the tolerance of the manifest."""
    golden = manifest["golden"]
    session = make_target(compiled.target, compiled.options).load(compiled, batch=golden["batch"])
    outputs = session.run({name: _array(bundle / file) for name, file in golden["inputs"].items()})
    deltas = {}
    for name, file in golden["outputs"].items():
        expected, tolerance = _array(bundle / file), golden["tolerance"][name]
        if name not in outputs:
            raise _refused(bundle / DESCRIPTION, f"names no output '{name}', which the golden output has")
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


def _verify(bundle: Path, signer: Signer | None, replay: bool) -> dict[str, Any]:
    manifest = check_files(bundle, signer)
    compiled = _compiled(bundle, manifest)
    check_machine(compiled)
    deltas = replay_golden(bundle, manifest, compiled) if replay else {}
    signature = _signature_facts(bundle, signer)
    num_files = len(manifest["files"]) + (2 if signature["status"] == "absent" else 3)
    checked, not_checked = _in_words(manifest, num_files, signature, deltas)
    return {
        "name": manifest["name"],
        "files": num_files,
        "signature": signature,
        "max_abs_delta": deltas,
        "checked": checked,
        "not_checked": not_checked,
    }


def _signature_facts(bundle: Path, signer: Signer | None) -> dict[str, Any]:
    if signer is not None:
        return {"status": "verified", "key_sha256": signer.fingerprint}
    return {"status": "not checked" if (bundle / SIGNATURE).exists() else "absent", "key_sha256": None}


def _in_words(
    manifest: Mapping[str, Any], num_files: int, signature: Mapping[str, Any], deltas: Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """What was looked at, and what was not."""
    checked, not_checked = [f"every byte of {num_files} files is as it was written"], []
    if signature["status"] == "verified":
        checked.append(f"signed with the key of sha256 {signature['key_sha256']}")
    else:
        signed = (
            "it is signed, but no public key was given" if signature["status"] == "not checked" else "it is not signed"
        )
        not_checked.append(f"who wrote it: {signed}")
    built_for = ", ".join(
        f"{key} {manifest['built_for'][key]}" for key in ("arch", "runtime", "sm") if key in manifest["built_for"]
    )
    if built_for:
        checked.append(f"this machine is what it was compiled for: {built_for}")
    else:
        not_checked.append(
            f"machine and version: it is for any that runs {manifest['target']}, and its golden output decides"
        )
    if deltas:
        tolerance = manifest["golden"]["tolerance"]
        told = ", ".join(f"{name} within {delta:g} ({tolerance[name]:g} allowed)" for name, delta in deltas.items())
        checked.append(f"the model answers as it did: {told}")
    else:
        not_checked.append("whether the model answers as it did")
    return checked, not_checked


def _check_seal(bundle: Path, found: set[str]) -> None:
    """manifest.json and, where there is one, the signature are as manifest.sha256 says."""
    if SEAL not in found:
        raise _refused(bundle / SEAL, "is missing")
    seal = (bundle / SEAL).read_bytes()
    sealed = (MANIFEST, SIGNATURE) if seal.endswith(f"  {SIGNATURE}\n".encode()) else (MANIFEST,)
    for name in sealed:
        if name not in found:
            raise _refused(bundle / name, "is missing")
        if _sealed(bundle / name) not in seal.splitlines(keepends=True):
            raise _refused(bundle / name, f"does not match {SEAL}")
    if SIGNATURE in found and SIGNATURE not in sealed:
        raise _refused(bundle / SIGNATURE, "was added")
    if seal != seal_of(bundle, signed=SIGNATURE in sealed):
        raise _refused(bundle / SEAL, "has changed")


def _sealed(path: Path) -> bytes:
    return f"{sha256_file(path)}  {path.name}\n".encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, its form checked: whoever may have written it, what follows finds what it looks for."""
    manifest = _read_json(path)
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise TargetError(
            f"{path}: schema_version={version!r}, this program reads {SCHEMA_VERSION}. "
            "Verify with the edgestill-device.pyz of the bundle."
        )
    if (fault := first_fault(SCHEMA, manifest, "manifest")) is not None:
        raise _refused(path, f"is none of ours: {fault}")
    golden: Mapping[str, Any] = manifest["golden"]
    for name in [DESCRIPTION, *golden["inputs"].values(), *golden["outputs"].values()]:
        if name not in manifest["files"]:
            raise _refused(path, f"does not list {name}")
    if golden["outputs"].keys() != golden["tolerance"].keys():
        raise _refused(path, "has not one tolerance for each golden output")
    result: dict[str, Any] = manifest
    return result


def _compiled(bundle: Path, manifest: Mapping[str, Any]) -> CompiledModel:
    """The model of the bundle, once its description names the bundle's own files and no others."""
    folder = f"{Path(DESCRIPTION).parent}/"
    described = _read_json(bundle / DESCRIPTION)
    files = described.get("files") if isinstance(described, dict) else None
    own = {name[len(folder) :]: digest for name, digest in manifest["files"].items() if name.startswith(folder)}
    del own[Path(DESCRIPTION).name]
    if files != own:
        raise _refused(bundle / DESCRIPTION, "does not describe the files beside it")
    try:
        return CompiledModel.load(bundle / folder)
    except (TypeError, KeyError, AttributeError) as error:
        raise _refused(bundle / DESCRIPTION, f"describes no compiled model: {error}") from None


def _read_json(path: Path) -> Any:
    """JSON in its strict form: no key twice, no NaN; raises IntegrityError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"cannot be read as JSON: {error}") from None


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"'{key}' stands in it twice")
        values[key] = value
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


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


def _same_release(built: str, installed: str) -> bool:
    """Whether both name the same release; a build suffix (2026.4.1-22982-abc, 1.32.0+local) does not count."""
    return _release(built) == _release(installed)


def _release(version: str) -> str:
    return re.split(r"[-+]", version)[0]


def _array(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _refused(path, f"is no array: {error}") from None
    return array


def _refused(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} {why}. Do not use this bundle: copy it again from where it was written.")
