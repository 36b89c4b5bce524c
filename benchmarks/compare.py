"""Is B slower than A? Two records of one session, judged pair by pair; a false alarm is rarer than one in a hundred.

Reads records (`benchmarks/turns.py` measures them pair by pair, `benchmarks/bench.py` launch by launch). A launch is the unit:
within one, samples follow each other and prove nothing. d_i = ln B_i - ln A_i over the pairs i; worse iff the exact one-sided
Wilcoxon test gives p < 0.01 (over several metrics: Holm) and the Hodges-Lehmann shift is beyond the metric's margin. Of a pair
whose processes took turns, the d of the latency is the median over their rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.bench import MAX_P, MIN_PAIRS
from benchmarks.comparison import BETTER, SAME, UNKNOWN, WORSE, Budget, Comparison, Difference, budget_line, sentence
from benchmarks.device.record import Launch, Record
from benchmarks.statistics import Interval, Values, hodges_lehmann, hodges_lehmann_interval, holm, wilcoxon_greater_p
from benchmarks.turns import pair_differences
from targets.errors import BudgetError, EdgestillError, MeasurementError, RecipeError

# Two records that were measured one after the other differ by the hour as well: only what no hour explains is told.
APART_MARGIN = 1.10
# What may differ between A and B: it is what is compared. Every other hard key of the environment must agree.
SUBJECT = ("model", "precision", "runtime", "flags", "shapes")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is compared: a value a launch, less is better. `margin`: a ratio below it is nobody's concern."""

    name: str
    unit: str
    margin: float
    words: tuple[str, str]  # better, worse
    read: Callable[[Launch], float | None]


LATENCY = "p25"
METRICS = {
    metric.name: metric
    for metric in (
        Metric(name=LATENCY, unit="ms", margin=1.02, words=("faster", "slower"), read=lambda one: one.lat_us.p25 / 1e3),
        Metric(name="peak RSS", unit="MiB", margin=1.02, words=("less", "more"), read=lambda one: one.memory.vmhwm_mib),
        Metric(name="load", unit="ms", margin=1.05, words=("faster", "slower"), read=lambda one: one.load_ms),
    )
}
SIZE, SIZE_MARGIN, SIZE_WORDS = "size", 1.01, ("smaller", "larger")
NAMES = (*METRICS, SIZE)


def compare(
    a: Record,
    b: Record,
    *,
    interleaved: bool = True,
    metrics: Sequence[str] = NAMES,
    max_p99_ms: float | None = None,
    labels: tuple[str, str] = ("A", "B"),
) -> Comparison:
    """Judge two records; `interleaved`: they are arms of one session, so that launch i of both stands in one round.

    Raises RecipeError for a metric that does not exist, and MeasurementError where the records cannot be compared: another
    machine, another harness, another workload. A worse metric or a broken budget is in `failure` (exit 4).
    """
    if unknown := [name for name in metrics if name not in NAMES]:
        raise RecipeError(f"metric '{unknown[0]}': there is no such metric. Known: {', '.join(NAMES)}.")
    changed = _changed(a, b)
    pairs = min(len(a.launches), len(b.launches))
    differences = _differences(a, b, metrics, interleaved)
    budget = None if max_p99_ms is None else _budget(b, max_p99_ms)
    return Comparison(
        a=_about(a, labels[0]),
        b=_about(b, labels[1]),
        interleaved=interleaved,
        by_turns=interleaved and pair_differences(a, b) is not None,
        num_pairs=pairs,
        preset=a.scenario.preset,
        differences=differences,
        budget=budget,
        changed=changed,
        warnings=_warnings(a, b, interleaved),
        failure=_failure(differences, budget),
    )


def is_worse(differences: Sequence[float], margin: float) -> bool:
    """The gate on one metric alone: ln B - ln A a pair."""
    return wilcoxon_greater_p(differences) < MAX_P and hodges_lehmann(differences) > math.log(margin)


def _differences(a: Record, b: Record, metrics: Sequence[str], interleaved: bool) -> tuple[Difference, ...]:
    """The tests of all metrics together: Holm over the direction that each shows."""
    measured = [METRICS[name] for name in metrics if name in METRICS]
    raw = {metric.name: _shift(metric, a, b, interleaved) for metric in measured}
    tested = [name for name, shift in raw.items() if shift is not None]
    adjusted = dict(zip(tested, holm([shift.p for shift in raw.values() if shift is not None]), strict=True))
    found = {
        metric.name: _judged(metric, raw[metric.name], adjusted.get(metric.name), len(tested), a, b, interleaved)
        for metric in measured
    }
    if SIZE in metrics:
        found[SIZE] = _size(a, b)
    return tuple(found[name] for name in metrics)


@dataclass(frozen=True)
class Shift:
    """ln B - ln A: the estimate, its interval, the one-sided p of its own direction, and the smallest p possible."""

    log: float
    ci95: Interval | None
    p: float
    least_p: float


def _shift(metric: Metric, a: Record, b: Record, interleaved: bool) -> Shift | None:
    values_a, values_b = _values(metric, a), _values(metric, b)
    if values_a is None or values_b is None:
        return None
    if not interleaved:
        return _apart(values_a, values_b)
    if metric.name == LATENCY and (by_turns := pair_differences(a, b)) is not None:
        return _paired(by_turns)
    pairs = min(len(values_a), len(values_b))
    return _paired(np.log(values_b[:pairs]) - np.log(values_a[:pairs]))


def _values(metric: Metric, record: Record) -> list[float] | None:
    values = [metric.read(launch) for launch in sorted(record.launches, key=lambda one: one.i)]
    readable = [value for value in values if value is not None and value > 0]
    return readable if len(readable) == len(values) else None


def _paired(differences: Values) -> Shift:
    differences = np.asarray(differences)
    log = hodges_lehmann(differences)
    p = wilcoxon_greater_p(differences if log > 0 else -differences)
    return Shift(log, hodges_lehmann_interval(differences), p, 0.5**differences.size)


def _apart(values_a: Sequence[float], values_b: Sequence[float]) -> Shift:
    """Mann-Whitney over launches, and the shift that belongs to it: the median of all differences. No interval: the
    difference of the hours is in none."""
    logs_a, logs_b = np.log(values_a), np.log(values_b)
    log = float(np.median(logs_b[:, None] - logs_a[None, :]))
    alternative = "greater" if log > 0 else "less"
    p = float(stats.mannwhitneyu(logs_b, logs_a, alternative=alternative, method="exact").pvalue)
    return Shift(log, None, p, 1 / math.comb(len(logs_a) + len(logs_b), len(logs_a)))


def _judged(
    metric: Metric,
    shift: Shift | None,
    p: float | None,
    num_tests: int,
    a: Record,
    b: Record,
    interleaved: bool,
) -> Difference:
    margin = metric.margin if interleaved else max(metric.margin, APART_MARGIN)
    outcome, why = UNKNOWN, "it could not be read in every launch"
    if shift is not None and p is not None:
        outcome, why = _outcome(shift, p, margin, num_tests, interleaved)
    ci95 = shift.ci95 if shift else None
    return Difference(
        metric=metric.name,
        unit=metric.unit,
        a=_median(metric, a),
        b=_median(metric, b),
        ratio=math.exp(shift.log) if shift else None,
        ci95=(math.exp(ci95[0]), math.exp(ci95[1])) if ci95 else None,
        p=p,
        margin=margin,
        outcome=outcome,
        verdict=_word(outcome, metric.words),
        why=why,
    )


def _word(outcome: str, words: tuple[str, str]) -> str:
    return {BETTER: words[0], WORSE: words[1], SAME: "no difference", UNKNOWN: "cannot tell"}[outcome]


def _outcome(shift: Shift, p: float, margin: float, num_tests: int, interleaved: bool) -> tuple[str, str]:
    """Same: the whole interval lies within the margin, so that what may be there is nobody's concern."""
    limit = math.log(margin)
    if p < MAX_P and abs(shift.log) > limit:
        return (WORSE if shift.log > 0 else BETTER), ""
    if not interleaved:
        return UNKNOWN, f"measured apart, and not {margin - 1:.0%} different. Measure both in one session"
    if shift.ci95 is not None and -limit < shift.ci95[0] and shift.ci95[1] < limit:
        return SAME, ""
    if shift.least_p * num_tests >= MAX_P:
        return (
            UNKNOWN,
            f"too few pairs: {MIN_PAIRS if num_tests == 1 else MIN_PAIRS + 2} are needed for {num_tests} metrics",
        )
    return UNKNOWN, f"the interval reaches beyond {margin - 1:.0%}. Take more pairs (--launches)"


def _size(a: Record, b: Record) -> Difference:
    """Bytes are known exactly: no test."""
    mib_a, mib_b = a.model.bytes / 2**20, b.model.bytes / 2**20
    ratio = mib_b / mib_a
    outcome = WORSE if ratio > SIZE_MARGIN else BETTER if ratio < 1 / SIZE_MARGIN else SAME
    return Difference(
        metric=SIZE,
        unit="MiB",
        a=mib_a,
        b=mib_b,
        ratio=ratio,
        ci95=None,
        p=None,
        margin=SIZE_MARGIN,
        outcome=outcome,
        verdict=_word(outcome, SIZE_WORDS),
    )


def _median(metric: Metric, record: Record) -> float | None:
    values = _values(metric, record)
    return float(np.median(values)) if values else None


def _budget(b: Record, limit_ms: float) -> Budget:
    if b.summary.es_p99_us is None:
        return Budget(limit_ms=limit_ms, p99_ms=None, passed=None, why="too few queries for a p99: take --preset ci")
    p99_ms = b.summary.es_p99_us / 1e3
    return Budget(limit_ms=limit_ms, p99_ms=p99_ms, passed=p99_ms <= limit_ms)


def _changed(a: Record, b: Record) -> dict[str, list[Any]]:
    """Hard keys that differ and may; raises MeasurementError for those that may not."""
    keys = sorted({*a.env.hard, *b.env.hard})
    changed = {
        key: [a.env.hard.get(key), b.env.hard.get(key)] for key in keys if a.env.hard.get(key) != b.env.hard.get(key)
    }
    if fixed := [key for key in changed if key not in SUBJECT]:
        told = "; ".join(f"{key}: {changed[key][0]} and {changed[key][1]}" for key in fixed[:3])
        raise MeasurementError(
            f"the two records are not comparable, they differ in what must agree ({told}). Measure both on one machine."
        )
    return changed


def _warnings(a: Record, b: Record, interleaved: bool) -> tuple[str, ...]:
    told = [
        f"{name} is not trustworthy: half of its launches or more were disturbed ({record.validity.flags[0]})"
        for name, record in (("A", a), ("B", b))
        if not record.validity.ok
    ]
    if not interleaved:
        told.append(
            f"the records were not measured in one session: only a difference beyond {APART_MARGIN - 1:.0%} is told"
        )
    return tuple(told)


def _failure(differences: Sequence[Difference], budget: Budget | None) -> EdgestillError | None:
    worse = [sentence(one) for one in differences if one.outcome == WORSE]
    if budget is not None and budget.passed is False:
        worse.append(budget_line(budget))
    return BudgetError(f"{' '.join(worse)} Look what changed, or raise what is allowed.") if worse else None


def _about(record: Record, label: str) -> dict[str, Any]:
    return {
        "label": label,
        "model": record.model.name,
        "precision": record.model.precision,
        "runtime": f"{record.runtime.name} {record.runtime.version}",
        "sha256": record.model.sha256,
        "run_id": record.run_id,
        "launches": len(record.launches),
        "valid": record.validity.ok,
    }
