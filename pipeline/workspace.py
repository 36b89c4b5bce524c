"""A finished stage on disk: its key, its atomic end, its reuse, and the one line that says why it is built again.

`runs/<recipe name>/<label>-<key8>/stage.json` is written last, so its presence means finished. The key is over the
stage's config, the digests of its inputs, the versions of the libraries and the source of every module of ours that the
stage's module imports, found without importing: a rerun with nothing to do imports no torch.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from platform import python_version
from typing import Any, TypeVar

from pipeline.artifacts import Artifact
from pipeline.progress import Progress
from targets.base import installed_version, read_json, sha256_file, write_json
from targets.errors import DeviceError, EdgestillError, IntegrityError

A = TypeVar("A", bound=Artifact)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "targets", "benchmarks")
# The recipe's resolved values stand in the key already; how lines are shown decides no result.
UNHASHED = ("pipeline.recipe", "pipeline.how", "pipeline.progress", "pipeline.workspace", "pipeline.artifacts")
LEAST_FREE = 2**20  # bytes; a disk with less is full: writers fill it up before they fail
CHECKPOINT_DIR = ".checkpoint"  # what an unfinished training goes on from; gone once the stage is finished
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML", "onnx_ir": "onnx-ir"}


class Stopped(Exception):  # noqa: N818 - no error: the run ends where it was told to
    """The stage that `--until` names is done, or `--dry-run` met one that would be built."""


class Workspace:
    """The directory of one recipe's runs."""

    def __init__(
        self,
        root: Path,
        name: str,
        progress: Progress,
        *,
        force: str | None = None,
        until: str | None = None,
        beyond: Collection[str] = (),
        dry_run: bool = False,
    ) -> None:
        """beyond: the stages that come after `until`, the last one wanted."""
        self.dir = root / name
        self.dir.mkdir(parents=True, exist_ok=True)
        self.built: list[str] = []
        self.seconds: dict[str, float] = {}  # what each stage of this run took, also one that an earlier run built
        self._progress = progress
        self._force = force
        self._until, self._beyond = until, beyond
        self._dry_run = dry_run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the workspace; a second run of the same recipe waits here and says so."""
        with (self.dir / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._progress.say(f"another run is at work in {self.dir}: waiting for it to end")
                with self._progress.task("waiting for the other run"):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def build(
        self,
        kind: Callable[..., A],
        label: str,
        config: Mapping[str, Any],
        inputs: Sequence[Artifact | str],
        make: Callable[[Path], object],
        *,
        module: str,
    ) -> A:
        """Return the finished stage, running `make(directory)` first where there is none with this key.

        label: directory prefix, unique in a run (`export-student`); config: what decides the result, as plain JSON;
        inputs: the artifacts it reads (or digests); module: the stage's module, whose source enters the key. Raises Stopped
        before a stage that `dry_run` would build, and before the first stage behind `until`.
        """
        if label.partition("-")[0] in self._beyond:
            raise Stopped(f"stopped after {self._until}, as --until says")
        parts = key_parts(config, inputs, module)
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        out_dir = self.dir / f"{label}-{key[:8]}"
        finished = self._finished(out_dir, label, key)
        if finished is None:
            self._say_why(label, parts, out_dir)
            if self._dry_run:
                raise Stopped(f"{label} and what follows from it would be built; everything before it is finished")
            _clear(out_dir)
            begun_s = time.monotonic()
            with self._progress.task(label), _disk_full_by_name(out_dir):
                make(out_dir)
            finished = _finish(out_dir, label, key, parts, time.monotonic() - begun_s)
            self.built.append(label)
        self.seconds[label] = finished["seconds"]
        return kind(dir=out_dir, digest=finished["digest"])

    def publish_all(self, folder: str, targets: Mapping[str, Path]) -> dict[str, Path]:
        """Point `<run>/<folder>/<name>` at each of `targets`; what an earlier run pointed at there is taken down."""
        (self.dir / folder).mkdir(exist_ok=True)
        for link in (self.dir / folder).iterdir():
            if link.is_symlink() and link.name not in targets:
                link.unlink()
        return {name: self.publish(f"{folder}/{name}", target) for name, target in targets.items()}

    def publish(self, name: str, target: Path) -> Path:
        """Point `<run>/<name>` at a finished directory, so that its path does not change with its key."""
        link = self.dir / name
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f".{link.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        fresh.replace(link)
        return link

    def _finished(self, out_dir: Path, label: str, key: str) -> dict[str, Any] | None:
        """The stage's description where it is whole; removes nothing, so that `dry_run` may ask."""
        if not (out_dir / "stage.json").exists():
            return None
        if self._force is not None and label.split("-")[0] == self._force and label not in self.built:
            return None
        try:
            stage: dict[str, Any] = read_json(out_dir / "stage.json")
            _check_seal(out_dir, stage, key)
            _check_files(out_dir, stage)
        except IntegrityError as error:
            self._progress.say(f"{label}: {error} Built again.")
            return None
        return stage

    def _say_why(self, label: str, parts: Mapping[str, Any], out_dir: Path) -> None:
        if (out_dir / CHECKPOINT_DIR).exists():
            self._progress.say(f"{label}: was not finished, goes on")
            return
        previous = self._latest(label)
        if previous is None:
            self._progress.say(f"{label}: building")
        elif changes := differences(previous["parts"], parts):
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            self._progress.say(f"{label}: building again, changed: {'; '.join(changes[:3])}{more}")
        else:
            self._progress.say(f"{label}: building again")

    def _latest(self, label: str) -> dict[str, Any] | None:
        stages = []
        for path in self.dir.glob(f"{label}-????????/stage.json"):
            try:
                stages.append(read_json(path))
            except IntegrityError:
                continue
        whole = [stage for stage in stages if isinstance(stage, dict) and {"parts", "utc"} <= stage.keys()]
        return max(whole, key=lambda stage: str(stage["utc"]), default=None)


def key_parts(config: Mapping[str, Any], inputs: Sequence[Artifact | str], module: str) -> dict[str, Any]:
    """Everything that the key is over, kept in stage.json so that a later run can say what changed."""
    sources, libraries = _closure(module)
    return {
        "config": dict(config),
        "inputs": [item if isinstance(item, str) else item.digest for item in inputs],
        "libraries": libraries,
        "sources": sources,
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, as `config.train.epochs 10 -> 20`."""
    old, new = dict(_flat(before)), dict(_flat(after))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key.startswith("sources."):
            changes.append(f"{key.removeprefix('sources.')} (source)")
        elif key.startswith("inputs."):
            changes.append("its input")
        else:
            changes.append(f"{key.removeprefix('config.')} {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    return list(dict.fromkeys(changes))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # A module's dotted name is one key, not a path of keys.
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{index}")
    else:
        yield prefix, value


def _clear(out_dir: Path) -> None:
    """Remove what an earlier build left, but for the checkpoint that a training goes on from."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "stage.json").unlink(missing_ok=True)  # first: from here on the stage is not finished
    for path in out_dir.iterdir():
        if path.name == CHECKPOINT_DIR:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finish(out_dir: Path, label: str, key: str, parts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    shutil.rmtree(out_dir / CHECKPOINT_DIR, ignore_errors=True)
    files = {str(path.relative_to(out_dir)): _file_facts(path) for path in sorted(out_dir.rglob("*")) if path.is_file()}
    stage = {
        "schema_version": 1,
        "label": label,
        "key": key,
        "digest": _digest(files),
        "utc": datetime.now(UTC).isoformat(timespec="microseconds"),
        "seconds": round(seconds, 3),
        "parts": parts,
        "files": files,
    }
    write_json(out_dir / "stage.json", stage)
    _sync(out_dir)
    return stage


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Over the names and contents of a stage's files."""
    contents = [[name, facts["sha256"]] for name, facts in files.items()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_facts(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": sha256_file(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _check_seal(out_dir: Path, stage: Any, key: str) -> None:
    """Raise IntegrityError where stage.json is not as it was written, in so far as anything is taken from it."""
    try:
        whole = stage["key"] == key and stage["digest"] == _digest(stage["files"])
        whole = whole and all({"size", "mtime_ns"} <= facts.keys() for facts in stage["files"].values())
        whole = whole and isinstance(stage["seconds"], float)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise IntegrityError(f"{out_dir / 'stage.json'} is not as it was written.")


def _check_files(out_dir: Path, stage: Mapping[str, Any]) -> None:
    """Raise IntegrityError for a file that is not as the stage left it; contents are hashed only where stat differs."""
    for name, facts in stage["files"].items():
        path = out_dir / name
        if not path.is_file():
            raise IntegrityError(f"{path} is gone.")
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (facts["size"], facts["mtime_ns"]):
            continue
        if stat.st_size != facts["size"]:
            raise IntegrityError(f"{path} has {stat.st_size} bytes, not {facts['size']}.")
        if sha256_file(path) != facts["sha256"]:
            raise IntegrityError(f"{path} has changed since it was written.")


@contextmanager
def _disk_full_by_name(out_dir: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into an OSError that says so.

    torch raises RuntimeError ("unexpected pos"), safetensors an error of its own, numpy an OSError without a number, and a
    process on the device ends as it likes. What a device says of no space may be said of its own disk, so for it only our free
    space counts.
    """
    try:
        yield
    except Exception as error:
        of_device = isinstance(error, DeviceError)
        of_ours = isinstance(error, EdgestillError) and not of_device
        said_so = os.strerror(errno.ENOSPC) in str(error) and not of_device
        if not of_ours and (said_so or shutil.disk_usage(out_dir).free < LEAST_FREE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out_dir)) from error
        raise


@cache
def _closure(module: str) -> tuple[dict[str, str], dict[str, str]]:
    """Source digests of `module` and of all it imports of ours, and the versions of the libraries these import."""
    sources: dict[str, str] = {}
    libraries = {"python": python_version()}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _module_path(name)
        if path is None or name in sources or name in UNHASHED:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        sources[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        for imported in _imports(tree):
            if imported.partition(".")[0] in PACKAGES:
                waiting.append(imported)
            elif (version := _version(imported.partition(".")[0])) is not None:
                libraries[imported.partition(".")[0]] = version
    return dict(sorted(sources.items())), dict(sorted(libraries.items()))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Comments are not in the tree; without docstrings either, only code that runs is left."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            # `from pipeline.learning import models`: the name may be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _version(top_level: str) -> str | None:
    if top_level in sys.stdlib_module_names:
        return None
    return installed_version(top_level, DISTRIBUTIONS.get(top_level))
