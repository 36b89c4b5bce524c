"""How many times faster one arm is than another, from launches that were measured in the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.bench import MAX_P, MIN_PAIRS
from benchmarks.statistics import Interval, hodges_lehmann, median_interval, wilcoxon_greater_p

MAX_LOSS = 0.02  # slower, as this project's gates have it: significant, and by more than 2 %


@dataclass(frozen=True, kw_only=True)
class PairedRatio:
    """Of latencies, slow over quick: above 1, the quick one is quicker. `ci95` is None below 6 pairs."""

    value: float
    ci95: Interval | None
    num_pairs: int


def paired_ratio(slow: Sequence[float], quick: Sequence[float]) -> PairedRatio:
    """Median over the rounds of ln(slow / quick), as a ratio, with the order-statistic interval of that median.

    One latency a launch, in the order of the rounds: what slows a whole round cancels, which a ratio of two medians over
    all launches would not give. Raises ValueError where the rounds do not pair up.
    """
    logs = _logs(slow, quick)
    interval = median_interval(logs)
    return PairedRatio(
        value=float(np.exp(np.median(logs))),
        ci95=None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1]))),
        num_pairs=len(logs),
    )


def faster(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether `ours` is faster by `bench.compare_speed`'s rule: exact one-sided Wilcoxon p < 0.01, shift above zero.

    Below 7 pairs the test cannot speak: then the median ratio alone decides.
    """
    logs = _logs(theirs, ours)
    if len(logs) < MIN_PAIRS:
        return bool(np.median(logs) > 0)
    return wilcoxon_greater_p(logs) < MAX_P and hodges_lehmann(logs) > 0


def not_slower(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether `ours` holds up: no exact one-sided Wilcoxon p < 0.01 together with a shift above 2 %.

    Below 7 pairs the test cannot speak: then the median ratio alone must not be above 1.02.
    """
    logs = _logs(ours, theirs)  # above zero: ours took longer
    if len(logs) < MIN_PAIRS:
        return bool(np.median(logs) <= np.log1p(MAX_LOSS))
    return not (wilcoxon_greater_p(logs) < MAX_P and hodges_lehmann(logs) > np.log1p(MAX_LOSS))


def _logs(slow: Sequence[float], quick: Sequence[float]) -> list[float]:
    if len(slow) != len(quick) or not slow:
        raise ValueError(f"{len(slow)} and {len(quick)} launches do not pair up")
    return [float(value) for value in np.log(slow) - np.log(quick)]
