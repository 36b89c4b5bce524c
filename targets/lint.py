"""A static linter of Q/DQ graphs: what is known to keep a runtime from running INT8, found before anything is compiled.

Reads an ONNX file. Host only: needs onnx. An error is a layer that is known to fall back to float in that runtime; a
warning costs speed or shows a graph that was not meant so. Placement, read from the executed graph, is the proof.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from targets.errors import ModelError

Severity = Literal["error", "warning"]
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FUSED = frozenset({"BatchNormalization", "Clip", "Relu"})  # what may stand between a product and its quantizer
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place in the graph: a stable code, its weight, the node's name, and what to do about it."""

    code: str
    severity: Severity
    node: str
    message: str


def lint(onnx_path: Path, dialect: str) -> list[Finding]:
    """All findings for the runtime of `dialect`, errors first. Raises ModelError for no ONNX or an unknown dialect."""
    if dialect not in RULES:
        near = difflib.get_close_matches(dialect, RULES, n=1)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(RULES)}."
        raise ModelError(f"dialect '{dialect}': no rules for it. {advice}")
    graph = _Graph(_load(onnx_path))
    findings = [finding for rule in RULES[dialect] for finding in rule(graph)]
    return sorted(findings, key=lambda finding: (finding.severity, finding.code, finding.node))


class _Graph:
    """Who makes and who reads each tensor of the top-level graph."""

    def __init__(self, proto: Any) -> None:
        self.nodes: list[Any] = list(proto.node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)
        self.initializers = {tensor.name: tensor for tensor in proto.initializer}

    def of(self, *op_types: str) -> Iterator[Any]:
        return (node for node in self.nodes if node.op_type in op_types)

    def constant(self, name: str) -> Any | None:
        """The TensorProto behind a name: an initializer or a Constant, through Identity."""
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer.get(name)
        if node is not None and node.op_type == "Identity":
            return self.constant(node.input[0])
        if node is not None and node.op_type == "Constant":
            return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        return None

    def is_weight(self, linear: Any) -> bool:
        """True for the Q or DQ of a constant."""
        maker = self.producer.get(linear.input[0])
        source = maker.input[0] if maker is not None and maker.op_type == QUANTIZE else linear.input[0]
        return self.constant(source) is not None

    def dequantize(self, name: str) -> Any | None:
        node = self.producer.get(name)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def dtype(self, linear: Any) -> str:
        """The integer type of a Q or DQ, by its zero point; uint8 is ONNX's default."""
        import onnx

        zero_point = self.constant(linear.input[2]) if len(linear.input) > 2 else None
        return onnx.TensorProto.DataType.Name(zero_point.data_type).lower() if zero_point is not None else "uint8"


Rule = Callable[[_Graph], Iterator[Finding]]


def nothing_quantized(graph: _Graph) -> Iterator[Finding]:
    if not any(graph.of(QUANTIZE, DEQUANTIZE)):
        yield Finding(
            code="not-quantized",
            severity="error",
            node="",
            message="the graph holds no QuantizeLinear or DequantizeLinear: it is float. Quantize it first.",
        )


def computed_scale(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(QUANTIZE, DEQUANTIZE):
        if any(graph.constant(name) is None for name in node.input[1:] if name):
            yield Finding(
                code="computed-scale",
                severity="error",
                node=node.name,
                message="its scale or zero point is computed at run time: runtimes fuse constants only. Fix the ranges.",
            )


def per_channel_activation(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(QUANTIZE):
        scale = graph.constant(node.input[1])
        if scale is not None and not graph.is_weight(node) and _num_elements(scale) > 1:
            yield Finding(
                code="per-channel-activation",
                severity="error",
                node=node.name,
                message=f"an activation with {_num_elements(scale)} scales: none of these runtimes computes it in INT8. "
                "Quantize activations per tensor.",
            )


def batchnorm_before_quantizer(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("BatchNormalization"):
        maker = graph.producer.get(node.input[0])
        if maker is not None and maker.op_type in CONVOLUTIONS:
            yield Finding(
                code="batchnorm-after-convolution",
                severity="error",
                node=node.name,
                message=f"BatchNorm stands between {maker.name} and its quantizer, so the convolution cannot be fused. "
                "Fold BatchNorm before quantization.",
            )


def mixed_types(graph: _Graph) -> Iterator[Finding]:
    """ONNX Runtime fuses a convolution or an Add only if its activations and its result have one integer type."""
    for node in graph.of("Conv", "Add", "GlobalAveragePool", "AveragePool"):
        makers = [graph.dequantize(name) for name in node.input]
        inputs = {graph.dtype(maker) for maker in makers if maker is not None and not graph.is_weight(maker)}
        outputs = {graph.dtype(quantizer) for quantizer in _quantizers_of_result(graph, node)}
        if inputs and outputs and len(inputs | outputs) > 1:
            yield Finding(
                code="mixed-types",
                severity="error",
                node=node.name,
                message=f"takes {'/'.join(sorted(inputs))} and gives {'/'.join(sorted(outputs))}: it falls back to float. "
                "Export in the onnxruntime dialect (uint8 throughout).",
            )


def weight_only(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(*PRODUCTS):
        x, weight = graph.dequantize(node.input[0]), graph.dequantize(node.input[1])
        if (
            weight is not None
            and graph.is_weight(weight)
            and x is None
            and not _moved(graph, node.input[0], MOVES | {"MaxPool"})
        ):
            yield Finding(
                code="weight-only",
                severity="warning",
                node=node.name,
                message="integer weights but a float activation: computed in float. Quantize its input too.",
            )


def float_weight(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(*PRODUCTS):
        if graph.dequantize(node.input[0]) is not None and graph.constant(node.input[1]) is not None:
            yield Finding(
                code="float-weight",
                severity="warning",
                node=node.name,
                message="an integer activation but float weights: computed in float. Quantize the weights too.",
            )


def asymmetric_weight(graph: _Graph) -> Iterator[Finding]:
    import numpy as np
    from onnx import numpy_helper

    for node in graph.of(DEQUANTIZE):
        zero_point = graph.constant(node.input[2]) if len(node.input) > 2 and graph.is_weight(node) else None
        if zero_point is not None and np.any(numpy_helper.to_array(zero_point)):
            yield Finding(
                code="asymmetric-weight",
                severity="warning",
                node=node.name,
                message="weights with a zero point other than 0 cost a correction in every product. Use symmetric weights.",
            )


def no_output_quantizer(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("Conv"):
        quantized = graph.dequantize(node.input[0]) is not None and graph.dequantize(node.input[1]) is not None
        if quantized and not _quantizers_of_result(graph, node):
            yield Finding(
                code="no-output-quantizer",
                severity="warning",
                node=node.name,
                message="its result is not quantized: ONNX Runtime has no integer convolution with a float result. "
                "Quantize the result.",
            )


def distant_dequantize(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of(*PRODUCTS):
        if _moved(graph, node.input[0], MOVES):
            yield Finding(
                code="distant-dequantize",
                severity="warning",
                node=node.name,
                message="a Flatten or Reshape stands between it and the DequantizeLinear of its input: not fused. "
                "Export in the onnxruntime dialect.",
            )


def float_bias(graph: _Graph) -> Iterator[Finding]:
    for node in graph.of("Gemm"):
        quantized = graph.dequantize(node.input[0]) is not None and graph.dequantize(node.input[1]) is not None
        if quantized and len(node.input) > 2 and graph.constant(node.input[2]) is not None:
            yield Finding(
                code="float-bias",
                severity="warning",
                node=node.name,
                message="a float bias keeps it from becoming QGemm. Export in the onnxruntime dialect (int32 bias).",
            )


GENERAL: tuple[Rule, ...] = (
    nothing_quantized,
    computed_scale,
    per_channel_activation,
    weight_only,
    float_weight,
    asymmetric_weight,
)
RULES: dict[str, tuple[Rule, ...]] = {
    "openvino": GENERAL,
    "onnxruntime": (
        *GENERAL,
        batchnorm_before_quantizer,
        mixed_types,
        no_output_quantizer,
        distant_dequantize,
        float_bias,
    ),
}


def _quantizers_of_result(graph: _Graph, node: Any) -> list[Any]:
    """The quantizers of a node's result, also behind what is fused into it."""
    found = []
    for reader in graph.readers.get(node.output[0], []):
        if reader.op_type == QUANTIZE:
            found.append(reader)
        elif reader.op_type in FUSED:
            found += _quantizers_of_result(graph, reader)
    return found


def _moved(graph: _Graph, name: str, moves: frozenset[str]) -> bool:
    """True if a tensor is a DequantizeLinear's, carried on by an operator that changes no value."""
    node = graph.producer.get(name)
    return node is not None and node.op_type in moves and graph.dequantize(node.input[0]) is not None


def _num_elements(tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _load(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} is not an ONNX file that can be read: {reason}. Export it again.") from None
