"""Stage 2, distill: teach the student from soft labels, easy samples first where the recipe has a curriculum.

Progressive rounds: soft labels, train, evaluate; where the validation target is met, stop; else the soft labels of the
next round come from the best model so far (the teacher, as long as no student beats it), and the student goes on.
A student that was trained elsewhere (`train: null`) is taken as it is.
Reads the data and the teacher. Writes model.safetensors and distill.json (rounds, training curves, pacing).
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.curriculum import difficulty, shown_samples
from pipeline.learning.data import Data
from pipeline.learning.losses import cross_entropy, kd_loss
from pipeline.learning.own_code import own_factory
from pipeline.learning.soft_labels import soft_labels, validation_top1
from pipeline.learning.trained import load_trained, new_model, open_data, save_trained
from pipeline.learning.training import Loss, Shown, all_samples, train
from pipeline.recipe import CurriculumConfig, DistillConfig, TrainConfig
from pipeline.workspace import CHECKPOINT_DIR


def distill(config: DistillConfig, prepared: PreparedData, teacher: TrainedModel, out_dir: Path, how: How) -> None:
    data = open_data(prepared)
    torch.manual_seed(how.seed)
    student = new_model(config, data, allow_code=how.allow_code, offline=how.offline)
    if config.train is None:  # as it was given
        score = validation_top1(student, data)
        save_trained(student, config, data, out_dir, "distill", top1_validation=score, rounds=[])
        return
    best, best_name = load_trained(teacher, data, allow_code=how.allow_code), "teacher"
    best_top1 = validation_top1(best, data)
    rounds: list[dict[str, Any]] = []
    for number in range(1, config.rounds + 1):
        trained = train(
            student,
            data,
            _loss(config, config.train, how.allow_code),
            config.train,
            seed=how.seed + 1000 * number,
            checkpoint_dir=out_dir / CHECKPOINT_DIR / f"round-{number}",
            progress=how.progress,
            label="distill" if config.rounds == 1 else f"distill round {number}",
            teacher=best if _needs_teacher(config) else None,
            shown=_pacing(config.curriculum, best, data, how.seed),
        )
        student_top1 = validation_top1(student, data)
        rounds.append(
            {"round": number, "soft_labels_from": best_name, "validation_top1": student_top1, **trained.summary()}
        )
        if student_top1 is None or best_top1 is None:
            break
        if config.target_top1 is not None and student_top1 >= config.target_top1:
            how.progress.say(f"distill: {student_top1:.2%} on validation meets the target of {config.target_top1:.2%}")
            break
        if student_top1 > best_top1:
            best, best_name, best_top1 = (
                _frozen_copy(student, config, data, how.allow_code),
                f"student of round {number}",
                student_top1,
            )
    save_trained(
        student, config, data, out_dir, "distill", top1_validation=rounds[-1]["validation_top1"], rounds=rounds
    )


def _loss(config: DistillConfig, training: TrainConfig, allow_code: bool) -> Loss:
    if config.loss is not None:
        own: Loss = own_factory(config.loss, "distill.loss", allow_code=allow_code)()
        return own
    return partial(
        soft_and_hard,
        temperature=config.temperature,
        kd_weight=config.kd_weight,
        label_smoothing=training.label_smoothing,
    )


def soft_and_hard(
    student_NK: Tensor,
    teacher_NK: Tensor | None,
    labels_N: Tensor,
    *,
    temperature: float,
    kd_weight: float,
    label_smoothing: float,
) -> Tensor:
    """KD with cross-entropy, in nats; without a teacher's logits plain cross-entropy."""
    if teacher_NK is None:
        return cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)
    return kd_loss(
        student_NK, teacher_NK, labels_N, temperature=temperature, weight=kd_weight, label_smoothing=label_smoothing
    )


def _needs_teacher(config: DistillConfig) -> bool:
    return config.kd_weight > 0 or config.loss is not None


def _pacing(config: CurriculumConfig | None, teacher: nn.Module, data: Data, seed: int) -> Shown:
    """Which samples an epoch shows: all of them, or the paced share in the order of the teacher's difficulty."""
    if config is None:
        return all_samples
    logits_NK, labels_N = soft_labels(teacher, data, "train")
    return partial(_shown, config, difficulty(config.difficulty, logits_NK, labels_N), seed)


def _shown(config: CurriculumConfig, difficulty_N: Tensor, seed: int, progress: float) -> Tensor:
    return shown_samples(config, difficulty_N, progress, seed=seed)


def _frozen_copy(student: nn.Module, config: DistillConfig, data: Data, allow_code: bool) -> nn.Module:
    """The student as it stands, to teach the next round while the student itself goes on."""
    copy = new_model(
        config.model_copy(update={"checkpoint": None, "pretrained": False}), data, allow_code=allow_code, offline=True
    )
    copy.load_state_dict(student.state_dict())
    return copy.eval()
