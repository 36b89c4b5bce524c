"""Moves of data between a DequantizeLinear and what computes with it: they are done on the integers instead.

A runtime fuses a product only with the DequantizeLinear right before it. Exact: a move changes no value. In place on an
`onnx_ir.Model`; each rewrite returns how many places it changed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from pipeline.graphs.rewrites import MOVES, Quantizer, nodes_of, quantizer_of, replace_value


def sink_dequantize(model: ir.Model) -> int:
    """DQ -> Flatten becomes Flatten -> DQ (and the other moves of data): the matrix product behind sees its DQ."""
    num_changed = 0
    for node in nodes_of(model, *MOVES):
        linear = node.inputs[0].producer()
        quantizer = quantizer_of(linear) if linear is not None and linear.op_type == "DequantizeLinear" else None
        readers = node.outputs[0].consumers()
        if linear is None or quantizer is None or not quantizer.per_tensor:
            continue
        if all(reader.op_type == "QuantizeLinear" for reader in readers) and not node.outputs[0].is_graph_output():
            continue
        title = node.name or node.outputs[0].name
        integers = ir.node(
            node.op_type,
            [linear.inputs[0], *node.inputs[1:]],
            attributes=dict(node.attributes),
            name=f"{title}_quantized",
        )
        dequantize = ir.node("DequantizeLinear", [integers.outputs[0], *linear.inputs[1:]], name=f"{title}_dequantized")
        model.graph.insert_before(node, [integers, dequantize])
        replace_value(model.graph, node.outputs[0], dequantize.outputs[0])
        model.graph.remove(node, safe=True)
        num_changed += 1
    common.RemoveUnusedNodesPass()(model)
    return num_changed


def join_integers(model: ir.Model) -> int:
    """Concat of dequantized tensors that share scale and zero point becomes Concat of their integers, dequantized once.

    The convolution behind it then reads a DequantizeLinear. The quantizer gives such tensors one scale when it is made.
    """
    num_changed = 0
    for node in nodes_of(model, "Concat"):
        linears = [value.producer() if value is not None else None for value in node.inputs]
        if not linears or not all(one is not None and one.op_type == "DequantizeLinear" for one in linears):
            continue
        quantizers = [quantizer_of(one) for one in linears if one is not None]
        first = quantizers[0]
        if first is None or not first.per_tensor or not all(_same(first, other) for other in quantizers):
            continue
        title = node.name or node.outputs[0].name
        integers = ir.node(
            "Concat",
            [one.inputs[0] for one in linears if one is not None],
            attributes=dict(node.attributes),
            name=f"{title}_quantized",
        )
        parameters = linears[0].inputs[1:] if linears[0] is not None else []
        dequantize = ir.node("DequantizeLinear", [integers.outputs[0], *parameters], name=f"{title}_dequantized")
        model.graph.insert_before(node, [integers, dequantize])
        replace_value(model.graph, node.outputs[0], dequantize.outputs[0])
        model.graph.remove(node, safe=True)
        num_changed += 1
    common.RemoveUnusedNodesPass()(model)
    return num_changed


def _same(first: Quantizer, other: Quantizer | None) -> bool:
    return (
        other is not None
        and first.dtype == other.dtype
        and np.array_equal(first.scale.reshape(-1), other.scale.reshape(-1))
        and np.array_equal(first.zero_point.reshape(-1), other.zero_point.reshape(-1))
    )
