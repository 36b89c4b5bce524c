"""ONNX Runtime on the CPU: what is compiled stays an ONNX file, what runs is read from the runtime's own profile.

Reads the exported ONNX; writes model.onnx (external data beside it) and compiled.json. Python 3.10, stdlib, numpy;
`onnxruntime` is imported by the method that uses it.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from targets.base import Array, Batch, CompiledModel, Exported, LayerPlacement, Placement, TensorSpec, sha256_file
from targets.checks import check_batch, check_precision, fill, smallest_batch
from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

MODEL_FILE = "model.onnx"
PROVIDERS = ["CPUExecutionProvider"]
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeCpu:
    """ONNX Runtime's CPU provider, one operator after another. `allow_spinning`: idle threads poll (faster, hotter)."""

    name: ClassVar[str] = "onnxruntime-cpu"
    scheme: ClassVar[str] = "cpu-int8"
    dialect: ClassVar[str] = "onnxruntime"

    num_threads: int = 1
    allow_spinning: bool = True

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

    def placement(self, compiled: CompiledModel) -> Placement:
        """Run once, batch 1, under the profiler; its events name each executed operator with types and shapes.

        Weights are kept unpacked for this run, for a packed weight has no shape in the profile; the graph is the same.
        """
        with tempfile.TemporaryDirectory() as folder:
            options = {"enable_profiling": True, "profile_file_prefix": str(Path(folder) / "profile")}
            session = self._open(compiled, options, {"session.disable_prepacking": "1"})
            batch = smallest_batch(compiled.inputs)
            zeros = {spec.name: np.zeros(spec.fixed(batch), spec.dtype) for spec in compiled.inputs}
            try:
                session.run(None, zeros)
            except Exception as error:  # the runtime's own classes; a graph that loads need not run
                raise TargetError(
                    f"{compiled.name} loads but does not run on {self.name}: {_first_line(error)}. "
                    "Mend the graph, or take another target."
                ) from None
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Placement(layers=tuple(_layers(events)), source=f"{compiled.toolchain} profile of one run")

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
FLOAT_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}


def _layers(events: list[dict[str, Any]]) -> Iterator[LayerPlacement]:
    for event in events:
        arguments = event.get("args", {})
        op = arguments.get("op_name", "")
        if event.get("cat") != "Node" or op not in COUNTS or not event["name"].endswith("_kernel_time"):
            continue
        types, inputs = _types_and_shapes(arguments["input_type_shape"])
        output = _types_and_shapes(arguments["output_type_shape"])[1][0]
        yield LayerPlacement(
            name=event["name"].removesuffix("_kernel_time"),
            op=op,
            precision="int8" if op in INTEGER_OPS else FLOAT_NAMES.get(types[0], types[0]),
            macs=COUNTS[op](inputs, output),
        )


def _types_and_shapes(described: list[dict[str, list[int]]]) -> tuple[list[str], Shapes]:
    """From the profile's form, one {type: shape} a tensor."""
    pairs = [next(iter(tensor.items())) for tensor in described]
    return [kind for kind, _ in pairs], [tuple(shape) for _, shape in pairs]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
