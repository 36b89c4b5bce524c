"""Dense layers that keep a machine's multipliers busy, as ONNX graphs in the form that each runtime takes for a precision.

Writes model.onnx and exported.json. One graph holds the layers of one level side by side, each with an input and an output of
its own. INT8 is explicit (Q/DQ around each layer): unsigned activations from zero, which is what x86 multiplies with signed
weights, or signed ones with zero point 0 where the dialect is TensorRT's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from targets.base import Array, Exported, TensorSpec

OPSET, IR_VERSION = 17, 8
SIGNED_DIALECTS = frozenset({"tensorrt", "portable"})
MODEL_FILE, HALF_FILE = "model.onnx", "model.fp16.onnx"


@dataclass(frozen=True)
class Convolution:
    """3x3, stride 1, as many channels out as in, on a square of `side` pixels."""

    channels: int
    side: int

    @property
    def name(self) -> str:
        return f"conv_3x3_{self.channels}_at_{self.side}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.channels, self.side, self.side)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels, self.channels, 3, 3)


@dataclass(frozen=True)
class MatMul:
    """(1, size, size) x (size, size), the second constant."""

    size: int

    @property
    def name(self) -> str:
        return f"matmul_{self.size}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.size, self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.size, self.size)


Dense = Convolution | MatMul
Level = tuple[Dense, ...]

# Each level is for machines on which the one before was over too soon to tell. Short layers come first: on a machine that does
# other work, they are the ones that run through undisturbed.
LEVELS: tuple[Level, ...] = (
    (Convolution(128, 28), Convolution(256, 28), MatMul(512)),
    (Convolution(256, 56), MatMul(1024)),
    (Convolution(512, 56), MatMul(2048)),
    (Convolution(1024, 112), MatMul(4096)),
)


def write_dense(directory: Path, layers: Level, *, precision: str, dialect: str) -> Exported:
    """The graph of `layers`: for "int8" with Q/DQ, else float; for "fp16" with its float16 twin beside it."""
    import onnx

    directory.mkdir(parents=True, exist_ok=True)
    int8 = precision == "int8"
    signed = dialect in SIGNED_DIALECTS
    onnx.save(_graph(layers, "float32", int8=int8, signed=signed), directory / MODEL_FILE)
    exported = Exported(
        name="dense",
        onnx_path=MODEL_FILE,
        inputs=tuple(TensorSpec(name=layer.name, shape=layer.shape, dtype="float32") for layer in layers),
        outputs=tuple(TensorSpec(name=f"{layer.name}_out", shape=layer.shape, dtype="float32") for layer in layers),
        scheme="dense" if int8 else None,
        dialect=dialect if int8 else None,
        directory=directory,
    )
    if precision == "fp16":
        onnx.save(_graph(layers, "float16", int8=False, signed=signed), directory / HALF_FILE)
        exported = replace(exported, half_path=HALF_FILE)
    exported.save()
    return exported


def _graph(layers: Level, dtype: str, *, int8: bool, signed: bool) -> Any:
    from onnx import TensorProto, helper

    parts = Parts(np.dtype(dtype), signed)
    for layer in layers:
        parts.add_int8(layer) if int8 else parts.add_float(layer)
    graph = helper.make_graph(
        parts.nodes,
        "dense",
        [helper.make_tensor_value_info(layer.name, TensorProto.FLOAT, layer.shape) for layer in layers],
        [helper.make_tensor_value_info(f"{layer.name}_out", TensorProto.FLOAT, layer.shape) for layer in layers],
        parts.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class Parts:
    """Nodes and constants of a graph in the making. Weights are seeded: the same bytes every time."""

    def __init__(self, dtype: np.dtype[Any], signed: bool) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._dtype = dtype
        self._zero: Array = np.array(0, np.int8 if signed else np.uint8)
        self._generator = np.random.default_rng(0)

    def add_float(self, layer: Dense) -> None:
        """Input, to the type of the arithmetic, layer, back to float32."""
        weight = self._generator.standard_normal(layer.weight_shape, np.float32) / layer.weight_shape[0]
        w = self._constant(f"{layer.name}_w", weight.astype(self._dtype))
        x, y = (
            (layer.name, f"{layer.name}_out") if self._dtype == np.float32 else (f"{layer.name}_x", f"{layer.name}_y")
        )
        if x != layer.name:
            self._node("Cast", [layer.name], x, to=_onnx_type(self._dtype))
        self._multiply(layer, x, w, y)
        if x != layer.name:
            self._node("Cast", [y], f"{layer.name}_out", to=_onnx_type(np.dtype("float32")))

    def add_int8(self, layer: Dense) -> None:
        """Quantizers before and behind the layer, and integer weights: what a runtime fuses into one INT8 kernel."""
        name = layer.name
        weight = self._generator.integers(-127, 128, layer.weight_shape).astype(np.int8)
        w_q, w_scale = self._constant(f"{name}_w_q", weight), self._scale(f"{name}_w_scale", 0.01)
        w_zero = self._constant(f"{name}_w_zero", np.array(0, np.int8))
        self._node("DequantizeLinear", [w_q, w_scale, w_zero], f"{name}_w")
        x = self._quantizer(name, f"{name}_x", 1 / 127)
        self._multiply(layer, x, f"{name}_w", f"{name}_y")
        self._quantizer(f"{name}_y", f"{name}_out", 1.0)

    def _quantizer(self, source: str, result: str, scale: float) -> str:
        step = self._scale(f"{result}_scale", scale)
        zero = self._constant(f"{result}_zero", self._zero)
        self._node("QuantizeLinear", [source, step, zero], f"{result}_q")
        self._node("DequantizeLinear", [f"{result}_q", step, zero], result)
        return result

    def _multiply(self, layer: Dense, x: str, w: str, y: str) -> None:
        if isinstance(layer, Convolution):
            self._node("Conv", [x, w], y, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        else:
            self._node("MatMul", [x, w], y)

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes))

    def _scale(self, name: str, value: float) -> str:
        return self._constant(name, np.array(value, np.float32))

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(value, name))
        return name


def _onnx_type(dtype: np.dtype[Any]) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(dtype))
