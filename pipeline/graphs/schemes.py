"""A scheme on an ONNX graph that was just quantized: signed activations, and the quantizers of residual additions.

This changes what the graph computes, which is why it is no dialect: it happens before anything is compared. Reads and
returns an `onnx.ModelProto`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from pipeline.graphs.branches import Branch, depths, main_branch
from pipeline.graphs.rewrites import MOVES, WEIGHTED, add_initializer, constant, quantizer_of, set_zero_point, tidy
from pipeline.schemes import Scheme

UNSIGNED_STEPS, SIGNED_STEPS = 255, 127
HANDS_ON = MOVES | {"MaxPool"}


def apply_scheme(quantized: onnx.ModelProto, scheme: Scheme) -> onnx.ModelProto:
    """The graph with the scheme's signedness and residual quantizers; the very same one where nothing is to change."""
    if not scheme.signed and scheme.both_branches:
        return quantized
    model = ir.from_proto(quantized)
    tidy(model)
    if scheme.signed:
        make_signed(model)
    if not scheme.both_branches:
        free_main_branches(model)
    return ir.to_proto(model)


def make_signed(model: ir.Model) -> int:
    """uint8 activations with zero point 0 become int8 over the same range: the step grows by 255/127. Returns how many."""
    num_changed = 0
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        quantizer, readers = quantizer_of(node), node.outputs[0].consumers()
        if quantizer is None or quantizer.dtype != np.uint8 or quantizer.zero_point.any() or not quantizer.per_tensor:
            continue
        if constant(node.inputs[0]) is not None or any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        step = (quantizer.scale.astype(np.float64) * UNSIGNED_STEPS / SIGNED_STEPS).astype(np.float32)
        scale = add_initializer(model.graph, f"{node.inputs[1].name}_signed", step)
        zero = add_initializer(model.graph, "signed_zero_point", np.array(0, dtype=np.int8))
        for linear in (node, *readers):
            linear.replace_input_with(1, scale)
            set_zero_point(linear, zero)
        node.outputs[0].dtype = ir.DataType.INT8
        num_changed += 1
    return num_changed


def free_main_branches(model: ir.Model) -> int:
    """The main branch of each residual addition loses its Q/DQ pair. Returns how many did."""
    depth = depths({_key(node): [_key(one) for one in node.predecessors()] for node in model.graph})
    num_changed = 0
    for addition in [node for node in model.graph if node.op_type == "Add"]:
        main = main_branch([b for value in addition.inputs if (b := _branch(value)) is not None], depth)
        if main is None:
            continue
        names = [None if value is None else value.name for value in addition.inputs]
        position = names.index(main.quantizer)
        dequantize = addition.inputs[position].producer()
        addition.replace_input_with(position, dequantize.inputs[0].producer().inputs[0])
        num_changed += 1
    tidy(model)
    return num_changed


def _branch(value: ir.Value | None) -> Branch | None:
    """A quantized input of an addition, by the name of the tensor; None for a float or a constant.

    A pool or a reshape hands on what was quantized before it.
    """
    node = value.producer() if value is not None else None
    if value is None or node is None:
        return None
    if node.op_type in HANDS_ON:
        behind = _branch(node.inputs[0])
        return behind and Branch(quantizer=str(value.name), source=_key(node), fusible=False)
    quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None
    source = quantize.inputs[0].producer() if quantize is not None and quantize.op_type == "QuantizeLinear" else None
    if quantize is None or source is None:
        return None
    chain = (source.outputs[0], quantize.outputs[0], node.outputs[0])
    alone = all(len(one.consumers()) == 1 and not one.is_graph_output() for one in chain)
    return Branch(quantizer=str(value.name), source=_key(source), fusible=alone and source.op_type in WEIGHTED)


def _key(node: ir.Node) -> str:
    """A node's first output names it: names of nodes may be absent or stand twice."""
    return str(node.outputs[0].name)
