"""Stage 2, distill: teach the student from the teacher's soft labels, on the curriculum that the recipe asks for.

Progressive rounds: soft labels, train, evaluate; where the validation target is met, stop; else the soft labels of the
next round come from the best model so far (the teacher, as long as no student beats it), and the student goes on from its best
round, which is also the one that ships: a round that made it worse is undone.
Where the recipe's teacher_forward comes to `cached`, the teacher's soft labels are those of stage soft_labels; a round that learns
from a student keeps that student's beside the checkpoints, and they are gone with them.
A student that no teacher helps is shown the samples that have a label. One that was trained elsewhere (`train: null`) is taken as it
is. An assistant is a student too: of the teacher, or of the assistant before it, by plain KD.
Reads the data, the teacher and its soft labels. Writes model.safetensors (the best epoch on validation), last.safetensors (the very last
one, which is what an ablation judges) and distill.json (rounds, training curves, pacing).
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import PreparedData, SoftLabels, TrainedModel
from pipeline.how import How
from pipeline.learning.curriculum import SampleCurriculum, check_fills_a_batch
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation, losses_of
from pipeline.learning.distributed import from_first, is_first
from pipeline.learning.label_cache import LabelCache
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.models import as_named, count_parameters, save_weights
from pipeline.learning.own_code import called, own_factory
from pipeline.learning.soft_labels import cache_soft_labels, labels_of, soft_labels, top1, validation_top1
from pipeline.learning.teachers import TeacherTrajectory
from pipeline.learning.trained import load_trained, new_model, open_data, save_trained
from pipeline.learning.training import Trained, train
from pipeline.learning.views import view_seeds
from pipeline.mistakes import where_teacher_errs
from pipeline.recipe import (
    AssistantConfig,
    DistillConfig,
    FeaturesConfig,
    ModelConfig,
    SoftLoss,
    TrainConfig,
    fault_without_labels,
)
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import RecipeError

TEACHER = "teacher"
# docs/results/ablation_fashion_mnist_views.json, arm one-view; a test holds the figure against the file.
VIEWS_COST = "on a fifth of Fashion-MNIST one view shown 12 times cost 0.20 points"


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


def distill(
    config: DistillConfig,
    prepared: PreparedData,
    teacher: TrainedModel,
    out_dir: Path,
    how: How,
    labels: SoftLabels | None = None,
    *,
    seed: int | None = None,
) -> None:
    """labels: this teacher's; where a cache is asked for and none is given, its own is made. seed: the student's, the recipe's where
    it is None; stored views come from the recipe's in either case, so that students of several seeds share them."""
    data = open_data(prepared)
    seed = how.seed if seed is None else seed
    torch.manual_seed(seed)
    student = new_model(config, data, allow_code=how.allow_code, offline=how.offline)
    if config.train is None:  # as it was given
        score = validation_top1(student, data)
        save_trained(student, config, data, out_dir, "distill", top1_validation=score, rounds=[])
        return
    if teacher.stage == "distill":
        _refuse_smaller(teacher.info["model"], teacher.info["parameters"], config.model, count_parameters(student))
    if not config.asks_teacher:
        data = data.labelled()
    elif data.num_labelled < data.num_train and (fault := fault_without_labels(config)) is not None:
        raise RecipeError(f"distill.{fault}.")
    if config.curriculum is not None:
        check_fills_a_batch(config.curriculum, data.num_train, config.train.batch_size)
    views = None if config.num_views is None else view_seeds(how.seed, config.num_views)
    job = _Job(config, config.train, prepared, data, teacher, labels, out_dir, how, seed, views)
    rounds, best, last = _rounds(job, student)
    used, why = config.decided_teacher_forward
    save_trained(
        student,
        config,
        data,
        out_dir,
        "distill",
        top1_validation=best["validation_top1"],
        rounds=rounds,
        weights=_weights(best, rounds[-1], data),
        teacher_forward={"asked": config.teacher_forward, "used": used, "why": why},
    )
    student.load_state_dict(last.last)
    save_weights(student, out_dir / "last.safetensors")


@dataclass(frozen=True)
class _Job:
    """What all rounds share. `seed` is the student's own, `view_seeds` are None where every epoch has a view of its own."""

    config: DistillConfig
    training: TrainConfig
    prepared: PreparedData
    data: Data
    teacher: TrainedModel
    labels: SoftLabels | None
    out_dir: Path
    how: How
    seed: int
    view_seeds: tuple[int, ...] | None


@dataclass(frozen=True)
class _Answers:
    """What a model says on the validation split: class ids (N,) beside the labels (N,), and its top-1."""

    says_N: torch.Tensor
    labels_N: torch.Tensor
    top1: float


@dataclass(frozen=True)
class _Tutor:
    """Who gives the soft labels of a round. Its answers are None where the recipe keeps no validation split."""

    model: nn.Module
    name: str
    answers: _Answers | None

    @property
    def top1(self) -> float | None:
        return None if self.answers is None else self.answers.top1


def _rounds(job: _Job, student: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Any], Trained]:
    """Train the student in place, round after round, and leave it as its best round did; returns what each has to say, which was
    the best, and the end of the last training."""
    config, data = job.config, job.data
    model = load_trained(job.teacher, data, allow_code=job.how.allow_code)
    tutor = _Tutor(model, TEACHER, _answers(model, data))
    rounds: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    best_weights: dict[str, torch.Tensor] = {}
    for number in range(1, config.rounds + 1):
        trained, told = _round(job, student, tutor, number)
        answers = _answers(student, data)
        student_top1 = None if answers is None else answers.top1
        rounds.append(
            {
                "round": number,
                "soft_labels_from": tutor.name,
                "validation_top1": student_top1,
                "teacher_wrong": _where_teacher_wrong(config, tutor.answers, answers),
                **told,
            }
        )
        if not best or (student_top1 or 0.0) > best["validation_top1"]:
            best, best_weights = rounds[-1], trained.best
        else:
            student.load_state_dict(best_weights)
        if student_top1 is None or tutor.top1 is None:  # both, as there is no validation split
            break
        if config.target_top1 is not None and student_top1 >= config.target_top1:
            met = f"{student_top1:.2%} on validation meets the target of {config.target_top1:.2%}"
            job.how.progress.say(f"distill: {met}")
            break
        if student_top1 > tutor.top1:
            copied = _frozen_copy(student, config, data, job.how.allow_code)
            tutor = _Tutor(copied, f"student of round {number}", answers)
    return rounds, best, trained


def _round(job: _Job, student: nn.Module, tutor: _Tutor, number: int) -> tuple[Trained, dict[str, Any]]:
    """Train the student in place; returns the curve, and the pacing as a recipe takes it for a blind replay."""
    cache = _cache(job, tutor)
    warnings = [few_views(job.config, job.view_seeds, cache), few_logits(job.config, cache)]
    warning = ". ".join(filter(None, warnings)) or None
    if warning is not None and number == 1:
        job.how.progress.say(f"distill: {warning}")
    objective = _objective(job, student.to(job.data.device), tutor)
    try:
        trained = train(
            student,
            job.data,
            objective,
            job.training,
            seed=job.seed + 1000 * number,
            checkpoint_dir=job.out_dir / CHECKPOINT_DIR / f"round-{number}",
            progress=job.how.progress,
            label="distill" if job.config.rounds == 1 else f"distill round {number}",
            teacher=tutor.model if cache is None and job.config.asks_teacher else None,
            labels=cache,
            view_seeds=job.view_seeds,
        )
    finally:
        objective.close()
    told = {**trained.summary(), "soft_labels": None if cache is None else _facts(cache), "warning": warning}
    if job.config.curriculum is not None:
        told["pacing_log"] = [epoch["shown_fraction"] for epoch in told["epochs"]]
    return trained, told


def _cache(job: _Job, tutor: _Tutor) -> LabelCache | None:
    """The tutor's soft labels; None where the tutor is asked in every step. A round that is gone on with finds them as it left them."""
    if not job.config.uses_cache or job.view_seeds is None:
        return None
    stored = job.config.cache
    of = labels_of(tutor.model, job.data, job.prepared.digest, job.view_seeds, dtype=stored.dtype, top_k=stored.top_k)
    if tutor.name == TEACHER and job.labels is not None:
        return LabelCache.open(job.labels.dir, of, job.data.device)
    directory = job.out_dir / CHECKPOINT_DIR / f"soft-labels-{of.teacher[:8]}"
    if not is_first():
        while not from_first(True):  # one word a view
            pass
        return LabelCache.open(directory, of, job.data.device)
    told = partial(from_first, False)
    cache = cache_soft_labels(tutor.model, job.data, of, directory, job.training, job.how.progress, after_view=told)
    from_first(True)
    return cache


def few_views(config: DistillConfig, view_seeds: tuple[int, ...] | None, cache: LabelCache | None) -> str | None:
    """A warning where views are shown more than once: how often, what it saves, and what it cost where that was measured."""
    num_epochs, words = config.epochs_in_words
    num_shown = num_epochs * config.num_passes
    if view_seeds is None or len(view_seeds) >= num_shown:
        return None
    num_views = len(view_seeds)
    if config.num_passes > 1:
        words += f" that show a sample up to {config.num_passes} times"
    times = f"{'up to ' if config.num_passes > 1 else ''}{num_shown / num_views:.3g} times"
    often = f"{num_views} view{'s' if num_views > 1 else ''} for {words}: each is shown {times}"
    costs = f"Images that differ less may cost accuracy ({VIEWS_COST}): distill.views"
    num_saved = num_epochs - num_views
    if cache is None:
        return f"{often}, and no time is saved by it, as no cache is read. {costs}"
    if num_saved <= 0:
        return f"{often}. {costs}"
    passes = f"{num_saved} pass{'es' if num_saved > 1 else ''} over the data"
    return f"{often}, which saves the teacher {passes} (about {num_saved * cache.seconds_a_view:.0f} s). {costs}"


def few_logits(config: DistillConfig, cache: LabelCache | None) -> str | None:
    """A warning where a cache keeps the largest logits and something looks at the others: all but plain KD at T = 1, and whatever
    weighs a sample by what the teacher gives its label."""
    if cache is None or cache.of.top_k is None or cache.of.top_k >= cache.of.num_classes:
        return None
    soft = [one for one in losses_of(config) if isinstance(one, SoftLoss)]
    is_plain = all(
        one.name == "kd" and not one.standardize and (one.temperature or config.temperature) == 1 for one in soft
    )
    weights = config.weight_curriculum
    by_label = config.teacher_wrong == "down_weight" or (weights is not None and weights.per_sample == "correctness")
    if is_plain and not by_label and config.loss is None and config.temperature_curriculum is None:
        return None
    return (
        f"The {cache.of.top_k} largest of {cache.of.num_classes} logits are kept and the rest spread evenly, which above T = 1 and "
        "under any loss but KD is another target than the teacher's: distill.cache.top_k"
    )


def _facts(cache: LabelCache) -> dict[str, Any]:
    """How they are stored, what they were computed in, and what a view took the teacher."""
    stored = {"dtype": cache.of.dtype, "top_k": cache.of.top_k, "num_views": len(cache.view_seeds)}
    return {**stored, "precision": cache.info["precision"], "seconds_a_view": cache.seconds_a_view}


def _weights(best: Mapping[str, Any], last: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Which epoch of which round each file of weights holds."""
    chosen_by = "validation top-1" if data.num_validation else "nothing: there is no validation split"
    return {
        "model.safetensors": {"round": best["round"], "epoch": best["best_epoch"], "chosen_by": chosen_by},
        "last.safetensors": {"round": last["round"], "epoch": len(last["epochs"]), "chosen_by": "the last epoch"},
    }


def _objective(job: _Job, student: nn.Module, tutor: _Tutor) -> Distillation:
    config = job.config
    samples = None
    if config.curriculum is not None:
        samples = SampleCurriculum(
            config.curriculum, job.data, tutor.model, seed=job.seed, batch_size=job.training.batch_size
        )
    own = None
    if config.loss is not None:
        own = called(own_factory(config.loss, "distill.loss", allow_code=job.how.allow_code), "distill.loss")
    return Distillation(
        config,
        job.training,
        samples=samples,
        trajectory=_trajectory(job, tutor),
        features=_features(config, job.data, student, tutor.model),
        teacher_top1=tutor.top1,
        own=own,
    )


def _trajectory(job: _Job, tutor: _Tutor) -> TeacherTrajectory | None:
    """The teacher's own way; None where the recipe asks for none, or a student of an earlier round teaches."""
    if job.config.teacher_curriculum is None or tutor.name != TEACHER:
        return None
    kept = [job.teacher.dir / one["file"] for one in job.teacher.info.get("trajectory", ())]
    if not kept:
        raise RecipeError(
            "distill.teacher_curriculum: this teacher kept no checkpoints of its way. Set teacher.keep_checkpoints and train it."
        )
    return TeacherTrajectory(job.config.teacher_curriculum, tutor.model, (*kept, job.teacher.weights_path), job.seed)


def _features(config: DistillConfig, data: Data, student: nn.Module, teacher: nn.Module) -> list[FeatureLoss]:
    """Hooks on both models, in the order of the recipe's feature losses."""
    wanted = [] if config.loss is not None else [one for one in losses_of(config) if isinstance(one, FeaturesConfig)]
    example_NCHW = torch.zeros(2, data.channels, *data.image_size, device=data.device)
    return [
        FeatureLoss(
            student,
            as_named(teacher),
            student_layer=one.student_layer,
            teacher_layer=one.teacher_layer,
            example_NCHW=example_NCHW,
        )
        for one in wanted
    ]


def _answers(model: nn.Module, data: Data) -> _Answers | None:
    """None where the recipe keeps no validation split."""
    if not data.num_validation:
        return None
    logits_NK, labels_N = soft_labels(model, data, "validation")
    # What is decided by an accuracy is decided by the first process for all: near a tie, another may count otherwise.
    return _Answers(logits_NK.argmax(1).cpu(), labels_N.cpu(), from_first(top1(logits_NK, labels_N)))


def _where_teacher_wrong(config: DistillConfig, teacher: _Answers | None, student: _Answers | None) -> dict[str, Any]:
    """What was done about it, and what the student says on validation where its teacher errs; counts None without one."""
    if teacher is None or student is None:
        return {"choice": config.teacher_wrong, "num_validation": 0, "on_validation": None}
    counts = where_teacher_errs(teacher.says_N.numpy(), student.says_N.numpy(), teacher.labels_N.numpy())
    return {"choice": config.teacher_wrong, "num_validation": len(teacher.labels_N), "on_validation": counts}


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
    return copy.to(data.device).eval()
