"""ONNX Runtime on the CPU: what is compiled stays an ONNX file, what runs is read from the runtime's own profile.

Reads the exported ONNX; writes model.onnx (external data beside it) and compiled.json. Python 3.10, stdlib, numpy;
`onnxruntime` is imported by the method that uses it.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from targets.base import (
    Array,
    Batch,
    CompiledModel,
    Exported,
    LayerPlacement,
    LayerTime,
    Placement,
    TensorSpec,
    sha256_file,
)
from targets.checks import check_batch, check_precision, fill, smallest_batch
from targets.errors import TargetError, first_line
from targets.onnxruntime_profile import (
    Event,
    Node,
    Product,
    check_counted,
    counted,
    node_times,
    op_of,
    precision_of,
    products_of,
    profiling,
    read_profile,
)

MODEL_FILE = "model.onnx"
PROVIDERS = ["CPUExecutionProvider"]


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider, one operator after another. `allow_spinning`: idle threads poll (faster, hotter).
    `arena`: memory of one run is kept for the next."""

    name: ClassVar[str] = "onnxruntime-cpu"
    package: ClassVar[str] = "onnxruntime"
    on_cpu: ClassVar[bool] = True
    scheme: ClassVar[str] = "cpu-int8"
    dialect: ClassVar[str] = "onnxruntime"

    num_threads: int = 1
    allow_spinning: bool = True
    arena: bool = True

    def missing(self) -> str | None:
        return None if find_spec("onnxruntime") else "pip install onnxruntime"

    def float_precisions(self) -> tuple[str, ...]:
        return ("fp32",)

    def compile(self, exported: Exported, out_dir: Path, precision: str) -> CompiledModel:
        """Keep the ONNX file after a trial load. Raises TargetError where the runtime refuses the graph."""
        import onnxruntime as ort

        check_precision(exported, precision, self.float_precisions())
        out_dir.mkdir(parents=True, exist_ok=True)
        files = _copy_model(exported.model_path, out_dir)
        compiled = CompiledModel(
            name=exported.name,
            target=self.name,
            options=asdict(self),
            precision=precision,
            files={name: sha256_file(out_dir / name) for name in files},
            inputs=exported.inputs,
            outputs=exported.outputs,
            toolchain=f"onnxruntime {ort.__version__}",
            built_for={"arch": platform.machine(), "runtime": ort.__version__},
            preprocessing=exported.preprocessing,
            directory=out_dir,
        )
        self._open(compiled)
        compiled.save()
        return compiled

    def load(self, compiled: CompiledModel, *, batch: int = 1) -> OnnxRuntimeSession:
        """A session on bound buffers for exactly `batch` samples a run."""
        check_batch(compiled.inputs, batch)
        return OnnxRuntimeSession(self._open(compiled), _fixed(compiled.inputs, batch), _sized(compiled.outputs, batch))

    def load_profiled(self, compiled: CompiledModel, *, batch: int = 1) -> OnnxRuntimeProfiledSession:
        """A session under the runtime's profiler, which writes a file of about 750 bytes an operator and run."""
        check_batch(compiled.inputs, batch)
        folder = Path(tempfile.mkdtemp())
        session = self._open(compiled, profiling(folder))
        return OnnxRuntimeProfiledSession(
            session,
            _fixed(compiled.inputs, batch),
            _sized(compiled.outputs, batch),
            products=lambda feeds: products_of(self._events(compiled, feeds)),
            folder=folder,
            source=f"{compiled.toolchain} profile",
        )

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> OnnxRuntimeProfiledSession:
        """The same: ONNX Runtime has no other clock of its own."""
        return self.load_profiled(compiled, batch=batch)

    def placement(self, compiled: CompiledModel) -> Placement:
        """Run once, batch 1, under the profiler; its events name each executed operator with types and shapes.

        Raises TargetError for INT8 beside an operator whose products cannot be counted.
        """
        batch = smallest_batch(compiled.inputs)
        zeros = {spec.name: np.zeros(spec.fixed(batch), spec.dtype) for spec in compiled.inputs}
        events = self._events(compiled, zeros)
        if compiled.precision == "int8":
            check_counted(events, compiled.name)
        layers = tuple(
            LayerPlacement(name=node[0], op=op_of(event), precision=precision_of(event), macs=macs)
            for node, event, macs in products_of(events)
        )
        return Placement(layers=layers, source=f"{compiled.toolchain} profile of one run")

    def _events(self, compiled: CompiledModel, feeds: Batch) -> list[Event]:
        """Of one run. Weights are kept unpacked for it, for a packed weight has no shape in the profile; the graph is the
        same.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(compiled, profiling(Path(folder)), {"session.disable_prepacking": "1"})
            try:
                session.run(None, dict(feeds))
            except Exception as error:  # the runtime's own classes; a graph that loads need not run
                raise TargetError(
                    f"{compiled.name} loads but does not run on {self.name}: {first_line(error)}. "
                    "Mend the graph, or take another target."
                ) from None
            return read_profile(session)

    def _open(
        self,
        compiled: CompiledModel,
        attributes: Mapping[str, Any] | None = None,
        entries: Mapping[str, str] | None = None,
    ) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = self.arena
        options.log_severity_level = 3  # errors only: warnings about unused initializers are no news to a person
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.allow_spinning)))
        for name, value in (attributes or {}).items():
            setattr(options, name, value)
        for name, text in (entries or {}).items():
            options.add_session_config_entry(name, text)
        path = compiled.directory / MODEL_FILE
        try:
            return ort.InferenceSession(str(path), options, providers=PROVIDERS)
        except Exception as error:  # ORT's errors share no base class but Exception
            raise TargetError(
                f"{compiled.name}: ONNX Runtime {ort.__version__} refuses the graph: {first_line(error)}. "
                "Export with an operator set that it knows, or take another target."
            ) from None


class OnnxRuntimeSession:
    """Inputs and outputs bound once; an output with a free axis beside the batch is allocated by the runtime."""

    def __init__(self, session: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._session, self._binding = session, session.io_binding()
        self._buffers = {spec.name: np.zeros(spec.fixed(1), spec.dtype) for spec in inputs}
        self._results = {spec.name: np.zeros(spec.fixed(1), spec.dtype) for spec in outputs if None not in spec.shape}
        for name, array in self._buffers.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for spec in outputs:
            if (result := self._results.get(spec.name)) is None:
                self._binding.bind_output(spec.name, "cpu")
            else:
                self._binding.bind_output(spec.name, "cpu", 0, result.dtype, result.shape, result.ctypes.data)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        for name, buffer in self._buffers.items():
            fill(buffer, name, batch)
        self._session.run_with_iobinding(self._binding)
        if len(self._results) == len(self.outputs):
            return self._results
        values = self._binding.get_outputs()
        return {spec.name: value.numpy() for spec, value in zip(self.outputs, values, strict=True)}


class OnnxRuntimeProfiledSession(OnnxRuntimeSession):
    """Layer times are medians over the runs since `start`; an operator that holds a subgraph counts without it."""

    resolution_us = 1.0
    clock, slowed = "ONNX Runtime profile, model_run", True  # every operator is noted as well, which takes time

    def __init__(
        self,
        session: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        products: Callable[[Batch], Iterator[Product]],
        folder: Path,
        source: str,
    ) -> None:
        super().__init__(session, inputs, outputs)
        self.source = source
        self._products, self._num_runs, self._num_warm = products, 0, 0
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        self._num_runs += 1
        return super().run(batch)

    def start(self) -> None:
        self._num_warm = self._num_runs

    def run_times_us(self) -> list[float]:
        """Whole microseconds."""
        runs = [event for event in read_profile(self._session) if event["name"] == "model_run"]
        return [float(event["dur"]) for event in sorted(runs, key=lambda event: event["ts"])]

    def layer_times(self) -> tuple[LayerTime, ...]:
        """Products are counted in one more run on the input of the last: a branch that it took is counted, too."""
        macs: dict[Node, int] = {}
        for node, _, count in self._products(self._buffers):
            macs[node] = macs.get(node, 0) + count
        return tuple(
            LayerTime(
                name=node[0],
                op=op_of(event),
                precision=precision_of(event),
                macs=counted(macs, node, event),
                time_us=time_us,
            )
            for node, event, time_us in node_times(read_profile(self._session), self._num_warm)
        )


def _fixed(specs: tuple[TensorSpec, ...], batch: int) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, shape=spec.fixed(batch)) for spec in specs)


def _sized(specs: tuple[TensorSpec, ...], batch: int) -> tuple[TensorSpec, ...]:
    """With the batch set where it is the only free axis; other free axes depend on the graph and stay free."""
    return tuple(replace(spec, shape=spec.fixed(batch)) if None not in spec.shape[1:] else spec for spec in specs)


def _copy_model(model_path: Path, out_dir: Path) -> list[str]:
    """Copy the ONNX file and its external data `<file>.data`; the data's name is written in the file and must stay."""
    shutil.copyfile(model_path, out_dir / MODEL_FILE)
    data_path = model_path.with_name(f"{model_path.name}.data")
    if not data_path.is_file():
        return [MODEL_FILE]
    shutil.copyfile(data_path, out_dir / data_path.name)
    return [MODEL_FILE, data_path.name]
