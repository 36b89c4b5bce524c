"""The objective of a distillation: a sum of losses, and the four axes on which it changes while the student learns."""
# Shapes: N batch, K classes.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.epochs import Epoch
from pipeline.learning.labels import UNLABELLED
from pipeline.learning.losses import cross_entropy, dist, dkd, kd, standardized
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.objective import Loss, Objective, Passes
from pipeline.learning.sample_weights import sample_weights
from pipeline.learning.schedules import way_done
from pipeline.learning.teachers import TeacherTrajectory
from pipeline.learning.temperature import LearnedTemperature, scheduled_temperature
from pipeline.recipe import (
    CrossEntropyConfig,
    DistConfig,
    DistillConfig,
    DkdConfig,
    FeaturesConfig,
    KdConfig,
    LossConfig,
    SoftLoss,
    TrainConfig,
    WeightCurriculumConfig,
)


def losses_of(config: DistillConfig) -> tuple[LossConfig, ...]:
    """The losses of the recipe in full: the short form written out, cross-entropy where the list has none, and none of weight 0 but
    cross-entropy that comes as the teacher's word goes."""
    given: tuple[LossConfig, ...]
    if config.losses is None:
        given = (KdConfig(weight=config.kd_weight), CrossEntropyConfig(weight=1 - config.kd_weight))
    elif not any(isinstance(one, CrossEntropyConfig) for one in config.losses):
        given = (*config.losses, CrossEntropyConfig())
    else:
        given = config.losses
    moves = config.weight_curriculum is not None and config.weight_curriculum.schedule != "constant"
    return tuple(one for one in given if one.weight > 0 or (moves and isinstance(one, CrossEntropyConfig)))


class Distillation(Objective):
    """sum of weight_i * factor * mean_n(w_n * loss_i,n) over the teacher's losses, and the same of cross-entropy on the labels.

    factor is the weight axis, w_n the weight of a sample (`sample_weights`); no gradient goes through either. `features` stand in the
    order of the recipe's FeaturesConfig. Where a part is None, its axis stands still; `own` takes the place of the sum.
    """

    def __init__(
        self,
        config: DistillConfig,
        training: TrainConfig,
        *,
        samples: SampleCurriculum | None = None,
        trajectory: TeacherTrajectory | None = None,
        features: Sequence[FeatureLoss] = (),
        teacher_top1: float | None = None,
        own: Loss | None = None,
    ) -> None:
        super().__init__()
        self._own = own
        self._config, self._training, self._losses = config, training, losses_of(config)
        self.samples = samples
        self.features = nn.ModuleList(features)
        schedule = config.temperature_curriculum
        self.learned = LearnedTemperature(schedule) if schedule is not None and schedule.schedule == "learned" else None
        self._trajectory, self._teacher_top1 = trajectory, teacher_top1
        self._factor, self._taught_by, self._epochs_done = 1.0, None if trajectory is None else "teacher", 0.0
        self._told = _Told()

    def forward(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        self._told.add(teacher_NK, labels_N)
        if self._own is not None:
            return self._own(student_NK, teacher_NK, labels_N)
        return self._sum(student_NK, teacher_NK, labels_N)

    def begin_epoch(self, epoch: int, num_epochs: int, epochs: Sequence[Epoch], model: nn.Module) -> Passes | None:
        progress = epoch / num_epochs
        self._told = _Told()
        validation_top1 = [one.validation_top1 for one in epochs]
        if self._config.weight_curriculum is not None:
            self._factor = teacher_factor(
                self._config.weight_curriculum, epoch, progress, validation_top1, self._teacher_top1
            )
        if self._trajectory is not None:
            self._taught_by = self._trajectory.begin_epoch(progress)
        if self.samples is None:
            return None
        return self.samples.begin_epoch(epoch, progress, validation_top1, model)

    def begin_step(self, epochs_done: float) -> None:
        self._epochs_done = epochs_done
        for feature in self._features:
            feature.listen()

    def facts(self) -> Mapping[str, Any]:
        return {
            "temperature": self._told.mean_temperature if self._config.temperature_curriculum is not None else None,
            "teacher_factor": self._factor if self._config.weight_curriculum is not None else None,
            "taught_by": self._taught_by,
            "teacher_wrong": self._told.share_wrong,
        }

    def close(self) -> None:
        """Leave both models as they were found: no hooks, and the teacher with the weights of its end."""
        for feature in self._features:
            feature.remove()
        if self._trajectory is not None:
            self._trajectory.finish()

    def temperature(self) -> float | Tensor:
        """T of this step, for every loss that has none of its own."""
        if self.learned is not None:
            learned: Tensor = self.learned(self._epochs_done)
            return learned
        progress = self._epochs_done / self._training.epochs
        epoch = int(self._epochs_done)
        return scheduled_temperature(
            self._config.temperature, self._config.temperature_curriculum, progress, epoch=epoch
        )

    @property
    def _features(self) -> list[FeatureLoss]:
        return [feature for feature in self.features if isinstance(feature, FeatureLoss)]

    def _sum(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        weights = sample_weights(self._config, student_NK, teacher_NK, labels_N)
        temperature = self.temperature()
        self._told.temperature_sum += temperature.detach() if isinstance(temperature, Tensor) else temperature
        features = iter(self._features)
        total = student_NK.new_zeros(())
        for one in self._losses:
            if isinstance(one, CrossEntropyConfig):
                hard_N = self._cross_entropy(student_NK, labels_N)
                total = total + self._weight(one) * _mean(hard_N, weights.hard_N)
                continue
            assert teacher_NK is not None  # asks_teacher
            if isinstance(one, FeaturesConfig):
                soft_N = next(features)()
            else:
                soft_N = logit_loss(one, student_NK, teacher_NK, labels_N, temperature, weights.soft_N)
            total = total + self._weight(one) * _mean(soft_N, weights.soft_N)
        return total

    def _cross_entropy(self, student_NK: Tensor, labels_N: Tensor) -> Tensor:
        return cross_entropy(student_NK, labels_N, label_smoothing=self._training.label_smoothing, reduction="none")

    def _weight(self, one: LossConfig) -> float:
        """The weight of a loss in this step."""
        weight = one.weight
        if one.warmup_epochs > 0:
            weight *= min(self._epochs_done / one.warmup_epochs, 1.0)
        if not isinstance(one, CrossEntropyConfig):
            return weight * self._factor
        return weight + (1 - self._factor) * max(1 - weight, 0.0)


def logit_loss(
    one: SoftLoss,
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor,
    weights_N: Tensor | None = None,
) -> Tensor:
    """(N,): one loss of the teacher's logits (N, K), at `temperature` where it has none of its own."""
    if one.standardize:
        student_NK, teacher_NK = standardized(student_NK), standardized(teacher_NK)
    if one.temperature is not None:
        temperature = one.temperature
    if isinstance(one, DkdConfig):
        return dkd(student_NK, teacher_NK, labels_N, temperature=temperature, alpha=one.alpha, beta=one.beta)
    if isinstance(one, DistConfig):
        shares = {"beta": one.beta, "gamma": one.gamma}
        return dist(student_NK, teacher_NK, temperature=temperature, weights_N=weights_N, **shares)
    return kd(student_NK, teacher_NK, temperature=temperature)


def teacher_factor(
    config: WeightCurriculumConfig,
    epoch: int,
    progress: float,
    validation_top1: Sequence[float | None],
    teacher_top1: float | None,
) -> float:
    """What everything that the teacher says is multiplied by in `epoch` (from 0), 0 to 1; 1 in the first epoch.

    linear, cosine and step go from 1 to `end`. gap: the teacher's lead on validation after the last epoch over that after the first,
    within `end` and 1; where the student was level after one epoch already, `end`.
    """
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "replay":
        return config.values[epoch]
    if config.schedule == "gap":
        gaps = [teacher_top1 - top1 for top1 in validation_top1 if top1 is not None and teacher_top1 is not None]
        if not gaps:
            return 1.0
        return config.end if gaps[0] <= 0 else min(1.0, max(config.end, gaps[-1] / gaps[0]))
    done = way_done(config.schedule, progress, full_at=config.full_at, num_steps=config.num_steps)
    return 1 + (config.end - 1) * done


class _Told:
    """What an epoch counts for its line of the curve; on the device, which is not waited for."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.temperature_sum: float | Tensor = 0.0
        self.num_wrong_and_labelled_2: Tensor | None = None

    def add(self, teacher_NK: Tensor | None, labels_N: Tensor) -> None:
        self.num_steps += 1
        if teacher_NK is not None:
            has_label_N = labels_N != UNLABELLED
            is_wrong_N = has_label_N & (teacher_NK.argmax(1) != labels_N)
            counts_2 = torch.stack([is_wrong_N.sum(), has_label_N.sum()])
            before_2 = self.num_wrong_and_labelled_2
            self.num_wrong_and_labelled_2 = counts_2 if before_2 is None else before_2 + counts_2

    @property
    def mean_temperature(self) -> float | None:
        return float(self.temperature_sum) / self.num_steps if self.num_steps else None

    @property
    def share_wrong(self) -> float | None:
        if self.num_wrong_and_labelled_2 is None:
            return None
        num_wrong, num_labelled = self.num_wrong_and_labelled_2.tolist()
        return num_wrong / num_labelled if num_labelled else None


def _mean(loss_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return loss_N.mean() if weights_N is None else (loss_N * weights_N).mean()
