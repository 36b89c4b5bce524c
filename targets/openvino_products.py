"""The products of an OpenVINO graph, and those that its executed graph does not show as layers of their own.

The executed graph names the type of each layer, but a Subgraph says neither that matrix products were fused into it nor how
they run, and a recurrent layer is of no type with a size. So products are counted in the graph as it was before the compile,
and each is looked for among the executed products: by the names that these say they were made of, else by its size. Python
3.10, stdlib; takes OpenVINO's objects and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

Shape = tuple[int, ...]
Count = Callable[[Any, Sequence[Shape], Shape], int]


@dataclass(frozen=True)
class Product:
    """An operator of the graph with multiply-accumulates a sample."""

    name: str
    op: str
    macs: int


@dataclass(frozen=True)
class Executed:
    """A product of the executed graph, and the operators that it says it was made of."""

    made_of: frozenset[str]
    macs: int


def products_of(model: Any, name: str) -> Iterator[Product]:
    """All products of a graph of fixed shapes, but for those of constants, which no run computes. Raises TargetError where they
    cannot be counted."""
    computed: set[str] = set()
    for op in model.get_ordered_ops():
        kind, title = op.get_type_name(), op.get_friendly_name()
        sources = {value.get_source_output().get_node().get_name() for value in op.inputs()}
        if kind != "Parameter" and not sources & computed:
            continue
        computed.add(op.get_name())
        if kind in UNCOUNTED:
            raise _uncounted(name, title, kind)
        if (count := COUNTS.get(kind)) is not None:
            try:
                shapes = [tuple(value.get_shape()) for value in op.inputs()]
                yield Product(title, kind, count(op, shapes, tuple(op.output(0).get_shape())))
            except (RuntimeError, KeyError):  # a size that only a run knows; an equation with dots in it
                raise _uncounted(name, title, kind) from None


def hidden(products: Sequence[Product], executed: Sequence[Executed]) -> list[Product]:
    """Those that none of the executed products was made of."""
    named = frozenset().union(*(layer.made_of for layer in executed))
    left = [product for product in products if product.name not in named]
    known = {product.name for product in products}
    for layer in executed:
        if not layer.made_of & known:  # the compile has renamed it
            same = next((product for product in left if product.macs == layer.macs), None)
            left = [product for product in left if product is not same]
    return left


def _uncounted(name: str, title: str, kind: str) -> TargetError:
    return TargetError(
        f"{name}: the multiply-accumulates of '{title}' ({kind}) cannot be counted, so no share of INT8 can be told. "
        "Export it as convolutions and matrix products of fixed sizes, or stay with float."
    )


def _convolution(op: Any, inputs: Sequence[Shape], output: Shape) -> int:
    return convolution_macs(output, inputs[1], output[1])


def _transposed(op: Any, inputs: Sequence[Shape], output: Shape) -> int:
    return transposed_convolution_macs(inputs[0], inputs[1], inputs[0][1])


def _matmul(op: Any, inputs: Sequence[Shape], output: Shape) -> int:
    turned = op.get_attributes()["transpose_a"] and len(inputs[0]) > 1
    return matmul_macs(output, inputs[0][-2 if turned else -1])


def _einsum(op: Any, inputs: Sequence[Shape], output: Shape) -> int:
    """Every combination of all indices once, for each operand after the first. Raises KeyError for an ellipsis."""
    terms = op.get_attributes()["equation"].partition("->")[0].replace(" ", "").split(",")
    if any("." in term for term in terms):
        raise KeyError("...")
    sizes = {
        index: size for term, shape in zip(terms, inputs, strict=True) for index, size in zip(term, shape, strict=True)
    }
    return prod(sizes.values()) * (len(terms) - 1)


def _recurrent(weight: int) -> Count:
    """Every step of every sample multiplies with all of W and R, whose first stands at `weight`."""
    return lambda op, inputs, output: prod(inputs[0][:-1]) * (prod(inputs[weight]) + prod(inputs[weight + 1]))


def _attention(op: Any, inputs: Sequence[Shape], output: Shape) -> int:
    """Q K', and its product with V."""
    return (prod(inputs[0]) + prod(output)) * inputs[1][-2]


COUNTS: dict[str, Count] = {
    "Convolution": _convolution,
    "GroupConvolution": _convolution,
    "ConvolutionBackpropData": _transposed,
    "GroupConvolutionBackpropData": _transposed,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "LSTMSequence": _recurrent(4),
    "GRUSequence": _recurrent(3),
    "RNNSequence": _recurrent(3),
    "LSTMCell": _recurrent(3),
    "GRUCell": _recurrent(2),
    "RNNCell": _recurrent(2),
    "ScaledDotProductAttention": _attention,
}
UNCOUNTED = frozenset({"BinaryConvolution", "DeformableConvolution", "Loop", "TensorIterator"})
