"""Cross-layer equalization: two layers in a row trade scale, channel by channel, until both use the same range there.

Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", eq. 9-11. Between the layers
stands f with f(s x) = s f(x) for s > 0: nothing, ReLU, LeakyReLU, PReLU, pooling, Flatten. With r1 the range of a row of
the first weight and r2 that of the columns that read it, s = sqrt(r1 * r2) / r2: W1 / s, b1 / s, W2 * s. Exact up to float
rounding. ReLU6 and other clips are no such f and are left alone. Changes an `onnx_ir.Model` in place.
"""
# Shapes: O outputs, I inputs of one group, C inputs of all groups, G groups, K the kernel and the pixels behind a Flatten.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline.graphs.rewrites import constant

Array = npt.NDArray[Any]

MAX_SWEEPS = 200
CONVERGED, CHANGED = 1e-6, 1e-4  # |log s|: of the last sweep, and of all together below which a pair is left as it was
DEAD = (
    2.0**-24
)  # below this share of the layer's largest range a channel is rounding noise; scaled up, its bias explodes
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
ELEMENTWISE = frozenset({"Identity", "LeakyRelu", "PRelu", "Relu"})
POOLING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})


def equalize(model: ir.Model) -> int:
    """Equalize all pairs of layers in place; returns how many changed.

    Left alone: a layer whose output something else reads too, a weight or bias that is computed or that two nodes share,
    and transposed convolutions.
    """
    layers: dict[ir.Node, _Layer] = {}
    pairs = []
    for node in model.graph:
        if (link := _link(node)) is not None:
            first, second = layers.setdefault(node, _Layer(node)), layers.setdefault(link.second, _Layer(link.second))
            first.bias, second.channels = link.bias, link.channels
            pairs.append((first, second))
    numbers = {id(layer): number for number, layer in enumerate(layers.values())}
    scales = balance(
        [ranges(layer.weight_OIK(), layer.groups) for layer in layers.values()],
        [(numbers[id(first)], numbers[id(second)]) for first, second in pairs],
    )
    for (first, second), scale_C in zip(pairs, scales, strict=True):
        first.outputs_O, second.inputs_C = 1 / scale_C, scale_C
    for layer in layers.values():
        layer.write()
    return sum(bool(np.any(scale_C != 1)) for scale_C in scales)


def ranges(weight_OIK: Array, groups: int) -> Array:
    """The largest magnitude between each input and each output, float64 (G, O / G, I)."""
    num_outputs, num_inputs, _ = weight_OIK.shape
    largest: Array = np.abs(weight_OIK.astype(np.float64)).max(axis=2, initial=0.0)
    return largest.reshape(groups, num_outputs // groups, num_inputs)


def balance(layers: Sequence[Array], pairs: Sequence[tuple[int, int]]) -> list[Array]:
    """The scale (C,) of each pair, given the `ranges` of all layers and which is first and second in each pair.

    The pairs are swept until nothing moves: a layer inside a chain is the second of one pair and the first of another. The
    scale of a pair that is equal already, and of a dead channel, is exactly 1.
    """
    layers = [layer.copy() for layer in layers]
    totals = [np.ones(layers[second].shape[0] * layers[second].shape[2]) for _, second in pairs]
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for number, (first, second) in enumerate(pairs):
            scale_C = _scale(layers[first].max(axis=2).reshape(-1), layers[second].max(axis=1).reshape(-1))
            layers[first] /= scale_C.reshape(*layers[first].shape[:2], 1)
            layers[second] *= scale_C.reshape(layers[second].shape[0], 1, -1)
            totals[number] *= scale_C
            largest = max(largest, float(np.abs(np.log(scale_C)).max()))
        if largest < CONVERGED:
            break
    return [total if np.abs(np.log(total)).max() > CHANGED else np.ones_like(total) for total in totals]


def rescaled(weight_OIK: Array, groups: int, outputs_O: Array | None, inputs_C: Array | None) -> Array:
    """The weight in float64, its outputs and its inputs multiplied; None multiplies by 1."""
    num_outputs, num_inputs, _ = weight_OIK.shape
    scaled: Array = weight_OIK.astype(np.float64)
    if inputs_C is not None:
        by_group = np.broadcast_to(inputs_C.reshape(groups, 1, num_inputs), (groups, num_outputs // groups, num_inputs))
        scaled = scaled * by_group.reshape(num_outputs, num_inputs, 1)
    return scaled if outputs_O is None else scaled * outputs_O[:, None, None]


def _scale(first_C: Array, second_C: Array) -> Array:
    """Eq. 11, s = sqrt(r1 * r2) / r2; 1 where a channel is dead on either side."""
    alive = (first_C > DEAD * first_C.max(initial=0.0)) & (second_C > DEAD * second_C.max(initial=0.0))
    scale_C: Array = np.sqrt(np.where(alive, first_C, 1.0) / np.where(alive, second_C, 1.0))
    return scale_C


@dataclass(eq=False)
class _Layer:
    """A Conv, Gemm or MatMul of the graph; `channels` is what it reads where a Flatten made several inputs of each."""

    node: ir.Node
    channels: int | None = None
    bias: ir.Value | None = None
    outputs_O: Array | None = None
    inputs_C: Array | None = None

    @property
    def groups(self) -> int:
        return int(self.node.attributes["group"].as_int()) if "group" in self.node.attributes else 1

    def weight_OIK(self) -> Array:  # noqa: N802 (shape suffix)
        weight = _constant(self.node.inputs[1])
        weight_OI = weight if self.node.op_type == "Conv" or _transposed(self.node, "transB") else weight.T
        return weight_OI.reshape(len(weight_OI), self.channels or weight_OI.shape[1], -1)

    def write(self) -> None:
        """Put the scaled weight and bias in the place of the old ones; names and types stay."""
        if all(scale is None or np.all(scale == 1) for scale in (self.outputs_O, self.inputs_C)):
            return
        scaled, old = rescaled(self.weight_OIK(), self.groups, self.outputs_O, self.inputs_C), self.node.inputs[1]
        if self.node.op_type != "Conv":
            scaled = scaled.reshape(len(scaled), -1)
            scaled = scaled if _transposed(self.node, "transB") else scaled.T
        _set(old, scaled.reshape(_constant(old).shape))
        if self.bias is not None and self.outputs_O is not None:
            _set(self.bias, _constant(self.bias).astype(np.float64) * self.outputs_O)


@dataclass(frozen=True)
class _Link:
    """The layer that alone reads another, that other's bias, and its channels if a Flatten stands between."""

    second: ir.Node
    bias: ir.Value | None
    channels: int | None


def _link(first: ir.Node) -> _Link | None:
    if not _is_layer(first):
        return None
    num_outputs, bias = _num_outputs(first), _bias(first)
    node, flat, spatial = first, False, first.op_type == "Conv"
    if bias is not None and not _is_own_vector(bias, num_outputs):
        return None
    while (reader := _only_reader(node)) is not None:
        if _is_layer(reader):
            fits = _fits(reader, num_outputs, flat) and _is_read_by_channel(spatial, flat, reader.op_type == "Conv")
            return _Link(reader, bias, num_outputs if flat else None) if fits else None
        if first.op_type == "MatMul" and node is first and (added := _added(reader, num_outputs)) is not None:
            bias = added
        elif reader.op_type == "Flatten" and spatial and not flat and _int(reader, "axis", 1) == 1:
            flat = True
        elif reader.op_type not in ELEMENTWISE and not (reader.op_type in POOLING and spatial and not flat):
            return None
        node = reader
    return None


def _is_read_by_channel(spatial: bool, flat: bool, by_convolution: bool) -> bool:
    """Whether the second layer's inputs are the first one's outputs: a convolution's channels are axis 1, a MatMul's the last."""
    if by_convolution:
        return spatial and not flat
    return flat == spatial


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads the only output of `node`, as its first input; for an Add any input will do."""
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output() or len(uses := list(node.outputs[0].uses())) != 1:
        return None
    reader, position = uses[0].node, uses[0].idx
    known = reader.domain in ("", "ai.onnx") and reader.graph is node.graph
    return reader if known and (position == 0 or reader.op_type == "Add") else None


def _is_layer(node: ir.Node) -> bool:
    """A product with a constant weight of its own, laid out as `_Layer` reads it."""
    if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx") or _transposed(node, "transA"):
        return False
    weight = constant(node.inputs[1])
    return weight is not None and len(node.inputs[1].uses()) == 1 and (node.op_type == "Conv" or weight.ndim == 2)


def _bias(node: ir.Node) -> ir.Value | None:
    value: ir.Value | None = node.inputs[2] if len(node.inputs) > 2 else None
    return value


def _added(node: ir.Node, num_outputs: int) -> ir.Value | None:
    """The constant of an Add that is the bias of the MatMul before it."""
    if node.op_type != "Add":
        return None
    return next((value for value in node.inputs if value is not None and _is_own_vector(value, num_outputs)), None)


def _is_own_vector(value: ir.Value, size: int) -> bool:
    array = constant(value)
    return array is not None and array.size == size == array.shape[-1] and len(value.uses()) == 1


def _num_outputs(node: ir.Node) -> int:
    weight = _constant(node.inputs[1])
    return int(weight.shape[0] if node.op_type == "Conv" or _transposed(node, "transB") else weight.shape[1])


def _fits(second: ir.Node, num_channels: int, flat: bool) -> bool:
    """Whether the layer reads each channel once, or (behind a Flatten) as often as every other channel."""
    num_inputs = _Layer(second).weight_OIK().shape[1] * _Layer(second).groups
    return num_inputs == num_channels or (flat and num_inputs % num_channels == 0)


def _constant(value: ir.Value) -> Array:
    array = constant(value)
    assert array is not None  # _is_layer and _is_own_vector have seen it
    return array


def _set(value: ir.Value, array: Array) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array.astype(_constant(value).dtype)), name=value.name)


def _transposed(node: ir.Node, attribute: str) -> bool:
    return _int(node, attribute, 0) != 0


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default
