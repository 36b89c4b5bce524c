"""Stage 5, score: what every model on the way answers on the test split, once per artifact.

Reads the data and the models. Writes logits (N, K) as .npy, one file a hop; the ledger and the gates read nothing else.
The test split is scored here and on the device, and nowhere before: no choice has seen it.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.device.preprocess import load_evaluation
from pipeline.artifacts import ExportedModel, PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.deployed import quantized_model
from pipeline.learning.models import predict
from pipeline.learning.trained import load_trained, open_data
from targets.base import Array

BATCH = 500


def score_torch(
    prepared: PreparedData,
    teacher: TrainedModel,
    student: TrainedModel,
    quantized: TrainedModel,
    out_dir: Path,
    how: How,
) -> None:
    """Teacher and student on training's own transform, student and quantized student on the device's pixels."""
    data = open_data(prepared)
    with how.progress.task("score the test split", total=4) as task:
        student_net = load_trained(student, data, allow_code=how.allow_code)
        for name, net in (
            ("teacher", load_trained(teacher, data, allow_code=how.allow_code)),
            ("student", student_net),
        ):
            np.save(out_dir / f"{name}.npy", predict(net, data.plain_batches("test", batch_size=BATCH)).cpu().numpy())
            task.advance()
        _save_on_device_pixels(student_net, data, out_dir / "preprocessing.npy")
        task.advance()
        _save_on_device_pixels(
            quantized_model(quantized, student, data, allow_code=how.allow_code), data, out_dir / "quantized.npy"
        )
        task.advance()


def score_onnx(exported: ExportedModel, prepared: PreparedData, out_dir: Path, how: How) -> None:
    """The exported graph node by node, no kernel fused: ONNX Runtime with every optimization off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(exported.exported.model_path), options, providers=["CPUExecutionProvider"])
    spec = exported.exported.inputs[0]
    batches = load_evaluation(prepared.evaluation_dir).batches(64, spec)
    logits: list[Array] = []
    with how.progress.task("score the exported graph") as task:
        for x in batches:
            logits.append(session.run(None, {spec.name: x})[0])
            task.advance()
    np.save(out_dir / "onnx.npy", np.concatenate(logits))


def _save_on_device_pixels(net: nn.Module, data: Data, path: Path) -> None:
    np.save(path, predict(net, data.evaluation_batches(batch_size=BATCH)).cpu().numpy())
