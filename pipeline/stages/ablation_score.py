"""Score of one arm under one seed: its accuracy, and how far it generalizes. And of the teacher, once.

Reads the data, the student's last and best weights, and what the teacher answered. Writes scores.json (and of the teacher
test.npy, its logits (N, K)). The test split and what is made of it are scored here, once an arm and seed; nothing is chosen by them.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.artifacts import Artifact, PreparedData, TrainedModel
from pipeline.generalization import Classes, Logits, expected_calibration_error, negative_log_likelihood
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.models import accuracy, load_weights
from pipeline.learning.shift import shifted_batches
from pipeline.learning.soft_labels import soft_labels
from pipeline.learning.trained import load_trained, open_data
from pipeline.recipe import DataConfig, ShiftConfig
from targets.base import sha256_file, write_json

TEACHER_LOGITS = "test.npy"


def score_teacher(
    shifts: Sequence[ShiftConfig],
    config: DataConfig,
    prepared: PreparedData,
    teacher: TrainedModel,
    out_dir: Path,
    how: How,
) -> None:
    data = open_data(prepared)
    model = load_trained(teacher, data, allow_code=how.allow_code)
    scores, logits_NK = _scores(model, shifts, config, data, prepared, how)
    np.save(out_dir / TEACHER_LOGITS, logits_NK)
    write_json(out_dir / "scores.json", scores)


def score_arm(
    shifts: Sequence[ShiftConfig],
    config: DataConfig,
    prepared: PreparedData,
    teacher_scores: Artifact,
    student: TrainedModel,
    out_dir: Path,
    how: How,
) -> None:
    """`last`: the weights after the last epoch, which are judged; `best`: those of the best epoch on validation."""
    data = open_data(prepared)
    teacher_NK = np.load(teacher_scores.dir / TEACHER_LOGITS, allow_pickle=False)
    model = load_trained(student, data, allow_code=how.allow_code)
    scores: dict[str, Any] = {}
    for which, path in (("best", student.weights_path), ("last", student.last_weights_path)):
        if scores and sha256_file(path) == sha256_file(student.weights_path):
            scores[which] = scores["best"]
            continue
        load_weights(model, path)
        found, logits_NK = _scores(model, shifts, config, data, prepared, how)
        scores[which] = {**found, "agreement": float((logits_NK.argmax(1) == teacher_NK.argmax(1)).mean())}
    write_json(out_dir / "scores.json", scores)


def _scores(
    model: nn.Module, shifts: Sequence[ShiftConfig], config: DataConfig, data: Data, prepared: PreparedData, how: How
) -> tuple[dict[str, Any], Logits]:
    """What tables show of one model, fractions and nats, and its logits (N, K) on the test split.

    Train top-1 is on the samples that the recipe keeps and that have a label, unaugmented, with the labels that the training had: wrong
    ones count. None where no sample has a label.
    """
    logits_NK, labels_N = _on_test(model, data)
    test_top1 = float((logits_NK.argmax(1) == labels_N).mean())
    train_top1 = accuracy(model, data.labelled().plain_batches("train")) if data.num_labelled else None
    shifted = {}
    with how.progress.task("score under shift", total=len(shifts)) as task:
        for shift in shifts:
            shifted[shift.name] = accuracy(
                model, shifted_batches(shift, data, config, prepared, allow_code=how.allow_code)
            )
            task.advance()
    scores = {
        "test_top1": test_top1,
        "train_top1": train_top1,
        "gap": None if train_top1 is None else train_top1 - test_top1,
        "ece": expected_calibration_error(logits_NK, labels_N),
        "nll": negative_log_likelihood(logits_NK, labels_N),
        "shift": shifted,
    }
    return scores, logits_NK


def _on_test(model: nn.Module, data: Data) -> tuple[Logits, Classes]:
    logits_NK, labels_N = soft_labels(model, data, "test")
    return logits_NK.cpu().numpy(), labels_N.cpu().numpy()
