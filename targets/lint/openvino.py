"""OpenVINO's CPU plugin: what its low-precision transformations leave in float.

They take far more than ONNX Runtime does: BatchNorm, Relu, float biases and float results around a quantized product,
int8 and uint8 mixed, any opset. So there are no rules against those. Each rule about INT8 is tried on the installed
runtime by the tests, on a graph that has the fault and one that has not.
"""

from __future__ import annotations

from collections.abc import Iterator

from targets.lint import general
from targets.lint.graph import STANDARD, Graph, Node, Quantizer, attribute_of
from targets.lint.rule import Found, Platform, Rule

KNOWN_DOMAINS = STANDARD | {"com.microsoft", "org.openvinotoolkit"}
TRANSPARENT = frozenset(
    {
        "Concat",
        "Dropout",
        "Flatten",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Resize",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# QLinearMatMul is turned into Q/DQ and runs in INT8.
INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv"})


def per_channel_activation(graph: Graph, platform: Platform) -> Iterator[Found]:
    """Scales of a depthwise convolution's input move into its weights; a sum over channels has no place for them."""
    for node in graph.products("Conv"):
        maker = graph.integer_activation(general.origin(graph, node.input[0], TRANSPARENT))
        linear = graph.quantizer(maker) if maker is not None else None
        if (
            linear is None
            or linear.scale is None
            or not linear.per_channel
            or (linear.scale == linear.scale.flat[0]).all()
        ):
            continue
        if not is_depthwise(graph, node):
            yield Found(node, f"its input has {linear.scale.size} scales, one a channel: computed in float.")


def is_depthwise(graph: Graph, convolution: Node) -> bool:
    shape = graph.shape(convolution.input[1])
    return attribute_of(convolution, "group", 1) > 1 and shape is not None and len(shape) > 1 and shape[1] == 1


def concat_of_scales(graph: Graph, platform: Platform) -> Iterator[Found]:
    """A convolution takes one scale: Concat without a quantizer behind it hands on one a branch."""
    for node in graph.products("Conv"):
        concat = graph.producer.get(general.origin(graph, node.input[0], TRANSPARENT - {"Concat"}))
        if concat is None or concat.op_type != "Concat" or is_depthwise(graph, node) or graph.weight(node) is None:
            continue
        makers = [graph.integer_activation(name) for name in concat.input]
        steps = {_step(graph.quantizer(maker)) if maker is not None else None for maker in makers}
        if len(steps) > 1:
            yield Found(node, f"'{concat.output[0]}' joins branches of different scales: computed in float.")


def _step(linear: Quantizer) -> tuple[object, ...]:
    scale = None if linear.scale is None else tuple(linear.scale.reshape(-1).tolist())
    zero_point = 0 if linear.zero_point is None else tuple(linear.zero_point.reshape(-1).tolist())
    return scale, zero_point or 0, linear.dtype


RULES: tuple[Rule, ...] = (
    Rule(
        code="V01",
        severity="error",
        find=general.nothing_quantized,
        title="Nothing is quantized",
        advice="Quantize it first: `edgestill quantize`.",
        evidence="tried",
    ),
    Rule(
        code="V02",
        severity="error",
        find=general.foreign_domains(KNOWN_DOMAINS),
        title="An operator of a domain that OpenVINO does not read",
        advice="Replace it by ONNX's own operators before export.",
        evidence="tried",
    ),
    Rule(
        code="V03",
        severity="error",
        find=general.scale_is_no_step(zero_weights=True),
        title="A scale that is empty, NaN, infinite or negative, or 0 for an activation",
        advice="Calibrate again with data that are numbers and not all 0; ONNX wants a positive scale.",
        evidence="-",
    ),
    Rule(
        code="V04",
        severity="warning",
        find=general.dead_channel,
        title="A dead channel: a weight scale of 0",
        advice="Prune the channel, or give it a scale of its own; it runs in INT8 all the same.",
        evidence="tried",
    ),
    Rule(
        code="V05",
        severity="error",
        find=general.computed_scale,
        title="A scale or zero point computed from the input",
        advice="Fix the ranges by calibration.",
        evidence="tried",
    ),
    Rule(
        code="V06",
        severity="error",
        find=general.scale_count(zero_points="warning"),
        title="As many scales as no axis is long, or another number of zero points",
        advice="Give one scale, or one for each channel of the axis, and a zero point for each scale.",
        evidence="tried",
    ),
    Rule(
        code="V07",
        severity="error",
        find=per_channel_activation,
        title="A per-channel scale on the input of a convolution that is not depthwise",
        advice="Quantize activations per tensor.",
        evidence="tried",
    ),
    Rule(
        code="V08",
        severity="error",
        find=general.weight_axis,
        title="Weights quantized along another axis than their outputs",
        advice="Quantize weights along their output axis: a convolution runs in float, a matrix product answers wrong.",
        evidence="tried",
    ),
    Rule(
        code="V09",
        severity="error",
        find=general.unsupported_type(frozenset({"int8", "uint8"})),
        title="Q/DQ of 4 or 16 bits or of float8",
        advice="Quantize to int8 or uint8.",
        evidence="tried",
    ),
    Rule(
        code="V10",
        severity="error",
        find=general.integer_operators(
            INTEGER_OPERATORS.__contains__, "is computed in float: OpenVINO fuses Q/DQ, not ONNX's integer operators"
        ),
        title="QLinearConv, ConvInteger, MatMulInteger",
        advice="Export Q/DQ (QuantFormat.QDQ in ONNX Runtime's quantizer).",
        evidence="tried",
    ),
    Rule(
        code="V11",
        severity="error",
        find=general.asymmetric_weight("Conv"),
        title="Convolution weights that are unsigned or have a zero point other than 0",
        advice="Use symmetric int8 weights.",
        evidence="tried",
    ),
    Rule(
        code="V12",
        severity="error",
        find=concat_of_scales,
        title="A convolution behind Concat whose branches have different scales",
        advice="Give the branches one scale, or quantize what Concat gives.",
        evidence="tried",
    ),
    Rule(
        code="V13",
        severity="warning",
        find=general.unquantized_links(transparent=TRANSPARENT),
        title="No quantizer behind an operator between two quantized layers (Relu, Add, Mul, pooling)",
        advice="Quantize that operator's result too.",
        evidence="tried",
    ),
    Rule(
        code="V14",
        severity="warning",
        find=general.weight_only("Conv", "ConvTranspose", transparent=TRANSPARENT),
        title="Only the weight of a convolution is quantized",
        advice="Quantize the input too, unless only the file should be small.",
        evidence="tried",
    ),
    Rule(
        code="V15",
        severity="warning",
        find=general.float_weight,
        title="Only the activation is quantized",
        advice="Quantize the weights too.",
        evidence="tried",
    ),
    Rule(
        code="V16",
        severity="warning",
        find=general.integer_deconvolution(frozenset()),
        title="A quantized ConvTranspose",
        advice="Replace it by Resize and Conv, or leave it in float.",
        evidence="tried",
    ),
    Rule(
        code="V17",
        severity="warning",
        find=general.saturation,
        title="uint8 times int8 weights of 8 bits on an x86 CPU without VNNI",
        advice="Quantize weights to 7 bits, as `edgestill quantize --scheme cpu-int8-w7` does, or use a CPU with VNNI.",
        evidence="tried",
    ),
    Rule(
        code="V18",
        severity="warning",
        find=general.free_axes,
        title="A free axis of an input beside the batch",
        advice="Export with the size that the device will see; the batch may stay free.",
        evidence="-",
    ),
    Rule(
        code="V19",
        severity="info",
        find=general.no_zero_point,
        title="A quantizer without a zero point: uint8 by default",
        advice="Write the zero point, so that the type can be seen.",
        evidence="tried",
    ),
    Rule(
        code="V20",
        severity="info",
        find=general.not_looked_into,
        title="A subgraph or local function that was not looked into",
        advice="Inline it, or trust the placement of the executed graph alone.",
        evidence="-",
    ),
)
