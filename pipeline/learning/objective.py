"""What a training minimises, and on which samples, epoch by epoch: the loop asks, an objective answers."""
# Shapes: N batch, K classes.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.learning.epochs import Epoch

Loss = Callable[[Tensor, "Tensor | None", Tensor], Tensor]  # student (N, K), teacher (N, K) or None, labels (N,)
Shown = Callable[[float], "Tensor | None"]  # progress in [0, 1) -> positions in the train split, None for all
Passes = tuple[Tensor, ...]  # positions in the train split, a pass each; what an epoch shows again is in several


def all_samples(progress: float) -> None:
    """No curriculum: every epoch shows every sample."""


class Objective(nn.Module):
    """What it learns is a parameter, which the model's own optimizer moves, and what it counts a buffer: both are kept with the
    weights, so that a killed training goes on as it was."""

    def begin_epoch(self, epoch: int, num_epochs: int, epochs: Sequence[Epoch], model: nn.Module) -> Passes | None:
        """What `epoch` (from 0) visits of the train split, None for all of it once; `epochs` are those that are done."""
        raise NotImplementedError

    def begin_step(self, epochs_done: float) -> None:
        """Told before each forward pass; a fraction of an epoch counts."""

    def forward(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        """A scalar in nats, from raw logits and class ids."""
        raise NotImplementedError

    def facts(self) -> Mapping[str, Any]:
        """What the epoch that ends was taught by: optional fields of `Epoch`."""
        return {}


class FixedObjective(Objective):
    """A loss that stays as it is, on samples that depend on nothing but the progress."""

    def __init__(self, loss: Loss, shown: Shown = all_samples) -> None:
        super().__init__()
        self._loss = loss
        self._shown = shown

    def begin_epoch(self, epoch: int, num_epochs: int, epochs: Sequence[Epoch], model: nn.Module) -> Passes | None:
        shown = self._shown(epoch / num_epochs)
        return None if shown is None else (shown,)

    def forward(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        return self._loss(student_NK, teacher_NK, labels_N)
