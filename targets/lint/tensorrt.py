"""TensorRT 10.3 to 11, explicit quantization, strongly typed: what its parser refuses and its fusions want.

The conditions are read from NVIDIA's documents and sources; none of them has been run on an engine yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from targets.lint import general
from targets.lint.graph import CONVOLUTIONS, DEQUANTIZE, QUANTIZE, Graph, Node, attribute_of, title_of
from targets.lint.rule import Found, Platform, Rule

# The newest opset that a version's parser reads; a version between two reads what the older one does.
NEWEST_OPSET: dict[tuple[int, int], int] = {(8, 6): 17, (10, 0): 20, (10, 15): 24, (11, 0): 25}
# A dequantized tensor stays one behind these: they only choose or move elements.
TRANSPARENT = frozenset(
    {"Dropout", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
UNFUSED = frozenset({"GlobalAveragePool", "HardSwish", "Mul"})
INTEGER_OPERATORS = frozenset(
    {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    | {"QAttention", "QGemm", "DynamicQuantizeLSTM"}
)
COMPUTE = frozenset(
    {"AveragePool", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "GlobalAveragePool", "GroupNormalization"}
    | {"InstanceNormalization", "LSTM", "LayerNormalization", "LogSoftmax", "MatMul", "RNN", "ReduceMean", "Resize"}
    | {"Softmax"}
)
CHANNELS = 16


def is_integer(op_type: str) -> bool:
    return op_type in INTEGER_OPERATORS or op_type.startswith("QLinear")


def zero_point(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears():
        if linear.zero_point is not None and (values := linear.zero_point.astype(np.float32)).any():
            yield Found(linear.node, f"its zero point is {values.flat[np.argmax(values != 0)]:g}, not 0.")


def unsigned_type(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears():
        by_default = linear.dtype == "uint8" and not linear.has_zero_point
        if by_default and not attribute_of(linear.node, "output_dtype", 0):
            continue  # a rule of its own
        if linear.dtype.startswith(("uint", "int16")):
            yield Found(
                linear.node, f"quantizes to {linear.dtype}: TensorRT reads the scale as that of int8, and clips."
            )


def scale(graph: Graph, platform: Platform) -> Iterator[Found]:
    yield from general.scale_is_no_step(zero_weights=False)(graph, platform)
    for found in general.computed_scale(graph, platform):
        yield Found(found.node, found.message, "warning", "Fix the ranges by calibration.")


def integer_bias(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears(DEQUANTIZE):
        if linear.dtype == "int32":
            yield Found(linear.node, "dequantizes int32, a quantized bias.")


def newest_opset(version: tuple[int, int]) -> int:
    return max((opset for known, opset in NEWEST_OPSET.items() if known <= version), default=min(NEWEST_OPSET.values()))


def opset(graph: Graph, platform: Platform) -> Iterator[Found]:
    if graph.opset > (newest := newest_opset(platform.tensorrt)):
        version = ".".join(map(str, platform.tensorrt))
        yield Found(graph.name, f"opset {graph.opset}: TensorRT {version} reads up to {newest}.")


def half_quantized(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.products():
        source = general.origin(graph, node.input[0], TRANSPARENT)
        link = general.unquantized_link(graph, source)
        if (
            graph.weight(node) is not None
            and not graph.dequantize(source)
            and (link is None or link.op_type not in UNFUSED)
        ):
            yield Found(node, "integer weights but a float input: it is computed in float.")
    yield from general.float_weight(graph, platform)


def _residual_adds(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each sum of two activations, and how many of the two are dequantized."""
    for node in graph.of("Add"):
        if len(node.input) == 2 and not any(name in graph.constants for name in node.input):
            branches = [graph.integer_activation(general.origin(graph, name, TRANSPARENT)) for name in node.input]
            yield node, sum(branch is not None for branch in branches)


def residual_on_both(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node, num_quantized in _residual_adds(graph):
        if num_quantized == 2:
            yield Found(node, "both branches of the sum are quantized, so it is not fused into the convolution.")


def residual_on_neither(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node, num_quantized in _residual_adds(graph):
        if not num_quantized and next(graph.linears(), None) is not None:
            yield Found(node, "neither branch of the sum is quantized, so it is computed in float.")


def quantizer_inside(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.of("BatchNormalization", "Relu", "Clip"):
        linear = graph.integer_activation(node.input[0])
        quantize = graph.producer.get(linear.input[0]) if linear is not None else None
        maker = graph.producer.get(quantize.input[0]) if quantize is not None and quantize.op_type == QUANTIZE else None
        if maker is not None and maker.op_type in CONVOLUTIONS:
            yield Found(
                node, f"Q/DQ stand between '{title_of(maker)}' and this {node.op_type}, so the two are not fused."
            )


def unfused_operator(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.of(*UNFUSED):
        if any(graph.integer_activation(name) for name in node.input) and not graph.quantizers_of(node.output[0]):
            yield Found(node, f"{node.op_type} reads integers and no quantizer reads its result: computed in float.")


def one_tensor_two_scales(graph: Graph, platform: Platform) -> Iterator[Found]:
    for name, readers in graph.readers.items():
        scales = {tuple(q.scale.reshape(-1).tolist()) for q in graph.quantizers_of(name) if q.scale is not None}
        if len(scales) > 1:
            yield Found(readers[0], f"tensor '{name}' is quantized with {len(scales)} different scales.")


def odd_channels(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.products("Conv"):
        weight = graph.weight(node)
        if weight is None or not graph.dequantize(general.origin(graph, node.input[0], TRANSPARENT)):
            continue
        shape = graph.shape(weight.quantizer.node.input[0]) or ()
        sizes = [shape[1] and shape[1] * attribute_of(node, "group", 1), shape[0]] if len(shape) > 1 else []
        if any(size is not None and size % CHANNELS for size in sizes):
            yield Found(
                node, f"{sizes[0]} channels in and {sizes[1]} out: INT8 kernels pad them to multiples of {CHANNELS}."
            )


def least_weight(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.products():
        weight = graph.weight(node)
        if weight is None or weight.quantizer.dtype != "int8":
            continue
        integers = graph.weight_integers(weight)
        if integers is not None and (count := int(np.sum(integers == -128))):
            yield Found(node, f"{count} of its weights are -128, outside the symmetric range -127..127.")


def float32_compute(graph: Graph, platform: Platform) -> Iterator[Found]:
    import onnx

    for node in graph.of(*COMPUTE):
        types = {graph.elem_type(name) for name in node.input if name}
        quantized = any(graph.dequantize(general.origin(graph, name, TRANSPARENT)) for name in node.input)
        if onnx.TensorProto.FLOAT in types and not quantized and not set(node.output) <= graph.constants:
            yield Found(node, f"{node.op_type} is not quantized and its tensors are float32: it runs in FP32.")


def wide_constant(graph: Graph, platform: Platform) -> Iterator[Found]:
    limits = np.iinfo(np.int32)
    for name, readers in graph.readers.items():
        if name not in graph.initializers and getattr(graph.producer.get(name), "op_type", "") != "Constant":
            continue
        values = graph.value(name)
        if values is not None and values.dtype == np.int64 and ((values < limits.min) | (values > limits.max)).any():
            yield Found(readers[0], f"constant '{name}' is INT64 and outside int32.")


def refused_pooling(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.of("MaxPool", "Resize"):
        if len(node.output) > 1 and node.output[1]:
            yield Found(node, "MaxPool with indices.")
        if any(size != 1 for size in attribute_of(node, "dilations", ())):
            yield Found(node, "MaxPool with dilation.")
        if attribute_of(node, "antialias", 0):
            yield Found(node, "Resize with antialias.")


RULES: tuple[Rule, ...] = (
    Rule(
        code="Q01",
        severity="error",
        find=zero_point,
        title="A zero point other than 0",
        advice="Quantize symmetrically: int8 with zero point 0 everywhere.",
        evidence="read",
    ),
    Rule(
        code="Q02",
        severity="error",
        find=unsigned_type,
        title="A zero point of type uint8",
        advice="Use int8: with scale * 255 / 127 where uint8 started at 0, as `edgestill quantize` does for this target.",
        evidence="read",
    ),
    Rule(
        code="Q03",
        severity="error",
        find=general.no_zero_point,
        title="No zero point and no output_dtype: uint8 by ONNX's default",
        advice="Write an int8 zero point of 0.",
        evidence="read",
    ),
    Rule(
        code="Q04",
        severity="error",
        find=scale,
        title="A scale that is empty, not positive or no float (computed from the input: a warning)",
        advice="Calibrate again with data that are numbers and not all 0; prune dead channels.",
        evidence="read",
    ),
    Rule(
        code="Q05",
        severity="error",
        find=general.scale_count(zero_points="error"),
        title="Neither one scale nor one for each channel of the axis, or another number of zero points",
        advice="Give one scale, or one for each channel of the axis, and a zero point for each scale.",
        evidence="read",
    ),
    Rule(
        code="Q06",
        severity="error",
        find=general.per_channel_activation,
        title="A per-channel scale on an activation",
        advice="Quantize activations per tensor.",
        evidence="read",
    ),
    Rule(
        code="Q07",
        severity="error",
        find=general.weight_axis,
        title="Weights quantized along another axis than their outputs",
        advice="Conv: axis 0; ConvTranspose: 1; Gemm: 0 with transB=1, else 1; MatMul: the last.",
        evidence="read",
    ),
    Rule(
        code="Q08",
        severity="error",
        find=integer_bias,
        title="A DequantizeLinear of int32: a quantized bias",
        advice="Keep the bias in float.",
        evidence="read",
    ),
    Rule(
        code="Q09",
        severity="error",
        find=general.integer_operators(is_integer, "is an integer operator; TensorRT knows Q/DQ only"),
        title="QLinear*, *Integer and DynamicQuantizeLinear operators",
        advice="Export Q/DQ (QuantFormat.QDQ in ONNX Runtime's quantizer).",
        evidence="read",
    ),
    Rule(
        code="Q10",
        severity="error",
        find=opset,
        title="An opset above what the TensorRT version reads",
        advice="Export with opset 17.",
        evidence="read",
    ),
    Rule(
        code="Q12",
        severity="warning",
        find=half_quantized,
        title="Only the weight or only the activation is quantized",
        advice="Quantize both, or neither.",
        evidence="read",
    ),
    Rule(
        code="Q13",
        severity="warning",
        find=residual_on_both,
        title="A residual Add that is quantized on both branches",
        advice="Quantize the identity branch only: the other is the convolution that the sum is fused into.",
        evidence="read",
    ),
    Rule(
        code="Q14",
        severity="warning",
        find=residual_on_neither,
        title="A residual Add that is quantized on no branch",
        advice="Quantize the identity branch.",
        evidence="read",
    ),
    Rule(
        code="Q15",
        severity="warning",
        find=quantizer_inside,
        title="Q/DQ between a convolution and its BatchNorm, Relu or Clip",
        advice="Fold BatchNorm, and quantize behind the activation function.",
        evidence="read",
    ),
    Rule(
        code="Q16",
        severity="warning",
        find=unfused_operator,
        title="GlobalAveragePool, HardSwish or Mul with INT8 in and no quantizer behind",
        advice="Quantize its result too.",
        evidence="read",
    ),
    Rule(
        code="Q17",
        severity="warning",
        find=one_tensor_two_scales,
        title="One tensor quantized with different scales",
        advice="Use one quantizer for all readers.",
        evidence="read",
    ),
    Rule(
        code="Q18",
        severity="info",
        find=odd_channels,
        title="An INT8 convolution whose channels are not a multiple of 16",
        advice="Nothing need be done; a student whose widths are multiples of 16 wastes nothing.",
        evidence="read",
    ),
    Rule(
        code="Q19",
        severity="info",
        find=least_weight,
        title="A weight of -128",
        advice="Train with narrow weights (-127..127).",
        evidence="read",
    ),
    Rule(
        code="Q20",
        severity="warning",
        find=float32_compute,
        title="An operator that is not quantized and still in float32: a strongly typed engine runs it in FP32",
        advice="Quantize it, or write what is not quantized in float16.",
        evidence="read",
    ),
    Rule(
        code="Q21",
        severity="warning",
        find=wide_constant,
        title="An INT64 constant outside int32",
        advice="Write it within int32 (an open end of a Slice: 2147483647).",
        evidence="read",
    ),
    Rule(
        code="Q22",
        severity="error",
        find=refused_pooling,
        title="MaxPool with indices or dilation, Resize with antialias",
        advice="Replace it: TensorRT has no such layer.",
        evidence="read",
    ),
    Rule(
        code="Q23",
        severity="error",
        find=general.nothing_quantized,
        title="Nothing is quantized",
        advice="Quantize it first: `edgestill quantize`.",
        evidence="-",
    ),
    Rule(
        code="Q24",
        severity="warning",
        find=general.free_axes,
        title="A free axis of an input beside the batch",
        advice="Export with the size that the device will see; the batch may stay free.",
        evidence="-",
    ),
    Rule(
        code="Q25",
        severity="info",
        find=general.not_looked_into,
        title="A subgraph or local function that was not looked into",
        advice="Inline it, or trust the placement of the built engine alone.",
        evidence="-",
    ),
)
