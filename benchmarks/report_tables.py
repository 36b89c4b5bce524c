"""Tables of a report: what a cell says, in HTML and in Markdown alike.

Reads rows of a summary (mappings from JSON; any value may be null). Writes nothing: the templates lay tables out.
Fractions are shown as percent, differences of fractions as percentage points, everything else in its own unit. A value
that is null is an em dash, with the flag of its row that says why as a numbered note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]

ABSENT = "—"
_UNIT = re.compile(r"(_p\d+)?_(ms|mib|mj|nats)$")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign; what rounds to zero has none."""
    text = f"{100 * difference:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def number(value: object) -> str:
    """Three significant digits, whole numbers in full; text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    decimals = next((places for limit, places in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= limit), None)
    text = f"{value:#.3g}" if decimals is None else f"{value:.{decimals}f}"
    return text.replace("-", "−")


def name_of(value: object) -> str:
    return ABSENT if value is None else str(value)


@dataclass(frozen=True)
class Column:
    """One column of a table. `key` is the field of a row, `interval` the field that holds its [low, high]."""

    name: str
    key: str
    show: Callable[[Any], str] = number
    group: str = ""
    interval: str | None = None

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name}" if self.group else self.name

    @property
    def is_text(self) -> bool:
        """Whether it holds words, set flush left, and not numbers."""
        return self.show is name_of


HEADLINE = (
    Column("Target", "target", name_of),
    Column("Ships", "shipped", name_of),
    Column("p50, ms", "p50_ms", interval="p50_ci95"),
    Column("× teacher", "speedup"),
    Column("Size, MiB", "size_mib"),
    Column("× smaller", "shrink"),
    Column("Top-1, %", "top1", percent),
    Column("Δ points", "delta_top1_teacher", points),
    Column("Gates passed", "gates_passed", name_of),
)
MODELS = (
    Column("Role", "role", name_of),
    Column("Model", "name", name_of),
    Column("Parameters", "parameters"),
    Column("MACs", "macs"),
    Column("Top-1 validation, %", "top1_validation", percent),
)
LEDGER = (
    Column("Hop", "hop", name_of),
    Column("Model", "model", name_of),
    Column("Precision", "precision", name_of),
    Column("n", "n"),
    Column("%", "top1", percent, group="Top-1", interval="ci95"),
    Column("Own metric", "metric"),
    Column("teacher", "agreement_teacher", percent, group="Agreement, %"),
    Column("previous hop", "agreement_previous", percent, group="Agreement, %"),
    Column("Δ points", "difference_top1", points, group="Against the previous hop", interval="difference_ci95"),
    Column("McNemar p", "mcnemar_p", group="Against the previous hop"),
    Column("KL, nats", "kl_previous", group="Against the previous hop"),
    Column("max |Δ logit|", "max_abs_delta", group="Against the previous hop"),
    Column("flipped", "num_flipped", group="Against the previous hop"),
    Column("n", "teacher_errs", group="Where the teacher errs"),
    Column("right, %", "right_where_teacher_errs", percent, group="Where the teacher errs"),
    Column("the same error, %", "same_where_teacher_errs", percent, group="Where the teacher errs"),
)
GATES = (
    Column("Gate", "name", name_of),
    Column("Result", "result", name_of),
    Column("Value", "value"),
    Column("Limit", "limit"),
    Column("Detail", "detail", name_of),
)
MEASURED = (
    Column("Model", "arm", name_of),
    Column("Top-1", "top1", percent, group="Accuracy, %"),
    Column("Δ teacher", "delta_top1_teacher", points, group="Accuracy, %"),
    Column("agreement", "agreement_teacher", percent, group="Accuracy, %"),
    Column("p50", "p50_ms", group="Latency, ms", interval="p50_ci95"),
    Column("p90", "p90_ms", group="Latency, ms"),
    Column("p99", "p99_ms", group="Latency, ms"),
    Column("from bytes, p50", "host_e2e_p50_ms", group="Latency, ms"),
    Column("one by one", "fps", group="Images/s"),
    Column("in batches", "throughput_fps", group="Images/s"),
    Column("load", "load_ms", group="Start, ms"),
    Column("first call", "first_ms", group="Start, ms"),
    Column("on disk", "size_mib", group="MiB"),
    Column("peak RSS", "peak_rss_mib", group="MiB"),
)
LAYERS = (
    Column("Layer", "name", name_of),
    Column("Operator", "op", name_of),
    Column("Runs in", "precision", name_of),
    Column("MACs", "macs"),
)
RUNGS = (
    Column("Rung", "rung", name_of),
    Column("Top-1 validation, %", "top1_validation", percent),
    Column("Gate", "result", name_of),
    Column("left in float", "float_layers", name_of),
)
CONTROLS = (Column("Control", "name", name_of), Column("Top-1 validation, %", "top1_validation", percent))
EPOCHS = (
    Column("Epoch", "epoch", name_of),
    Column("Loss", "loss"),
    Column("training", "train_top1", percent, group="Top-1, %"),
    Column("validation", "validation_top1", percent, group="Top-1, %"),
    Column("Samples shown, %", "shown_fraction", percent),
    Column("Temperature", "temperature"),
    Column("Weight of the teacher, %", "teacher_factor", percent),
    Column("Taught by", "taught_by", name_of),
    Column("Teacher wrong, %", "teacher_wrong", percent),
    Column("Rate", "lr"),
    Column("Images/s", "images_per_s"),
    Column("Seconds", "seconds"),
)
ROUNDS = (
    Column("Round", "round", name_of),
    Column("Top-1 validation, %", "validation_top1", percent),
    Column("Soft labels from", "soft_labels_from", name_of),
)


@dataclass(frozen=True)
class Span:
    """An interval and its middle, in percent of the width that all intervals of the table share."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Scale:
    """The axis that all drawn intervals of one column share."""

    key: str
    low: float
    high: float

    def span(self, interval: tuple[float, float], middle: float) -> Span:
        low, centre, high = (
            round(100 * (value - self.low) / (self.high - self.low), 2) for value in (interval[0], middle, interval[1])
        )
        return Span(low, centre, high)


@dataclass(frozen=True)
class Cell:
    """`detail` is the interval in words, `hint` why the value is absent, `notes` the numbers of the table's notes."""

    text: str
    detail: str = ""
    hint: str = ""
    notes: tuple[int, ...] = ()
    badges: tuple[str, ...] = ()
    span: Span | None = None


@dataclass(frozen=True)
class Heading:
    """A heading cell over `columns` columns and `rows` heading lines; `key` is that of its column, "" over a group."""

    text: str
    key: str = ""
    columns: int = 1
    rows: int = 1
    is_group: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the first cell of a row is its heading."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]

    @property
    def headings(self) -> list[list[Heading]]:
        """One line of headings, or two where columns share a group."""
        upper: list[Heading] = []
        lower = [Heading(column.name, column.key, is_text=column.is_text) for column in self.columns if column.group]
        for group, members in groupby(self.columns, key=lambda column: column.group):
            columns = list(members)
            if group:
                upper.append(Heading(group, columns=len(columns), is_group=True))
            else:
                upper += [
                    Heading(column.name, column.key, rows=2 if lower else 1, is_text=column.is_text)
                    for column in columns
                ]
        return [upper, lower] if lower else [upper]

    def records(self) -> list[dict[str, str]]:
        """The texts of each row by the label of their column."""
        labels = [column.label for column in self.columns]
        return [dict(zip(labels, (cell.text for cell in row), strict=True)) for row in self.rows]


def make_table(
    caption: str,
    columns: Iterable[Column],
    rows: Sequence[Row],
    badges: Callable[[Row], tuple[str, ...]] = lambda _row: (),
    plot: str | None = None,
    is_digest: bool = False,
) -> Table | None:
    """A table of `rows`, or None without any. Columns that are null everywhere, without a reason, are left out.

    `plot` is the key of the column whose interval is drawn as well; `badges` are words set beside a row's heading.
    `is_digest`: the rows stand in full in another table, so flags about what is not shown here are left to that one.
    """
    first, *others = columns
    shown = (first, *(column for column in others if any(_is_said(row, column.key) for row in rows)))
    if not rows:
        return None
    notes: list[str] = []
    scale = _scale(rows, next((column for column in shown if column.key == plot), None))
    cells = tuple(_cells(row, shown, badges(row), notes, scale, is_digest) for row in rows)
    return Table(caption, shown, cells, tuple(notes))


def _cells(
    row: Row,
    columns: Sequence[Column],
    badges: tuple[str, ...],
    notes: list[str],
    scale: Scale | None,
    is_digest: bool,
) -> tuple[Cell, ...]:
    """Flags that explain a null stand at that cell; the others stand at the row's heading, so that none is lost."""
    explaining = {reason_of(row, column.key) for column in columns if row.get(column.key) is None}
    general = [] if is_digest else [flag for flag in flags_of(row) if flag not in explaining]
    heading = Cell(
        name_of(row.get(columns[0].key)), badges=badges, notes=tuple(_number_of(flag, notes) for flag in general)
    )
    return (heading, *(_cell(row, column, notes, scale) for column in columns[1:]))


def _cell(row: Row, column: Column, notes: list[str], scale: Scale | None) -> Cell:
    value = row.get(column.key)
    if value is None:
        reason = reason_of(row, column.key)
        numbers = () if reason is None else (_number_of(reason, notes),)
        return Cell(ABSENT, hint=reason or "not recorded", notes=numbers)
    interval = interval_of(row, column)
    detail = f"{column.show(interval[0])} to {column.show(interval[1])}" if interval else ""
    drawn = scale if scale and interval and column.key == scale.key else None
    return Cell(column.show(value), detail=detail, span=drawn.span(interval, value) if drawn and interval else None)


def interval_of(row: Row, column: Column) -> tuple[float, float] | None:
    """The [low, high] beside a value; None where either end is null."""
    ends: Sequence[float | None] = (row.get(column.interval) if column.interval else None) or ()
    low, high = ends if len(ends) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def _scale(rows: Iterable[Row], column: Column | None) -> Scale | None:
    if column is None:
        return None
    ends = [
        end
        for row in rows
        if row.get(column.key) is not None and (interval := interval_of(row, column))
        for end in (*interval, row[column.key])
    ]
    return Scale(column.key, min(ends), max(ends)) if ends and max(ends) > min(ends) else None


def flags_of(row: Row) -> list[str]:
    """What a measurement says about itself: its flags and its note."""
    remarks = [*(row.get("flags") or ()), row.get("note")]
    return [str(remark) for remark in remarks if remark]


def reason_of(row: Row, key: str) -> str | None:
    """The flag that speaks of `key`, with or without its unit (p99_ms, p99)."""
    names = "|".join(re.escape(name) for name in {key, _UNIT.sub("", key)})
    pattern = re.compile(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])")
    return next((flag for flag in flags_of(row) if pattern.search(flag)), None)


def _is_said(row: Row, key: str) -> bool:
    return row.get(key) is not None or reason_of(row, key) is not None


def _number_of(note: str, notes: list[str]) -> int:
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1
