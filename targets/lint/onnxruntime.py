"""ONNX Runtime's CPU provider: what keeps its graph optimizer from making an integer operator of a Q/DQ group.

It replaces DQ -> operator -> Q by one integer operator, if types, readers and neighbours are as its selectors want them.
Each rule about INT8 is tried on the installed runtime by the tests, on a graph that has the fault and one that has not.
"""

from __future__ import annotations

from collections.abc import Iterator

from targets.lint import general
from targets.lint.graph import (
    CONVOLUTIONS,
    DEQUANTIZE,
    QUANTIZE,
    STANDARD,
    Graph,
    Node,
    is_linear,
    title_of,
)
from targets.lint.onnxruntime_fusion import (
    TRANSPARENT,
    clamp_that_stays,
    end,
    float_bias,
    float_weight,
    is_integer,
    result_not_quantized,
)
from targets.lint.onnxruntime_opset import unread_opset
from targets.lint.rule import Found, Platform, Rule

KNOWN_DOMAINS = STANDARD | {"ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
PASSED = TRANSPARENT | {"Flatten"}  # rule O21 speaks of Flatten
# What falls back to float with an int8 input on x86; Gemm does not.
UNSIGNED_ONLY = frozenset({"Add", "AveragePool", "Conv", "GlobalAveragePool", "MatMul", "Mul"})


def half_scale(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears():
        if linear.scale is not None and linear.scale.dtype.name in ("float16", "bfloat16"):
            yield Found(linear.node, f"its scale is {linear.scale.dtype}, so the layers around it are of that type.")


def batchnorm_after_convolution(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.of("BatchNormalization"):
        maker = graph.producer.get(node.input[0])
        if maker is not None and maker.op_type in CONVOLUTIONS and is_integer(graph, maker):
            yield Found(node, f"BatchNorm stands between '{title_of(maker)}' and its quantizer: computed in float.")


def branching_int8(graph: Graph, platform: Platform) -> Iterator[Found]:
    """On x86 the optimizer wants uint8, and turns an int8 pair into one by itself only where it has one reader."""
    if not platform.x86:
        return
    for linear in graph.activations(QUANTIZE):
        if linear.dtype != "int8" or linear.per_channel:
            continue
        readers = list(_readers_behind(graph, linear.node.output[0]))
        maker = graph.producer.get(linear.node.input[0])
        around = {reader.op_type for reader in readers if reader is not None} | {
            maker.op_type if maker is not None else ""
        }
        if len(readers) > 1 and around & UNSIGNED_ONLY:
            yield Found(
                linear.node, f"an int8 activation with {len(readers)} readers: the layers around it run in float."
            )


def _readers_behind(graph: Graph, name: str) -> Iterator[Node | None]:
    """All who read a quantized tensor behind DequantizeLinear and moves; None for the caller of the graph."""
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in graph.outputs:
            yield None
        for reader in graph.readers.get(name, []):
            if reader.output and (is_linear(reader, DEQUANTIZE) or reader.op_type in TRANSPARENT):
                waiting.append(reader.output[0])
            else:
                yield reader


def mixed_types(graph: Graph, platform: Platform) -> Iterator[Found]:
    """Where int8 stays int8 (not on x86), a fused operator has one integer type for its activations and its result."""
    if platform.x86:
        return
    for node in graph.of("Conv", "Add", "GlobalAveragePool", "AveragePool"):
        makers = [maker for name in node.input if (maker := graph.integer_activation(name)) is not None]
        inputs = {graph.quantizer(maker).dtype for maker in makers}
        outputs = {quantizer.dtype for quantizer in graph.quantizers_of(end(graph, node)[0])}
        if inputs and outputs and len(inputs | outputs) > 1:
            yield Found(
                node, f"takes {'/'.join(sorted(inputs))} and gives {'/'.join(sorted(outputs))}: computed in float."
            )


def flatten_after_dequantize(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.products():
        flatten = graph.producer.get(general.origin(graph, node.input[0], TRANSPARENT))
        if flatten is None or flatten.op_type != "Flatten" or graph.weight(node) is None:
            continue
        if graph.integer_activation(general.origin(graph, flatten.input[0], TRANSPARENT)):
            yield Found(node, f"'{title_of(flatten)}' stands between it and the DequantizeLinear of its input: float.")


RULES: tuple[Rule, ...] = (
    Rule(
        code="O01",
        severity="error",
        find=general.nothing_quantized,
        title="Nothing is quantized",
        advice="Quantize it first: `edgestill quantize`.",
        evidence="tried",
    ),
    Rule(
        code="O02",
        severity="error",
        find=unread_opset,
        title="An opset that the installed ONNX Runtime does not read",
        advice="Export with opset 17, or install a newer onnxruntime.",
        evidence="tried",
    ),
    Rule(
        code="O03",
        severity="error",
        find=general.foreign_domains(KNOWN_DOMAINS),
        title="An operator of a domain that ONNX Runtime does not know",
        advice="Replace it by ONNX's own operators before export.",
        evidence="tried",
    ),
    Rule(
        code="O04",
        severity="error",
        find=general.scale_is_no_step(zero_weights=True),
        title="A scale that is empty, NaN, infinite or negative, or 0 for an activation",
        advice="Calibrate again with data that are numbers and not all 0; ONNX wants a positive scale.",
        evidence="-",
    ),
    Rule(
        code="O05",
        severity="warning",
        find=general.dead_channel,
        title="A dead channel: a weight scale of 0",
        advice="Prune the channel, or give it a scale of its own; it runs in INT8 all the same.",
        evidence="tried",
    ),
    Rule(
        code="O06",
        severity="warning",
        find=general.computed_scale,
        title="A scale or zero point computed from the input",
        advice="Fix the ranges by calibration; the layer runs in INT8, after the time that the range takes.",
        evidence="tried",
    ),
    Rule(
        code="O07",
        severity="error",
        find=general.scale_count(zero_points="warning"),
        title="As many scales as no axis is long, or another number of zero points",
        advice="Give one scale, or one for each channel of the axis, and a zero point for each scale.",
        evidence="tried",
    ),
    Rule(
        code="O08",
        severity="error",
        find=general.per_channel_activation,
        title="A per-channel scale on an activation",
        advice="Quantize activations per tensor: with uint8 the graph does not run, with int8 it runs in float.",
        evidence="tried",
    ),
    Rule(
        code="O09",
        severity="error",
        find=general.weight_axis,
        title="Weights quantized along another axis than their outputs",
        advice="Quantize weights along their output axis: ONNX Runtime takes the scales for that axis and answers wrong.",
        evidence="tried",
    ),
    Rule(
        code="O10",
        severity="error",
        find=general.unsupported_type(frozenset({"int8", "uint8"})),
        title="Q/DQ of 4 or 16 bits or of float8",
        advice="Quantize to int8 or uint8.",
        evidence="tried",
    ),
    Rule(
        code="O11",
        severity="error",
        find=general.blocked,
        title="Scales shared by blocks (block_size)",
        advice="Use one scale a channel: in blocks, MatMul answers wrong and Gemm runs in float.",
        evidence="tried",
    ),
    Rule(
        code="O12",
        severity="error",
        find=half_scale,
        title="A float16 or bfloat16 scale",
        advice="Write scales and the float layers around them in float32.",
        evidence="tried",
    ),
    Rule(
        code="O13",
        severity="error",
        find=batchnorm_after_convolution,
        title="BatchNorm between a convolution and its quantizer",
        advice="Fold BatchNorm into the convolution before quantization.",
        evidence="tried",
    ),
    Rule(
        code="O14",
        severity="error",
        find=branching_int8,
        title="An int8 activation with several readers (x86)",
        advice="Use uint8 with zero point 128, the same steps, as `edgestill quantize` does for this target.",
        evidence="tried",
    ),
    Rule(
        code="O15",
        severity="error",
        find=mixed_types,
        title="Another integer type in than out (not on x86, where int8 becomes uint8 by itself)",
        advice="Use uint8 throughout, as `edgestill quantize` does for this target.",
        evidence="read",
    ),
    Rule(
        code="O16",
        severity="error",
        find=clamp_that_stays,
        title="A Relu or Clip before a quantizer that does not saturate at its bounds",
        advice="Use uint8 with zero point 0 behind Relu and scale 6/255 behind ReLU6, or quantize before the Clip too.",
        evidence="tried",
    ),
    Rule(
        code="O17",
        severity="warning",
        find=general.unquantized_links(transparent=PASSED),
        title="No quantizer behind an operator between two quantized layers (Concat, Add, Mul, Resize, pooling)",
        advice="Quantize that operator's result too.",
        evidence="tried",
    ),
    Rule(
        code="O18",
        severity="warning",
        find=general.weight_only(transparent=PASSED),
        title="Only the weight is quantized",
        advice="Quantize the input too, unless only the file should be small.",
        evidence="tried",
    ),
    Rule(
        code="O19",
        severity="warning",
        find=float_weight,
        title="Only the activation is quantized",
        advice="Quantize the weights too, with the scales that training or calibration chose.",
        evidence="tried",
    ),
    Rule(
        code="O20",
        severity="warning",
        find=general.asymmetric_weight(),
        title="Unsigned weights, or a zero point other than 0",
        advice="Use symmetric int8 weights: a zero point costs a correction in every product.",
        evidence="tried",
    ),
    Rule(
        code="O21",
        severity="warning",
        find=flatten_after_dequantize,
        title="Flatten between a DequantizeLinear and a matrix product",
        advice="Put the DequantizeLinear behind Flatten, as `edgestill quantize` does for this target.",
        evidence="tried",
    ),
    Rule(
        code="O22",
        severity="warning",
        find=result_not_quantized,
        title="A result that is not read by one quantizer alone",
        advice="Put one quantizer behind it, and let all readers read what that gives.",
        evidence="tried",
    ),
    Rule(
        code="O23",
        severity="warning",
        find=float_bias,
        title="A float bias on a Gemm whose result is not quantized",
        advice="Give it an int32 bias with scale s_x * s_w, as `edgestill quantize` does, or quantize its result.",
        evidence="tried",
    ),
    Rule(
        code="O24",
        severity="warning",
        find=general.integer_deconvolution(TRANSPARENT),
        title="A quantized ConvTranspose",
        advice="Replace it by Resize and Conv, or leave it in float.",
        evidence="tried",
    ),
    Rule(
        code="O25",
        severity="warning",
        find=general.saturation,
        title="uint8 times int8 weights of 8 bits on an x86 CPU without VNNI",
        advice="Quantize weights to 7 bits, as `edgestill quantize --scheme cpu-int8-w7` does, or use a CPU with VNNI.",
        evidence="read",
    ),
    Rule(
        code="O26",
        severity="warning",
        find=general.free_axes,
        title="A free axis of an input beside the batch",
        advice="Export with the size that the device will see; the batch may stay free.",
        evidence="-",
    ),
    Rule(
        code="O27",
        severity="info",
        find=general.no_zero_point,
        title="A quantizer without a zero point: uint8 by default",
        advice="Write the zero point, so that the type can be seen.",
        evidence="tried",
    ),
    Rule(
        code="O28",
        severity="info",
        find=general.not_looked_into,
        title="A subgraph or local function that was not looked into",
        advice="Inline it, or trust the placement of the executed graph alone.",
        evidence="-",
    ),
)
