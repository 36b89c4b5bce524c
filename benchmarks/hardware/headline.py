"""The comparison in a sentence, and what a reader must know before believing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.hardware.identity import Configuration, counted
from benchmarks.hardware.rows import HardwareRow
from benchmarks.hardware.scores import Score
from benchmarks.hardware.tables import accuracy_names, is_fraction
from benchmarks.report_tables import number, percent

QUIET = "Measure again on a quiet machine."


def headline_of(
    rows: Sequence[HardwareRow], scores: Sequence[Score], baseline: Configuration, varying: frozenset[str]
) -> str:
    """Who is fastest, at what accuracy; over all models where there are several and nobody knows an accuracy.

    Only rows that are valid can win.
    """
    valid = [row for row in rows if row.valid]
    if not valid and len(rows) == 1:
        return f"This measurement is not trustworthy. {QUIET}"
    if not valid:
        return f"None of these {len(rows):,} measurements is trustworthy. {QUIET}"
    if names := accuracy_names(valid):
        return _fastest_at(_judged(valid, names[0]), names[0], varying)
    return _by_score(scores, baseline, varying) or _fastest(valid, varying)


def lead_of(
    rows: Sequence[HardwareRow], scores: Sequence[Score], baseline: Configuration, varying: frozenset[str]
) -> list[str]:
    """What the headline leaves to be said: who is most accurate, and who is fastest over all models."""
    valid = [row for row in rows if row.valid]
    names = accuracy_names(valid)
    told = _most_accurate(_judged(valid, names[0]), names[0], varying) if names else None
    return [sentence for sentence in (told, _by_score(scores, baseline, varying) if names else None) if sentence]


def _by_score(scores: Sequence[Score], baseline: Configuration, varying: frozenset[str]) -> str | None:
    """The best of those that have all of the baseline's models, over those of them that are valid on both sides.

    None where that is the baseline alone, or fewer than two models.
    """
    ranked = [
        (speed, one)
        for one in scores
        if one.is_complete and one.num_valid > 1 and (speed := one.valid_speed) is not None
    ]
    if all(one.configuration == baseline for _, one in ranked):
        return None
    speed, best = max(ranked, key=lambda item: (item[0], item[1].configuration == baseline))
    left_out = f"; {len(best.doubtful)} left out, not valid" if best.doubtful else ""
    over = f"over {counted(best.num_valid, 'model')} (geometric mean{left_out})"
    if best.configuration == baseline:
        return f"No other configuration is faster than {baseline.label(varying)} {over}."
    return f"{best.configuration.label(varying)} is {number(speed)}× as fast as {baseline.label(varying)} {over}."


def alerts_of(rows: Sequence[HardwareRow]) -> list[str]:
    """What stands in the way of quoting these numbers."""
    invalid = sum(not row.valid for row in rows)
    smoke = sum(row.stored.record.scenario.preset == "smoke" for row in rows)
    told = []
    if invalid:
        told.append(f"{invalid:,} of {counted(len(rows), 'row')} failed the validity checks and are marked. {QUIET}")
    if smoke:
        told.append(
            f"{smoke:,} of {counted(len(rows), 'row')} measured in preset smoke: a short look, no figures to quote."
        )
    if len(harnesses := {row.stored.record.env.hard.get("harness") for row in rows}) > 1:
        named = " and ".join(sorted("none" if one is None else str(one) for one in harnesses))
        told.append(
            f"Measured by versions {named} of the harness, whose times are not comparable. Measure all with one."
        )
    return told


def facts_of(
    rows: Sequence[HardwareRow], baseline: Configuration, varying: frozenset[str], num_older: int
) -> list[tuple[str, str]]:
    """The small print: what is the same in every row and so in no column, and who measured it when."""
    records = [row.stored.record for row in rows]
    configurations = [row.identity.configuration for row in rows]
    days = sorted({record.utc[:10] for record in records})
    launches = sorted({len(record.launches) for record in records})
    lines = {
        "In every row": " · ".join(_constants(rows)),
        "Runtimes": _each(f"{one.runtime} ({one.version})" for one in configurations),
        "Measured": f"{_span(days)}, {_span(launches)} {'launch' if launches == [1] else 'launches'} a row",
        "Energy from": _each(row.energy_source for row in rows if row.energy_source),
        "Baseline": baseline.label(varying),
        "Left out": f"{counted(num_older, 'record')} of the same rows, older, shorter or not valid: see report.json"
        if num_older
        else "",
    }
    return [(term, text) for term, text in lines.items() if text]


def _constants(rows: Sequence[HardwareRow]) -> list[str]:
    """What stands in no column since all rows share it."""
    return [texts[0] for texts in zip(*map(_circumstances, rows), strict=True) if texts[0] and len(set(texts)) == 1]


def _circumstances(row: HardwareRow) -> tuple[str, ...]:
    configuration, scenario = row.identity.configuration, row.stored.record.scenario
    cpus, threads = configuration.num_cpus, configuration.threads
    return (
        configuration.device,
        counted(cpus, "CPU") if cpus is not None else "",
        configuration.power_mode or "",
        counted(threads, "thread") if threads is not None else "",
        scenario.kind.replace("_", " "),
        f"batch {configuration.batch}",
        f"preset {scenario.preset}",
    )


def _judged(rows: Sequence[HardwareRow], name: str) -> list[HardwareRow]:
    return [row for row in rows if row.accuracy and row.accuracy.name == name]


def _fastest_at(rows: Sequence[HardwareRow], name: str, varying: frozenset[str]) -> str:
    fastest = min(rows, key=lambda row: (row.p50_ms, -_value(row)))
    at = f"{number(fastest.p50_ms)} ms (p50) at {_accuracy(fastest, rows)} {name}"
    verb = "is fastest:" if len(rows) > 1 else "answers in"
    return f"{fastest.identity.label(varying)} {verb} {at}."


def _most_accurate(rows: Sequence[HardwareRow], name: str, varying: frozenset[str]) -> str | None:
    if len(rows) == 1:
        return None
    best = max(rows, key=lambda row: (_value(row), -row.p50_ms))
    what = f"{_accuracy(best, rows)} in {number(best.p50_ms)} ms"
    return f"{best.identity.label(varying)} is most accurate: {what}."


def _fastest(rows: Sequence[HardwareRow], varying: frozenset[str]) -> str:
    fastest = min(rows, key=lambda row: row.p50_ms)
    verb = "is fastest:" if len(rows) > 1 else "answers in"
    return f"{fastest.identity.label(varying)} {verb} {number(fastest.p50_ms)} ms (p50); no accuracy was measured."


def _value(row: HardwareRow) -> float:
    return row.accuracy.value if row.accuracy else 0.0


def _accuracy(row: HardwareRow, rows: Sequence[HardwareRow]) -> str:
    name = row.accuracy.name if row.accuracy else ""
    return f"{percent(_value(row))} %" if is_fraction(rows, name) else number(_value(row))


def _each(texts: Iterable[str]) -> str:
    return " · ".join(dict.fromkeys(texts))


def _span(values: Sequence[str] | Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
