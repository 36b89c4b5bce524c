"""Exact rewrites of ONNX graphs, one function each: what a graph computes stays, what runtimes make of it changes.

A rewrite works in place on an `onnx_ir.Model` and returns how many places it changed, so that a second call returns 0.
"Exact" means: the same integers in every quantized tensor. Only `integer_bias` rounds, by half a step of the
accumulator (s_x * s_w / 2), which integer kernels do anyhow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common

Array = npt.NDArray[Any]

MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Constants above this many elements stay computed: folding a ConstantOfShape must not blow up the file.
MAX_FOLDED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Quantizer:
    """The constants of a QuantizeLinear or DequantizeLinear; `axis` is None if one scale serves the whole tensor."""

    scale: Array
    zero_point: Array
    axis: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.zero_point.dtype

    @property
    def per_tensor(self) -> bool:
        return self.scale.size == 1

    def quantize(self, x: Array) -> Array:
        """ONNX QuantizeLinear: saturate(round_half_even(x / scale) + zero_point)."""
        info = np.iinfo(self.dtype)
        rounded = np.rint(x / self._along(self.scale, x.ndim)) + self._along(self.zero_point, x.ndim).astype(np.float64)
        integers: Array = np.clip(rounded, info.min, info.max).astype(self.dtype)
        return integers

    def saturates_at(self, low: float, high: float) -> bool:
        """True if all below `low` becomes the first integer, and all above `high` the last, by saturation alone."""
        info = np.iinfo(self.dtype)
        zero = self.zero_point.astype(np.float64)
        first, last = np.rint(low / self.scale) + zero, np.rint(high / self.scale) + zero
        return bool(np.all(first <= info.min) and np.all(last >= info.max))

    def _along(self, values: Array, ndim: int) -> Array:
        if self.axis is None or values.size == 1:
            return values.reshape(())
        shape = [1] * ndim
        shape[self.axis] = -1
        return values.reshape(shape)


def tidy(model: ir.Model) -> int:
    """Constants become initializers, Identity and unused nodes and opsets go. Names of inputs and outputs stay."""
    sequence = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    return int(sequence(model).modified)


def fold_constants(model: ir.Model) -> int:
    """Compute nodes whose inputs are all constants, by ONNX's reference operators. Q/DQ stay: they carry the ranges."""
    num_changed = 0
    for node in list(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
            continue
        inputs = [constant(value) for value in node.inputs if value is not None]
        if not inputs or any(value is None for value in inputs) or _has_subgraph(node):
            continue
        outputs = _evaluate(model, node)
        if any(output.size > MAX_FOLDED_ELEMENTS for output in outputs):
            continue
        for value, output in zip(node.outputs, outputs, strict=True):
            replace_value(model.graph, value, add_initializer(model.graph, f"{value.name}_folded", output))
        model.graph.remove(node, safe=True)
        num_changed += 1
    return num_changed


def fold_padding(model: ir.Model) -> int:
    """A Pad with zeros before a convolution becomes the convolution's own `pads`."""
    num_changed = 0
    for pad in nodes_of(model, "Pad"):
        pads = _spatial_zero_pads(pad)
        convolutions = pad.outputs[0].consumers()
        if pads is None or pad.outputs[0].is_graph_output() or not all(_takes_pads(c, pad) for c in convolutions):
            continue
        for convolution in convolutions:
            old = _ints(convolution, "pads") or (0,) * len(pads)
            convolution.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(old, pads, strict=True)])
            convolution.attributes.pop("auto_pad", None)  # VALID, which may not stand beside pads
            convolution.replace_input_with(0, pad.inputs[0])
        model.graph.remove(pad, safe=True)
        num_changed += 1
    return num_changed


def integer_weights(model: ir.Model) -> int:
    """QuantizeLinear of a constant becomes the integers themselves: a quarter of the size, nothing to do at load."""
    num_changed = 0
    for node in nodes_of(model, "QuantizeLinear"):
        weight, quantizer = constant(node.inputs[0]), quantizer_of(node)
        if weight is None or quantizer is None:
            continue
        integers = add_initializer(model.graph, f"{node.inputs[0].name}_quantized", quantizer.quantize(weight))
        replace_value(model.graph, node.outputs[0], integers)
        model.graph.remove(node, safe=True)
        num_changed += 1
    return num_changed


def drop_redundant_activations(model: ir.Model) -> int:
    """Relu and Clip go where the quantizers behind them saturate at the same bounds by themselves."""
    num_changed = 0
    for node in nodes_of(model, "Relu", "Clip"):
        bounds, quantizers = _bounds(node), _quantizers_behind(node.outputs[0])
        if bounds is None or not quantizers or not all(q.saturates_at(*bounds) for q in quantizers):
            continue
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)
        num_changed += 1
    return num_changed


def quantize_before_clip(model: ir.Model) -> int:
    """A Clip that does not saturate gets its quantizer's Q/DQ in front as well, so that what feeds it can run in INT8.

    Exact, for rounding is monotone: Q(clip(x)) = Q(clip(DQ(Q(x)))). Training may widen a scale beyond 6/255.
    """
    num_changed = 0
    for node in nodes_of(model, "Clip"):
        consumers = node.outputs[0].consumers()
        producer = node.inputs[0].producer()
        if len(consumers) != 1 or not _quantizers_behind(node.outputs[0]) or _bounds(node) is None:
            continue
        if producer is None or producer.op_type not in WEIGHTED or len(node.inputs[0].consumers()) != 1:
            continue
        parameters = list(consumers[0].inputs[1:])
        quantize = ir.node("QuantizeLinear", [node.inputs[0], *parameters], num_outputs=1)
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], num_outputs=1)
        model.graph.insert_before(node, [quantize, dequantize])
        node.replace_input_with(0, dequantize.outputs[0])
        num_changed += 1
    return num_changed


def unsigned_activations(model: ir.Model) -> int:
    """int8 activations with zero point 0 become uint8 with 128 and the same scale: the same steps, shifted by 128.

    ONNX Runtime makes a QLinearConv (QLinearAdd) only where input and output have one type.
    """
    return _shift_zero_points(model, np.int8(0), np.uint8(128))


def signed_activations(model: ir.Model) -> int:
    """uint8 activations with zero point 128 become int8 with 0: the way back, for TensorRT, which takes no uint8."""
    return _shift_zero_points(model, np.uint8(128), np.int8(0))


def _shift_zero_points(model: ir.Model, old: np.int8 | np.uint8, new: np.int8 | np.uint8) -> int:
    num_changed = 0
    for node in nodes_of(model, "QuantizeLinear"):
        quantizer, readers = quantizer_of(node), node.outputs[0].consumers()
        if quantizer is None or quantizer.dtype != old.dtype or not quantizer.per_tensor:
            continue
        if np.any(quantizer.zero_point != old) or constant(node.inputs[0]) is not None:
            continue
        if not readers or node.outputs[0].is_graph_output():
            continue
        if any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        zero_point = add_initializer(model.graph, f"zero_point_{new}", np.array(new))
        for linear in (node, *readers):
            set_zero_point(linear, zero_point)
        node.outputs[0].dtype = ir.DataType.from_numpy(new.dtype)
        num_changed += 1
    return num_changed


def integer_bias(model: ir.Model) -> int:
    """The bias of a quantized Conv or Gemm becomes int32 with scale s_x * s_w, the accumulator's own step."""
    num_changed = 0
    for node in nodes_of(model, "Conv", "Gemm"):
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        x, weight = _dequantized(node.inputs[0]), _dequantized(node.inputs[1])
        if bias is None or x is None or weight is None or not x.per_tensor or _float(node, "beta", 1.0) != 1.0:
            continue
        if bias.ndim > 1:  # Gemm broadcasts (1, K), but DequantizeLinear wants an axis as long as the scales
            if bias.size != bias.shape[-1]:
                continue
            bias = bias.reshape(-1)
        scale = (x.scale.reshape(()) * weight.scale * np.float32(_float(node, "alpha", 1.0))).astype(np.float32)
        steps = np.rint(bias.astype(np.float64) / scale)
        if not np.all(np.abs(steps) < 2**31):  # a dead channel's tiny scale: its bias stays a float
            continue
        name = node.inputs[2].name
        axis = {"axis": 0} if scale.size > 1 else {}
        dequantize = ir.node(
            "DequantizeLinear",
            [
                add_initializer(model.graph, f"{name}_quantized_for_{node.name}", steps.astype(np.int32)),
                add_initializer(model.graph, f"{name}_scale_for_{node.name}", scale),
            ],
            attributes=axis,
        )
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])
        num_changed += 1
    return num_changed


def float_bias(model: ir.Model) -> int:
    """An int32 bias behind a DequantizeLinear becomes the floats that it stands for: TensorRT takes no other."""
    num_changed = 0
    for node in nodes_of(model, "DequantizeLinear"):
        integers, quantizer = constant(node.inputs[0]), quantizer_of(node)
        if integers is None or quantizer is None or integers.dtype != np.int32:
            continue
        values = (integers.astype(np.float64) * quantizer.scale.reshape(-1)).astype(np.float32).reshape(integers.shape)
        replace_value(
            model.graph, node.outputs[0], add_initializer(model.graph, f"{node.outputs[0].name}_float", values)
        )
        model.graph.remove(node, safe=True)
        num_changed += 1
    return num_changed


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer that no caller can override, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: Array = value.const_value.numpy()
    return array


def quantizer_of(node: ir.Node) -> Quantizer | None:
    """The constants of a Q or DQ; None if scale or zero point are computed, or blocks are quantized apart."""
    scale = constant(node.inputs[1])
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    zero_point = constant(node.inputs[2]) if has_zero_point else np.zeros((), _default_dtype(node))
    if scale is None or zero_point is None or _int(node, "block_size", 0):
        return None
    return Quantizer(scale, zero_point, _int(node, "axis", 1) if scale.size > 1 else None)


def add_initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new constant of the graph; one of the same name and content is used again."""
    if (old := graph.initializers.get(name)) is not None:
        known = constant(old)
        if known is not None and known.dtype == array.dtype and np.array_equal(known, array):
            return old
        return add_initializer(graph, f"{name}_", array)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    graph.register_initializer(value)
    return value


def nodes_of(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these operators as they stand now, so that a rewrite may take some away."""
    yield from [node for node in model.graph if node.op_type in op_types and node.domain in ("", "ai.onnx")]


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Every reader of `old` reads `new`; a graph output keeps its name."""
    if old.is_graph_output():
        name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{name}_replaced"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
    else:
        if new.const_value is None:
            new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)


def _evaluate(model: ir.Model, node: ir.Node) -> list[Array]:
    feeds = {value.name: constant(value) for value in node.inputs if value is not None}
    proto = ir.serde.serialize_node(node)
    outputs = ReferenceEvaluator(proto, opsets=dict(model.graph.opset_imports)).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _spatial_zero_pads(pad: ir.Node) -> tuple[int, ...] | None:
    """The pads of the spatial axes, begins then ends, if the Pad adds zeros there and nowhere else."""
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    pads = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    fill = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    if mode != "constant" or pads is None or fill is None or fill.any() or len(pad.inputs) > 3:
        return None
    begins, ends = np.split(pads.astype(int), 2)
    if begins[:2].any() or ends[:2].any() or (pads < 0).any():
        return None
    return (*begins[2:].tolist(), *ends[2:].tolist())


def _takes_pads(node: ir.Node, pad: ir.Node) -> bool:
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    return node.op_type == "Conv" and node.inputs[0] is pad.outputs[0] and auto in ("NOTSET", "VALID")


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip, None if they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [_float(node, "min", -np.inf), _float(node, "max", np.inf)]  # attributes before opset 11
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            array = constant(value)
            if array is None:
                return None
            bounds[index] = float(array)
    return bounds[0], bounds[1]


def _quantizers_behind(value: ir.Value) -> list[Quantizer]:
    """The quantizers of all readers; empty if one reads the float."""
    found = [quantizer_of(c) if c.op_type == "QuantizeLinear" else None for c in value.consumers()]
    known = [quantizer for quantizer in found if quantizer is not None]
    return known if len(known) == len(found) and not value.is_graph_output() else []


def _dequantized(value: ir.Value | None) -> Quantizer | None:
    producer = value.producer() if value is not None else None
    return quantizer_of(producer) if producer is not None and producer.op_type == "DequantizeLinear" else None


def set_zero_point(linear: ir.Node, zero_point: ir.Value) -> None:
    """Give a Q or DQ another zero point, also where it had none."""
    if len(linear.inputs) < 3:
        linear.resize_inputs(3)
    linear.replace_input_with(2, zero_point)


def _default_dtype(node: ir.Node) -> np.dtype[Any]:
    """Without a zero point: `output_dtype` of a Q (uint8 if unset), the input's type of a DQ."""
    if node.op_type == "QuantizeLinear":
        code = _int(node, "output_dtype", 0)
        return np.dtype(ir.DataType(code).numpy() if code else np.uint8)
    dtype = node.inputs[0].dtype
    return np.dtype(dtype.numpy() if dtype is not None else np.uint8)


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else ()


def _float(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes[name].as_float()) if name in node.attributes else default
