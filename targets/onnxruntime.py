"""ONNX Runtime on the CPU: what is compiled stays an ONNX file, what runs is read from the runtime's own profile.

Reads the exported ONNX; writes model.onnx (external data beside it) and compiled.json. Python 3.10, stdlib, numpy;
`onnxruntime` is imported by the method that uses it.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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

MODEL_FILE = "model.onnx"
PROVIDERS = ["CPUExecutionProvider"]
Shapes = list[tuple[int, ...]]
Event = dict[str, Any]  # of ORT's profile: ts and dur are whole microseconds
Node = tuple[str, str]  # name and index in the optimized graph: names alone may stand twice
Product = tuple[Node, Event, int]  # its multiply-accumulates


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider, one operator after another. `allow_spinning`: idle threads poll (faster, hotter).
    `arena`: memory of one run is kept for the next."""

    name: ClassVar[str] = "onnxruntime-cpu"
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
        session = self._open(compiled, _profiling(folder))
        return OnnxRuntimeProfiledSession(
            session,
            _fixed(compiled.inputs, batch),
            _sized(compiled.outputs, batch),
            products=lambda feeds: _products(self._events(compiled, feeds)),
            folder=folder,
            source=f"{compiled.toolchain} profile",
        )

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> OnnxRuntimeProfiledSession:
        """The same: ONNX Runtime has no other clock of its own."""
        return self.load_profiled(compiled, batch=batch)

    def placement(self, compiled: CompiledModel) -> Placement:
        """Run once, batch 1, under the profiler; its events name each executed operator with types and shapes."""
        batch = smallest_batch(compiled.inputs)
        zeros = {spec.name: np.zeros(spec.fixed(batch), spec.dtype) for spec in compiled.inputs}
        layers = tuple(
            LayerPlacement(name=node[0], op=_op(event), precision=_precision(event), macs=macs)
            for node, event, macs in _products(self._events(compiled, zeros))
        )
        return Placement(layers=layers, source=f"{compiled.toolchain} profile of one run")

    def _events(self, compiled: CompiledModel, feeds: Batch) -> list[Event]:
        """Of one run. Weights are kept unpacked for it, for a packed weight has no shape in the profile; the graph is the
        same.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(compiled, _profiling(Path(folder)), {"session.disable_prepacking": "1"})
            try:
                session.run(None, dict(feeds))
            except Exception as error:  # the runtime's own classes; a graph that loads need not run
                raise TargetError(
                    f"{compiled.name} loads but does not run on {self.name}: {_first_line(error)}. "
                    "Mend the graph, or take another target."
                ) from None
            return _read_profile(session)

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
                f"{compiled.name}: ONNX Runtime {ort.__version__} refuses the graph: {_first_line(error)}. "
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
        runs = [event for event in _read_profile(self._session) if event["name"] == "model_run"]
        return [float(event["dur"]) for event in sorted(runs, key=lambda event: event["ts"])]

    def layer_times(self) -> tuple[LayerTime, ...]:
        """Products are counted in one more run on the input of the last: a branch that it took is counted, too."""
        macs: dict[Node, int] = {}
        for node, _, count in self._products(self._buffers):
            macs[node] = macs.get(node, 0) + count
        return tuple(
            LayerTime(
                name=node[0],
                op=_op(event),
                precision=_precision(event),
                macs=_counted(macs, node, event),
                time_us=time_us,
            )
            for node, event, time_us in node_times(_read_profile(self._session), self._num_warm)
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


# Operators with products: how to count them from the shapes of their inputs and of their first output.
Count = Callable[[Shapes, tuple[int, ...]], int]


def _convolution(weight: int) -> Count:
    return lambda inputs, output: convolution_macs(output, inputs[weight], inputs[weight][0])


def _transposed(inputs: Shapes, output: tuple[int, ...]) -> int:
    return transposed_convolution_macs(inputs[0], inputs[1], inputs[1][0])


def _matmul(inputs: Shapes, output: tuple[int, ...]) -> int:
    return matmul_macs(output, inputs[0][-1])


def _gemm(weight: int) -> Count:
    return lambda inputs, output: matmul_macs(output, inputs[weight][0] * inputs[weight][1] // output[-1])


COUNTS: dict[str, Count] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "FusedMatMulActivation": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm(1),
    "FusedGemm": _gemm(1),
    "QGemm": _gemm(3),
}
INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "QLinearConv",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
    }
)
WITH_SUBGRAPH = frozenset({"If", "Loop", "Scan"})
TYPE_NAMES = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "uint8": "int8",
    "int8": "int8",
}


def _profiling(folder: Path) -> dict[str, Any]:
    return {"enable_profiling": True, "profile_file_prefix": str(folder / "profile")}


def _read_profile(session: Any) -> list[Event]:
    """End the profiling of a session and take what it wrote; the file goes."""
    path = Path(session.end_profiling())
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return events


def _operators(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _op(event: Event) -> str:
    op: str = event["args"]["op_name"]
    return op


def _node(event: Event) -> Node:
    return event["name"].removesuffix("_kernel_time"), event["args"].get("node_index", "")


def _precision(event: Event) -> str:
    """Of the arithmetic; of its first input for an operator without products."""
    if _op(event) in INTEGER_OPS:
        return "int8"
    types = _types_and_shapes(event["args"]["input_type_shape"])[0]
    return TYPE_NAMES.get(types[0], types[0]) if types else "none"


def _products(events: Sequence[Event]) -> Iterator[Product]:
    """Every execution of an operator with products."""
    for event in _operators(events):
        if (count := COUNTS.get(_op(event))) is not None:
            inputs = _types_and_shapes(event["args"]["input_type_shape"])[1]
            output = _types_and_shapes(event["args"]["output_type_shape"])[1][0]
            yield _node(event), event, count(inputs, output)


def _counted(macs: Mapping[Node, int], node: Node, event: Event) -> int:
    if _op(event) in COUNTS and node not in macs:
        raise TargetError(
            f"ONNX Runtime ran '{node[0]}' when it was timed, but not when its products were counted on the same input, so its "
            "GOP/s cannot be told. Report this model; nothing is assumed."
        )
    return macs.get(node, 0)


def node_times(events: Sequence[Event], num_warm: int) -> Iterator[tuple[Node, Event, float]]:
    """Each node that ran after the first `num_warm` runs, with its first event and its median microseconds a run."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[num_warm:]
    first: dict[Node, Event] = {}
    spent: dict[Node, Array] = {}
    for event, own_us in _own_times(_operators(events)):
        if (run := bisect_right(starts, event["ts"]) - 1) >= 0:
            node = _node(event)
            first.setdefault(node, event)
            spent.setdefault(node, np.zeros(len(starts)))[run] += own_us
    for node, event in first.items():
        yield node, event, float(np.median(spent[node]))


def _own_times(operators: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """Durations without those of nested operators: an If or a Loop spans what its subgraph runs. In order of time."""
    ordered = sorted(operators, key=lambda event: (event["ts"], -event["dur"]))
    own_us = [event["dur"] for event in ordered]
    around: list[int] = []
    for i, event in enumerate(ordered):
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around and _op(ordered[around[-1]]) in WITH_SUBGRAPH:
            own_us[around[-1]] -= event["dur"]
        around.append(i)
    return zip(ordered, own_us, strict=True)


def _types_and_shapes(described: list[dict[str, list[int]]]) -> tuple[list[str], Shapes]:
    """From the profile's form, one {type: shape} a tensor."""
    pairs = [next(iter(tensor.items())) for tensor in described]
    return [kind for kind, _ in pairs], [tuple(shape) for _, shape in pairs]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
