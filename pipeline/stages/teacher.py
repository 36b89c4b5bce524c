"""Stage 1, teacher: train it, fine-tune it, or take a checkpoint as it is, and make sure that it knows something.

It learns from the samples that have a label, and from no others. Reads the prepared data. Writes model.safetensors and teacher.json
(architecture, validation top-1, training curve); and in trajectory/ the weights of its own way that the recipe wants kept, to
teach a student that is not ready for the end of it.
"""

from __future__ import annotations

import shutil
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
from pipeline.learning.training import kept_weights, train
from pipeline.recipe import TeacherConfig, TrainConfig
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import TrainingError


def train_teacher(config: TeacherConfig, prepared: PreparedData, out_dir: Path, how: How) -> None:
    data = open_data(prepared)
    torch.manual_seed(how.seed)
    model = new_model(config, data, allow_code=how.allow_code, offline=how.offline)
    learned: dict[str, Any] = {"training": None, "trajectory": []}
    if config.train is not None:
        learned = _train(model, data.labelled(), config.train, trajectory_epochs(config), out_dir, how)
    split = "validation" if data.num_validation else "train"
    score = evaluate_teacher(model, data, split)
    save_trained(model, config, data, out_dir, "teacher", **{f"top1_{split}": score}, **learned)


def _train(
    model: nn.Module, data: Data, config: TrainConfig, keep_epochs: list[int], out_dir: Path, how: How
) -> dict[str, Any]:
    """Train in place; returns the curve and which weights of its way were kept, the first epoch first."""
    trained = train(
        model,
        data,
        partial(plain_loss, label_smoothing=config.label_smoothing),
        config,
        seed=how.seed,
        checkpoint_dir=out_dir / CHECKPOINT_DIR,
        progress=how.progress,
        label="teacher",
        keep_epochs=keep_epochs,
    )
    kept = []
    for epoch in keep_epochs:
        path = out_dir / "trajectory" / kept_weights(out_dir, epoch).name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(kept_weights(out_dir / CHECKPOINT_DIR, epoch), path)  # a copy: a killed stage begins here again
        top1 = trained.epochs[epoch - 1].validation_top1
        kept.append({"epoch": epoch, "file": str(path.relative_to(out_dir)), "validation_top1": top1})
    return {"training": trained.summary(), "trajectory": kept}


def trajectory_epochs(config: TeacherConfig) -> list[int]:
    """The epochs (from 1) whose weights are kept: evenly spaced, without the last, which is the teacher itself."""
    if config.train is None:
        return []
    step = config.train.epochs / (config.keep_checkpoints + 1)
    return [round(number * step) for number in range(1, config.keep_checkpoints + 1)]


def plain_loss(student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy in nats; there is nobody above the teacher."""
    return cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)


def evaluate_teacher(model: nn.Module, data: Data, split: str) -> float:
    """Top-1 on `split`, of train on the samples that have a label; raises TrainingError for a teacher that a coin could replace."""
    logits_NK, labels_N = soft_labels(model, data.labelled() if split == "train" else data, split)
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
