"""How often the gate of `benchmarks/compare.py` cries wolf on this machine, and what it sees: from launches of one model.

Reads the p25 of contiguous launches of identical arms. Windows of 2 K launches slide over them, one launch at a time; in each,
neighbours are a pair, a coin says which of them is A, and B may be made slower by arithmetic. Windows overlap, so their
Clopper-Pearson bound is as if they did not; the windows that share no launch stand beside it. Third, for those, what every
other throw of the coins would have said: the rate that the protocol's own randomisation gives, by counting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench import MAX_P
from benchmarks.statistics import clopper_pearson_interval, signed_rank_cdf
from targets.errors import EdgestillError, RecipeError

MARGIN = 1.02
SLOWDOWNS = (0.03, 0.05)
MAX_COUNTED = 2**12  # throws of the coins; all of them up to 12 pairs
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
    """What contiguous launches of one model say about the gate. `counted` is over all throws of the coins."""

    num_launches: int
    num_pairs: int
    spread: float  # standard deviation of ln p25 over the launches
    false_alarms: Rate
    apart: Rate
    counted: float
    power: dict[str, Rate]  # "+3%": windows in which B was so much slower by arithmetic
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "verb": "compare --selftest",
            "num_launches": self.num_launches,
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
            f"{self.num_launches} launches of one model, {self.num_pairs} pairs a comparison; p25 varies by {self.spread:.1%} "
            "between launches",
            f"false alarms  {_told(self.false_alarms)}, at most {self.false_alarms.upper95:.2%} (95 %, as if windows did not "
            "overlap)",
            f"              {_told(self.apart)} that share no launch, at most {self.apart.upper95:.1%}",
            f"              {self.counted:.3%} of all throws of the coins in these",
        ]
        lines += [
            f"power         B slower by {name}: seen in {_told(rate)}, at least {rate.lower95:.1%}"
            for name, rate in self.power.items()
        ]
        return "\n".join(lines)


def selftest(p25s: Sequence[float], *, num_pairs: int = 10, seed: int = 0) -> SelfTest:
    """The rates of the gate on contiguous launches, in their order. Raises RecipeError for less than one window."""
    logs = np.log(np.asarray(p25s, dtype=np.float64))
    if logs.size < 2 * num_pairs:
        raise RecipeError(
            f"--selftest: {logs.size} launches are no comparison of {num_pairs} pairs. Take {2 * num_pairs} or more "
            "(330 give 311 windows)."
        )
    differences = np.stack(list(_windows(logs, num_pairs, np.random.default_rng(seed))))
    return SelfTest(
        num_launches=int(logs.size),
        num_pairs=num_pairs,
        spread=float(logs.std(ddof=1)),
        false_alarms=_rate(differences),
        apart=_rate(differences[:: 2 * num_pairs]),
        counted=_counted(differences[:: 2 * num_pairs], seed),
        power={f"{slow:+.0%}": _rate(differences + math.log1p(slow)) for slow in SLOWDOWNS},
    )


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


def _windows(logs: Floats, num_pairs: int, generator: np.random.Generator) -> Iterator[Floats]:
    """ln B - ln A of each window, the coins thrown anew in each."""
    for begin in range(logs.size - 2 * num_pairs + 1):
        pairs = logs[begin : begin + 2 * num_pairs].reshape(num_pairs, 2)
        yield (pairs[:, 1] - pairs[:, 0]) * generator.choice((-1.0, 1.0), num_pairs)


def _rate(differences: Floats) -> Rate:
    return Rate(alarms=int(alarms(differences).sum()), windows=len(differences))


def _counted(differences: Floats, seed: int) -> float:
    """The share of alarms over the coins, mean over the windows."""
    num_pairs = differences.shape[1]
    if 2**num_pairs <= MAX_COUNTED:
        coins = 1.0 - 2.0 * ((np.arange(2**num_pairs)[:, None] >> np.arange(num_pairs)) & 1)
    else:
        coins = np.random.default_rng(seed).choice((-1.0, 1.0), (MAX_COUNTED, num_pairs))
    return float(np.mean([alarms(np.abs(row) * coins).mean() for row in differences]))


def _told(rate: Rate) -> str:
    return f"{rate.alarms} of {rate.windows} windows"
