"""ONNX files: read and refuse, check and write, and what a graph says of its inputs, outputs and ranges.

Reads and writes .onnx (external data beside it as <file>.data), ranges.json and exported.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pipeline.graphs.half import to_half
from pipeline.graphs.rewrites import constant, quantizer_of
from targets.base import Exported, Preprocessing, TensorSpec, write_json
from targets.errors import ModelError, first_line
from targets.lint.general import is_integer

MODEL_FILE, HALF_FILE, RANGES_FILE = "model.onnx", "model.fp16.onnx", "ranges.json"
HALF_DIALECTS = frozenset({"tensorrt"})  # whose runtime computes in the types that the graph is written in
INLINE_BYTES = 1 << 30  # protobuf ends at 2 GiB; larger weights lie beside the file
DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"}
)


def read_graph(path: Path) -> ir.Model:
    """Read an ONNX file with all its weights. Raises ModelError: no ONNX, truncated, external data absent, NaN weights."""
    model = _read(path)
    if (bad := _weight_that_is_no_number(model)) is not None:
        raise ModelError(
            f"{path}: weight '{bad}' holds NaN or infinity: the training that wrote it failed. Export an earlier one."
        )
    return model


def _read(path: Path) -> ir.Model:
    try:
        proto = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path))
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        return ir.external_data.load_to_model(model)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no file {error.filename or path}. Name an ONNX file that exists.") from None
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX file: its bytes do not parse. Export it again.") from None
    except (onnx.checker.ValidationError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is no whole ONNX model: {first_line(error)}. Export it again.") from None


def _weight_that_is_no_number(graph: ir.Model) -> str | None:
    """The first float weight with NaN or infinity in it."""
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not np.isfinite(tensor.numpy()).all():
            return str(name)
    return None


def write_graph(model: ir.Model, path: Path) -> None:
    """Write and check: the ONNX checker with full shape inference. Raises ModelError with what it found."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > INLINE_BYTES else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} did not become a valid graph: {first_line(error)}. Report this model.") from None


def describe(
    model: ir.Model,
    *,
    name: str,
    out_dir: Path,
    scheme: str | None = None,
    dialect: str | None = None,
    preprocessing: Preprocessing | None = None,
    layout: str = "",
) -> Exported:
    """The `Exported` of a graph that lies (or will lie) at out_dir/model.onnx; `layout` is that of the inputs."""
    return Exported(
        name=name,
        onnx_path=MODEL_FILE,
        inputs=tuple(_spec(value, layout) for value in model.graph.inputs),
        outputs=tuple(_spec(value, "") for value in model.graph.outputs),
        scheme=scheme,
        dialect=dialect,
        ranges_path=RANGES_FILE if scheme is not None else None,
        preprocessing=preprocessing,
        directory=out_dir,
    )


def export_graph(model: ir.Model, exported: Exported) -> Exported:
    """Write graph, ranges (of a quantized graph) and exported.json into `exported.directory`."""
    exported.directory.mkdir(parents=True, exist_ok=True)
    write_graph(model, exported.model_path)
    if exported.ranges_path is not None:
        write_json(exported.directory / exported.ranges_path, ranges(model))
    exported.save()
    return exported


def export_half(model: ir.Model, exported: Exported) -> Exported:
    """Write the float16 twin beside the graph; a graph that has none says why in `half_note`."""
    try:
        write_graph(to_half(model), exported.directory / HALF_FILE)
        exported = replace(exported, half_path=HALF_FILE)
    except ModelError as error:
        exported = replace(exported, half_note=str(error))
    exported.save()
    return exported


def import_onnx(
    path: Path, *, name: str, out_dir: Path, preprocessing: Preprocessing | None = None, half: bool = False
) -> Exported:
    """Take anybody's ONNX file as it is, float or quantized: the front door of compile and bench. Raises ModelError."""
    model = read_graph(path)
    quantized = any(node.op_type == "QuantizeLinear" or is_integer(node.op_type) for node in model.graph)
    scheme = "as given" if quantized else None
    exported = describe(model, name=name, out_dir=out_dir, scheme=scheme, preprocessing=preprocessing)
    exported = export_graph(model, exported)
    return export_half(model, exported) if half else exported


def check_float(model: ir.Model, path: Path) -> None:
    """Raise ModelError for a graph that is quantized already, by Q/DQ or by operators on integers."""
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or is_integer(node.op_type):
            raise ModelError(f"{path} is quantized already. Compile or bench it as it is, or give the float model.")


def ranges(model: ir.Model) -> dict[str, dict[str, Any]]:
    """Scale, zero point, dtype and axis of every quantized tensor, by the name of what is quantized."""
    found: dict[str, dict[str, Any]] = {}
    for node in model.graph:
        is_constant = constant(node.inputs[0]) is not None if node.inputs else False
        wanted = "DequantizeLinear" if is_constant else "QuantizeLinear"
        if node.op_type != wanted or (quantizer := quantizer_of(node)) is None:
            continue
        found[str(node.inputs[0].name)] = {
            "scale": quantizer.scale.reshape(-1).tolist(),
            "zero_point": quantizer.zero_point.reshape(-1).tolist(),
            "dtype": str(quantizer.dtype),
            "axis": quantizer.axis,
        }
    return found


def _spec(value: ir.Value, layout: str) -> TensorSpec:
    dtype = value.dtype.numpy().name if value.dtype is not None and value.type is not None else "unknown"
    if not isinstance(value.type, ir.TensorType) or dtype not in DTYPES:
        raise ModelError(
            f"'{value.name}' is {value.type}: only plain tensors of {', '.join(sorted(DTYPES))} cross to a device. "
            "Cast it inside the graph."
        )
    if value.shape is None:
        raise ModelError(f"'{value.name}' has no known rank, so no buffer can be made. Export it with a shape.")
    return TensorSpec(name=str(value.name), shape=_sizes(value.shape), dtype=dtype, layout=layout)


def _sizes(shape: ir.Shape | Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in shape)
