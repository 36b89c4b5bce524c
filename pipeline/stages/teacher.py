"""Stage 1, teacher: train it, fine-tune it, or take a checkpoint as it is, and make sure that it knows something.

Reads the prepared data. Writes model.safetensors and teacher.json (architecture, validation top-1, training curve).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts import PreparedData
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.losses import cross_entropy
from pipeline.learning.soft_labels import soft_labels, top1
from pipeline.learning.trained import new_model, open_data, save_trained
from pipeline.learning.training import train
from pipeline.recipe import TeacherConfig
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import TrainingError


def train_teacher(config: TeacherConfig, prepared: PreparedData, out_dir: Path, how: How) -> None:
    data = open_data(prepared)
    torch.manual_seed(how.seed)
    model = new_model(config, data, allow_code=how.allow_code, offline=how.offline)
    training: dict[str, Any] | None = None
    if config.train is not None:
        loss = partial(plain_loss, label_smoothing=config.train.label_smoothing)
        trained = train(
            model,
            data,
            loss,
            config.train,
            seed=how.seed,
            checkpoint_dir=out_dir / CHECKPOINT_DIR,
            progress=how.progress,
            label="teacher",
        )
        training = trained.summary()
    split = "validation" if data.num_validation else "train"
    score = evaluate_teacher(model, data, split)
    save_trained(model, config, data, out_dir, "teacher", **{f"top1_{split}": score}, training=training)


def plain_loss(student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy in nats; there is nobody above the teacher."""
    return cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)


def evaluate_teacher(model: nn.Module, data: Data, split: str) -> float:
    """Top-1 on `split`; raises TrainingError for a teacher that a coin could replace."""
    logits_NK, labels_N = soft_labels(model, data, split)
    score = top1(logits_NK, labels_N)
    chance = float(labels_N.bincount().max() / len(labels_N))
    # Three standard errors above always answering the most frequent class.
    # With few samples that would ask for more than all of them; half the way to perfect is then enough.
    limit = min(chance + 3 * (chance * (1 - chance) / len(labels_N)) ** 0.5, (1 + chance) / 2)
    if score <= limit:
        raise TrainingError(
            f"teacher scores {score:.1%} on {split}, where always naming one class scores {chance:.1%}: "
            "its weights are probably not loaded, or it was not trained.\n"
            "Check teacher.checkpoint and the order of the classes, or train it (teacher.train)."
        )
    return score
