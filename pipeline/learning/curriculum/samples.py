"""The sample axis of a training: which positions of the train split an epoch visits."""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.learning.curriculum.difficulty import OF_HISTORY, OF_STUDENT, ScoreHistory, difficulty
from pipeline.learning.curriculum.pacing import adaptive_fraction, pacing_fraction
from pipeline.learning.data import Data
from pipeline.learning.objective import Passes
from pipeline.learning.soft_labels import soft_labels
from pipeline.learning.views import mixed_seed
from pipeline.recipe import CurriculumConfig
from targets.errors import RecipeError


class SampleCurriculum(nn.Module):
    """Order by difficulty, as many as the pacing says. What it has measured and counted are buffers, kept with the weights.

    The teacher is asked once, unaugmented; where the student tells, it is asked before the first epoch and every `rescore_every`
    epochs, in evaluation mode. Rescoring may take a sample out again that was shown; the share never falls.
    """

    difficulty_N: Tensor

    def __init__(self, config: CurriculumConfig, data: Data, teacher: nn.Module, *, seed: int, batch_size: int) -> None:
        super().__init__()
        self._config, self._data, self._seed, self._batch_size = config, data, seed, batch_size
        self._teacher_NK, self._labels_N = soft_labels(teacher, data, "train")
        self.history = ScoreHistory(data.num_train) if config.difficulty in OF_HISTORY else None
        told_by_student = config.difficulty in (*OF_STUDENT, *OF_HISTORY)
        measured_N = (
            torch.zeros(data.num_train, dtype=torch.float64)
            if told_by_student
            else difficulty(config.difficulty, self._teacher_NK, self._labels_N)
        )
        self.register_buffer("difficulty_N", measured_N)
        self._told_by_student = told_by_student

    def fraction(self, epoch: int, progress: float, validation_top1: Sequence[float | None]) -> float:
        """The share to show in `epoch` (from 0), at `progress` of the training, after the epochs scored so far."""
        if self._config.pacing == "replay":
            return self._config.fractions[epoch]
        if self._config.pacing == "adaptive":
            return adaptive_fraction(self._config, progress, [top1 for top1 in validation_top1 if top1 is not None])
        return pacing_fraction(self._config, progress)

    def begin_epoch(
        self, epoch: int, progress: float, validation_top1: Sequence[float | None], student: nn.Module
    ) -> Passes:
        """What to visit in `epoch`; measures difficulty again where it is time."""
        if self._told_by_student and epoch % (self._config.rescore_every or 1) == 0:
            self._ask(student)
        fraction = self.fraction(epoch, progress, validation_top1)
        shown = first_samples(self._config.order, self.difficulty_N, fraction, seed=self._seed)
        if self._config.epoch_length == "shown":
            return (shown,)
        num_samples, seed = len(self.difficulty_N), mixed_seed(self._seed, epoch)
        return as_long_as_all(shown, num_samples, self._batch_size, seed=seed)

    def _ask(self, student: nn.Module) -> None:
        student_NK, labels_N = soft_labels(student, self._data, "train")
        if self.history is not None:
            self.history.add(student_NK, labels_N)
            self.difficulty_N.copy_(self.history.difficulty(self._config.difficulty))
        else:
            self.difficulty_N.copy_(difficulty(self._config.difficulty, self._teacher_NK, labels_N, student_NK))


def shown_samples(config: CurriculumConfig, difficulty_N: Tensor, progress: float, *, seed: int) -> Tensor:
    """Indices of the samples to show at `progress`, paced by a function; what is shown once stays shown later."""
    return first_samples(config.order, difficulty_N, pacing_fraction(config, progress), seed=seed)


def first_samples(order: str, difficulty_N: Tensor, fraction: float, *, seed: int) -> Tensor:
    """Indices of that share of the samples, at least one; of a larger share these come first.

    easy_first takes the easiest, hard_first the hardest, random a permutation fixed by `seed`; equally hard samples come in the
    order of that permutation, since data often lie sorted by class. Classes are not balanced: easy classes come first, which is
    the curriculum's own effect, and the random control, which is balanced on average, shows it.
    """
    num_samples = len(difficulty_N)
    num_shown = max(1, round(fraction * num_samples))
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(num_samples, generator=generator).to(difficulty_N.device)
    if order != "random":
        order_N = order_N[torch.argsort(difficulty_N[order_N], stable=True, descending=order == "hard_first")]
    return order_N[:num_shown]


def as_long_as_all(shown: Tensor, num_samples: int, batch_size: int, *, seed: int) -> Passes:
    """The shown positions again and again, `num_samples` in all, in an order that is drawn by `seed`: so a curriculum shows as many
    images as a training without one, in as many steps.

    A pass shows a position once at most, and all but the last are of whole batches, so that no pass ends in a smaller one. A rest of
    one sample is left out of batches of more: BatchNorm cannot train on it. `shown` must fill a batch.
    """
    if len(shown) == num_samples:
        return (shown,)
    order_N = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed)).to(shown.device)]
    length = len(shown) // batch_size * batch_size
    starts = range(0, num_samples, length)
    passes = [torch.arange(start, min(start + length, num_samples), device=shown.device) for start in starts]
    return tuple(order_N[positions % len(shown)] for positions in passes if len(positions) > min(batch_size - 1, 1))


def check_fills_a_batch(config: CurriculumConfig, num_train: int, batch_size: int) -> None:
    """Raise RecipeError where an epoch as long as all the data would come round to what it shows within a batch."""
    least = config.least_fraction
    num_shown = max(1, round(least * num_train))
    if config.epoch_length == "all" and num_shown < min(batch_size, num_train):
        key = "fractions" if config.pacing == "replay" else "start_fraction"
        raise RecipeError(
            f"distill.curriculum.epoch_length: all shows {num_shown:,} of {num_train:,} samples again and again, which is less than a "
            f"batch of {batch_size}: such an epoch has more steps than one of all the data. Raise {key}, or "
            "lower train.batch_size."
        )
