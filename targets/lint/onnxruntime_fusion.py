"""What stands around a quantized product and keeps ONNX Runtime's optimizer from making one integer operator of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from targets.lint import general
from targets.lint.graph import QUANTIZE, Graph, Node, attribute_of, is_linear, title_of
from targets.lint.rule import Found, Platform

# Operators that the optimizer moves behind a DequantizeLinear by itself. Flatten and Resize are not among them.
TRANSPARENT = frozenset(
    {"Dropout", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
CLAMPS = frozenset({"Clip", "Relu"})


def clamp_that_stays(graph: Graph, platform: Platform) -> Iterator[Found]:
    """The optimizer drops a Relu or Clip before a quantizer that saturates at the same bounds, and no other."""
    for node in graph.products("Conv", "Gemm", "MatMul"):
        name, clamps = end(graph, node)
        if not clamps or not is_integer(graph, node):
            continue
        quantizers = graph.quantizers_of(name)
        for clamp in clamps:
            bounds = clamp_bounds(graph, clamp)
            if quantizers and (bounds is None or not all(q.saturates_at(*bounds) for q in quantizers)):
                kind, title = clamp.op_type, title_of(clamp)
                yield Found(
                    node, f"{kind} '{title}' stays, for the quantizer behind it does not saturate there: float."
                )
                break


def clamp_bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    """Lower and upper bound of a Relu or Clip; None if they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [attribute_of(node, "min", -np.inf), attribute_of(node, "max", np.inf)]  # attributes before opset 11
    for index, name in enumerate(list(node.input)[1:3]):
        if name:
            array = graph.value(name)
            if array is None or array.size != 1:
                return None
            bounds[index] = float(array.reshape(-1)[0])
    return bounds[0], bounds[1]


def result_not_quantized(graph: Graph, platform: Platform) -> Iterator[Found]:
    """A QLinearConv has one reader, its quantizer. A QGemm may give a float, but not to a quantizer and another."""
    for node in graph.products("Conv", "Gemm", "MatMul"):
        name, _ = end(graph, node)
        readers = [title_of(reader) for reader in graph.readers.get(name, []) if not is_linear(reader, QUANTIZE)]
        readers += ["the graph's caller"] if name in graph.outputs else []
        num_quantizers = len(graph.quantizers_of(name))
        if num_quantizers == 1 and not readers:
            continue
        if is_integer(graph, node) and (node.op_type == "Conv" or num_quantizers):
            others = (
                f"is read as a float by {', '.join(readers[:3])}" if readers else f"has {num_quantizers} quantizers"
            )
            yield Found(node, f"its result {others}: computed in float.")


def float_bias(graph: Graph, platform: Platform) -> Iterator[Found]:
    """A float bias is turned to int32 by the optimizer itself where a quantizer follows."""
    for node in graph.products("Gemm"):
        bias = node.input[2] if len(node.input) > 2 else ""
        quantized = bool(graph.quantizers_of(end(graph, node)[0]))
        if bias in graph.constants and not graph.dequantize(bias) and is_integer(graph, node) and not quantized:
            yield Found(node, "a float bias, and no quantizer behind it: computed in float.")


def float_weight(graph: Graph, platform: Platform) -> Iterator[Found]:
    """Before a quantizer, the optimizer quantizes the weights of Conv and Gemm by itself, by their largest value."""
    for found in general.float_weight(graph, platform):
        node: Any = found.node
        itself = node.op_type in ("Conv", "Gemm") and graph.quantizers_of(end(graph, node)[0])
        chosen = "an integer input but float weights: ONNX Runtime quantizes them by itself, per tensor, at load."
        yield Found(node, chosen) if itself else found


def is_integer(graph: Graph, product: Node) -> bool:
    """True if input and weight of a product are both dequantized."""
    return len(product.input) > 1 and general.is_quantized(graph, product, TRANSPARENT)


def end(graph: Graph, node: Node) -> tuple[str, list[Node]]:
    """The result of a node behind Relu, Clip and BatchNorm, and the clamps on the way."""
    name, on_the_way = general.end_of(graph, node, CLAMPS | {"BatchNormalization"})
    return name, [one for one in on_the_way if one.op_type in CLAMPS]
