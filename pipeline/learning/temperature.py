"""The temperature axis: constant, scheduled, replayed, or learned against the student."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.learning.schedules import way_done
from pipeline.recipe import TemperatureCurriculumConfig


def scheduled_temperature(
    start: float, config: TemperatureCurriculumConfig | None, progress: float, *, epoch: int
) -> float:
    """T at `progress` (of 1): from `start` to config.end by its schedule; a replay's value of the `epoch` (from 0)."""
    if config is None:
        return start
    if config.schedule == "replay":
        return config.values[epoch]
    done = way_done(config.schedule, progress, full_at=config.full_at, num_steps=config.num_steps)
    return start + (config.end - start) * done


class LearnedTemperature(nn.Module):
    """CTKD's global temperature (Li et al., 2023): T = lowest + span * sigmoid(theta), theta = 1 at first.

    It learns with the student but against it: its gradient is multiplied by lambda, which goes from 0 to -1 by a cosine over
    the first `reversal_epochs` and stays there, so that the task grows harder. 1 + 20 sigmoid(1) = 15.6 at first.
    """

    def __init__(self, config: TemperatureCurriculumConfig) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))
        self._config = config

    def forward(self, epochs_done: float) -> Tensor:
        factor = reversal(epochs_done, self._config.reversal_epochs)
        theta: Tensor = _ScaleGradient.apply(self.theta, factor)
        return self._config.lowest + self._config.span * theta.sigmoid()


def reversal(epochs_done: float, reversal_epochs: float) -> float:
    """lambda: (cos(pi e / E) - 1) / 2 for e of E epochs, -1 afterwards."""
    return (math.cos(math.pi * min(epochs_done / reversal_epochs, 1.0)) - 1) / 2


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor (Ganin and Lempitsky, 2015, with a negative one)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None
