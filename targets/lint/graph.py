"""What a rule sees of an ONNX file: nodes and their neighbours, constants, quantizers, weights, shapes.

Only the main graph is walked: what stands inside If, Loop, Scan or a local function is not looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.errors import ModelError, first_line

Array = npt.NDArray[Any]
Node = Any  # onnx.NodeProto

STANDARD = frozenset({"", "ai.onnx"})
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LINEAR_DOMAINS = STANDARD | {"com.microsoft"}  # ONNX Runtime's own Q/DQ mean the same
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Quantizer:
    """The parameters of a QuantizeLinear or DequantizeLinear; scale and zero_point are None where they are computed.

    dtype is ONNX's name of the integer type in lower case; without a zero point it is `output_dtype` of a
    QuantizeLinear (uint8 if unset) and the type that a DequantizeLinear reads.
    """

    node: Node
    scale: Array | None
    zero_point: Array | None
    has_zero_point: bool
    dtype: str
    axis: int
    block_size: int

    @property
    def per_channel(self) -> bool:
        return self.scale is not None and self.scale.size > 1

    def quantize(self, x: Array) -> Array | None:
        """ONNX QuantizeLinear: saturate(round_half_even(x / scale) + zero_point); None for other types than 8 bits."""
        if self.scale is None or self.dtype not in ("int8", "uint8"):
            return None
        zero_point = np.zeros(1) if self.zero_point is None else self.zero_point
        info = np.iinfo(self.dtype)
        try:
            with np.errstate(all="ignore"):
                steps = np.rint(x / _along(self.scale, x.ndim, self.axis)) + _along(zero_point, x.ndim, self.axis)
        except ValueError:  # as many scales as no axis is long: a rule of its own
            return None
        integers: Array = np.clip(np.nan_to_num(steps), info.min, info.max)
        return integers

    def saturates_at(self, low: float, high: float) -> bool:
        """True if all below `low` becomes the first integer and all above `high` the last, by saturation alone."""
        if self.scale is None or self.dtype not in ("int8", "uint8") or not np.all(self.scale > 0):
            return False
        info = np.iinfo(self.dtype)
        zero = np.zeros(1) if self.zero_point is None else self.zero_point.astype(np.float64)
        scale = self.scale.astype(np.float64)
        first, last = np.rint(low / scale) + zero, np.rint(high / scale) + zero
        return bool(np.all(first <= info.min) and np.all(last >= info.max))


@dataclass(frozen=True)
class Weight:
    """The quantized constant that a product multiplies with: its DequantizeLinear, and the axis of its scales.

    axis counts in the product's own view, behind any Transpose; None where one scale serves the whole weight, or where
    its rank is not known.
    """

    quantizer: Quantizer
    axis: int | None


class Graph:
    """A read-only view of the main graph of a ModelProto. `path` is where its external data lie."""

    def __init__(self, model: Any, path: Path) -> None:
        self._model, self._path = model, path
        self.name: str = model.graph.name or "graph"
        self.nodes: list[Node] = list(model.graph.node)
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in STANDARD), default=1)
        self.functions = {(function.domain, function.name) for function in model.functions}
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.input):  # one who reads a tensor twice is one reader
                self.readers.setdefault(value, []).append(node)

    def of(self, *op_types: str) -> Iterator[Node]:
        """The nodes of these types in ONNX's own domain, those that read and make something."""
        named = (node for node in self.nodes if node.op_type in op_types and node.domain in STANDARD)
        return (node for node in named if node.input and node.output)

    def linears(self, *op_types: str) -> Iterator[Quantizer]:
        """All quantizers of these types (both if none is named)."""
        wanted = op_types or (QUANTIZE, DEQUANTIZE)
        return (self.quantizer(node) for node in self.nodes if is_linear(node, *wanted))

    def activations(self, *op_types: str) -> Iterator[Quantizer]:
        return (linear for linear in self.linears(*op_types) if not self.is_weight(linear.node))

    def products(self, *op_types: str) -> Iterator[Node]:
        """Convolutions and matrix products with two operands."""
        return (node for node in self.of(*(op_types or PRODUCTS)) if len(node.input) > 1)

    def is_weight(self, linear: Node) -> bool:
        """True for the Q or DQ of a constant, integer or float."""
        return linear.input[0] in self.constants

    @cached_property
    def constants(self) -> set[str]:
        """Every tensor that depends on no input of the graph: what any runtime computes once, at load."""
        known = set(self.initializers)
        for node in self.nodes:
            given = [name for name in node.input if name]
            computable = (given or node.op_type == "Constant") and not has_subgraph(node)
            if computable and all(name in known for name in given):
                known.update(output for output in node.output if output)
        return known

    def value(self, name: str) -> Array | None:
        """The array behind a name: an initializer or a Constant, through Identity and Cast; else None."""
        casts: list[int] = []
        while (tensor := self._tensor(name)) is None:
            node = self.producer.get(name)
            if node is None or node.op_type not in ("Identity", "Cast") or not node.input:
                return None
            if node.op_type == "Cast":
                casts.append(attribute_of(node, "to", 0))
            name = node.input[0]
        array = self._array(name, tensor)
        for code in reversed(casts):
            array = _cast(array, code)
        return array

    def _tensor(self, name: str) -> Any | None:
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer.get(name)
        return node if node is not None and node.op_type == "Constant" and node.domain in STANDARD else None

    def _array(self, name: str, tensor: Any) -> Array:
        from onnx import helper, numpy_helper

        try:
            if not hasattr(tensor, "op_type"):
                return np.asarray(numpy_helper.to_array(tensor, base_dir=str(self._path.parent)))
            (attribute,) = tensor.attribute
            if attribute.name == "value":
                return np.asarray(numpy_helper.to_array(attribute.t, base_dir=str(self._path.parent)))
            if attribute.name == "sparse_value":
                return np.zeros(0)
            return np.asarray(helper.get_attribute_value(attribute))
        except Exception as error:  # protobuf, NumPy and the file system each have their own
            raise ModelError(
                f"{self._path}: constant '{name}' cannot be read: {first_line(error)}. Export it again."
            ) from None

    def quantizer(self, node: Node) -> Quantizer:
        has_zero_point = len(node.input) > 2 and bool(node.input[2])
        return Quantizer(
            node=node,
            scale=self.value(node.input[1]) if len(node.input) > 1 else None,
            zero_point=self.value(node.input[2]) if has_zero_point else None,
            has_zero_point=has_zero_point,
            dtype=self._integer_type(node, node.input[2] if has_zero_point else ""),
            axis=attribute_of(node, "axis", 1),
            block_size=attribute_of(node, "block_size", 0),
        )

    def _integer_type(self, node: Node, zero_point: str) -> str:
        code = self.elem_type(zero_point) if zero_point else attribute_of(node, "output_dtype", 0)
        if not code and node.op_type == DEQUANTIZE and node.input:
            code = self.elem_type(node.input[0])
        return type_name(code) if code else "uint8"

    def dequantize(self, name: str) -> Node | None:
        """The DequantizeLinear that makes a tensor."""
        node = self.producer.get(name)
        return node if node is not None and is_linear(node, DEQUANTIZE) else None

    def integer_activation(self, name: str) -> Node | None:
        """The DequantizeLinear of an activation that makes a tensor."""
        node = self.dequantize(name)
        return node if node is not None and not self.is_weight(node) else None

    def weight(self, product: Node) -> Weight | None:
        """The quantized weight of a product, found through Transpose, Identity and Cast."""
        name, turns = product.input[1], []
        while (node := self.producer.get(name)) is not None and node.op_type in ("Transpose", "Identity", "Cast"):
            if node.op_type == "Transpose":
                turns.append(tuple(attribute_of(node, "perm", ())))
            name = node.input[0]
        if node is None or not is_linear(node, DEQUANTIZE) or not self.is_weight(node):
            return None
        quantizer = self.quantizer(node)
        if not quantizer.per_channel:
            return Weight(quantizer, None)
        rank = len(self.shape(node.input[0]) or ())
        axis = quantizer.axis % rank if rank else None
        for perm in reversed(turns):
            order = perm or tuple(reversed(range(rank)))
            axis = order.index(axis) if axis in order else None
        return Weight(quantizer, axis)

    def weight_integers(self, weight: Weight) -> Array | None:
        """The integers of a weight: as they are stored, or what its QuantizeLinear makes of the floats. None: computed."""
        source = weight.quantizer.node.input[0]
        stored = self.value(source)
        maker = self.producer.get(source)
        if stored is not None or maker is None or not is_linear(maker, QUANTIZE):
            return stored
        floats, quantizer = self.value(maker.input[0]), self.quantizer(maker)
        return None if floats is None else quantizer.quantize(floats)

    def quantizers_of(self, name: str) -> list[Quantizer]:
        """The QuantizeLinear nodes that quantize a tensor; one that takes it for its scale is none."""
        readers = self.readers.get(name, [])
        return [self.quantizer(node) for node in readers if is_linear(node, QUANTIZE) and node.input[0] == name]

    @cached_property
    def _values(self) -> dict[str, Any]:
        """Name -> type and shape, as far as shape inference gets: of inputs, outputs and everything between."""
        import onnx

        graph = self._model.graph
        with suppress(Exception):  # not inferable: the graph's own declarations are all there is
            graph = onnx.shape_inference.infer_shapes(self._model, data_prop=True).graph
        known = [*graph.value_info, *graph.output, *graph.input]
        return {value.name: value.type.tensor_type for value in known if value.type.HasField("tensor_type")}

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Sizes, None for a free axis; None where even the rank is not known."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        kind = self._values.get(name)
        if kind is None or not kind.HasField("shape"):
            return None
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)

    def elem_type(self, name: str) -> int:
        """ONNX's number of the element type, 0 where it is not known."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        known = self._values.get(name)
        return int(known.elem_type) if known is not None else 0


def is_linear(node: Node, *op_types: str) -> bool:
    return node.op_type in op_types and node.domain in LINEAR_DOMAINS and bool(node.input) and bool(node.output)


def has_subgraph(node: Node) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def title_of(node: Node) -> str:
    """A node's name, or its first output: exporters often leave nodes without a name."""
    return str(node.name or next((output for output in node.output if output), "") or node.op_type)


def attribute_of(node: Node, name: str, default: Any) -> Any:
    from onnx import helper

    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def type_name(code: int) -> str:
    """int8, uint8, float, float8e4m3fn, ... ; `type 99` for a number that this onnx does not know."""
    import onnx

    names: dict[int, str] = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    return names.get(code, f"type {code}")


def _cast(array: Array, code: int) -> Array:
    from onnx import helper

    try:
        with np.errstate(all="ignore"):
            return array.astype(helper.tensor_dtype_to_np_dtype(code))
    except (KeyError, TypeError, ValueError):
        return array


def _along(values: Array, ndim: int, axis: int) -> Array:
    """One value a channel, shaped to broadcast along `axis`."""
    if values.size == 1 or not ndim:
        return values.reshape(-1)[:1]
    shape = [1] * ndim
    shape[axis % ndim] = -1
    return values.reshape(shape)
