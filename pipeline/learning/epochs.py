"""What a training leaves behind: its curve, epoch by epoch, and its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """One line of the training curve; top-1 are fractions. `shown_fraction` is the share of the samples visited that are there to
    learn from, `num_images` how many images that made: more than samples where some came again. `train_top1` is of the visited
    samples that have a label, None where none has.

    Of the axes of a curriculum, each None where it stood still: the mean temperature of the steps, the factor on what the teacher
    says at the end, and which of its checkpoints taught. `teacher_wrong` is the share of the visited samples that have a label,
    as they were augmented, that the teacher takes for another class.
    """

    epoch: int
    loss: float
    train_top1: float | None
    validation_top1: float | None
    shown_fraction: float
    lr: float
    images_per_s: float
    seconds: float
    temperature: float | None = None
    teacher_factor: float | None = None
    taught_by: str | None = None
    teacher_wrong: float | None = None
    num_images: int | None = None


@dataclass
class Trained:
    """The end of a training. `best` is by validation top-1 and equals `last` where there is no validation split."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_epoch: int
    precision: str
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)

    def summary(self) -> dict[str, Any]:
        """What the stage's JSON keeps."""
        best = next(epoch for epoch in self.epochs if epoch.epoch == self.best_epoch)
        return {
            "precision": self.precision,
            "best_epoch": self.best_epoch,
            "validation_top1_best": best.validation_top1,
            "validation_top1_last": self.epochs[-1].validation_top1,
            "seconds": self.seconds,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }
