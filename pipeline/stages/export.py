"""Stage 4, export: a torch model becomes an ONNX graph that takes uint8 pixels, in the dialect of a target's runtime.

Reads a torch model (float, or quantized and stripped) that does its own normalisation. Writes model.onnx, exported.json
and, for a quantized one, ranges.json (tensor -> scale, zero_point, dtype, axis) and rewrites.json (each rewrite of the
dialect, and by how much it moved the logits of real samples). Input "image" (N, C, H, W) uint8 with a
free batch, output "logits" (N, K) float32.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.graphs.files import HALF_DIALECTS, describe, export_graph, export_half
from pipeline.graphs.proof import REWRITES_FILE, apply_proved
from pipeline.graphs.rewrites import fold_constants, tidy
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.deployed import float_model, on_pixels, preprocessing_of, quantized_model
from pipeline.learning.fake_quantize import strip_fake_quantizers
from pipeline.learning.trained import open_data
from targets.base import Array, Exported, Preprocessing, write_json
from targets.errors import ModelError

INPUT, OUTPUT = "image", "logits"
NUM_PROOF_SAMPLES = 8
OPSET = 17  # the newest that the tracing exporter writes without a detour and that all our runtimes read


def export_trained(role: str, trained: TrainedModel, prepared: PreparedData, out_dir: Path, how: How) -> None:
    """Export the float teacher or student: the baselines of every table."""
    data = open_data(prepared)
    export_float(
        float_model(trained, data, allow_code=how.allow_code).cpu(),
        name=f"{role}-{_file_name(trained)}",
        example_shape=(data.channels, *data.image_size),
        preprocessing=preprocessing_of(prepared),
        out_dir=out_dir,
    )


def export_student_int8(
    scheme: str,
    dialect: str,
    quantized: TrainedModel,
    student: TrainedModel,
    prepared: PreparedData,
    out_dir: Path,
    how: How,
) -> None:
    """Strip the fake quantizers to plain Q/DQ and export the quantized student in `dialect`."""
    data = open_data(prepared)
    shape = (data.channels, *data.image_size)
    fake = quantized_model(quantized, student, data, allow_code=how.allow_code).cpu()
    stripped = strip_fake_quantizers(fake, torch.zeros(1, *shape))
    export_quantized(
        on_pixels(stripped, data).cpu(),
        name=f"student-{_file_name(student)}-int8",
        scheme=scheme,
        dialect=dialect,
        example_shape=shape,
        preprocessing=preprocessing_of(prepared),
        out_dir=out_dir,
        pixels_NCHW=_calibration_pixels(data, NUM_PROOF_SAMPLES),
    )


def _calibration_pixels(data: Data, num_samples: int) -> Array:
    """uint8 (N, C, H, W): the first calibration samples as the graph takes them, out of the batches that learning reads."""
    x_NCHW = next(iter(data.plain_batches("calibration", batch_size=num_samples))).x_NCHW
    mean, std = (torch.tensor(values, device=x_NCHW.device).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels: Array = ((x_NCHW * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels


def _file_name(trained: TrainedModel) -> str:
    """The model's name without what a path or a reader would stumble over."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in trained.info["model"])


def export_float(
    model: nn.Module, *, name: str, example_shape: Sequence[int], preprocessing: Preprocessing, out_dir: Path
) -> Exported:
    """Export a float model on pixels; `example_shape` is one sample (C, H, W). Raises ModelError."""
    graph = trace(model, example_shape)
    tidy(graph)
    fold_constants(graph)
    tidy(graph)
    exported = export_graph(
        graph, describe(graph, name=name, out_dir=out_dir, preprocessing=preprocessing, layout="NCHW")
    )
    return export_half(graph, exported)


def export_quantized(
    stripped_model: nn.Module,
    *,
    name: str,
    scheme: str,
    dialect: str,
    example_shape: Sequence[int],
    preprocessing: Preprocessing,
    out_dir: Path,
    pixels_NCHW: Array,
) -> Exported:
    """Export a stripped quantized model on pixels and rewrite it exactly for `dialect`, proved on `pixels_NCHW` (uint8).

    Raises ModelError.
    """
    graph = trace(stripped_model, example_shape)
    samples = [{INPUT: np.ascontiguousarray(pixels_NCHW[i : i + 1])} for i in range(len(pixels_NCHW))]
    proofs = apply_proved(graph, dialect, samples)
    exported = describe(
        graph,
        name=name,
        out_dir=out_dir,
        scheme=scheme,
        dialect=dialect,
        preprocessing=preprocessing,
        layout="NCHW",
    )
    if not any(node.op_type == "QuantizeLinear" for node in graph.graph):
        raise ModelError(f"{name} has no quantizer in its graph. Insert them, train, strip, then export.")
    exported = export_graph(graph, exported)
    if dialect in HALF_DIALECTS:
        exported = export_half(graph, exported)
    write_json(out_dir / REWRITES_FILE, [asdict(proof) for proof in proofs])
    return exported


def trace(model: nn.Module, example_shape: Sequence[int]) -> ir.Model:
    """The ONNX graph of `model` on one sample (C, H, W) of pixels, as torch's tracing exporter writes it.

    The other exporter (dynamo) fails on FakeQuantize: a branch there depends on data.
    """
    x_NCHW = torch.zeros(1, *example_shape, dtype=torch.uint8)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of the tracing exporter, and of constants in traced code
            torch.onnx.export(
                model.eval(),
                (x_NCHW,),
                buffer,  # type: ignore[arg-type]  # the tracing exporter takes a file-like object too
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
            )
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{type(model).__name__} cannot be exported for {list(example_shape)}: {reason}. "
            "Use operators that ONNX knows and an input size that the model takes."
        ) from None
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))
