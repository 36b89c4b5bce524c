"""Stage 2, distill: teach the student from the teacher's soft labels, on the curriculum that the recipe asks for.

Progressive rounds: soft labels, train, evaluate; where the validation target is met, stop; else the soft labels of the
next round come from the best model so far (the teacher, as long as no student beats it), and the student goes on.
A student that was trained elsewhere (`train: null`) is taken as it is. An assistant is a student too: of the teacher, or of the
assistant before it, by plain KD.
Reads the data and the teacher. Writes model.safetensors and distill.json (rounds, training curves, pacing).
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation, asks_teacher, losses_of
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.models import count_parameters
from pipeline.learning.own_code import own_factory
from pipeline.learning.soft_labels import soft_labels, validation_top1
from pipeline.learning.teachers import TeacherTrajectory
from pipeline.learning.trained import load_trained, new_model, open_data, save_trained
from pipeline.learning.training import train
from pipeline.mistakes import where_teacher_errs
from pipeline.recipe import AssistantConfig, DistillConfig, FeaturesConfig, ModelConfig
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import RecipeError

TEACHER = "teacher"


def train_assistant(
    config: AssistantConfig, student: ModelConfig, prepared: PreparedData, tutor: TrainedModel, out_dir: Path, how: How
) -> None:
    """An assistant learns from `tutor`; it must not be smaller than the student that it is there for."""
    data = open_data(prepared)
    sizes = [
        count_parameters(new_model(_architecture(one), data, allow_code=how.allow_code, offline=how.offline))
        for one in (config, student)
    ]
    _refuse_smaller(config.model, sizes[0], student.model, sizes[1])
    distill(DistillConfig(**config.model_dump()), prepared, tutor, out_dir, how)


def distill(config: DistillConfig, prepared: PreparedData, teacher: TrainedModel, out_dir: Path, how: How) -> None:
    data = open_data(prepared)
    torch.manual_seed(how.seed)
    student = new_model(config, data, allow_code=how.allow_code, offline=how.offline)
    if config.train is None:  # as it was given
        score = validation_top1(student, data)
        save_trained(student, config, data, out_dir, "distill", top1_validation=score, rounds=[])
        return
    if teacher.stage == "distill":
        _refuse_smaller(teacher.info["model"], teacher.info["parameters"], config.model, count_parameters(student))
    best, best_name = load_trained(teacher, data, allow_code=how.allow_code), TEACHER
    best_top1 = validation_top1(best, data)
    rounds: list[dict[str, Any]] = []
    for number in range(1, config.rounds + 1):
        tutor = _Tutor(best, best_name, best_top1, teacher)
        trained = _round(config, data, student, tutor, number, out_dir, how)
        student_top1 = validation_top1(student, data)
        rounds.append(
            {
                "round": number,
                "soft_labels_from": best_name,
                "validation_top1": student_top1,
                "teacher_wrong": _where_teacher_wrong(config, best, student, data),
                **trained,
            }
        )
        if student_top1 is None or best_top1 is None:
            break
        if config.target_top1 is not None and student_top1 >= config.target_top1:
            how.progress.say(f"distill: {student_top1:.2%} on validation meets the target of {config.target_top1:.2%}")
            break
        if student_top1 > best_top1:
            best = _frozen_copy(student, config, data, how.allow_code)
            best_name, best_top1 = f"student of round {number}", student_top1
    score = rounds[-1]["validation_top1"]
    save_trained(student, config, data, out_dir, "distill", top1_validation=score, rounds=rounds)


@dataclass(frozen=True)
class _Tutor:
    """Who gives the soft labels of a round, and the teacher's own files."""

    model: nn.Module
    name: str
    top1: float | None
    teacher: TrainedModel


def _round(
    config: DistillConfig, data: Data, student: nn.Module, tutor: _Tutor, number: int, out_dir: Path, how: How
) -> dict[str, Any]:
    """Train the student in place; returns the curve, and the pacing as a recipe takes it for a blind replay."""
    assert config.train is not None  # distill takes such a student as it is
    objective = _objective(config, data, student.to(data.device), tutor, how)
    try:
        trained = train(
            student,
            data,
            objective,
            config.train,
            seed=how.seed + 1000 * number,
            checkpoint_dir=out_dir / CHECKPOINT_DIR / f"round-{number}",
            progress=how.progress,
            label="distill" if config.rounds == 1 else f"distill round {number}",
            teacher=tutor.model if asks_teacher(config) else None,
        )
    finally:
        objective.close()
    summary = trained.summary()
    if config.curriculum is not None:
        summary["pacing_log"] = [epoch["shown_fraction"] for epoch in summary["epochs"]]
    return summary


def _objective(config: DistillConfig, data: Data, student: nn.Module, tutor: _Tutor, how: How) -> Distillation:
    assert config.train is not None  # distill takes such a student as it is
    samples = None
    if config.curriculum is not None:
        samples = SampleCurriculum(config.curriculum, data, tutor.model, seed=how.seed)
    own = None
    if config.loss is not None:
        own = own_factory(config.loss, "distill.loss", allow_code=how.allow_code)()
    return Distillation(
        config,
        config.train,
        samples=samples,
        trajectory=_trajectory(config, tutor, how.seed),
        features=_features(config, data, student, tutor.model),
        teacher_top1=tutor.top1,
        own=own,
    )


def _trajectory(config: DistillConfig, tutor: _Tutor, seed: int) -> TeacherTrajectory | None:
    """The teacher's own way; None where the recipe asks for none, or a student of an earlier round teaches."""
    if config.teacher_curriculum is None or tutor.name != TEACHER:
        return None
    kept = [tutor.teacher.dir / one["file"] for one in tutor.teacher.info.get("trajectory", ())]
    if not kept:
        raise RecipeError(
            "distill.teacher_curriculum: this teacher kept no checkpoints of its way. Set teacher.keep_checkpoints and train it."
        )
    return TeacherTrajectory(config.teacher_curriculum, tutor.model, (*kept, tutor.teacher.weights_path), seed)


def _features(config: DistillConfig, data: Data, student: nn.Module, teacher: nn.Module) -> list[FeatureLoss]:
    """Hooks on both models, in the order of the recipe's feature losses."""
    wanted = [] if config.loss is not None else [one for one in losses_of(config) if isinstance(one, FeaturesConfig)]
    example_NCHW = torch.zeros(2, data.channels, *data.image_size, device=data.device)
    return [
        FeatureLoss(
            student,
            teacher,
            student_layer=one.student_layer,
            teacher_layer=one.teacher_layer,
            example_NCHW=example_NCHW,
        )
        for one in wanted
    ]


def _where_teacher_wrong(config: DistillConfig, teacher: nn.Module, student: nn.Module, data: Data) -> dict[str, Any]:
    """What was done about it, and what the student says on validation where its teacher errs; counts None without one."""
    if not data.num_validation:
        return {"choice": config.teacher_wrong, "num_validation": 0, "on_validation": None}
    (teacher_NK, labels_N), (student_NK, _) = (soft_labels(model, data, "validation") for model in (teacher, student))
    teacher_N, student_N = (logits_NK.argmax(1).cpu().numpy() for logits_NK in (teacher_NK, student_NK))
    counts = where_teacher_errs(teacher_N, student_N, labels_N.cpu().numpy())
    return {"choice": config.teacher_wrong, "num_validation": data.num_validation, "on_validation": counts}


def _refuse_smaller(assistant: str, num_assistant: int, student: str, num_student: int) -> None:
    if num_assistant < num_student:
        raise RecipeError(
            f"distill.assistants: {assistant} has {num_assistant:,} parameters, fewer than the {num_student:,} of the student "
            f"{student}, which would learn from a smaller net. Order assistants from the teacher's size down to the student's."
        )


def _architecture(config: ModelConfig) -> ModelConfig:
    return ModelConfig(model=config.model, args=config.args)


def _frozen_copy(student: nn.Module, config: DistillConfig, data: Data, allow_code: bool) -> nn.Module:
    """The student as it stands, to teach the next round while the student itself goes on."""
    copy = new_model(_architecture(config), data, allow_code=allow_code, offline=True)
    copy.load_state_dict(student.state_dict())
    return copy.eval()
