"""Which columns the comparison has, and its tables of results and of scores.

A column without a value in any row is left out and named in `absences`; one that says the same in every row is told once above
the table. Each accuracy has columns of its own a (metric, data set): they are different quantities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.hardware.identity import Configuration
from benchmarks.hardware.rows import HardwareRow
from benchmarks.hardware.scores import Score
from benchmarks.report_tables import ABSENT, Cell, Column, Table, make_table, name_of, number, percent, points

NOT_VALID, FEWER, BASELINE = "not valid", "fewer models", "baseline"

IDENTITY = (
    Column("Model", "model", name_of),
    Column("Input", "shape", name_of),
    Column("Precision", "precision", name_of),
    Column("Runtime", "runtime", name_of),
    Column("Version", "version", name_of),
    Column("Options", "options", name_of),
    Column("Threads", "threads"),
    Column("Device", "device", name_of),
    Column("CPUs", "num_cpus"),
    Column("Power mode", "power_mode", name_of),
    Column("Batch", "batch"),
    Column("Taken", "taken", name_of),
)
RESULTS = (
    Column("p50", "p50_ms", group="Latency, ms", interval="p50_ci95_ms"),
    Column("p90", "p90_ms", group="Latency, ms"),
    Column("p99", "p99_ms", group="Latency, ms"),
    Column("p50 by the runtime’s own clock", "own_clock_p50_ms", group="Latency, ms"),
    Column("p50 from bytes", "host_e2e_p50_ms", group="Latency, ms"),
    Column("one by one", "fps", group="Inferences/s"),
    Column("in batches", "throughput_fps", group="Inferences/s"),
    Column("load", "load_ms", group="Start, ms"),
    Column("first", "first_ms", group="Start, ms"),
    Column("on disk", "size_mib", group="MiB"),
    Column("peak RSS", "peak_rss_mib", group="MiB"),
    Column("without arena", "arena_off_rss_mib", group="MiB"),
    Column("GPU", "gpu_mib", group="MiB"),
    Column("net", "net_mj", group="mJ an inference"),
    Column("gross", "gross_mj", group="mJ an inference"),
    Column("Inferences/J", "per_joule"),
    Column("Energy from", "energy_source", name_of),
    Column("INT8 MACs, %", "int8_share", percent),
    Column("Ops fallen back", "num_fallback"),
    Column("Launches disturbed", "disturbed", name_of),
)
ALWAYS = ("model", "precision", "runtime")
MORE_IS_BETTER = ("fps", "throughput_fps", "per_joule", "accuracy", "delta", "agreement", "int8_share")
# What a column is called where it does not stand: among the values that no row has.
WORDS = {
    "own_clock_p50_ms": "p50 by the runtime’s own clock",
    "host_e2e_p50_ms": "p50 from encoded bytes",
    "throughput_fps": "inferences/s in batches",
    "gpu_mib": "GPU memory",
    "net_mj": "net energy",
    "gross_mj": "gross energy",
    "peak_rss_mib": "peak RSS",
    "arena_off_rss_mib": "peak RSS without the runtime’s arena",
    "load_ms": "load time",
    "first_ms": "first inference",
    "int8_share": "INT8 share of the MACs",
    "num_fallback": "ops fallen back",
    "accuracy": "accuracy",
    "power_mode": "power mode",
    "threads": "threads",
    "p90_ms": "p90",
    "p99_ms": "p99",
    "p50_ci95_ms": "interval of p50",
}


@dataclass(frozen=True)
class Absence:
    """A value that some rows lack: how many of all, and the reasons with their numbers of rows."""

    name: str
    count: int
    of: int
    reasons: tuple[tuple[str, int], ...]


def accuracy_names(rows: Sequence[HardwareRow]) -> list[str]:
    """Each metric on a data set, the one that most rows have first."""
    counts = Counter(row.accuracy.name for row in rows if row.accuracy)
    return [name for name, _ in counts.most_common()]


def is_fraction(rows: Sequence[HardwareRow], name: str) -> bool:
    """Whether this metric is shown in percent: all its values are fractions."""
    values = [row.accuracy.value for row in rows if row.accuracy and row.accuracy.name == name]
    return bool(values) and all(0 <= value <= 1 for value in values)


def columns_of(rows: Sequence[HardwareRow], varying: frozenset[str]) -> list[Column]:
    """The columns that say something: identities that differ, results that some row has."""
    identities = [column for column in IDENTITY if column.key in ALWAYS or column.key in varying]
    before = [column for column in RESULTS if column.key not in ("int8_share", "num_fallback", "disturbed")]
    after = [column for column in RESULTS if column not in before]
    accuracies = [column for name in accuracy_names(rows) for column in _accuracy_columns(rows, name)]
    values = [cells_of(row) for row in rows]
    results = [one for one in (*before, *accuracies, *after) if any(value.get(one.key) is not None for value in values)]
    told_above = [] if len({value["energy_source"] for value in values} - {None}) > 1 else ["energy_source"]
    return [*identities, *(one for one in results if one.key not in told_above)]


def _accuracy_columns(rows: Sequence[HardwareRow], name: str) -> list[Column]:
    fraction = is_fraction(rows, name)
    value, difference = ("%", "Δ teacher, points") if fraction else ("value", "Δ teacher")
    return [
        Column(value, f"accuracy {name}", percent if fraction else number, name, f"accuracy_ci95 {name}"),
        Column(difference, f"delta {name}", points if fraction else number, name, f"delta_ci95 {name}"),
        Column("agreement, %", f"agreement {name}", percent, name),
    ]


def cells_of(row: HardwareRow) -> dict[str, Any]:
    """The values of a row by the keys of its columns."""
    values = row.flat()
    named = {
        f"{key} {row.accuracy.name}": values[key]
        for key in ("accuracy", "accuracy_ci95", "delta", "delta_ci95", "agreement")
        if row.accuracy
    }
    return {**values, **named, "disturbed": f"{row.num_disturbed} of {row.num_launches}"}


def sort_keys(row: HardwareRow, columns: Sequence[Column]) -> list[float | str | None]:
    """What each cell is sorted by; None goes last, whichever way."""
    cells = {**cells_of(row), "disturbed": row.num_disturbed / max(row.num_launches, 1) + (not row.valid)}
    return [cells.get(column.key) for column in columns]


def results_table(caption: str, rows: Sequence[HardwareRow], columns: Sequence[Column]) -> Table:
    """A line a row, in their order; an absent value carries why."""
    table = make_table(
        caption, columns, [cells_of(row) for row in rows], badges=lambda value: () if value["valid"] else (NOT_VALID,)
    )
    if table is None:
        raise ValueError("a table of results needs a row")
    lines = [
        tuple(
            replace(cell, hint=_why_absent(row, column.key)) if cell.text == ABSENT else cell
            for cell, column in zip(line, table.columns, strict=True)
        )
        for row, line in zip(rows, table.rows, strict=True)
    ]
    return replace(table, rows=tuple(lines))


def scores_table(
    caption: str, scores: Sequence[Score], baseline: Configuration, varying: frozenset[str]
) -> Table | None:
    """A line a configuration: its score, and beside it what it is made of, the p50 of each model and its ratio."""
    models = list(dict.fromkeys(model for score in scores for model in (*score.ratios, *score.missing)))
    columns = [
        Column("Configuration", "name", name_of),
        Column("× baseline", "speed"),
        Column("over models", "models", name_of),
        Column("perf/W, × baseline", "per_joule"),
        *(Column(model, f"p50 {model}", group="p50, ms (× baseline)") for model in models),
    ]
    lines = [_score_line(score, baseline, varying) for score in scores]
    table = make_table(caption, columns, lines, badges=lambda line: line["badges"])
    if table is None:
        return None
    return replace(
        table,
        rows=tuple(
            tuple(_with_ratio(cell, score, column.key) for cell, column in zip(line, table.columns, strict=True))
            for score, line in zip(scores, table.rows, strict=True)
        ),
    )


def _score_line(score: Score, baseline: Configuration, varying: frozenset[str]) -> dict[str, Any]:
    total = len(score.ratios) + len(score.missing)
    is_baseline = score.configuration == baseline
    doubtful = f", {len(score.doubtful)} not valid" if score.doubtful else ""
    return {
        "name": score.configuration.label(varying),
        "badges": (BASELINE,) * is_baseline + (FEWER,) * (not score.is_complete),
        "speed": score.speed,
        "models": f"{len(score.ratios)} of {total}{doubtful}",
        "per_joule": score.per_joule,
        **{f"p50 {model}": row.p50_ms for model, row in score.rows.items()},
    }


def _with_ratio(cell: Cell, score: Score, key: str) -> Cell:
    if key in ("speed", "per_joule") and cell.text == ABSENT:
        why = "no model in common with the baseline" if key == "speed" else "energy was not measured on both sides"
        return replace(cell, hint=why)
    if not key.startswith("p50 "):
        return cell
    ratio = score.ratios.get(key.removeprefix("p50 "))
    return replace(cell, hint="not measured") if ratio is None else replace(cell, detail=f"{number(ratio)}×")


def _why_absent(row: HardwareRow, key: str) -> str:
    name = key.partition(" ")[0]
    if row.accuracy is not None and name == "accuracy":
        return f"measured by {row.accuracy.name}"
    return row.absent.get(name, "not recorded")


def absences(rows: Sequence[HardwareRow]) -> list[Absence]:
    """Every value that some row lacks, those that all lack first."""
    found = []
    for name, words in WORDS.items():
        reasons = Counter(row.absent[name] for row in rows if name in row.absent)
        if reasons:
            found.append(Absence(words, reasons.total(), len(rows), tuple(reasons.most_common(4))))
    return sorted(found, key=lambda absence: -absence.count)
