"""Stage 5, score: what every model on the way answers on the test split, once per artifact.

Reads the data and the models. Writes logits (N, K) as .npy, one file a hop; the ledger and the gates read nothing else.
The test split is scored here and on the device, and nowhere before: no choice has seen it.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.device.preprocess import load_evaluation
from benchmarks.statistics import wilson_interval
from pipeline.artifacts import ExportedModel, PreparedData, TrainedModel
from pipeline.graphs.proof import REWRITES_FILE
from pipeline.how import How
from pipeline.learning.data import Batch, Data
from pipeline.learning.deployed import quantized_model
from pipeline.learning.models import predict
from pipeline.learning.trained import load_trained, open_data
from targets.base import Array, read_json, write_json

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
    student_net = load_trained(student, data, allow_code=how.allow_code)
    models = {
        "teacher": load_trained(teacher, data, allow_code=how.allow_code),
        "student": student_net,
        "preprocessing": student_net,
        "quantized": quantized_model(quantized, student, data, allow_code=how.allow_code),
    }
    with how.progress.task("score the test split", total=len(models)) as task:
        for hop, net in models.items():
            own_transform = hop in ("teacher", "student")
            batches = data.plain_batches("test", batch_size=BATCH) if own_transform else _device_batches(data)
            np.save(out_dir / f"{hop}.npy", predict(net, batches).cpu().numpy())
            task.advance()
    write_json(out_dir / "pixels.json", {"max_abs_delta_levels": pixel_delta(data)})


def pixel_delta(data: Data) -> float:
    """Largest difference between training's transform and the device's decode and resize, in levels of 0..255."""
    pairs = zip(data.plain_batches("test", batch_size=BATCH), _device_batches(data), strict=True)
    std = torch.tensor(data.std, device=data.device).view(-1, 1, 1)
    return max(float(((ours.x_NCHW - theirs.x_NCHW) * std * 255).abs().max()) for ours, theirs in pairs)


def _device_batches(data: Data) -> Iterator[Batch]:
    return data.evaluation_batches(batch_size=BATCH)


def score_onnx(exported: ExportedModel, prepared: PreparedData, out_dir: Path, how: How) -> None:
    """The exported graph node by node, no kernel fused: ONNX Runtime with every optimization off.

    Beside the logits: what the dialect's rewrites moved, for the ledger, and the accuracy that a runtime has to reach.
    """
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
    logits_NK = np.concatenate(logits)
    np.save(out_dir / "onnx.npy", logits_NK)
    write_json(out_dir / "rewrites.json", read_json(exported.dir / REWRITES_FILE))
    write_json(out_dir / "expected.json", expected_accuracy(logits_NK, prepared))


def expected_accuracy(logits_NK: Array, prepared: PreparedData) -> dict[str, Any]:
    """What a device has to reach with this graph: top-1 on the whole test split, and by how much its own kernels may
    differ: half the width of the 95 % interval, which two honest runs on other samples would differ by as well."""
    labels_N = np.load(prepared.evaluation_dir / "y.npy", allow_pickle=False)
    right = int((logits_NK.argmax(1) == labels_N).sum())
    low, high = wilson_interval(right, len(labels_N))
    return {"metric": "top1", "value": right / len(labels_N), "n": len(labels_N), "tolerance": (high - low) / 2}
