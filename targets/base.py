"""What a target is: the contract that OpenVINO, ONNX Runtime and every later runtime fulfil.

The way of a model: `Exported` (an ONNX file and its specs) -> `Target.compile` -> `CompiledModel` (a directory that
describes itself in `compiled.json`) -> `Target.load` -> `Session.run`. JSON is what crosses to the device, so each
description reads and writes itself. Python 3.10, stdlib and numpy only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from targets.errors import IntegrityError, RecipeError

Array = npt.NDArray[Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph: `shape` has None where the graph leaves an axis free (the batch)."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str  # numpy's name: uint8, float32, ...
    layout: str = ""  # NCHW, NHWC, ...; empty where nobody said so

    def fixed(self, batch: int) -> tuple[int, ...]:
        """The shape with the first axis set to `batch` where it is free, and 1 for any other free axis."""
        return tuple((batch if axis == 0 else 1) if size is None else size for axis, size in enumerate(self.shape))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From encoded bytes to what the graph's input takes. Decode and resize are `benchmarks/device/preprocess.py`.

    `resize` is the shorter side in pixels before the centre crop to `crop` (height, width); None leaves the image as it
    is. `mean` and `std` are in pixel units (0..255) a channel and stay None where the graph normalises by itself.
    """

    mode: str = "RGB"  # or L
    resize: int | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX graph, ready for a target. A float graph has `scheme=None`; paths are relative to the directory that holds
    `exported.json`.

    `half_path` is the same graph with float16 between its inputs and outputs (whose types stay), for runtimes that compute
    in the types that a graph is written in; None where it was not written, `half_note` says why.
    """

    name: str
    onnx_path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    scheme: str | None = None
    dialect: str | None = None
    ranges_path: str | None = None
    half_path: str | None = None
    half_note: str | None = None
    preprocessing: Preprocessing | None = None
    directory: Path = field(default=Path(), compare=False)

    @property
    def model_path(self) -> Path:
        return self.directory / self.onnx_path

    @property
    def half_model_path(self) -> Path | None:
        return None if self.half_path is None else self.directory / self.half_path

    def save(self) -> None:
        write_json(self.directory / "exported.json", _plain(self))

    @classmethod
    def load(cls, directory: Path) -> Exported:
        return cls(**_typed(read_json(directory / "exported.json")), directory=directory)


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """What a target made of an exported graph: a directory, its files with their sha256, and how it must be loaded."""

    name: str
    target: str
    options: Mapping[str, Any]
    precision: str  # int8, fp32, bf16: what the compile asked for; placement says what runs
    files: Mapping[str, str]  # path in the directory -> sha256
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    toolchain: str
    built_for: Mapping[str, str]  # arch, runtime (and SM for TensorRT)
    preprocessing: Preprocessing | None = None
    directory: Path = field(default=Path(), compare=False)

    def save(self) -> None:
        write_json(self.directory / "compiled.json", _plain(self))

    @classmethod
    def load(cls, directory: Path) -> CompiledModel:
        """Read `compiled.json` and check every file's digest; raises IntegrityError with the file's name."""
        compiled = cls(**_typed(read_json(directory / "compiled.json")), directory=directory)
        for name, expected in compiled.files.items():
            path = directory / name
            if not path.is_file() or sha256_file(path) != expected:
                raise IntegrityError(
                    f"{path} is not the file that was compiled: its sha256 differs or it is absent. "
                    "Copy or compile the model again."
                )
        return compiled

    @property
    def size_bytes(self) -> int:
        return sum((self.directory / name).stat().st_size for name in self.files)


@dataclass(frozen=True, kw_only=True)
class LayerPlacement:
    """One executed layer with arithmetic worth counting (convolution, matrix product): where and how it really ran."""

    name: str
    op: str
    precision: str  # int8, bf16, fp16, fp32: of the arithmetic
    macs: int  # multiply-accumulates a sample


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the runtime's own executed graph says. `source` names where it was read."""

    layers: tuple[LayerPlacement, ...]
    source: str

    @property
    def int8_share(self) -> float:
        """MACs that run in INT8 over all MACs; 0.0 for a graph without any."""
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.precision == "int8") / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "int8_share": self.int8_share,
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        return cls(layers=tuple(LayerPlacement(**layer) for layer in data["layers"]), source=data["source"])


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """How long one executed layer takes in a run, as the runtime's own profiler says."""

    name: str
    op: str
    precision: str  # of the arithmetic; of its first input where a layer only moves or converts
    macs: int  # multiply-accumulates a sample; 0 for a layer without products
    time_us: float
    kernel: str = ""  # what the runtime calls its implementation, where it tells


class Session(Protocol):
    """A loaded model on bound buffers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        ...


class ProfiledSession(Session, Protocol):
    """A session that times its layers, slower than a plain one by what its profiler costs. Good for one `layer_times`."""

    source: str
    resolution_us: (
        float  # by how much a layer's time may be off, for what was cut off; 0 where the profiler counts finely
    )

    def start(self) -> None:
        """The warm-up is over: times count from the next run on."""
        ...

    def layer_times(self) -> tuple[LayerTime, ...]:
        """Each executed layer once, in the order of execution, over the runs since `start`."""
        ...


class ClockedSession(Session, Protocol):
    """A session whose runtime times each run by a clock of its own. Good for one `run_times_us`."""

    clock: str  # whose it is
    slowed: bool  # whether reading it slows the run down

    def run_times_us(self) -> Sequence[float]:
        """One a run since the load, in their order."""
        ...


@runtime_checkable
class Clocked(Protocol):
    """What a target is besides, if its runtime has such a clock."""

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> ClockedSession: ...


@runtime_checkable
class LayerTimer(Protocol):
    """What a target is besides, if its runtime can time single layers."""

    def load_profiled(self, compiled: CompiledModel, *, batch: int = 1) -> ProfiledSession: ...


@runtime_checkable
class Target(Protocol):
    """One runtime on one kind of device."""

    @property
    def name(self) -> str: ...

    @property
    def scheme(self) -> str:
        """What is trained; targets that share one share a quantized student."""
        ...

    @property
    def dialect(self) -> str:
        """The exact rewrites that the runtime wants."""
        ...

    @property
    def package(self) -> str:
        """The Python package that is the runtime."""
        ...

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU."""
        ...

    def missing(self) -> str | None:
        """The pip command that installs what is absent, or None."""
        ...

    def float_precisions(self) -> tuple[str, ...]:
        """The float precisions this runtime offers on this machine, fp32 first."""
        ...

    def compile(self, exported: Exported, out_dir: Path, precision: str) -> CompiledModel: ...

    def load(self, compiled: CompiledModel, *, batch: int = 1) -> Session: ...

    def placement(self, compiled: CompiledModel) -> Placement: ...


def check_folder_of(path: Path, option: str) -> None:
    """Raise RecipeError for a file that could not be written in the end, before what it is to hold is measured or trained."""
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"{option} {path}: there is no folder {path.parent}. Make it, or name another file.")


def installed_version(module: str, distribution: str | None = None) -> str | None:
    """Version of the distribution that brings `module`, whatever it is called (onnxruntime, onnxruntime-gpu; tensorrt, tensorrt-cu13);
    None where none does. `distribution`: its usual name, where that is not the module's."""
    try:
        return metadata.version(distribution or module)
    except metadata.PackageNotFoundError:
        return next(map(metadata.version, _distributions().get(module, ())), None)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; raises IntegrityError where it is absent, truncated or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as JSON: {error}. Write it again.") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one. NaN is refused: unreadable is null."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False, default=_encode) + "\n", encoding="utf-8")
    partial.replace(path)


def _encode(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _plain(described: Exported | CompiledModel) -> dict[str, Any]:
    values = asdict(described)
    del values["directory"]
    return values


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    for key in ("inputs", "outputs"):
        values[key] = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in values[key])
    if (pre := values.get("preprocessing")) is not None:
        values["preprocessing"] = preprocessing_from_json(pre)
    return values


def preprocessing_from_json(values: Mapping[str, Any]) -> Preprocessing:
    typed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Preprocessing(**typed)
