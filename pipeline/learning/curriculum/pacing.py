"""Pacing: which share of the samples is shown when. With x = t / (a T), t of T steps: b at x = 0, all from x = 1 on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.learning.schedules import ROUNDING
from pipeline.recipe import CurriculumConfig


def pacing_fraction(config: CurriculumConfig, progress: float) -> float:
    """The share of samples shown at `progress` = t / T, in 0..1, by a pacing function that looks at nothing else.

    It begins at b = start_fraction, never falls, and is 1 from a = full_at on. b + (1 - b) g(x): linear x; root x^0.5; quadratic
    x^2; step 0; baby_step floor(n x) / n; exponential (e^(10 x) - 1) / (e^10 - 1); log 1 + 0.1 ln(x + e^-10) (Wu et al., 2021).
    geometric b^(1 - x) (Penha and Hauff, 2020). competence (x (1 - b^p) + b^p)^(1/p), p = root_p (Platanios et al., 2019).
    """
    a, b = config.full_at, config.start_fraction
    if progress >= a:
        return 1.0
    x = max(0.0, progress) / a
    if config.pacing == "competence":
        p = config.root_p
        competence: float = (x * (1 - b**p) + b**p) ** (1 / p)
        return min(1.0, max(b, competence))  # b^p underflows for a large p
    if config.pacing == "geometric":
        return min(1.0, max(b, math.pow(b, 1 - x)))
    return b + (1 - b) * _growth(config.pacing, x, config.num_steps)


def _growth(pacing: str, x: float, num_steps: int) -> float:
    """g(x), from 0 to 1."""
    if pacing == "step":
        return 0.0
    if pacing == "baby_step":
        return math.floor(x * num_steps + ROUNDING) / num_steps
    if pacing == "exponential":
        return math.expm1(10 * x) / math.expm1(10)
    if pacing == "log":
        return min(1.0, max(0.0, 1 + 0.1 * math.log(x + math.exp(-10))))
    return float(x ** {"linear": 1.0, "root": 0.5, "quadratic": 2.0}[pacing])


def adaptive_fraction(config: CurriculumConfig, progress: float, validation_top1: Sequence[float]) -> float:
    """The share to show next, from the validation top-1 after each epoch so far.

    Every epoch that comes within config.plateau of the best before it, above or below, has learned what there is to learn from
    what it was shown: config.advance more. One that gains more goes on with the same share, and so does one that drops: it has not
    digested what it has. It never falls, and is 1 from full_at on as with any pacing.
    """
    if progress >= config.full_at:
        return 1.0
    num_plateaus = sum(
        abs(top1 - max(validation_top1[:epoch])) <= config.plateau
        for epoch, top1 in enumerate(validation_top1)
        if epoch > 0
    )
    return min(1.0, config.start_fraction + config.advance * num_plateaus)
