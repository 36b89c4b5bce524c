"""Has a model become slower since it was measured last? The rule over a series of runs, and what the rule is worth.

Pure functions over s = ln p25 of valid runs of one fingerprint, in their order. W is up to WINDOW runs, at least
MIN_WINDOW, that stand before the SUSPECTS newest and after the last accepted change; m its median, sigma its 1.4826 MAD,
at least MIN_SIGMA. Alarm: each of the newest runs is beyond m + 2 sigma, and their Hodges-Lehmann shift against W is
beyond max(ln 1.03, 3 sigma). A single slow run is never an alarm, whatever its size. The same downwards is an improvement,
and the level begins anew with it.
"""
# Shapes: M series, T runs of a series, W runs of the window, S suspects.

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WINDOW, MIN_WINDOW, SUSPECTS = 30, 10, 3
NEEDED = MIN_WINDOW + SUSPECTS
MAD_TO_SIGMA = 1.4826
MIN_SIGMA = 0.002
MIN_SHIFT = math.log(1.03)
SLOWER, NEITHER, FASTER = 1, 0, -1


def level_of(window_W: Floats) -> tuple[Floats, Floats]:
    """Median and robust sigma of (..., W) values, each (...)."""
    m = np.median(window_W, axis=-1)
    mad = np.median(np.abs(window_W - m[..., None]), axis=-1)
    return m, np.maximum(MAD_TO_SIGMA * mad, MIN_SIGMA)


def shift_between(window_W: Floats, suspects_S: Floats) -> Floats:
    """Hodges-Lehmann shift of two samples: the median of all differences suspect - window, (..., W) and (..., S) to (...)."""
    differences = suspects_S[..., :, None] - window_W[..., None, :]
    shift: Floats = np.median(differences.reshape(*differences.shape[:-2], -1), axis=-1)
    return shift


def verdict_of(window_W: Floats, suspects_S: Floats) -> Ints:
    """SLOWER, FASTER or NEITHER for each of (...) windows and the suspects after them."""
    m, sigma = level_of(window_W)
    shift, least = shift_between(window_W, suspects_S), np.maximum(MIN_SHIFT, 3 * sigma)
    above = (suspects_S > (m + 2 * sigma)[..., None]).all(axis=-1)
    below = (suspects_S < (m - 2 * sigma)[..., None]).all(axis=-1)
    verdict: Ints = (above & (shift > least)).astype(np.int64) - (below & (shift < -least))
    return verdict


@dataclass(frozen=True, kw_only=True)
class Change:
    """A step that the rule saw. Indices are into the series: `first` run of the new level, `confirmed` the run that proved it.

    `shift` is ln(new / old) over the suspects. Of a slow-down, `ended` is the first run that was back at the old level, and
    `accepted` says that a person took the new one for good.
    """

    first: int
    confirmed: int
    shift: float
    ended: int | None = None
    accepted: bool = False

    @property
    def direction(self) -> int:
        return SLOWER if self.shift > 0 else FASTER

    @property
    def is_open(self) -> bool:
        """A slow-down that is neither over nor accepted."""
        return self.direction == SLOWER and self.ended is None and not self.accepted


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the rule says of a whole series. `median` and `sigma` (of ln p25) are the level that the newest runs are held
    against, `shift` is theirs to it; None where there are too few.

    The level begins at run `begin`, the last that a person accepted or that an improvement began with, and has had
    `num_runs` valid runs: below NEEDED nothing can be told.
    """

    changes: tuple[Change, ...]
    begin: int
    num_runs: int
    median: float | None
    sigma: float | None
    shift: float | None

    @property
    def open(self) -> Change | None:
        """The slow-down that is neither over nor accepted, if there is one."""
        return self.changes[-1] if self.changes and self.changes[-1].is_open else None


def follow(logs_T: Sequence[float], accepted: Collection[int] = ()) -> Course:
    """Walk through the ln p25 of one series; `accepted` are the indices at which an accepted level begins.

    From the first of three suspects on, slow runs are no part of the level, until three runs in a row are back at it or a
    person accepts: otherwise the window would fill with them and the alarm would fall silent by itself. Fast runs are the
    new level at once, so that what was won is not lost unseen.
    """
    walk = _Walk()
    for index, log in enumerate(logs_T):
        if index in accepted:
            walk.accept(index)
        walk.add(index, log)
    return walk.course()


class _Walk:
    """`level` are the runs that count as the present level, the newest included; `since` those of an open slow-down."""

    def __init__(self) -> None:
        self.begin = 0
        self.level: list[float] = []
        self.since: list[float] = []
        self.changes: list[Change] = []

    @property
    def open(self) -> Change | None:
        return self.changes[-1] if self.changes and self.changes[-1].is_open else None

    def accept(self, index: int) -> None:
        if self.open:
            self.changes[-1] = replace(self.changes[-1], accepted=True)
        self.begin, self.level, self.since = index, [], []

    def add(self, index: int, log: float) -> None:
        if self.open:
            self.since.append(log)
            self._end(index)
            return
        self.level.append(log)
        if len(self.level) < NEEDED:
            return
        window, suspects = self._window(self.level[:-SUSPECTS]), np.array(self.level[-SUSPECTS:])
        verdict, first = int(verdict_of(window, suspects)), index - SUSPECTS + 1
        if verdict == NEITHER:
            return
        self.changes.append(Change(first=first, confirmed=index, shift=float(shift_between(window, suspects))))
        if verdict == SLOWER:
            self.level, self.since = self.level[:-SUSPECTS], self.level[-SUSPECTS:]
        else:
            self.begin, self.level = first, self.level[-SUSPECTS:]

    def _end(self, index: int) -> None:
        """Close the slow-down once three runs in a row are no longer beyond the two sigma that made them suspect."""
        newest = np.array(self.since[-SUSPECTS:])
        m, sigma = level_of(self._window(self.level))
        if (newest <= m + 2 * sigma).all():
            self.changes[-1] = replace(self.changes[-1], ended=index - SUSPECTS + 1)
            self.level, self.since = [*self.level, *self.since[-SUSPECTS:]], []

    def course(self) -> Course:
        before, newest = self.level, self.since[-SUSPECTS:]
        if not self.open:
            before, newest = self.level[:-SUSPECTS], self.level[-SUSPECTS:]
        m = sigma = shift = None
        if len(before) >= MIN_WINDOW:
            window = self._window(before)
            (m, sigma), shift = level_of(window), shift_between(window, np.array(newest))
        return Course(
            changes=tuple(self.changes),
            begin=self.begin,
            num_runs=len(self.level) + len(self.since),
            median=None if m is None else float(m),
            sigma=None if sigma is None else float(sigma),
            shift=None if shift is None else float(shift),
        )

    @staticmethod
    def _window(runs: Sequence[float]) -> Floats:
        return np.array(runs[-WINDOW:])


@dataclass(frozen=True)
class Noise:
    """How ln p25 varies from run to run: `sample` gives (M, T) values around zero."""

    name: str
    about: str
    sample: Callable[[np.random.Generator, int, int], Floats]


SD, OUTLIER_SHARE, CORRELATION = 0.01, 0.05, 0.6
OUTLIERS = (0.05, 0.30)


def independent(generator: np.random.Generator, num_series: int, num_runs: int) -> Floats:
    return generator.normal(0.0, SD, (num_series, num_runs))


def with_outliers(generator: np.random.Generator, num_series: int, num_runs: int) -> Floats:
    """One run in twenty is slower by 5 to 30 %."""
    slower = np.log1p(generator.uniform(*OUTLIERS, (num_series, num_runs)))
    hit = generator.random((num_series, num_runs)) < OUTLIER_SHARE
    return independent(generator, num_series, num_runs) + np.where(hit, slower, 0.0)


def drifting(generator: np.random.Generator, num_series: int, num_runs: int) -> Floats:
    """AR(1), x_t = 0.6 x_(t-1) + e_t, from its stationary state on; x has the standard deviation SD."""
    x_MT = independent(generator, num_series, num_runs)
    scale = math.sqrt(1 - CORRELATION**2)
    for run in range(1, num_runs):
        x_MT[:, run] = CORRELATION * x_MT[:, run - 1] + scale * x_MT[:, run]
    return x_MT


def drifting_far(generator: np.random.Generator, num_series: int, num_runs: int) -> Floats:
    """The same AR(1), its steps e of the standard deviation SD: x has 1.25 SD."""
    return drifting(generator, num_series, num_runs) / math.sqrt(1 - CORRELATION**2)


NOISES = (
    Noise("independent", "normal, standard deviation 1 %", independent),
    Noise("outliers", "the same, and one run in twenty slower by 5 to 30 %", with_outliers),
    Noise("drift", "AR(1) with 0.6, standard deviation 1 %", drifting),
    Noise("far drift", "AR(1) with 0.6, steps of 1 %: standard deviation 1.25 %", drifting_far),
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Series of which something is true, with the exact 95 % interval (Clopper and Pearson)."""

    count: int
    num_series: int

    @property
    def share(self) -> float:
        return self.count / self.num_series

    @property
    def ci95(self) -> tuple[float, float]:
        from benchmarks.statistics import (
            clopper_pearson_interval,
        )  # scipy: a second that the history itself need not wait

        return clopper_pearson_interval(self.count, self.num_series)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "num_series": self.num_series, "share": self.share, "ci95": self.ci95}


def first_alarms(logs_MT: Floats) -> Ints:
    """The index of the run at which each series first alarms (SLOWER), or -1: (M, T) to (M,)."""
    found = np.full(len(logs_MT), -1, dtype=np.int64)
    for newest in range(NEEDED - 1, logs_MT.shape[1]):
        end = newest - SUSPECTS + 1
        window = logs_MT[:, max(0, end - WINDOW) : end]
        slower = verdict_of(window, logs_MT[:, end : newest + 1]) == SLOWER
        found[(found < 0) & slower] = newest
    return found


def false_alarms(noise: Noise, *, num_series: int, num_runs: int, seed: int) -> Share:
    """Series of pure noise in which the rule alarms at least once."""
    first = first_alarms(noise.sample(np.random.default_rng(seed), num_series, num_runs))
    return Share(count=int((first >= 0).sum()), num_series=num_series)


def power(
    noise: Noise, slowdown: float, *, step_at: int, within: int, num_series: int, num_runs: int, seed: int
) -> Share:
    """Series that alarm within `within` runs of a step of `slowdown` (0.05: 5 % slower), and not before it."""
    logs_MT = noise.sample(np.random.default_rng(seed), num_series, num_runs)
    logs_MT[:, step_at:] += math.log1p(slowdown)
    first = first_alarms(logs_MT)
    return Share(count=int(((first >= step_at) & (first < step_at + within)).sum()), num_series=num_series)


def creep_seen(noise: Noise, slowdown_a_run: float, *, num_series: int, num_runs: int, seed: int) -> Share:
    """Series that alarm at least once while each run is slower than the one before by `slowdown_a_run`."""
    logs_MT = noise.sample(np.random.default_rng(seed), num_series, num_runs)
    first = first_alarms(logs_MT + math.log1p(slowdown_a_run) * np.arange(num_runs))
    return Share(count=int((first >= 0).sum()), num_series=num_series)
