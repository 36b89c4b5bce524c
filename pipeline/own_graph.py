"""A person's ONNX graph as it is taken in: read, refused where it cannot be used, described for the targets.

Reads an ONNX file, writes model.onnx and exported.json into a directory of ours. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from pipeline.calibration import Calibration, Sample
from pipeline.graphs.files import check_float, describe, export_graph, export_half, import_onnx, read_graph
from targets.base import Exported
from targets.errors import ModelError, first_line


def float_graph(model: Path) -> ir.Model:
    """Read a float graph; raises ModelError for what is quantized already."""
    graph = read_graph(model)
    check_float(graph, model)
    return graph


def import_float(model: Path, calibration: Calibration, out_dir: Path, *, half: bool = False) -> Exported:
    """The float graph with every free axis but the batch pinned to the samples' size: so it is quantized and measured.

    `half`: with its float16 twin, for a runtime that computes in the types that a graph is written in.
    """
    graph = float_graph(model)
    for value in graph.graph.inputs:
        sample = calibration.samples[0].get(str(value.name))
        if sample is not None and value.shape is not None and len(value.shape) == sample.ndim:
            sizes = [
                size if isinstance(size, int) else given for size, given in zip(value.shape, sample.shape, strict=True)
            ]
            value.shape = ir.Shape([value.shape[0], *sizes[1:]])
    exported = describe(graph, name=model.stem, out_dir=out_dir, preprocessing=calibration.preprocessing)
    exported = export_graph(graph, exported)
    return export_half(graph, exported) if half else exported


def check_runs(floats: Exported, sample: Sample) -> None:
    """Run the float graph once: what no checker sees, such as channels that do not fit, would end inside the quantizer."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the message below says it
    try:
        session = ort.InferenceSession(str(floats.model_path), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(sample))
    except Exception as error:  # ORT's errors share no base class but Exception
        told = ", ".join(f"'{name}' {array.dtype}{list(array.shape)}" for name, array in sample.items())
        raise ModelError(
            f"{floats.name}: ONNX Runtime cannot run it on {told}: {first_line(error)}. Mend the model or the samples."
        ) from None


def import_fixed(model: Path, out_dir: Path, *, half: bool = False) -> Exported:
    """Anybody's graph as it is; one that leaves more than the batch free has no size to be proved or measured with."""
    exported = import_onnx(model, name=model.stem, out_dir=out_dir, half=half)
    for spec in exported.inputs:
        if None in spec.shape[1:]:
            raise ModelError(
                f"{model}: input '{spec.name}' {list(spec.shape)} leaves more than the batch free, so there is no size to "
                "compile for. Fix it:\n"
                f"python -m onnxruntime.tools.make_dynamic_shape_fixed --input_name {spec.name} --input_shape 1,3,224,224 ..."
            )
    return exported
