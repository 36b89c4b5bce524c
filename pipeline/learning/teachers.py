"""The teacher axis: the checkpoints of a teacher's own way teach one after the other, then the finished teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pipeline.learning.models import load_weights
from pipeline.recipe import TeacherCurriculumConfig


@dataclass
class TeacherTrajectory:
    """`teacher` is the module that the loop asks: other weights are loaded into it, so that hooks on it stay.

    `checkpoints` are files in the order in which the teacher passed them; the last one is the finished teacher.
    """

    config: TeacherCurriculumConfig
    teacher: nn.Module
    checkpoints: Sequence[Path]
    seed: int
    _loaded: int | None = field(default=None, init=False)

    def begin_epoch(self, progress: float) -> str:
        """Load what teaches at `progress`; returns its name."""
        position = self.position(progress)
        self._load(position)
        return self.checkpoints[position].stem if position < len(self.checkpoints) - 1 else "teacher"

    def finish(self) -> None:
        """Load the finished teacher."""
        self._load(len(self.checkpoints) - 1)

    def _load(self, position: int) -> None:
        if position != self._loaded:
            load_weights(self.teacher, self.checkpoints[position])
            self._loaded = position

    def position(self, progress: float) -> int:
        """Which of the checkpoints teaches: each on the way an equal share of `full_at`, from there on the last.

        easy_first is the way itself (route-constrained optimization, Jin et al., 2019); hard_first goes it backwards, random in
        an order fixed by `seed`.
        """
        num_on_the_way = len(self.checkpoints) - 1
        if progress >= self.config.full_at:
            return num_on_the_way
        turn = min(int(progress / self.config.full_at * num_on_the_way), num_on_the_way - 1)
        order = list(range(num_on_the_way))
        if self.config.order == "hard_first":
            order.reverse()
        if self.config.order == "random":
            random.Random(self.seed).shuffle(order)
        return order[turn]
