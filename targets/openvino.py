"""OpenVINO on the CPU: IR on disk, compiled at load with the latency hint, proved by the executed (runtime) graph.

Reads the exported ONNX; writes model.xml, model.bin and compiled.json. Python 3.10, stdlib, numpy; `openvino` is
imported by the method that uses it. The ONNX is read by the runtime's own frontend, not by OpenVINO's converter tool:
that one reports usage to its maker.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
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
from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs
from targets.openvino_products import Executed, hidden, products_of

IR_FILE, WEIGHTS_FILE = "model.xml", "model.bin"
# What is not quantized in an INT8 graph runs in FP32: only what calibration or training has seen may lose precision.
PRECISION_HINTS = {"int8": "f32", "fp32": "f32", "bf16": "bf16"}
PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
PRECISION_NAMES = {"u8": "int8", "i8": "int8", "f32": "fp32", "bf16": "bf16", "f16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class OpenVinoCpu:
    """OpenVINO's CPU plugin: latency hint, one stream."""

    name: ClassVar[str] = "openvino-cpu"
    package: ClassVar[str] = "openvino"
    on_cpu: ClassVar[bool] = True
    scheme: ClassVar[str] = "cpu-int8"
    dialect: ClassVar[str] = "openvino"

    num_threads: int = 1

    def missing(self) -> str | None:
        return None if find_spec("openvino") else "pip install openvino"

    def float_precisions(self) -> tuple[str, ...]:
        """FP32, and BF16 where the CPU computes in it."""
        capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("fp32", "bf16") if "BF16" in capabilities else ("fp32",)

    def compile(self, exported: Exported, out_dir: Path, precision: str) -> CompiledModel:
        """Write the IR after a trial compile. Raises TargetError where OpenVINO refuses the graph."""
        import openvino as ov

        check_precision(exported, precision, self.float_precisions())
        out_dir.mkdir(parents=True, exist_ok=True)
        model = _read(exported.model_path, exported.name)
        ov.save_model(model, str(out_dir / IR_FILE), compress_to_fp16=False)
        version = _version(ov.__version__)
        compiled = CompiledModel(
            name=exported.name,
            target=self.name,
            options=asdict(self),
            precision=precision,
            files={name: sha256_file(out_dir / name) for name in (IR_FILE, WEIGHTS_FILE)},
            inputs=exported.inputs,
            outputs=exported.outputs,
            toolchain=f"openvino {version}",
            built_for={"arch": platform.machine(), "runtime": version},
            preprocessing=exported.preprocessing,
            directory=out_dir,
        )
        self._open(compiled, smallest_batch(compiled.inputs))
        compiled.save()
        return compiled

    def load(self, compiled: CompiledModel, *, batch: int = 1) -> OpenVinoSession:
        """A session on shared tensors for exactly `batch` samples a run."""
        check_batch(compiled.inputs, batch)
        return OpenVinoSession(self._open(compiled, batch), compiled.inputs, compiled.outputs)

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> OpenVinoClockedSession:
        """A session that keeps what its infer request says of each run: what benchmark_app reports."""
        check_batch(compiled.inputs, batch)
        return OpenVinoClockedSession(self._open(compiled, batch), compiled.inputs, compiled.outputs)

    def load_profiled(self, compiled: CompiledModel, *, batch: int = 1) -> OpenVinoProfiledSession:
        """A session that counts the time of each layer: PERF_COUNT is a property of the compile."""
        check_batch(compiled.inputs, batch)
        opened = self._open(compiled, batch, {"PERF_COUNT": True})
        return OpenVinoProfiledSession(
            opened, compiled.inputs, compiled.outputs, source=f"{compiled.toolchain} PERF_COUNT"
        )

    def placement(self, compiled: CompiledModel) -> Placement:
        """Read the executed graph of batch 1: each layer's type, the precision it runs in, and its shapes.

        A product that the executed graph does not show (inside a Subgraph, a recurrent layer) counts as float, for nothing
        proves otherwise. Raises TargetError for INT8 beside an operator whose products cannot be counted.
        """
        batch = smallest_batch(compiled.inputs)
        ops = self._open(compiled, batch).get_runtime_model().get_ordered_ops()
        layers = tuple(_layers(ops))
        if compiled.precision == "int8":
            model = self._fixed(compiled, batch)
            layers += tuple(
                LayerPlacement(name=product.name, op=product.op, precision="fp32", macs=product.macs)
                for product in hidden(list(products_of(model, compiled.name)), list(_executed(ops)))
            )
        return Placement(layers=layers, source=f"{compiled.toolchain} runtime model")

    def _fixed(self, compiled: CompiledModel, batch: int) -> Any:
        model = _read(compiled.directory / IR_FILE, compiled.name)
        model.reshape({spec.name: list(spec.fixed(batch)) for spec in compiled.inputs})
        return model

    def _open(self, compiled: CompiledModel, batch: int, properties: Mapping[str, Any] | None = None) -> Any:
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.num_threads,
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[compiled.precision],
            **(properties or {}),
        }
        try:
            return _core().compile_model(self._fixed(compiled, batch), "CPU", config)
        except RuntimeError as error:
            raise TargetError(
                f"{compiled.name}: OpenVINO cannot compile it for batch {batch}: {_first_line(error)}. "
                "Export with an operator set that it knows, or take another target."
            ) from None


class OpenVinoSession:
    """One infer request whose inputs and outputs are NumPy arrays of our own."""

    def __init__(self, compiled: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.inputs = tuple(map(_static, inputs, compiled.inputs))
        self.outputs = tuple(map(_static, outputs, compiled.outputs))
        self._request = compiled.create_infer_request()
        self._buffers = self._bind(self.inputs, compiled.inputs)
        self._results = self._bind(self.outputs, compiled.outputs)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        for name, buffer in self._buffers.items():
            fill(buffer, name, batch)
        self._request.infer()
        if len(self._results) == len(self.outputs):
            return self._results
        return {spec.name: self._request.get_output_tensor(i).data for i, spec in enumerate(self.outputs)}

    def _bind(self, specs: tuple[TensorSpec, ...], ports: Any) -> dict[str, Array]:
        """An array for each tensor; one whose shape is not known before a run is left to the runtime."""
        import openvino as ov

        arrays: dict[str, Array] = {}
        for spec, port in zip(specs, ports, strict=True):
            if None not in spec.shape:
                arrays[spec.name] = np.zeros(spec.fixed(1), spec.dtype)
                self._request.set_tensor(port, ov.Tensor(arrays[spec.name], shared_memory=True))
        return arrays


class OpenVinoClockedSession(OpenVinoSession):
    """The request stamps each run anyway, so that reading its clock costs nothing."""

    clock, slowed = "OpenVINO InferRequest.latency", False

    def __init__(self, compiled: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(compiled, inputs, outputs)
        self._run_times_us: list[float] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        results = super().run(batch)
        self._run_times_us.append(self._request.latency * 1e3)
        return results

    def run_times_us(self) -> list[float]:
        return self._run_times_us


class OpenVinoProfiledSession(OpenVinoSession):
    """Layer times are means over the runs since `start`.

    OpenVINO tells the average of all runs since the compile, in whole microseconds, so two of its answers and the number
    of runs behind each are needed. It cuts off fractions twice, at each run and in the average.
    """

    resolution_us = 2.0

    def __init__(
        self, compiled: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, source: str
    ) -> None:
        super().__init__(compiled, inputs, outputs)
        self.source = source
        self._compiled = compiled
        self._num_runs = self._num_warm = 0
        self._warm_us: list[float] = []
        self._executed: set[int] = set()

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        self._num_runs += 1
        results = super().run(batch)
        if self._num_runs == 1:  # later, a layer whose average is below a microsecond is said not to have run
            self._executed = {i for i, one in enumerate(self._counters()) if one.status == one.Status.EXECUTED}
        return results

    def start(self) -> None:
        self._num_warm, self._warm_us = self._num_runs, self._averages_us()

    def layer_times(self) -> tuple[LayerTime, ...]:
        counters = self._counters()
        before_us = self._warm_us or [0.0] * len(counters)
        known = {op.get_friendly_name(): op for op in self._compiled.get_runtime_model().get_ordered_ops()}
        return tuple(
            _layer_time(
                counter, known.get(counter.node_name), mean_since(before, self._num_warm, after, self._num_runs)
            )
            for i, (counter, before, after) in enumerate(zip(counters, before_us, self._averages_us(), strict=True))
            if i in self._executed or counter.status == counter.Status.EXECUTED
        )

    def _counters(self) -> list[Any]:
        """One a node of the graph, in an order that stays; what was fused away is among them as NOT_RUN."""
        return list(self._request.profiling_info)

    def _averages_us(self) -> list[float]:
        return [counter.real_time.total_seconds() * 1e6 for counter in self._counters()]


def mean_since(before: float, num_before: int, after: float, num_after: int) -> float:
    """Mean of the runs that came between two running averages; not below zero, where a whole unit was cut off."""
    return max((after * num_after - before * num_before) / (num_after - num_before), 0.0)


def _core() -> Any:
    import openvino as ov

    return ov.Core()


def _read(path: Path, name: str) -> Any:
    try:
        return _core().read_model(str(path))
    except RuntimeError as error:
        raise TargetError(
            f"{name}: OpenVINO cannot read {path.name}: {_first_line(error)}. "
            "Export with an operator set that it knows, or take another target."
        ) from None


def _static(spec: TensorSpec, port: Any) -> TensorSpec:
    """The spec with the shape that the compiled model has; None stays where even that is not known before a run."""
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return replace(spec, shape=shape)


def _layers(ops: Sequence[Any]) -> Iterator[LayerPlacement]:
    for op in ops:
        if (macs := _macs_of(op)) is not None:
            name, layer_type = op.get_friendly_name(), _said(op, "layerType")
            yield LayerPlacement(name=name, op=layer_type, precision=_precision(op), macs=macs)


def _executed(ops: Sequence[Any]) -> Iterator[Executed]:
    for op in ops:
        if (macs := _macs_of(op)) is not None:
            yield Executed(frozenset(_said(op, "originalLayersNames").split(",")), macs)


def _layer_time(counter: Any, op: Any, time_us: float) -> LayerTime:
    """`op` is the layer in the executed graph; None for one that OpenVINO times without showing it there."""
    return LayerTime(
        name=counter.node_name,
        op=counter.node_type if op is None else _said(op, "layerType"),
        precision="unknown" if op is None else _precision(op),
        macs=0 if op is None else _macs_of(op) or 0,
        time_us=time_us,
        kernel=counter.exec_type,
    )


def _said(op: Any, key: str) -> str:
    text: str = op.get_rt_info()[key].astype(str)
    return text


def _precision(op: Any) -> str:
    ran_in = _said(op, "runtimePrecision")
    return PRECISION_NAMES.get(ran_in, ran_in)


def _macs_of(op: Any) -> int | None:
    """Shapes are read of products only: what a NonZero finds has none before a run."""
    layer_type = _said(op, "layerType")
    if layer_type not in PRODUCTS:
        return None
    try:
        shapes = [tuple(value.get_shape()) for value in op.inputs()[:2]]
        return _macs(layer_type, shapes, tuple(op.output(0).get_shape()))
    except RuntimeError:
        raise TargetError(
            f"The size of layer '{op.get_friendly_name()}' ({layer_type}) is known only in a run, so its multiply-accumulates "
            "cannot be counted. Export the model with fixed sizes up to there."
        ) from None


def _macs(layer_type: str, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of one of PRODUCTS."""
    if layer_type == "Convolution":
        return convolution_macs(output, inputs[1], output[1])
    if layer_type == "Deconvolution":
        return transposed_convolution_macs(inputs[0], inputs[1], inputs[0][1])
    return matmul_macs(output, inputs[0][-1])


def _version(text: str) -> str:
    """2026.4.1-22982-e213a147257-releases/2026/4 -> 2026.4.1."""
    return text.split("-", 1)[0]


def _first_line(error: Exception) -> str:
    """The last line that says something: OpenVINO puts source locations first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception from")] or lines or [type(error).__name__]
    return said[0][:200].rstrip(".")
