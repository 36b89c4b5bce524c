"""ExecuTorch with the XNNPACK delegate: a .pte that an Android or iOS app loads, and the same runtime on this machine.

Reads the exported ONNX, float or Q/DQ; writes model.pte and compiled.json. The program is made on the host, from
torch and onnx (`targets/executorch_program.py`); it runs wherever ExecuTorch's runtime does. Shapes are fixed when it is
made: a free batch becomes 1. Python 3.10, stdlib, numpy; `executorch` and torch imported by the method that uses them.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np

from targets.base import (
    Array,
    Batch,
    CompiledModel,
    Exported,
    LayerTime,
    Placement,
    TensorSpec,
    sha256_file,
)
from targets.checks import check_batch, check_precision, fill, smallest_batch
from targets.errors import TargetError, first_line
from targets.executorch_inspector import layer_times, placements, read_program, read_trace

PROGRAM_FILE = "model.pte"
PINNED = "'executorch>=1.5.1,<1.6'"  # the module of its runtime has another name in other versions
NEEDED = ("executorch", "torch")
NEEDED_TO_COMPILE = (*NEEDED, "onnx", "onnxruntime")
CPUINFO = Path("/proc/cpuinfo")
# How far an answer may be from torch's own to the same graph, ||delta|| / ||answer - its mean||: kernels round in other orders,
# and a rounding that falls the other way is a whole step. A dropped dequantization is off by about 1.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.15}
HALF_FLAGS = ({"f16c", "avx2", "fma"}, {"asimdhp"})  # x86, ARM 8.2: any of them has XNNPACK's float16 kernels


@dataclass(frozen=True, kw_only=True)
class ExecuTorch:
    """XNNPACK on a CPU, through ExecuTorch."""

    name: ClassVar[str] = "executorch"
    package: ClassVar[str] = "executorch"
    on_cpu: ClassVar[bool] = True
    scheme: ClassVar[str] = "cpu-int8"
    dialect: ClassVar[str] = "executorch"

    num_threads: int = 1

    def missing(self) -> str | None:
        absent = [PINNED if name == "executorch" else name for name in _absent(NEEDED)]
        return f"pip install {' '.join(absent)}" if absent else None

    def float_precisions(self) -> tuple[str, ...]:
        """float16 where XNNPACK has kernels for this CPU: without them a float16 program does not load."""
        return ("fp32", "fp16") if any(flags <= _cpu_flags() for flags in HALF_FLAGS) else ("fp32",)

    def compile(self, exported: Exported, out_dir: Path, precision: str) -> CompiledModel:
        """Make the program, run it once, and hold its answer against torch's and, for a float graph, ONNX Runtime's. Raises
        TargetError where these are absent, as on a board, where the exporter or the runtime refuses the graph, or where the
        program computes something else."""
        check_precision(exported, precision, self.float_precisions())
        if absent := _absent(NEEDED_TO_COMPILE):
            raise TargetError(
                f"{exported.name}: an ExecuTorch program is made on the host, with torch, onnx and onnxruntime, and "
                f"{', '.join(absent)} is not installed here. Compile it there and bring {PROGRAM_FILE} here."
            )
        from targets.executorch_program import make_program, plain_answers

        out_dir.mkdir(parents=True, exist_ok=True)
        inputs = _fixed(exported.inputs)
        program = make_program(exported.model_path, inputs, exported.name, half=precision == "fp16")
        (out_dir / PROGRAM_FILE).write_bytes(program.pte)
        compiled = CompiledModel(
            name=exported.name,
            target=self.name,
            options=asdict(self),
            precision=precision,
            files={PROGRAM_FILE: sha256_file(out_dir / PROGRAM_FILE)},
            inputs=inputs,
            outputs=exported.outputs,
            toolchain=f"executorch {version('executorch')}",
            built_for={"runtime": version("executorch")},
            preprocessing=exported.preprocessing,
            directory=out_dir,
        )
        session = self.load(compiled, batch=smallest_batch(inputs))
        answers = session.run(program.sample)
        check_answers(compiled, answers, program.answers)
        if exported.scheme is None:  # what integers round away is no fault of the program's
            check_answers(compiled, answers, plain_answers(exported.model_path, exported.name, program.sample))
        compiled = replace(compiled, outputs=session.outputs)
        compiled.save()
        return compiled

    def load(self, compiled: CompiledModel, *, batch: int = 1) -> ExecuTorchSession:
        """A session for the batch that the program was made for. Raises TargetError for a file that is no such program."""
        check_batch(compiled.inputs, batch)
        return ExecuTorchSession(self._open(compiled), compiled)

    def load_profiled(self, compiled: CompiledModel, *, batch: int = 1) -> ExecuTorchProfiledSession:
        """A session that traces what it executes, about 60 bytes an operator and run."""
        check_batch(compiled.inputs, batch)
        return ExecuTorchProfiledSession(self._open(compiled, traced=True), compiled)

    def placement(self, compiled: CompiledModel) -> Placement:
        """Run once on zeros under the event tracer, which names each operator that XNNPACK executed with its types."""
        session = ExecuTorchProfiledSession(self._open(compiled, traced=True), compiled)
        program = read_program((compiled.directory / PROGRAM_FILE).read_bytes())
        layers = tuple(placements(program, session.trace()[0], compiled.name))
        return Placement(layers=layers, source=f"{compiled.toolchain} event trace of one run")

    def _open(self, compiled: CompiledModel, *, traced: bool = False) -> Any:
        runtime = _runtime()
        refusal = f"{PROGRAM_FILE} is no program that ExecuTorch {version('executorch')} can load"
        with _in_words(f"{compiled.name}: {refusal}", "Copy or compile the model again."):
            self._set_threads(runtime)
            return runtime._load_program(
                str(compiled.directory / PROGRAM_FILE),
                enable_etdump=traced,
                program_verification=runtime.Verification.InternalConsistency,
            )

    def _set_threads(self, runtime: Any) -> None:
        """One pool serves the whole process, and an open session keeps a pointer to it."""
        if (now := runtime._threadpool_get_thread_count()) == self.num_threads:
            return
        if OPEN_SESSIONS:
            gc.collect()  # one that only a cycle holds, such as that of a kept exception and its frame, is not in use
        if OPEN_SESSIONS:
            raise TargetError(
                f"num_threads={self.num_threads}: a session of this process runs with {now}, and ExecuTorch has one pool of "
                "threads for all. Drop that session first, or take as many threads."
            )
        runtime._unsafe_reset_threadpool(self.num_threads)


class ExecuTorchSession:
    """Input tensors on buffers of our own; outputs are views on the memory that the program has planned for them."""

    def __init__(self, program: Any, compiled: CompiledModel) -> None:
        import torch

        OPEN_SESSIONS.add(self)
        self.inputs = compiled.inputs
        self._buffers = {spec.name: np.zeros(spec.fixed(1), spec.dtype) for spec in self.inputs}
        self._tensors = [torch.from_numpy(buffer) for buffer in self._buffers.values()]
        self._program = program  # holds the weights that the method reads
        refusal = f"{compiled.name}: ExecuTorch {version('executorch')} does not run the program"
        with _in_words(refusal, "Export with plainer operators, or take another target."):
            self._method = program.load_method("forward")
            self._execute()
            values = self._method.get_outputs(clone_outputs=False)
        arrays = [np.asarray(_Held(value.numpy(), (program, self._method))) for value in values]
        self._results = {spec.name: array for spec, array in zip(compiled.outputs, arrays, strict=True)}
        self.outputs = tuple(_seen(spec, self._results[spec.name]) for spec in compiled.outputs)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        for name, buffer in self._buffers.items():
            fill(buffer, name, batch)
        self._execute()
        return self._results

    def _execute(self) -> None:
        self._method.set_inputs(self._tensors)
        self._method.execute()


class ExecuTorchProfiledSession(ExecuTorchSession):
    """Layer times are medians over the runs since `start`; XNNPACK counts whole microseconds."""

    resolution_us = 1.0

    def __init__(self, program: Any, compiled: CompiledModel) -> None:
        super().__init__(program, compiled)
        self.source = f"{compiled.toolchain} event trace"
        self._compiled, self._num_runs, self._num_warm = compiled, 1, 0

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        self._num_runs += 1
        return super().run(batch)

    def start(self) -> None:
        self._num_warm = self._num_runs

    def layer_times(self) -> tuple[LayerTime, ...]:
        program = read_program((self._compiled.directory / PROGRAM_FILE).read_bytes())
        return tuple(layer_times(program, self.trace()[self._num_warm :], self._compiled.name))

    def trace(self) -> list[list[Mapping[str, Any]]]:
        """The events of every run, the first of which is the one that the session was opened with."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.etdp"
            self._program.write_etdump_result_to_file(str(path), None)
            return read_trace(path.read_bytes())


OPEN_SESSIONS: WeakSet[ExecuTorchSession] = WeakSet()


def _runtime() -> Any:
    """The extension module that `executorch.runtime` wraps. That package's own import takes the whole exporter with it, ten
    seconds and a GiB that no run needs; torch must be there first, for its libraries."""
    import torch  # noqa: F401  # isort: skip

    try:
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise TargetError(
            f"ExecuTorch {version('executorch')} is installed, but its runtime does not load here: {first_line(error)}. "
            f"Install the version that this target was written for: pip install {PINNED}."
        ) from None
    return _C


@contextmanager
def _in_words(refusal: str, advice: str) -> Iterator[None]:
    """Turn the runtime's RuntimeError, a bare number, into a TargetError with what it wrote before to file descriptor 2,
    where it also writes notes that nobody can act on."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            heard.seek(0)
            lines = heard.read().decode(errors="replace").strip().splitlines() or [first_line(error)]
            raise TargetError(f"{refusal}: {lines[-1].partition('] ')[2] or lines[-1]}. {advice}") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def check_answers(compiled: CompiledModel, answers: Mapping[str, Array], expected: Sequence[Array]) -> None:
    """Raise TargetError where the exporter has changed what the graph computes, which it does not tell by itself."""
    for spec, wanted in zip(compiled.outputs, expected, strict=True):
        given, values = answers[spec.name].astype(np.float64), wanted.astype(np.float64)
        spread = float(np.linalg.norm(values - values.mean())) or float(np.linalg.norm(values)) or 1.0
        distance = float(np.linalg.norm(given - values)) / spread if given.shape == values.shape else np.inf
        if not distance <= TOLERANCES[compiled.precision]:
            raise TargetError(
                f"{compiled.name}: the program that ExecuTorch made answers otherwise than the graph: output '{spec.name}' is "
                f"off by {distance:.2g} of its spread. Report this model; take another target."
            )


def _cpu_flags() -> set[str]:
    """What the kernel says of the first CPU; empty where it says nothing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _absent(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def _fixed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, shape=spec.fixed(1)) for spec in specs)


class _Held:
    """Memory of a program, and what keeps it: an array made of it stays readable when the session is gone."""

    def __init__(self, array: Array, owner: object) -> None:
        self.__array_interface__ = array.__array_interface__
        self._owner = owner


def _seen(spec: TensorSpec, array: Array) -> TensorSpec:
    return replace(spec, shape=array.shape, dtype=array.dtype.name)
