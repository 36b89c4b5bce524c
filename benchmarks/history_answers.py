"""What the verbs of the history answer: `to_json()` for machines, `text()` for people, `failure` for the exit code.

Values only: nothing is read or judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.history_series import (
    ACCEPTED,
    BACK,
    FASTER,
    SLOWER,
    UNKNOWN,
    Accepted,
    Run,
    Series,
    Step,
    before_line,
    named,
    sentence,
)
from benchmarks.terminal import WIDTH, Point, aligned, plot
from targets.errors import EdgestillError

SCHEMA_VERSION = 1
MARKS = {SLOWER: "^", FASTER: "v", BACK: "<", ACCEPTED: "A"}
LEGEND = {
    "o": "valid",
    "x": "not judged",
    "^": "slower from here",
    "v": "faster from here",
    "<": "back from here",
    "A": "accepted from here",
}
LEVEL, BEYOND = "-", "."


@dataclass(frozen=True, kw_only=True)
class HistoryAdded:
    """Run ids by what became of them. `different`: another record of this id is there and stays; `spooled`: they wait."""

    db: str
    added: tuple[str, ...] = ()
    already: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    spooled: tuple[str, ...] = ()
    merged: int = 0
    notes: tuple[str, ...] = ()
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        fields = ("db", "added", "already", "different", "spooled", "merged", "notes")
        return _document("history add", self.failure, {name: getattr(self, name) for name in fields})

    def text(self) -> str:
        counts = {
            "added": len(self.added),
            "there already": len(self.already),
            "not written": len(self.different),
            "waiting": len(self.spooled),
            "merged from the spool": self.merged,
        }
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return "\n".join([f"{self.db}: {told or 'nothing to add'}", *_note_lines(self.notes)])


@dataclass(frozen=True, kw_only=True)
class HistoryShown:
    """Series of a history; one alone is shown run by run."""

    db: str
    series: tuple[Series, ...]
    page: Path | None = None
    notes: tuple[str, ...] = ()
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        page = str(self.page) if self.page else None
        series = [one.to_json() for one in self.series]
        return _document(
            "history show", self.failure, {"db": self.db, "page": page, "series": series, "notes": self.notes}
        )

    def text(self) -> str:
        shown = series_lines(self.series[0]) if len(self.series) == 1 else aligned([_cells(one) for one in self.series])
        written = [f"written to {self.page}"] if self.page else []
        return "\n".join([*(shown or [f"{self.db} holds no runs"]), *_note_lines(self.notes), *written])


@dataclass(frozen=True, kw_only=True)
class HistoryChecked:
    """The verdict on each series."""

    db: str
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        series = [
            {key: value for key, value in one.to_json().items() if key != "runs"} | {"sentence": sentence(one)}
            for one in self.series
        ]
        return _document("history check", self.failure, {"db": self.db, "series": series, "notes": self.notes})

    def text(self) -> str:
        lines = []
        for one in self.series:
            lines += [f"{one.id}  {one.title}", f"          {sentence(one)}"]
            lines += [f"          note: {note}" for note in one.notes]
        return "\n".join([*(lines or [f"{self.db} holds no runs"]), *_note_lines(self.notes)])


@dataclass(frozen=True, kw_only=True)
class ChangeAccepted:
    """A level that holds from `run` on, and the person and reason that stand in the history (the first, if given twice)."""

    db: str
    series: str
    title: str
    run: str
    who: str
    note: str
    utc: str
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        fields = ("db", "series", "title", "run", "who", "note", "utc")
        return _document("history accept", self.failure, {name: getattr(self, name) for name in fields})

    def text(self) -> str:
        return "\n".join(
            [
                f"{self.series}  {self.title}",
                f"accepted from run {self.run} on, by {self.who}, {self.utc[:10]}: {self.note}",
                "Runs to come are held against this level once it has 10 runs.",
            ]
        )


def series_lines(series: Series) -> list[str]:
    """One series for a terminal: its plot, what changed and what was accepted, the verdict."""
    runs = series.runs
    left_out = sum(run.why_not is not None for run in runs)
    lines = [
        f"{series.id}  {series.title}",
        f"{len(runs)} runs, {runs[0].utc[:10]} to {runs[-1].utc[:10]}, {left_out} of them not judged",
        *([before_line(series.before)] if series.before else []),
        "",
        f"p25 in ms, a column a run{f', the last {WIDTH}' if len(runs) > WIDTH else ''}",
        *_plot(series),
        "",
        *[_step_line(step, runs) for step in series.steps],
        *[_accepted_line(one, runs) for one in series.accepted],
        *[f"note: {note}" for note in series.notes],
    ]
    return [*lines, sentence(series)]


def _plot(series: Series) -> list[str]:
    points = [Point(run.p25_us / 1e3, "x" if run.why_not else MARKS.get(run.mark or "", "o")) for run in series.runs]
    lines = {}
    if series.level_us and series.beyond_us:
        lines = {BEYOND: series.beyond_us / 1e3, LEVEL: series.level_us / 1e3}
    used = dict.fromkeys(point.mark for point in points[-WIDTH:])
    legend = [f"{mark} {LEGEND[mark]}" for mark in LEGEND if mark in used]
    if lines:
        legend += [f"{LEVEL} level", f"{BEYOND} two sigma"]
    return [*plot(points, lines, lines_from=series.level_from), "  ".join(legend)]


def _step_line(step: Step, runs: Sequence[Run]) -> str:
    by_id = {run.run_id: run for run in runs}
    line = f"{step.kind} by {abs(step.ratio - 1):.1%} from run {named(by_id[step.first_run])} on"
    if step.ended_run:
        return f"{line}, back from run {named(by_id[step.ended_run])} on"
    return f"{line}, accepted later" if step.accepted else line


def _accepted_line(one: Accepted, runs: Sequence[Run]) -> str:
    first = next(run for run in runs if run.run_id == one.run_id)
    ratio = f", {one.ratio - 1:+.1%}" if one.ratio else ""
    return f"accepted from run {named(first)} on{ratio}, by {one.who}, {one.utc[:10]}: {one.note}"


def _cells(series: Series) -> dict[str, str]:
    last = series.runs[-1]
    return {
        "series": series.id,
        "what": series.title,
        "runs": str(len(series.runs)),
        "last": last.utc[:10],
        "p25 ms": f"{last.p25_us / 1e3:.4g}",
        "verdict": f"cannot tell ({series.num_runs} valid)" if series.verdict == UNKNOWN else series.verdict,
        "differs in": ", ".join(series.before.changed) if series.before else "",
    }


def _note_lines(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _document(verb: str, failure: EdgestillError | None, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        **values,
        "error": str(failure) if failure else None,
        "exit_code": failure.exit_code if failure else 0,
    }
