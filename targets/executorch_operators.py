"""ONNX operators as torch functions on floats: what a graph has to consist of before ExecuTorch can compile it.

Shapes are those of ONNX, N first. What ONNX passes as a tensor but torch wants to know while it traces (shapes, axes, bounds)
must be a constant of the graph. Imports torch, so it is imported by the compile alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from targets.base import Array
from targets.errors import TargetError

FLOAT, HALF = 1, 10  # ONNX's codes of what a Cast may give


@dataclass(frozen=True)
class Call:
    """One node with its inputs: `constants` where they are known before a run, `as_tensor` for what an operator computes
    with (None where nothing is given)."""

    op_type: str
    title: str
    attributes: Mapping[str, Any]
    constants: Sequence[Array | None]
    as_tensor: Callable[[int], Tensor | None]
    opset: int
    float_type: torch.dtype = torch.float32  # of what ONNX calls FLOAT
    num_outputs: int = 1
    has_weights: bool = False  # input 1 is a constant, floats or integers

    @property
    def x(self) -> Tensor:
        return self.tensor(0)

    def tensor(self, index: int) -> Tensor:
        tensor = self.optional(index)
        if tensor is None:
            raise self.refused(f"has no input {index}")
        return tensor

    def optional(self, index: int) -> Tensor | None:
        return self.as_tensor(index) if index < len(self.constants) else None

    def number(self, index: int, name: str, default: float | None) -> float | None:
        """A scalar, by attribute in old opsets and by input in newer ones."""
        constant = self._constant(index)
        return self.attributes.get(name, default) if constant is None else float(constant.reshape(-1)[0])

    def listed(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Integers that are an attribute."""
        values = self.attributes.get(name, default)
        if values is None:
            raise self.refused(f"says no {name}")
        return [int(value) for value in values]

    def ints(self, index: int, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Integers, by attribute in old opsets and by input in newer ones."""
        constant = self._constant(index)
        return self.listed(name, default) if constant is None else [int(value) for value in constant.reshape(-1)]

    def refused(self, reason: str) -> TargetError:
        return TargetError(
            f"node '{self.title}' ({self.op_type}) {reason}. Export the model without it, or take another target."
        )

    def _constant(self, index: int) -> Array | None:
        if index >= len(self.constants):
            return None
        if (constant := self.constants[index]) is None and self.as_tensor(index) is not None:
            raise self.refused(f"computes input {index} in the run, where ExecuTorch has to know it before")
        return constant


Operator = Callable[[Call], Tensor | Sequence[Tensor]]


def symmetric_pads(call: Call, rank: int) -> list[int] | None:
    """The pads of `rank` spatial axes where both ends have the same, which torch takes; else None."""
    if call.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refused(f"pads by auto_pad={call.attributes['auto_pad']}, which depends on the size")
    pads = call.listed("pads", [0] * 2 * rank)
    return pads[:rank] if pads[:rank] == pads[rank:] else None


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """ONNX lists all begins, then all ends, first axis first; torch lists pairs, last axis first."""
    rank = len(pads) // 2
    pairs = [pads[i + end * rank] for i in reversed(range(rank)) for end in (0, 1)]
    return functional.pad(x, pairs, value=value)


def convolution(call: Call) -> Tensor:
    x, weight, bias = call.x, call.tensor(1), call.optional(2)
    rank = weight.dim() - 2
    if rank not in (1, 2):
        raise call.refused(f"convolves over {rank} axes, and XNNPACK over 1 or 2")
    pads = symmetric_pads(call, rank)
    if pads is None:
        x, pads = padded(x, call.listed("pads")), [0] * rank
    strides, dilations = (call.listed(name, [1] * rank) for name in ("strides", "dilations"))
    function = functional.conv1d if rank == 1 else functional.conv2d
    result: Tensor = function(x, weight, bias, strides, pads, dilations, int(call.attributes.get("group", 1)))
    return result


def transposed_convolution(call: Call) -> Tensor:
    weight = call.tensor(1)
    rank = weight.dim() - 2
    pads = symmetric_pads(call, rank)
    if rank != 2 or pads is None or "output_shape" in call.attributes:
        raise call.refused(
            "is a transposed convolution of another kind than XNNPACK's (2 axes, the same pads at both ends)"
        )
    strides, dilations = (call.listed(name, [1] * rank) for name in ("strides", "dilations"))
    extra = call.listed("output_padding", [0] * rank)
    group = int(call.attributes.get("group", 1))
    return functional.conv_transpose2d(call.x, weight, call.optional(2), strides, pads, extra, group, dilations)


def matrix_product(call: Call) -> Tensor:
    return product_of_tensors(call.x, call.tensor(1))


def product_of_tensors(x: Tensor, y: Tensor) -> Tensor:
    """A matrix that a run computes is multiplied as a batch of one: the XNNPACK partitioner of ExecuTorch 1.5 takes the second
    of a plain `mm` for weights, drops the dequantization of both and then leaves them, so integers are multiplied."""
    if y.dim() != 2:
        return torch.matmul(x, y)
    return torch.bmm(x.reshape(1, -1, x.shape[-1]), y.unsqueeze(0)).reshape(*x.shape[:-1], y.shape[-1])


def general_product(call: Call) -> Tensor:
    """Gemm: alpha * A' B' + beta * C, a weight that is (outputs, inputs) as in torch's Linear."""
    x, weight, bias = call.x, call.tensor(1), call.optional(2)
    alpha, beta = (float(call.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    x = x.transpose(0, 1) if call.attributes.get("transA", 0) else x
    weight = weight if call.attributes.get("transB", 0) else weight.transpose(0, 1)
    if not call.has_weights:
        product = product_of_tensors(x, weight.transpose(0, 1)) * alpha
    elif alpha == beta == 1.0 and (bias is None or bias.dim() == 1):
        return functional.linear(x, weight, bias)
    else:
        product = functional.linear(x, weight) * alpha
    return product if bias is None else product + bias * beta


def clip(call: Call) -> Tensor:
    """As hardtanh or ReLU where it can be, for these are what XNNPACK fuses into the product before."""
    low, high = call.number(1, "min", None), call.number(2, "max", None)
    if low == 0.0 and high is None:
        return functional.relu(call.x)
    if low is not None and high is not None:
        return functional.hardtanh(call.x, low, high)
    return torch.clamp(call.x, low, high)


def max_pool(call: Call) -> Tensor:
    kernel = call.listed("kernel_shape")
    rank = len(kernel)
    x, pads = call.x, symmetric_pads(call, rank)
    if rank != 2:
        raise call.refused(f"pools over {rank} axes, and XNNPACK over 2")
    if pads is None:
        x, pads = padded(x, call.listed("pads"), -torch.inf), [0] * rank
    strides, dilations = (call.listed(name, [1] * rank) for name in ("strides", "dilations"))
    return functional.max_pool2d(x, kernel, strides, pads, dilations, bool(call.attributes.get("ceil_mode", 0)))


def average_pool(call: Call) -> Tensor:
    kernel = call.listed("kernel_shape")
    pads = symmetric_pads(call, len(kernel))
    if len(kernel) != 2 or pads is None or call.attributes.get("dilations", [1, 1]) != [1, 1]:
        raise call.refused("pools in another way than torch (2 axes, the same pads at both ends, no dilation)")
    strides = call.listed("strides", [1, 1])
    counted = bool(call.attributes.get("count_include_pad", 0))
    return functional.avg_pool2d(call.x, kernel, strides, pads, bool(call.attributes.get("ceil_mode", 0)), counted)


def mean(call: Call) -> Tensor:
    axes = call.ints(1, "axes", range(call.x.dim()))
    return call.x.mean(axes, keepdim=bool(call.attributes.get("keepdims", 1)))


def global_average_pool(call: Call) -> Tensor:
    return call.x.mean(list(range(2, call.x.dim())), keepdim=True)


def softmax(call: Call) -> Tensor:
    """Before opset 13 over all axes from `axis` on, as if they were one."""
    if call.opset >= 13:
        return torch.softmax(call.x, int(call.attributes.get("axis", -1)))
    flat = call.x.flatten(int(call.attributes.get("axis", 1)))
    return torch.softmax(flat, -1).reshape(call.x.shape)


def batch_norm(call: Call) -> Tensor:
    scale, bias, average, variance = (call.tensor(index) for index in range(1, 5))
    return functional.batch_norm(
        call.x, average, variance, scale, bias, eps=float(call.attributes.get("epsilon", 1e-5))
    )


def hard_sigmoid(call: Call) -> Tensor:
    alpha, beta = float(call.attributes.get("alpha", 0.2)), float(call.attributes.get("beta", 0.5))
    return torch.clamp(call.x * alpha + beta, 0.0, 1.0)


def cast(call: Call) -> Tensor:
    kind = int(call.attributes["to"])
    if kind not in (FLOAT, HALF):
        raise call.refused("casts to another type than float32 or float16")
    return call.x.to(call.float_type if kind == FLOAT else torch.float16)


def flatten(call: Call) -> Tensor:
    axis = int(call.attributes.get("axis", 1))
    sizes = list(call.x.shape)
    rows = int(torch.Size(sizes[:axis]).numel())
    return call.x.reshape(rows, -1)


def reshape(call: Call) -> Tensor:
    """A 0 keeps the size of its axis, but where allowzero says otherwise."""
    wanted = call.ints(1, "shape")
    if not call.attributes.get("allowzero", 0):
        wanted = [call.x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return call.x.reshape(wanted)


def transpose(call: Call) -> Tensor:
    return call.x.permute(call.listed("perm", list(reversed(range(call.x.dim())))))


def squeeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes", [axis for axis, size in enumerate(call.x.shape) if size == 1])
    return torch.squeeze(call.x, [axis % call.x.dim() for axis in axes])


def unsqueeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes")
    x, rank = call.x, call.x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def concat(call: Call) -> Tensor:
    return torch.cat([call.tensor(index) for index in range(len(call.constants))], int(call.attributes["axis"]))


def split(call: Call) -> Sequence[Tensor]:
    axis = int(call.attributes.get("axis", 0))
    size = call.x.shape[axis]
    even = [-(-size // call.num_outputs)] * call.num_outputs
    even[-1] = size - sum(even[:-1])
    parts: Sequence[Tensor] = torch.split(call.x, call.ints(1, "split", even), axis)
    return parts


def cut(call: Call) -> Tensor:
    """Slice, forwards."""
    starts, ends = call.ints(1, "starts"), call.ints(2, "ends")
    axes = call.ints(3, "axes", range(len(starts)))
    steps = call.ints(4, "steps", [1] * len(starts))
    if any(step < 1 for step in steps):
        raise call.refused("slices backwards")
    index = [slice(None)] * call.x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, min(end, call.x.shape[axis]), step)
    return call.x[tuple(index)]


def pad(call: Call) -> Tensor:
    if call.attributes.get("mode", "constant") != "constant" or call.optional(3) is not None:
        raise call.refused("pads by mirroring, or some axes only")
    return padded(call.x, call.ints(1, "pads"), call.number(2, "value", 0.0) or 0.0)


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.x)


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: function(call.x, call.tensor(1))


# Operators whose results are among the values that come in: integers with one step go through them as they are.
MOVES: dict[str, Operator] = {
    "Concat": concat,
    "Dropout": unary(lambda x: x),
    "Flatten": flatten,
    "Identity": unary(lambda x: x),
    "MaxPool": max_pool,
    "Reshape": reshape,
    "Slice": cut,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
PRODUCTS: dict[str, Operator] = {
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Gemm": general_product,
    "MatMul": matrix_product,
}
OPERATORS: dict[str, Operator] = {
    **MOVES,
    **PRODUCTS,
    "Abs": unary(torch.abs),
    "Add": binary(torch.add),
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Div": binary(torch.div),
    "Elu": lambda call: functional.elu(call.x, float(call.attributes.get("alpha", 1.0))),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(functional.hardswish),
    "LeakyRelu": lambda call: functional.leaky_relu(call.x, float(call.attributes.get("alpha", 0.01))),
    "Mul": binary(torch.mul),
    "Neg": unary(torch.neg),
    "Pad": pad,
    "Pow": binary(torch.pow),
    "ReduceMean": mean,
    "Relu": unary(functional.relu),
    "Sigmoid": unary(torch.sigmoid),
    "Softmax": softmax,
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(torch.sub),
    "Tanh": unary(torch.tanh),
}
