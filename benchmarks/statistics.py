"""What samples say: intervals, rank tests, early stopping. Pure functions over numbers.

Every interval names its source; counts are of samples, confidence is a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = Sequence[float] | npt.NDArray[Any]
Interval = tuple[float, float]


def hodges_lehmann(differences: Values) -> float:
    """Median of the Walsh averages (d_i + d_j) / 2, i <= j: the shift that belongs to Wilcoxon's signed-rank test."""
    values = np.asarray(differences, dtype=np.float64)
    rows, columns = np.triu_indices(values.size)
    return float(np.median((values[rows] + values[columns]) / 2.0))


def wilcoxon_greater_p(differences: Values) -> float:
    """Exact one-sided p of Wilcoxon's signed-rank test: the differences lie above zero. Zeros count against it.

    Zeros get a tiny negative value, so that the test stays exact and a launch without a difference is never evidence.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.any():
        return 1.0
    smallest = np.abs(values[values != 0]).min()
    values = np.where(values == 0, -smallest / 2, values)
    return float(stats.wilcoxon(values, alternative="greater", method="exact").pvalue)


def hodges_lehmann_interval(differences: Values, confidence: float = 0.95) -> Interval | None:
    """Exact interval of the Hodges-Lehmann shift: the shifts that Wilcoxon's two-sided test would not refuse.

    The Walsh averages W_(c+1) and W_(M-c) with the largest c whose P(T+ <= c) is at most (1 - confidence) / 2; None where
    there is no such c (95 % needs n >= 6). Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3.3.
    """
    values = np.asarray(differences, dtype=np.float64)
    rows, columns = np.triu_indices(values.size)
    walsh = np.sort((values[rows] + values[columns]) / 2.0)
    c = int(np.searchsorted(signed_rank_cdf(values.size), (1 - confidence) / 2, side="right")) - 1
    return None if c < 0 else (float(walsh[c]), float(walsh[walsh.size - 1 - c]))


def signed_rank_cdf(n: int) -> npt.NDArray[np.float64]:
    """P(T+ <= t), t = 0 .. n (n + 1) / 2, of Wilcoxon's signed-rank sum without ties: every sign is a fair coin."""
    mass = np.ones(1)
    for rank in range(1, n + 1):
        mass = (np.concatenate([mass, np.zeros(rank)]) + np.concatenate([np.zeros(rank), mass])) / 2
    return np.cumsum(mass)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: reject those below alpha, and at most alpha are wrong."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def mean_interval(values: Values, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    found = np.asarray(values, dtype=np.float64)
    if found.size < 2:
        return None
    reach = float(stats.t.ppf(0.5 + confidence / 2, found.size - 1) * found.std(ddof=1) / math.sqrt(found.size))
    return float(found.mean()) - reach, float(found.mean()) + reach


def median_interval(values: Values, confidence: float = 0.95) -> Interval | None:
    """Order-statistic interval of the median, free of any distribution; None where there are too few values.

    [x_(k), x_(n+1-k)] with the largest k whose coverage 1 - 2 P(Bin(n, 1/2) < k) is at least `confidence`; 95 % needs
    n >= 6. David and Nagaraja, Order Statistics, 7.1.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    k = int(stats.binom.ppf((1 - confidence) / 2, ordered.size, 0.5))
    if k < 1:
        return None
    return float(ordered[k - 1]), float(ordered[ordered.size - k])


def early_stopping_percentile(values: Values, q: float, confidence: float = 0.99) -> float | None:
    """MLPerf's early-stopping estimate of the q-th percentile (0..100): the t-th largest value, t as large as
    P(Bin(n, 1 - q/100) <= t) <= 1 - confidence allows; None where not even t = 1 is allowed.

    The true percentile lies below it with `confidence`. MLCommons inference policies, appendix "early stopping".
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n, over = ordered.size, 1.0 - q / 100.0
    t = int(stats.binom.ppf(1.0 - confidence, n, over))  # the first with P(Bin <= t) >= 1 - confidence
    while t > 0 and stats.binom.cdf(t, n, over) > 1.0 - confidence:
        t -= 1
    return float(ordered[n - t]) if t >= 1 else None


def wilson_interval(num_correct: int, num_samples: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): the one that tables of accuracy show."""
    if not 0 <= num_correct <= num_samples or num_samples == 0:
        raise ValueError(f"{num_correct} of {num_samples} is no proportion")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p, n = num_correct / num_samples, num_samples
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the bound is the end itself; rounding must not move it beyond.
    lower = 0.0 if num_correct == 0 else centre - half
    upper = 1.0 if num_correct == num_samples else centre + half
    return lower, upper


def clopper_pearson_interval(num_correct: int, num_samples: int, confidence: float = 0.95) -> Interval:
    """The exact interval of a proportion (Clopper and Pearson 1934): covers at least `confidence`, for gates."""
    if not 0 <= num_correct <= num_samples or num_samples == 0:
        raise ValueError(f"{num_correct} of {num_samples} is no proportion")
    tail, k, n = (1 - confidence) / 2, num_correct, num_samples
    lower = 0.0 if k == 0 else float(stats.beta.ppf(tail, k, n - k + 1))
    upper = 1.0 if k == n else float(stats.beta.ppf(1 - tail, k + 1, n - k))
    return lower, upper


def mcnemar_exact_p(num_only_first: int, num_only_second: int) -> float:
    """Exact two-sided p of McNemar's test over the discordant samples: right in one model only. 1.0 without any."""
    discordant = num_only_first + num_only_second
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2.0 * stats.binom.cdf(min(num_only_first, num_only_second), discordant, 0.5)))


def paired_difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[float, Interval]:
    """Accuracy of `second` minus that of `first` on the same samples (N,), with its 95 % interval.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10: Wilson's limits joined by the samples' correlation.
    """
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"paired samples are needed: shapes {first.shape} and {second.shape}")
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_second, only_first = int((second & ~first).sum()), int((first & ~second).sum())
    return _newcombe(both, only_second, only_first, neither)


def _newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, Interval]:
    """Method 10 for a - b from the four counts."""
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    p_a, p_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, n), wilson_interval(right_b, n)
    phi = _correlation(both, only_a, only_b, neither)
    difference = (only_a - only_b) / n
    below = _joined(p_a - low_a, high_b - p_b, phi)
    above = _joined(high_a - p_a, p_b - low_b, phi)
    return difference, (difference - below, difference + above)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Phi of the 2 x 2 table, with Newcombe's continuity correction towards zero where it is positive."""
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    excess = float(both * neither - only_a * only_b)
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    return excess / math.sqrt(margins)


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))
