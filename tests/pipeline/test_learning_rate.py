"""The learning rate's schedules against torch's, and which nets are kept out of channels_last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.learning.training import learning_rate, survives_channels_last
from pipeline.recipe import TrainConfig


def torchs_rates(make: Callable[[Any], Any], num_epochs: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs_cosine_annealing() -> None:
    config = TrainConfig(epochs=12, lr=0.3)

    expected = torchs_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12), 12, 0.3)

    assert [learning_rate(config, epoch) for epoch in range(12)] == pytest.approx(expected)


def test_steps_fall_at_the_milestones_as_torchs_do() -> None:
    config = TrainConfig(epochs=12, lr=0.3, schedule="step", milestones=(3, 8), gamma=0.2)

    expected = torchs_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 8], gamma=0.2), 12, 0.3)

    assert [learning_rate(config, epoch) for epoch in range(12)] == pytest.approx(expected)
    assert learning_rate(config, 2.999) == 0.3


def test_warm_up_rises_in_a_line_to_the_rate_from_which_cosine_falls_to_zero() -> None:
    config = TrainConfig(epochs=10, lr=0.2, warmup_epochs=2)

    assert [learning_rate(config, p) for p in (0.5, 1.0, 1.5)] == pytest.approx([0.05, 0.1, 0.15], rel=3e-3)
    assert learning_rate(config, 0) > 0
    assert learning_rate(config, 2) == pytest.approx(0.2)
    assert learning_rate(config, 6) == pytest.approx(0.1)
    assert learning_rate(config, 10) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 300), st.floats(0, 1), st.just(0.0) | st.floats(1e-6, 0.9))
def test_a_rate_is_positive_and_at_most_the_recipes(epochs: int, share: float, warm: float) -> None:
    config = TrainConfig(epochs=epochs, lr=0.1, warmup_epochs=warm * epochs)

    rate = learning_rate(config, share * epochs * 0.999)

    assert 0 < rate <= 0.1 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("layer", "survives"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(32, 64, 1, stride=2, groups=4), False),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(8, 16, 1), True),
        (nn.Conv2d(8, 16, 3, stride=2), True),
    ],
)
def test_a_net_whose_backward_pass_corrupts_memory_in_channels_last_is_told_apart(
    layer: nn.Module, survives: bool
) -> None:
    assert survives_channels_last(nn.Sequential(nn.Sequential(layer))) is survives
