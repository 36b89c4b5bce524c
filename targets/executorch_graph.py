"""An ONNX graph, float or Q/DQ, as a torch module that ExecuTorch's XNNPACK partitioner recognises.

What XNNPACK computes in INT8 is a product between a quantized input, int8 weights with one scale an output and zero point 0,
and a quantized result, one type all over: int8. So every activation is written as int8 (uint8 with zero point z is int8 with
z - 128 and the same scale: the same values), each reader gets a dequantization of its own, and a product that lacks one of
the three gets its weights as floats: the same values again. Integers pass moves of data and MaxPool as they are. Imports
torch and onnx, so it is imported by the compile alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from targets.base import Array
from targets.errors import TargetError
from targets.executorch_operators import MOVES, OPERATORS, PRODUCTS, Call

LOW, HIGH = -128, 127
LOWEST_WEIGHT = -127  # two products of -128 * -128 overflow the 16 bits of XNNPACK's kernels for ARM
LINEAR = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Step:
    """The scale and zero point of a whole int8 tensor."""

    scale: float
    zero_point: int
    # What was taken from the graph's own integers: 128 where these are uint8. Two steps of other integers say the same.
    shift: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Integers:
    """A quantized activation: an int8 tensor that stands for (x - zero_point) * scale."""

    tensor: Tensor
    step: Step


@dataclass(frozen=True)
class Weight:
    """A quantized constant; `axis` is None where one scale serves all."""

    integers: Array
    scale: Array
    zero_point: Array
    axis: int | None

    @property
    def ndim(self) -> int:
        return self.integers.ndim

    def floats(self) -> Array:
        steps = self.integers.astype(np.int32) - self._along(self.zero_point).astype(np.int32)
        return (steps * self._along(self.scale)).astype(np.float32)

    def transposed(self) -> Weight:
        """Of a matrix."""
        return Weight(self.integers.T, self.scale, self.zero_point, None if self.axis is None else 1 - self.axis)

    def runs_in_int8(self, output_axis: int) -> bool:
        symmetric = self.integers.dtype == np.int8 and not self.zero_point.any()
        return symmetric and self.axis in (None, output_axis) and int(self.integers.min(initial=0)) >= LOWEST_WEIGHT

    def _along(self, values: Array) -> Array:
        shape = [1] * self.integers.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        return values.reshape(shape) if values.size > 1 else values.reshape(())


Value = Array | Tensor | Integers | Weight
Q: Any = torch.ops.quantized_decomposed


class OnnxModule(nn.Module):
    """Takes the graph's inputs in their order and gives its outputs as a tuple. Run it once before it is traced: the
    constants become buffers in the first run. `float_type` is what float32 of the graph is computed in; inputs and outputs
    keep their types. Raises TargetError for an operator or a quantizer that is not known here."""

    def __init__(self, model: onnx.ModelProto, float_type: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.float_type = float_type
        graph = model.graph
        self.nodes = list(graph.node)
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.input_names = [value.name for value in graph.input if value.name not in self.constants]
        self.output_names = [value.name for value in graph.output]
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = [x.to(self.float_type) if x.dtype == torch.float32 else x for x in inputs]
        values: dict[str, Value] = {**self.constants, **dict(zip(self.input_names, given, strict=True))}
        for node in self.nodes:
            values.update(zip(node.output, self._run(node, values), strict=False))
        answers = [self._float(name, values[name]) for name in self.output_names]
        return tuple(x if self.float_type == torch.float32 else x.to(torch.float32) for x in answers)

    def _run(self, node: onnx.NodeProto, values: Mapping[str, Value]) -> Sequence[Value]:
        given = [values[name] if name else None for name in node.input]
        if node.op_type == "QuantizeLinear" and not isinstance(given[0], np.ndarray):
            return [self._quantize(node, given)]
        if node.op_type == "DequantizeLinear":
            return [_dequantize(node, given)]
        if node.op_type == "Shape" and isinstance(given[0], Tensor | Integers):
            shape = (given[0].tensor if isinstance(given[0], Integers) else given[0]).shape
            return [np.array(shape, np.int64)[_attribute(node, "start", 0) : _attribute(node, "end", None)]]
        if all(value is None or isinstance(value, np.ndarray) for value in given):
            return self._known_before(node, given)
        if node.op_type in PRODUCTS:
            return [self._product(node, given)]
        if node.op_type in MOVES and (step := self._step_through(node, given)) is not None:
            results = self._compute(node, [_with_step(value, step) for value in given])
            return [_integers(result, step) for result in results]
        return self._compute(node, given)

    def _known_before(self, node: onnx.NodeProto, given: Sequence[Value | None]) -> Sequence[Value]:
        feeds = {name: value for name, value in zip(node.input, given, strict=True) if value is not None}
        outputs: Sequence[Value] = ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds)
        return outputs

    def _compute(
        self, node: onnx.NodeProto, given: Sequence[Value | None], *, has_weights: bool = False
    ) -> list[Tensor]:
        if (operator := OPERATORS.get(node.op_type)) is None:
            raise _refused(node, "has no counterpart here")
        # XNNPACK's serializer keeps a constant once, as its first reader wants it: a bias that two products share would be
        # rounded to the step of one accumulator and be wrong in the other. So each product has constants of its own.
        own = f" of {node.output[0]}" if node.op_type in PRODUCTS else ""
        call = Call(
            op_type=node.op_type,
            title=title_of(node),
            attributes=_attributes(node),
            constants=[value if isinstance(value, np.ndarray) else None for value in given],
            as_tensor=lambda index: (
                None if given[index] is None else self._float(node.input[index] + own, given[index])
            ),
            opset=self.opsets.get("", self.opsets.get("ai.onnx", 1)),
            float_type=self.float_type,
            num_outputs=len(node.output),
            has_weights=has_weights,
        )
        result = operator(call)
        return [result] if isinstance(result, Tensor) else list(result)

    def _product(self, node: onnx.NodeProto, given: Sequence[Value | None]) -> Tensor:
        """A product with constant weights, in the form in which XNNPACK knows it; any other as it is."""
        x, weight = given[0], given[1]
        has_weights = isinstance(weight, np.ndarray | Weight)
        if not has_weights and node.op_type not in LINEAR:
            raise _refused(node, "convolves with weights that the run computes")
        if node.op_type in LINEAR and isinstance(weight, np.ndarray | Weight) and weight.ndim == 2:
            node, weight = _as_linear(node, weight)
        if isinstance(weight, Weight):
            bias_is_known = all(not isinstance(value, Tensor | Integers) for value in given[2:])
            quantized = isinstance(x, Integers) and bias_is_known and self._is_quantized_behind(node.output[0])
            output_axis = 1 if node.op_type == "ConvTranspose" else 0
            if quantized and _is_plain(node) and weight.runs_in_int8(output_axis):
                weight = self._dequantized(f"{node.input[1]} of {node.output[0]}", weight)
        return self._compute(node, [x, weight, *given[2:]], has_weights=has_weights)[0]

    def _is_quantized_behind(self, name: str) -> bool:
        """XNNPACK wants one reader of the result: a quantizer, or a ReLU or Clip that a quantizer alone reads."""
        reader = self._only_reader(name)
        if reader is not None and self._is_fused(reader):
            reader = self._only_reader(reader.output[0])
        return reader is not None and reader.op_type == "QuantizeLinear"

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.output_names else None

    def _is_fused(self, node: onnx.NodeProto) -> bool:
        """True for a ReLU, and for a Clip that is one (from 0 up) or has two bounds."""
        if node.op_type != "Clip":
            return bool(node.op_type == "Relu")
        low, high = (self.constants.get(name) for name in [*node.input[1:], "", ""][:2])
        return low is not None and (high is not None or not low.any())

    def _step_through(self, node: onnx.NodeProto, given: Sequence[Value | None]) -> Step | None:
        """The step that all results of a move have: that of its inputs, or of the quantizer behind a Concat."""
        if node.op_type != "Concat":
            return given[0].step if isinstance(given[0], Integers) else None
        steps = {value.step if isinstance(value, Integers) else None for value in given}
        if len(steps) == 1:
            return steps.pop()
        readers = self.readers.get(node.output[0], [])
        if None in steps or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            return None
        return _step_of(readers[0], [self.constants.get(name) for name in readers[0].input])

    def _quantize(self, node: onnx.NodeProto, given: Sequence[Value | None]) -> Value:
        step, x = _step_of(node, given), given[0]
        if isinstance(x, Integers) and x.step == step:
            return x
        return _integers(self._float(node.input[0], x), step)

    def _float(self, name: str, value: Value | None) -> Tensor:
        """A value as floats, where an operator reads it."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Integers):
            return _float_of(value)
        return self._buffer(name, value.floats() if isinstance(value, Weight) else np.asarray(value))

    def _dequantized(self, name: str, weight: Weight) -> Tensor:
        """int8 weights as XNNPACK knows them: the integers, behind a dequantization."""
        integers = self._buffer(f"{name} integers", weight.integers)
        x: Tensor
        if weight.axis is None:
            scale = float(weight.scale.reshape(-1)[0])
            x = Q.dequantize_per_tensor(integers, scale, 0, LOWEST_WEIGHT, HIGH, torch.int8)
        else:
            scales = self._buffer(f"{name} scale", weight.scale)
            zeros = self._buffer(f"{name} zero", np.zeros(weight.scale.shape, np.int64))
            x = Q.dequantize_per_channel(integers, scales, zeros, weight.axis, LOWEST_WEIGHT, HIGH, torch.int8)
        return x

    def _buffer(self, name: str, array: Array) -> Tensor:
        """One buffer a constant; buffers' names may not have dots."""
        key = f"constant {name}".replace(".", "·")
        if key not in self._buffers:
            value = torch.from_numpy(np.array(array, order="C"))
            if value.dtype == torch.float32 != self.float_type:
                value = _halved(name, value)
            self.register_buffer(key, value)
        return self.get_buffer(key)


def _halved(name: str, value: Tensor) -> Tensor:
    half = value.to(torch.float16)
    if not torch.equal(half.isfinite(), value.isfinite()):
        raise TargetError(f"constant '{name}' is too large for float16. Compile it as fp32.")
    return half


def title_of(node: onnx.NodeProto) -> str:
    return node.name or str(node.output[0])


def _float_of(value: Integers) -> Tensor:
    step = value.step
    x: Tensor = Q.dequantize_per_tensor(value.tensor, step.scale, step.zero_point, LOW, HIGH, torch.int8)
    return x


def _integers(x: Tensor, step: Step) -> Integers:
    return Integers(Q.quantize_per_tensor(x, step.scale, step.zero_point, LOW, HIGH, torch.int8), step)


def _with_step(value: Value | None, step: Step) -> Value | None:
    return _integers(_float_of(value), step) if isinstance(value, Integers) and value.step != step else value


def _step_of(node: onnx.NodeProto, given: Sequence[Value | None]) -> Step:
    """Of a QuantizeLinear or DequantizeLinear of an activation, as int8; raises TargetError for what XNNPACK cannot do."""
    scale, zero = _scale_and_zero(node, given)
    if scale.size != 1:
        raise _refused(node, f"quantizes an activation with {scale.size} scales, and XNNPACK knows one")
    if zero.dtype not in (np.int8, np.uint8):
        raise _refused(node, f"quantizes an activation to {zero.dtype}, and XNNPACK knows 8 bits")
    shift = 128 if zero.dtype == np.uint8 else 0
    return Step(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) - shift, shift)


def _scale_and_zero(node: onnx.NodeProto, given: Sequence[Value | None]) -> tuple[Array, Array]:
    """Without a zero point it is 0: of `output_dtype` for a quantizer, uint8 where that is not set, else of its input's type."""
    scale = given[1]
    zero = given[2] if len(given) > 2 else None
    if not isinstance(scale, np.ndarray) or not (zero is None or isinstance(zero, np.ndarray)):
        raise _refused(node, "computes its scale or zero point in the run")
    if zero is None:
        zero = np.zeros(scale.shape, _type_of_integers(node, given[0]))
    return scale, zero


def _type_of_integers(node: onnx.NodeProto, x: Value | None) -> np.dtype[Any]:
    """What a node without a zero point makes of floats, or takes."""
    if isinstance(x, Integers):
        return np.dtype(np.uint8 if x.step.shift else np.int8)
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu":
        return x.dtype
    code = int(_attribute(node, "output_dtype", 0))
    return np.dtype(helper.tensor_dtype_to_np_dtype(code) if code else np.uint8)


def _dequantize(node: onnx.NodeProto, given: Sequence[Value | None]) -> Value:
    x = given[0]
    if isinstance(x, Integers):
        return Integers(x.tensor, _step_of(node, given))
    if not isinstance(x, np.ndarray):
        raise _refused(node, "dequantizes what the graph takes as integers")
    scale, zero = _scale_and_zero(node, given)
    axis = int(_attribute(node, "axis", 1)) % max(x.ndim, 1) if scale.size > 1 else None
    return Weight(x, scale, zero, axis)


def _as_linear(node: onnx.NodeProto, weight: Array | Weight) -> tuple[onnx.NodeProto, Array | Weight]:
    """The same product as a Gemm whose weight is (outputs, inputs): the only form that is computed in INT8."""
    attributes = _attributes(node)
    if attributes.get("transB", 0):
        return node, weight
    turned = weight.transposed() if isinstance(weight, Weight) else weight.T
    inputs = [node.input[0], f"{node.input[1]} turned", *node.input[2:]]
    return helper.make_node("Gemm", inputs, list(node.output), name=node.name, **{**attributes, "transB": 1}), turned


def _is_plain(node: onnx.NodeProto) -> bool:
    attributes = _attributes(node)
    return attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return _attributes(node).get(name, default)


def _refused(node: onnx.NodeProto, reason: str) -> TargetError:
    return TargetError(
        f"node '{title_of(node)}' ({node.op_type}) {reason}. Export the model without it, or take another target."
    )
