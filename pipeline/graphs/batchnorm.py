"""BatchNorm behind a quantized convolution is folded into the scale of its weights and its bias: no integer changes.

scale *= gamma / sigma a channel, bias = (bias - mean) * gamma / sigma + beta. Where gamma is negative the channel's integers
change sign and its scale stays positive, which needs them within -127..127. Exact but for the rounding of float32.
"""
# Shapes: C output channels.

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline.graphs.rewrites import add_initializer, constant, quantizer_of

Array = npt.NDArray[Any]
EPSILON = 1e-5  # ONNX's default
CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}


def fold_batchnorm(model: ir.Model) -> int:
    """Fold every BatchNorm that alone reads a convolution with integer weights; returns how many."""
    num_changed = 0
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        convolution = norm.inputs[0].producer()
        if convolution is None or not _alone(convolution, norm):
            continue
        affine, weight = _affine(norm), _weight(convolution)
        if affine is None or weight is None or not _fold(model, convolution, weight, affine):
            continue
        norm.outputs[0].replace_all_uses_with(convolution.outputs[0], replace_graph_outputs=True)
        model.graph.remove(norm, safe=True)
        num_changed += 1
    return num_changed


def _alone(convolution: ir.Node, norm: ir.Node) -> bool:
    """True for a Conv, or a ConvTranspose of one group, that nothing but `norm` reads, in evaluation mode."""
    if convolution.op_type not in CHANNEL_AXIS or len(convolution.outputs[0].consumers()) != 1:
        return False
    if convolution.op_type == "ConvTranspose" and convolution.attributes.get_int("group", 1) != 1:
        return False
    is_output = convolution.outputs[0].is_graph_output() or norm.outputs[0].is_graph_output()
    return not is_output and not norm.attributes.get_int("training_mode", 0)


def _affine(norm: ir.Node) -> tuple[Array, Array] | None:
    """(factor, shift) a channel in float64: y = factor * x + shift; None where a parameter is computed."""
    values = [constant(value) for value in norm.inputs[1:5]]
    if any(value is None for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", EPSILON))
    return factor, beta - mean * factor


def _weight(convolution: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of constant integer weights that only this convolution reads, symmetric, by channel or as a whole."""
    dequantize = convolution.inputs[1].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(dequantize.outputs[0].consumers()) != 1:
        return None
    integers, quantizer = constant(dequantize.inputs[0]), quantizer_of(dequantize)
    if integers is None or quantizer is None or integers.dtype != np.int8 or quantizer.zero_point.any():
        return None
    axis_fits = quantizer.per_tensor or quantizer.axis == CHANNEL_AXIS[convolution.op_type]
    return dequantize if axis_fits else None


def _fold(model: ir.Model, convolution: ir.Node, dequantize: ir.Node, affine: tuple[Array, Array]) -> bool:
    """Write new integers, scales and bias; False, with nothing changed, where a channel of -128 would have to change sign."""
    factor_C, shift_C = affine
    integers, quantizer = constant(dequantize.inputs[0]), quantizer_of(dequantize)
    assert integers is not None  # _weight looked
    assert quantizer is not None
    bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 and convolution.inputs[2] is not None else 0.0
    axis = CHANNEL_AXIS[convolution.op_type]
    flipped_C = factor_C < 0
    by_channel = np.moveaxis(integers, axis, 0)
    if bias is None or np.any(by_channel[flipped_C] == np.iinfo(np.int8).min):
        return False
    signs_C = np.where(flipped_C, -1, 1).reshape(-1, *[1] * (integers.ndim - 1))
    turned = np.moveaxis((by_channel * signs_C).astype(np.int8), 0, axis)
    scale_C = (quantizer.scale.reshape(-1).astype(np.float64) * np.abs(factor_C)).astype(np.float32)
    bias_C = (np.asarray(bias, np.float64) * factor_C + shift_C).astype(np.float32)
    name = convolution.inputs[1].name
    dequantize.replace_input_with(0, add_initializer(model.graph, f"{name}_folded", turned))
    dequantize.replace_input_with(1, add_initializer(model.graph, f"{name}_folded_scale", scale_C))
    if len(dequantize.inputs) > 2 and dequantize.inputs[2] is not None:
        zeros = np.zeros(len(scale_C), np.int8)
        dequantize.replace_input_with(2, add_initializer(model.graph, f"{name}_folded_zero_point", zeros))
    dequantize.attributes["axis"] = ir.AttrInt64("axis", axis)
    folded_bias = add_initializer(model.graph, f"{name}_folded_bias", bias_C)
    if len(convolution.inputs) < 3:
        convolution.resize_inputs(3)
    convolution.replace_input_with(2, folded_bias)
    return True
