"""What rules of several runtimes look for. How grave it is, and what to do, is said by each runtime's own table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from targets.lint.graph import (
    CONVOLUTIONS,
    DEQUANTIZE,
    QUANTIZE,
    Graph,
    Node,
    Quantizer,
    attribute_of,
    has_subgraph,
    is_linear,
    title_of,
)
from targets.lint.rule import Find, Found, Platform, Severity

# u8 * s8 twice in 16 bits: 2 * 255 * 64 = 32640 fits, 2 * 255 * 65 does not.
LARGEST_7_BIT = 64


def is_integer(op_type: str) -> bool:
    """Whether an operator computes with integers by itself, without Q/DQ around it."""
    return op_type.startswith(("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize"))


def nothing_quantized(graph: Graph, platform: Platform) -> Iterator[Found]:
    if next(graph.linears(), None) is None and not any(is_integer(node.op_type) for node in graph.nodes):
        yield Found(graph.name, "the graph holds no QuantizeLinear or DequantizeLinear: it is float.")


def integer_operators(is_one: Callable[[str], bool], told: str) -> Find:
    """Operators that compute with integers by themselves, where the runtime wants Q/DQ; `told` is what it does with them."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.nodes:
            if is_one(node.op_type):
                yield Found(node, f"{node.op_type} {told}.")

    return find


def integer_deconvolution(transparent: frozenset[str]) -> Find:
    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.products("ConvTranspose"):
            if is_quantized(graph, node, transparent):
                yield Found(
                    node, "a quantized ConvTranspose: the runtime has no integer kernel, so it is computed in float."
                )

    return find


def is_quantized(graph: Graph, product: Node, transparent: frozenset[str]) -> bool:
    """Whether input and weight of a product are both dequantized."""
    source = origin(graph, product.input[0], transparent)
    return graph.dequantize(source) is not None and graph.weight(product) is not None


def end_of(graph: Graph, node: Node, passed: frozenset[str]) -> tuple[str, list[Node]]:
    """The result of a node behind operators of `passed` that alone read it, and these."""
    name, on_the_way = node.output[0], list[Node]()
    while name not in graph.outputs and len(readers := graph.readers.get(name, [])) == 1:
        if readers[0].op_type not in passed:
            break
        on_the_way.append(readers[0])
        name = readers[0].output[0]
    return name, on_the_way


def foreign_domains(known: frozenset[str]) -> Find:
    """Nodes of a domain that the runtime does not know; local functions are the model's own."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.nodes:
            if node.domain not in known and (node.domain, node.op_type) not in graph.functions:
                yield Found(
                    node, f"'{node.op_type}' is of the domain '{node.domain}', which the runtime does not know."
                )

    return find


def scale_is_no_step(*, zero_weights: bool) -> Find:
    """A scale that divides into no number; `zero_weights` lets a weight's scale be 0, which is a dead channel."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for linear in graph.linears():
            may_be_zero = zero_weights and graph.is_weight(linear.node)
            if linear.scale is not None and (fault := _fault_of_scale(linear, may_be_zero)):
                yield Found(linear.node, f"its scale {fault}.")

    return find


def _fault_of_scale(linear: Quantizer, may_be_zero: bool) -> str:
    scale = linear.scale
    if scale is None or not scale.size:
        return "is empty"
    if "float" not in scale.dtype.name:
        return f"is {scale.dtype}, not a float"
    values = scale.astype(np.float64)
    if not np.isfinite(values).all():
        return "holds NaN or infinity"
    if (values < 0).any():
        return f"is negative ({values.min():.4g})"
    return "is 0" if (values == 0).any() and not may_be_zero else ""


def dead_channel(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears(DEQUANTIZE):
        if linear.scale is not None and graph.is_weight(linear.node) and (dead := int(np.sum(linear.scale == 0))):
            yield Found(
                linear.node, f"{dead} of {linear.scale.size} scales are 0: those channels always give their bias."
            )


def computed_scale(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears():
        if any(name and name not in graph.constants for name in linear.node.input[1:3]):
            yield Found(
                linear.node, "its scale or zero point depends on the graph's input, so it is computed in every run."
            )


def scale_count(zero_points: Severity) -> Find:
    """As many scales as the axis is long, or one; as many zero points as scales, which not every runtime minds."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for linear in graph.linears():
            if linear.scale is None or linear.block_size:
                continue
            count = linear.scale.size
            if seen := _other_length(graph, linear):
                yield Found(linear.node, f"{count} scales along axis {linear.axis}, but the tensor {seen}.")
            elif linear.zero_point is not None and linear.zero_point.size != count:
                yield Found(linear.node, f"{count} scales but {linear.zero_point.size} zero points.", zero_points)

    return find


def _other_length(graph: Graph, linear: Quantizer) -> str:
    """What a tensor has in place of one scale a channel; empty where the count fits or the shape is not known."""
    shape = graph.shape(linear.node.input[0])
    if linear.scale is None or not linear.per_channel or shape is None:
        return ""
    if not -len(shape) <= linear.axis < len(shape):
        return "has no such axis"
    size = shape[linear.axis]
    return "" if size in (None, linear.scale.size) else f"is {size} long there"


def per_channel_activation(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.activations(QUANTIZE):
        if linear.per_channel and linear.scale is not None:
            yield Found(linear.node, f"an activation with {linear.scale.size} scales, one a channel.")


def weight_axis(graph: Graph, platform: Platform) -> Iterator[Found]:
    """Weights must have one scale an output channel: anything else cannot be taken out of the sum over the inputs."""
    for node in graph.products():
        weight = graph.weight(node)
        if weight is None or weight.axis is None or weight.quantizer.block_size:
            continue
        wanted = output_axis(graph, node)
        if wanted is not None and weight.axis != wanted:
            title = title_of(weight.quantizer.node)
            yield Found(
                node, f"its weight '{title}' is quantized along axis {weight.axis}, not along {wanted}, its outputs."
            )


def output_axis(graph: Graph, product: Node) -> int | None:
    """The axis of a product's weight that counts its outputs; None where the weight's rank is not known."""
    if product.op_type == "MatMul":
        shape = graph.shape(product.input[1])
        return len(shape) - 1 if shape else None
    if product.op_type == "Gemm":
        return 0 if attribute_of(product, "transB", 0) else 1
    return 0 if product.op_type == "Conv" else 1


def unsupported_type(runs: frozenset[str]) -> Find:
    """Q and DQ of integers that the runtime does not multiply; int32 is a bias."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for linear in graph.linears():
            if linear.dtype not in runs | {"int32"}:
                yield Found(linear.node, f"quantizes to {linear.dtype}, which the runtime does not compute with.")

    return find


def blocked(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears():
        if linear.block_size:
            yield Found(linear.node, f"blocks of {linear.block_size} share a scale along axis {linear.axis}.")


def weight_only(*op_types: str, transparent: frozenset[str]) -> Find:
    """Quantized weights, and an input that nobody quantized."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.products(*op_types):
            source = origin(graph, node.input[0], transparent)
            if graph.weight(node) is not None and not graph.dequantize(source) and not unquantized_link(graph, source):
                yield Found(node, "integer weights but a float input: it is computed in float.")

    return find


def unquantized_links(*op_types: str, transparent: frozenset[str]) -> Find:
    """A product with quantized weights behind an operator that reads integers and whose result is not quantized."""

    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.products(*op_types):
            link = unquantized_link(graph, origin(graph, node.input[0], transparent))
            if link is not None and graph.weight(node) is not None:
                name = f"{link.op_type} '{title_of(link)}'"
                yield Found(
                    node, f"its input comes from {name}, which reads integers and gives a float: computed in float."
                )

    return find


def unquantized_link(graph: Graph, name: str) -> Node | None:
    """The maker of a float tensor, if it reads a dequantized activation and is no product itself."""
    node = graph.producer.get(name)
    if node is None or is_linear(node, QUANTIZE, DEQUANTIZE) or node.op_type in CONVOLUTIONS | {"Gemm", "MatMul"}:
        return None
    return node if any(graph.integer_activation(value) for value in node.input) else None


def origin(graph: Graph, name: str, transparent: frozenset[str]) -> str:
    """The tensor that `name` was before operators through which the runtime carries integers."""
    while (node := graph.producer.get(name)) is not None and node.op_type in transparent and node.input:
        name = node.input[0]
    return name


def float_weight(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.products():
        if graph.integer_activation(node.input[0]) and node.input[1] in graph.constants and not graph.weight(node):
            yield Found(node, "an integer input but float weights: it is computed in float.")


def asymmetric_weight(*op_types: str) -> Find:
    def find(graph: Graph, platform: Platform) -> Iterator[Found]:
        for node in graph.products(*op_types):
            weight = graph.weight(node)
            zero = None if weight is None else weight.quantizer.zero_point
            unsigned = weight is not None and weight.quantizer.dtype.startswith("uint")
            if unsigned or (zero is not None and zero.astype(np.float32).any()):
                yield Found(node, "its weights are unsigned or have a zero point other than 0.")

    return find


def no_zero_point(graph: Graph, platform: Platform) -> Iterator[Found]:
    for linear in graph.linears(QUANTIZE):
        if not linear.has_zero_point and not attribute_of(linear.node, "output_dtype", 0):
            yield Found(
                linear.node, "no zero point and no output_dtype: by ONNX's default it quantizes to uint8 from 0 up."
            )


def saturation(graph: Graph, platform: Platform) -> Iterator[Found]:
    """u8 activations and s8 weights of 8 bits on an x86 CPU that adds two products in 16 bits.

    Depthwise kernels widen the products first (tried with both runtimes on an AVX2 CPU), with one output a channel only.
    """
    if not platform.saturates:
        return
    for node in graph.products():
        maker, weight = graph.dequantize(node.input[0]), graph.weight(node)
        if (
            maker is None
            or weight is None
            or graph.quantizer(maker).dtype != "uint8"
            or weight.quantizer.dtype != "int8"
        ):
            continue
        integers = graph.weight_integers(weight)
        if (
            integers is not None
            and integers.size
            and not _is_plain_depthwise(node, integers)
            and (peak := int(np.abs(integers.astype(np.int32)).max())) > LARGEST_7_BIT
        ):
            yield Found(node, f"weights up to {peak} times uint8 inputs overflow 16 bits, and this CPU has no VNNI.")


def _is_plain_depthwise(node: Node, weight: np.ndarray[Any, Any]) -> bool:
    groups = int(attribute_of(node, "group", 1)) if node.op_type == "Conv" else 1
    return bool(1 < groups == weight.shape[0] and weight.shape[1] == 1)


def free_axes(graph: Graph, platform: Platform) -> Iterator[Found]:
    for name, value in graph.inputs.items():
        shape = graph.shape(name)
        free = (
            [] if shape is None or name in graph.initializers else [i for i, size in enumerate(shape) if size is None]
        )
        if free and free != [0]:
            axes = ", ".join(str(axis) for axis in free if axis)
            yield Found(
                value.name, f"axis {axes} of this input is free: it is compiled and measured with size 1 there."
            )


def not_looked_into(graph: Graph, platform: Platform) -> Iterator[Found]:
    for node in graph.nodes:
        if has_subgraph(node) or (node.domain, node.op_type) in graph.functions:
            yield Found(
                node, f"what stands inside this {node.op_type} was not looked at: rules see the main graph only."
            )
