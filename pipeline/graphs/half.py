"""A float32 graph in float16: inputs and outputs keep their types, everything between computes in half.

For runtimes that compute in the types that a graph is written in (a strongly typed TensorRT network). Q/DQ take and give
float16 from operator set 19 on only, so a quantized graph is raised to that one. Reads and changes an `onnx_ir.Model`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline.graphs.rewrites import constant
from targets.errors import ModelError

Array = npt.NDArray[Any]

HALF_QDQ_OPSET = 19
LARGEST, SMALLEST = 65504.0, 2.0**-24  # of float16; below the smallest a scale would be 0
# Where operators take float32 whatever the tensors are: inputs of these stay (sizes and scales of a Resize).
KEPT_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}


def to_half(model: ir.Model) -> ir.Model:
    """A copy of `model` in float16. Raises ModelError where a weight leaves float16's range, or a subgraph is in the way."""
    proto = _with_half_qdq(ir.to_proto(model))
    half = ir.from_proto(proto)
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in half.graph for a in n.attributes.values()
    ):
        raise ModelError("a graph with If, Loop or Scan has no float16 form here. Export it without control flow.")
    _convert_initializers(half)
    _convert_nodes(half)
    _cast_ends(half)
    return half


def _with_half_qdq(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Raise the operator set where Q/DQ could not be float16; a float graph keeps its own."""
    version = next(opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx"))
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)
    if not quantized or version >= HALF_QDQ_OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, HALF_QDQ_OPSET)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"operator set {version} cannot become {HALF_QDQ_OPSET}, which float16 Q/DQ need: {reason}. "
            f"Export with operator set {HALF_QDQ_OPSET}."
        ) from None


def _convert_initializers(model: ir.Model) -> None:
    kept = {
        str(value.name)
        for node in model.graph
        for index in KEPT_INPUTS.get(node.op_type, ())
        if index < len(node.inputs) and (value := node.inputs[index]) is not None
    }
    scales = {
        str(node.inputs[1].name) for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    for name, value in model.graph.initializers.items():
        array = constant(value)
        if array is None or array.dtype != np.float32 or name in kept:
            continue
        value.const_value = ir.tensor(_half(array, str(name), is_scale=name in scales), name=str(name))
        value.dtype = ir.DataType.FLOAT16


def _half(array: Array, name: str, *, is_scale: bool) -> Array:
    if np.abs(array).max(initial=0.0) > LARGEST:
        raise ModelError(f"'{name}' holds {np.abs(array).max():.3g}: float16 ends at {LARGEST:g}. Rescale that layer.")
    half: Array = (np.maximum(array, SMALLEST) if is_scale else array).astype(np.float16)
    return half


def _convert_nodes(model: ir.Model) -> None:
    """Casts to float become casts to half; constants in attributes too; the types of all tensors between follow."""
    inputs = {value.name for value in model.graph.inputs}
    for node in model.graph:
        for name in ("to", "dtype", "output_dtype"):
            if name in node.attributes and node.attributes[name].as_int() == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT16))
        if "value" in node.attributes and node.op_type in ("Constant", "ConstantOfShape"):
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name not in inputs:
                value.dtype = ir.DataType.FLOAT16


def _cast_ends(model: ir.Model) -> None:
    """float32 inputs are cast to half behind the door, outputs back to float32 before it."""
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT and (readers := list(value.uses())):
            cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT16)}, num_outputs=1)
            cast.outputs[0].name = f"{value.name}_half"
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), value.shape
            for use in readers:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            model.graph.insert_before(next(iter(model.graph)), cast)
    for index, value in enumerate(list(model.graph.outputs)):
        if value.dtype == ir.DataType.FLOAT16:
            _cast_output(model, index, value)


def _cast_output(model: ir.Model, index: int, value: ir.Value) -> None:
    name, value.name = value.name, f"{value.name}_half"
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, num_outputs=1)
    cast.outputs[0].name = name
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    model.graph.append(cast)
    model.graph.outputs[index] = cast.outputs[0]
