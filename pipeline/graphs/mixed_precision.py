"""Mixed precision: which layers cost the accuracy in INT8, and the fewest multiply-accumulates to leave in float.

Layers are the Conv, ConvTranspose, Gemm and MatMul nodes with quantized weight and input, by their names. Works on a Q/DQ
graph as the quantizer wrote it, before any dialect: a dialect lets quantizers do the work of a ReLU, and taking such a
quantizer away would take the ReLU too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline.graphs.proof import answers_of
from pipeline.graphs.rewrites import MOVES, WEIGHTED, add_initializer, constant, tidy
from targets.errors import ModelError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]
Answers = Mapping[str, Sequence[Array]]  # output -> one array a sample

# What hands a tensor on without a quantizer of its own: whoever reads the result reads the quantized input.
TRANSPARENT = MOVES | {"Clip", "Dropout", "Identity", "MaxPool", "Pad", "Relu", "Slice"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized layer: its multiply-accumulates a sample, and how much the error falls when it alone is float again."""

    name: str
    macs: int
    gain: float


def choose(layers: Sequence[Layer], passes: Callable[[frozenset[str]], bool]) -> tuple[str, ...] | None:
    """The layers to leave in float so that `passes`, by gain per multiply-accumulate; None if all but one do not suffice.

    The shortest prefix that passes is found by bisection, and then each layer that it does without is dropped, the
    largest first: the fewest multiply-accumulates that this order can reach where more float never fails what less
    passed; finding the fewest of all would mean to try every set. INT8 alone is taken as failed.
    """
    ordered = sorted(layers, key=lambda layer: (-layer.gain / max(layer.macs, 1), layer.name))
    if len(ordered) < 2 or not passes(_names(ordered[:-1])):
        return None
    fails, chosen = 0, len(ordered) - 1
    while chosen - fails > 1:
        middle = (fails + chosen) // 2
        if passes(_names(ordered[:middle])):
            chosen = middle
        else:
            fails = middle
    kept = ordered[:chosen]
    for layer in sorted(kept, key=lambda layer: (-layer.macs, layer.name)):
        fewer = [one for one in kept if one is not layer]
        if fewer and passes(_names(fewer)):
            kept = fewer
    return tuple(layer.name for layer in kept)


def _names(layers: Sequence[Layer]) -> frozenset[str]:
    return frozenset(layer.name for layer in layers)


def in_float(quantized: ir.Model, float_model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy of `quantized` in which the named layers have the weight and bias of `float_model` and no quantizers.

    `float_model` is what was quantized, and has nodes of the same names: a bias that was corrected for its quantized
    weight is wrong for the float one. A Q/DQ that a quantized layer still needs stays for that layer. Raises ModelError
    where a name is no quantized layer, or no layer of `float_model`.
    """
    model = ir.from_proto(ir.to_proto(quantized))  # a clone would share the types, which rewrites change
    layers = {str(node.name): node for node in quantized_layers(model)}
    originals = {str(node.name): node for node in float_model.graph}
    for name in names:
        if name not in layers or name not in originals:
            where = "quantized" if name not in layers else "float"
            raise ModelError(f"'{name}' is no layer of the {where} graph. Quantized layers: {', '.join(layers)}.")
    freed = {layers[name] for name in names}
    for node in freed:
        _restore(model, node, originals[str(node.name)])
    _skip_quantizers(model, freed)
    tidy(model)
    return model


def quantized_layers(model: ir.Model) -> list[ir.Node]:
    """The nodes whose weight is a dequantized constant and whose input comes from a quantizer, in the graph's order."""
    return [
        node
        for node in model.graph
        if node.op_type in WEIGHTED and _is_dequantized_constant(node.inputs[1]) and _source(node.inputs[0]) is not None
    ]


def sensitivities(float_model: ir.Model, quantized: ir.Model, samples: Sequence[Sample]) -> list[Layer]:
    """Each quantized layer with its gain: the fall of the error against `float_model` when it alone is float again.

    The error is the mean Kullback-Leibler divergence between softmaxed logits (nats) where the graph has one output (N, K),
    else the mean over outputs of the squared error over the float output's variance. Measured in ONNX Runtime with every
    optimization off. Some tens of calibration samples do; the float outputs of all are held in memory.
    """
    if not samples:
        raise ModelError("no samples: sensitivities cannot be measured. Give some tens of calibration samples.")
    expected = answers_of(float_model, samples)
    nodes = quantized_layers(quantized)
    macs = _macs(float_model, [str(node.name) for node in nodes], samples[0])
    error = _error(expected, answers_of(quantized, samples))
    found = []
    for name in macs:
        freed = answers_of(in_float(quantized, float_model, [name]), samples)
        found.append(Layer(name=name, macs=macs[name], gain=error - _error(expected, freed)))
    return found


def _restore(model: ir.Model, node: ir.Node, original: ir.Node) -> None:
    for position, value in enumerate(original.inputs[1:], start=1):
        if value is None:
            continue
        array = constant(value)
        if array is None:
            raise ModelError(f"'{node.name}': its float weight '{value.name}' is computed. Fold constants first.")
        node.replace_input_with(position, add_initializer(model.graph, str(value.name), array))


def _skip_quantizers(model: ir.Model, freed: Collection[ir.Node]) -> None:
    """Freed layers read what was quantized; a quantizer that only they read goes, also from behind a MaxPool."""
    for dequantize in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        quantize = dequantize.inputs[0].producer()
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        if _feeds_only(dequantize.outputs[0], freed):
            dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])
            continue
        for reader in dequantize.outputs[0].consumers():
            if reader in freed:
                reader.replace_input_with(0, quantize.inputs[0])


def _feeds_only(value: ir.Value, freed: Collection[ir.Node]) -> bool:
    readers = value.consumers()
    if not readers or value.is_graph_output():
        return False
    return all(
        reader in freed
        or (reader.op_type in TRANSPARENT and all(_feeds_only(output, freed) for output in reader.outputs))
        for reader in readers
    )


def _source(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of an activation that `value` comes from, None for a float."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in TRANSPARENT:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_dequantized_constant(value: ir.Value | None) -> bool:
    """DQ of integers, or DQ of Q of floats, as some exporters leave it."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return False
    before = node.inputs[0].producer()
    return constant(node.inputs[0] if before is None else before.inputs[0]) is not None


def _macs(float_model: ir.Model, names: Sequence[str], sample: Sample) -> dict[str, int]:
    """Multiply-accumulates of each layer, from the shapes of one run."""
    nodes = {str(node.name): node for node in float_model.graph}
    if missing := [name for name in names if name not in nodes]:
        raise ModelError(f"'{missing[0]}' is no layer of the float graph. Give the graph that was quantized.")
    given = {str(value.name) for value in (*float_model.graph.inputs, *float_model.graph.outputs)}
    wanted = {str(value.name) for name in names for value in (nodes[name].inputs[0], nodes[name].outputs[0])}
    proto = ir.to_proto(float_model)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - given))
    shapes = {name: np.shape(array) for name, array in sample.items()}
    shapes |= {name: np.shape(answer) for name, (answer,) in answers_of(ir.from_proto(proto), [sample]).items()}
    return {name: _macs_of(nodes[name], shapes) for name in names}


def _macs_of(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    x, y = shapes[str(node.inputs[0].name)], shapes[str(node.outputs[0].name)]
    weight = constant(node.inputs[1])
    assert weight is not None  # quantized_layers has seen a constant
    if node.op_type == "Conv":
        return convolution_macs(y, weight.shape, y[1])
    if node.op_type == "ConvTranspose":
        return transposed_convolution_macs(x, weight.shape, x[1])
    return matmul_macs(y, weight.size // y[-1])


def _error(expected: Answers, got: Answers) -> float:
    first = next(iter(expected.values()))[0]
    if len(expected) == 1 and first.ndim == 2 and first.shape[1] > 1:
        (name,) = expected
        return float(
            np.mean(np.concatenate([_divergence(a, b) for a, b in zip(expected[name], got[name], strict=True)]))
        )
    return float(np.mean([_relative_error(expected[name], got[name]) for name in expected]))


def _relative_error(expected: Sequence[Array], got: Sequence[Array]) -> float:
    """Mean squared error over the variance of what is expected; over 1 where that never changes."""
    a, b = (
        np.concatenate([answer.reshape(-1) for answer in answers]).astype(np.float64) for answers in (expected, got)
    )
    if a.shape != b.shape:
        raise ModelError("an output's shape depends on values, so outputs cannot be compared. Cut the graph before it.")
    return float(np.mean((a - b) ** 2) / (np.var(a) or 1.0))


def _divergence(expected_NK: Array, got_NK: Array) -> Array:
    """KL(softmax(expected) || softmax(got)) of each sample, in nats."""
    log_p, log_q = _log_softmax(expected_NK.astype(np.float64)), _log_softmax(got_NK.astype(np.float64))
    divergence_N: Array = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return divergence_N


def _log_softmax(logits_NK: Array) -> Array:
    shifted = logits_NK - logits_NK.max(axis=1, keepdims=True)
    log_p: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_p
