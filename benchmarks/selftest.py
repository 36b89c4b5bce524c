"""How often the gate of `benchmarks/compare.py` cries wolf on this machine, and what it sees: from pairs of one model.

Reads ln B - ln A of contiguous pairs of identical arms. Windows of K pairs slide over them, one pair at a time; in each, a coin
says which of a pair is A, and B may be made slower by arithmetic. Windows overlap, so their Clopper-Pearson bound is as if they
did not; the windows that share no pair stand beside it. Third, for those, what other throws of the coins would have said: the
rate that the protocol's own randomisation gives, by counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench import MAX_P
from benchmarks.device.duet import in_turns
from benchmarks.statistics import clopper_pearson_interval, signed_rank_cdf
from targets.errors import EdgestillError, RecipeError

MARGIN = 1.02
SLOWDOWNS = (0.03, 0.05)
MAX_COUNTED = 2**12  # throws of the coins; all of them up to 12 pairs
NUM_PAIRS = in_turns("ci").launches  # of a comparison
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Windows in which the gate failed B; `upper95` is Clopper-Pearson's one-sided bound."""

    alarms: int
    windows: int

    @property
    def share(self) -> float:
        return self.alarms / self.windows

    @property
    def upper95(self) -> float:
        return clopper_pearson_interval(self.alarms, self.windows, 0.90)[1]

    @property
    def lower95(self) -> float:
        return clopper_pearson_interval(self.alarms, self.windows, 0.90)[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "lower95": self.lower95, "upper95": self.upper95}


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What contiguous pairs of one model say about the gate. `counted` is over the throws of the coins, MAX_COUNTED at most."""

    num_measured: int  # pairs in all
    num_pairs: int  # of one comparison
    spread: float  # standard deviation of ln B - ln A over the pairs
    false_alarms: Rate
    apart: Rate
    counted: float
    power: dict[str, Rate]  # "+3%": windows in which B was so much slower by arithmetic
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 2,
            "verb": "compare --selftest",
            "num_measured": self.num_measured,
            "num_pairs": self.num_pairs,
            "spread": self.spread,
            "false_alarms": self.false_alarms.to_json(),
            "apart": self.apart.to_json(),
            "counted": self.counted,
            "power": {name: rate.to_json() for name, rate in self.power.items()},
            "error": None,
            "exit_code": 0,
        }

    def text(self) -> str:
        lines = [
            f"{self.num_measured} pairs of one model, {self.num_pairs} pairs a comparison; B against A varies by {self.spread:.1%} "
            "between pairs",
            f"false alarms  {_told(self.false_alarms)}, at most {self.false_alarms.upper95:.2%} (95 %, as if windows did not "
            "overlap)",
            f"              {_told(self.apart)} that share no pair, at most {self.apart.upper95:.1%}",
            f"              {self.counted:.3%} of {throws(self.num_pairs)} of the coins in these",
        ]
        lines += [
            f"power of p25  B slower by {name}: seen in {_told(rate)}, at least {rate.lower95:.1%}"
            for name, rate in self.power.items()
        ]
        return "\n".join(lines)


def selftest(differences: Sequence[float], *, num_pairs: int = NUM_PAIRS, seed: int = 0) -> SelfTest:
    """The rates of the gate on contiguous pairs, in their order. Raises RecipeError for less than one window."""
    measured = np.asarray(differences, dtype=np.float64)
    check_size(measured.size, num_pairs)
    windows = np.stack(list(_windows(measured, num_pairs, np.random.default_rng(seed))))
    return judged(
        windows, num_measured=int(measured.size), spread=float(measured.std(ddof=1)), step=num_pairs, seed=seed
    )


def check_size(num_measured: int, num_pairs: int) -> None:
    """Raises RecipeError for less than one window."""
    if num_measured < num_pairs:
        raise RecipeError(
            f"--selftest: {num_measured} pairs are no comparison of {num_pairs}. Take {num_pairs} or more "
            f"({num_pairs + 300} give 301 windows)."
        )


def judged(windows: Floats, *, num_measured: int, spread: float, step: int, seed: int = 0) -> SelfTest:
    """The rates over windows (M, K), of which every `step`-th has nothing in common with the one before."""
    return SelfTest(
        num_measured=num_measured,
        num_pairs=windows.shape[1],
        spread=spread,
        false_alarms=rate_of(windows),
        apart=rate_of(windows[::step]),
        counted=_counted(windows[::step], seed),
        power={f"{slow:+.0%}": rate_of(windows + math.log1p(slow)) for slow in SLOWDOWNS},
    )


def rate_of(windows: Floats) -> Rate:
    return Rate(alarms=int(alarms(windows).sum()), windows=len(windows))


def alarms(differences: Floats) -> npt.NDArray[np.bool_]:
    """The gate on every row of (M, K) differences ln B - ln A: what `compare.is_worse` says of each, all at once.

    The exact p by the null distribution of the signed-rank sum; rows without ties and zeros, as real latencies are.
    """
    num_pairs = differences.shape[1]
    ranks = np.argsort(np.argsort(np.abs(differences), axis=1), axis=1) + 1
    positive = np.where(differences > 0, ranks, 0).sum(axis=1)
    total = num_pairs * (num_pairs + 1) // 2
    p = signed_rank_cdf(num_pairs)[total - positive]  # P(T+ >= t) = P(T+ <= total - t)
    rows, columns = np.triu_indices(num_pairs)
    shifts = np.median((differences[:, rows] + differences[:, columns]) / 2, axis=1)
    worse: npt.NDArray[np.bool_] = (p < MAX_P) & (shifts > math.log(MARGIN))
    return worse


def _windows(measured: Floats, num_pairs: int, generator: np.random.Generator) -> Iterator[Floats]:
    """ln B - ln A of each window, the coins thrown anew in each."""
    for begin in range(measured.size - num_pairs + 1):
        yield measured[begin : begin + num_pairs] * generator.choice((-1.0, 1.0), num_pairs)


def _counted(differences: Floats, seed: int) -> float:
    """The share of alarms over the coins, mean over the windows."""
    num_pairs = differences.shape[1]
    if 2**num_pairs <= MAX_COUNTED:
        coins = 1.0 - 2.0 * ((np.arange(2**num_pairs)[:, None] >> np.arange(num_pairs)) & 1)
    else:
        coins = np.random.default_rng(seed).choice((-1.0, 1.0), (MAX_COUNTED, num_pairs))
    return float(np.mean([alarms(np.abs(row) * coins).mean() for row in differences]))


def throws(num_pairs: int) -> str:
    """How many of the coins' throws are counted, in words."""
    return "all throws" if 2**num_pairs <= MAX_COUNTED else f"{MAX_COUNTED:,} throws"


def _told(rate: Rate) -> str:
    return f"{rate.alarms} of {rate.windows} windows"
