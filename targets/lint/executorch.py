"""ExecuTorch's XNNPACK: what keeps its partitioner from making an INT8 operator of a Q/DQ group.

It wants a product between a quantized input and symmetric int8 weights, whose result is quantized too; our compile writes
such groups in the one form that it knows, and everything else in float. The rules are those of the partitioner's sources and
of our compile (`targets/executorch_graph.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from targets.lint import general
from targets.lint.graph import STANDARD, Graph, is_linear
from targets.lint.rule import Found, Platform, Rule

LOWEST_WEIGHT = -127
PASSED = frozenset(
    {
        "Concat",
        "Dropout",
        "Flatten",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
FUSED = frozenset({"Relu", "Clip"})


def lowest_weight(graph: Graph, platform: Platform) -> Iterator[Found]:
    """Kernels for ARM add two products in 16 bits, and twice -128 * -128 is one too many."""
    for node in graph.products():
        weight = graph.weight(node)
        integers = None if weight is None else graph.weight_integers(weight)
        if integers is not None and integers.dtype == np.int8 and int(integers.min(initial=0)) < LOWEST_WEIGHT:
            yield Found(node, "its weights hold -128, which XNNPACK's kernels do not take: computed in float.")


def result_not_quantized(graph: Graph, platform: Platform) -> Iterator[Found]:
    """A result has one reader: its quantizer, or a Relu or Clip before it."""
    for node in graph.products():
        if not general.is_quantized(graph, node, PASSED):
            continue
        name, _ = general.end_of(graph, node, FUSED)
        readers = graph.readers.get(name, [])
        if name in graph.outputs or len(readers) != 1 or not is_linear(readers[0], "QuantizeLinear"):
            yield Found(node, "its result is not quantized, or has other readers too: computed in float.")


RULES: tuple[Rule, ...] = (
    Rule(
        code="X01",
        severity="error",
        find=general.nothing_quantized,
        title="Nothing is quantized",
        advice="Quantize it first: `edgestill quantize`.",
        evidence="tried",
    ),
    Rule(
        code="X02",
        severity="error",
        find=general.foreign_domains(STANDARD),
        title="An operator of a domain that is not ONNX's own",
        advice="Replace it by ONNX's own operators before export.",
        evidence="tried",
    ),
    Rule(
        code="X03",
        severity="error",
        find=general.scale_is_no_step(zero_weights=False),
        title="A scale that is empty, NaN, infinite, negative or 0",
        advice="Calibrate again with data that are numbers and not all 0; prune a dead channel or give it a scale of its own.",
        evidence="read",
    ),
    Rule(
        code="X04",
        severity="error",
        find=general.computed_scale,
        title="A scale or zero point computed from the input",
        advice="Fix the ranges by calibration.",
        evidence="tried",
    ),
    Rule(
        code="X05",
        severity="error",
        find=general.scale_count(zero_points="error"),
        title="As many scales as no axis is long, or another number of zero points",
        advice="Give one scale, or one for each channel of the axis, and a zero point for each scale.",
        evidence="read",
    ),
    Rule(
        code="X06",
        severity="error",
        find=general.per_channel_activation,
        title="A per-channel scale on an activation",
        advice="Quantize activations per tensor.",
        evidence="tried",
    ),
    Rule(
        code="X07",
        severity="error",
        find=general.weight_axis,
        title="Weights quantized along another axis than their outputs",
        advice="Quantize weights along their output axis.",
        evidence="tried",
    ),
    Rule(
        code="X08",
        severity="error",
        find=general.unsupported_type(frozenset({"int8", "uint8"})),
        title="Q/DQ of 4 or 16 bits or of float8",
        advice="Quantize to int8 or uint8.",
        evidence="read",
    ),
    Rule(
        code="X09",
        severity="error",
        find=general.blocked,
        title="Scales shared by blocks (block_size)",
        advice="Use one scale a channel.",
        evidence="read",
    ),
    Rule(
        code="X10",
        severity="error",
        find=general.integer_operators(
            general.is_integer, "is not known: the compile takes Q/DQ, not ONNX's integer operators"
        ),
        title="QLinearConv, ConvInteger, MatMulInteger and their like",
        advice="Export Q/DQ (QuantFormat.QDQ in ONNX Runtime's quantizer).",
        evidence="tried",
    ),
    Rule(
        code="X11",
        severity="error",
        find=general.asymmetric_weight("Conv", "ConvTranspose", "Gemm", "MatMul"),
        title="Weights that are unsigned or have a zero point other than 0",
        advice="Use symmetric int8 weights.",
        evidence="tried",
    ),
    Rule(
        code="X12",
        severity="error",
        find=lowest_weight,
        title="Weights that hold -128",
        advice="Quantize weights to -127..127.",
        evidence="tried",
    ),
    Rule(
        code="X13",
        severity="warning",
        find=result_not_quantized,
        title="A quantized product whose result is not quantized (the last layer, most often)",
        advice="Quantize the result too, and read it nowhere else; a small last layer may stay in float.",
        evidence="tried",
    ),
    Rule(
        code="X14",
        severity="warning",
        find=general.unquantized_links(transparent=PASSED),
        title="No quantizer behind an operator between two quantized layers (Relu, Add, Mul, pooling)",
        advice="Quantize that operator's result too.",
        evidence="tried",
    ),
    Rule(
        code="X15",
        severity="warning",
        find=general.weight_only(transparent=PASSED),
        title="Only the weight is quantized",
        advice="Quantize the input too, unless only the file should be small.",
        evidence="tried",
    ),
    Rule(
        code="X16",
        severity="warning",
        find=general.float_weight,
        title="Only the activation is quantized",
        advice="Quantize the weights too.",
        evidence="tried",
    ),
    Rule(
        code="X17",
        severity="warning",
        find=general.free_axes,
        title="A free axis of an input beside the batch",
        advice="Export with the size that the device will see; a free batch becomes 1.",
        evidence="-",
    ),
    Rule(
        code="X18",
        severity="info",
        find=general.no_zero_point,
        title="A quantizer without a zero point: uint8 by default",
        advice="Write the zero point, so that the type can be seen.",
        evidence="read",
    ),
    Rule(
        code="X19",
        severity="info",
        find=general.not_looked_into,
        title="A subgraph or local function that was not looked into",
        advice="Inline it: the compile knows neither.",
        evidence="-",
    ),
)
