"""The history as one page that works offline: a figure and a table of runs for each series.

Reads series; writes one HTML file. Titles, names and notes in a history are not trusted: jinja2 escapes them in the page,
this module in the figures, and the page's policy lets no script run but its own two.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.history_series import (
    ACCEPTED,
    BACK,
    FASTER,
    SHORT,
    SLOWER,
    UNKNOWN,
    Accepted,
    Run,
    Series,
    Step,
    before_line,
    sentence,
)
from benchmarks.report_figures import Figure, base_axis, base_layout
from benchmarks.report_page import environment, page_scripts, write_text
from benchmarks.report_tables import Column, Row, make_table, name_of, number

RUNS = (
    Column("Run", "run", name_of),
    Column("Measured", "measured", name_of),
    Column("git", "git", name_of),
    Column("p25", "p25_ms", group="Latency, ms"),
    Column("p50", "p50_ms", group="Latency, ms"),
    Column("p99", "p99_ms", group="Latency, ms"),
    Column("Peak RSS, MiB", "peak_rss_mib"),
    Column("Size, MiB", "size_mib"),
    Column("What begins here", "begins", name_of),
)
CHANGES = (
    Column("Change", "what", name_of),
    Column("From run", "run", name_of),
    Column("By", "percent", name_of),
    Column("Became of it", "outcome", name_of),
)
LINES = {
    SLOWER: ("var(--warn)", "dash"),
    FASTER: ("var(--fp32)", "dash"),
    BACK: ("var(--muted)", "dot"),
    ACCEPTED: ("var(--text)", "solid"),
}


def render_history(series: Sequence[Series], page_path: Path) -> Path:
    """Write the page, its folder too where there is none; returns its path."""
    page_path.parent.mkdir(parents=True, exist_ok=True)
    slower = [one for one in series if one.verdict == SLOWER]
    values = {
        "title": _title(series, slower),
        "slower": [one.title for one in slower],
        "series": [_section(index, one) for index, one in enumerate(series)],
        "figures": {f"history-{index}": history_figure(one) for index, one in enumerate(series)},
    }
    write_text(page_path, environment().get_template("history.html.j2").render(values | page_scripts("report.js")))
    return page_path


def history_figure(series: Series) -> Figure:
    """p25 of each run in their order, not by their dates: a pause is no slope. What is not judged is a cross off the line."""
    places = list(range(1, len(series.runs) + 1))
    judged = [(place, run) for place, run in zip(places, series.runs, strict=True) if run.why_not is None]
    others = [(place, run) for place, run in zip(places, series.runs, strict=True) if run.why_not is not None]
    marks = [(place, run.mark) for place, run in zip(places, series.runs, strict=True) if run.mark]
    ends = (series.level_from + 0.5, len(places) + 0.5)
    level = [] if series.level_us is None else [_level("level", series.level_us, "dot", ends)]
    beyond = [] if series.beyond_us is None else [_level("two sigma above", series.beyond_us, "dash", ends)]
    layout = base_layout(
        height=300,
        showlegend=True,
        xaxis=base_axis("run", range=[0.5, len(places) + 0.5], tickformat="d"),
        yaxis=base_axis("p25, ms"),
        shapes=[_line(place, mark) for place, mark in marks],
        annotations=[_label(place, mark) for place, mark in marks],
    )
    layout["margin"] = {**layout["margin"], "t": 44}
    traces = [_trace("valid", judged), *([_trace("not judged", others)] if others else []), *level, *beyond]
    return {"data": traces, "layout": layout}


def _trace(name: str, points: Sequence[tuple[int, Run]]) -> Figure:
    valid = name == "valid"
    colour = "var(--int8)" if valid else "var(--warn)"
    return {
        "type": "scatter",
        "mode": "lines+markers" if valid else "markers",
        "name": name,
        "x": [place for place, _ in points],
        "y": [run.p25_us / 1e3 for _, run in points],
        "customdata": [escape(_about(run)) for _, run in points],
        "line": {"width": 1, "color": colour},
        "marker": {"size": 7 if valid else 9, "symbol": "circle" if valid else "x", "color": colour},
        "hovertemplate": "%{customdata}<br>%{y:.4g} ms<extra>%{fullData.name}</extra>",
    }


def _about(run: Run) -> str:
    words = (run.run_id[:SHORT], run.utc[:16].replace("T", " "), (run.git_sha or "")[:SHORT], run.why_not)
    return ", ".join(word for word in words if word)


def _level(name: str, value_us: float, dash: str, ends: tuple[float, float]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(ends),
        "y": [value_us / 1e3] * 2,
        "line": {"width": 1, "dash": dash, "color": "var(--muted)"},
        "hoverinfo": "skip",
    }


def _line(place: int, mark: str) -> Figure:
    """Before the run with which the new level begins."""
    colour, dash = LINES[mark]
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": place - 0.5,
        "x1": place - 0.5,
        "y0": 0,
        "y1": 1,
        "line": {"width": 1.5, "dash": dash, "color": colour},
    }


def _label(place: int, mark: str) -> Figure:
    return {
        "x": place - 0.5,
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "text": mark,
        "showarrow": False,
        "font": {"color": LINES[mark][0]},
    }


def _title(series: Sequence[Series], slower: Sequence[Series]) -> str:
    if not series:
        return "No runs yet"
    unknown = sum(one.verdict == UNKNOWN for one in series)
    told = f"; {unknown} cannot be told yet" if unknown else ""
    return f"{len(slower) or 'None'} of {len(series)} series slower{told}"


def _section(index: int, series: Series) -> dict[str, Any]:
    places = {run.run_id: place for place, run in enumerate(series.runs, start=1)}
    return {
        "id": f"history-{index}",
        "title": series.title,
        "name": f"{series.name} {series.precision}",
        "series": series.id,
        "verdict": sentence(series),
        "is_slower": series.verdict == SLOWER,
        "before": before_line(series.before) if series.before else None,
        "notes": series.notes,
        "changes": make_table("Changes", CHANGES, _changes(series, places)),
        "runs": make_table(
            "Runs, the newest first",
            RUNS,
            [_row(place, run) for place, run in enumerate(series.runs, start=1)][::-1],
            badges=lambda row: (row["why_not"],) if row["why_not"] else (),
        ),
    }


def _row(place: int, run: Run) -> Row:
    return {
        "run": f"{place} · {run.run_id[:SHORT]}",
        "measured": run.utc[:16].replace("T", " "),
        "git": run.git_sha[:SHORT] if run.git_sha else None,
        "p25_ms": run.p25_us / 1e3,
        "p50_ms": run.p50_us / 1e3,
        "p99_ms": None if run.p99_us is None else run.p99_us / 1e3,
        "peak_rss_mib": run.peak_rss_mib,
        "size_mib": run.size_bytes / 2**20,
        "begins": run.mark,
        "why_not": run.why_not,
    }


def _changes(series: Series, places: dict[str, int]) -> list[Row]:
    """What the rule saw and what a person accepted, in the order of the runs."""
    rows = [(places[step.first_run], _step(step, places)) for step in series.steps]
    rows += [(places[one.run_id], _accepted(one, places)) for one in series.accepted]
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _step(step: Step, places: dict[str, int]) -> Row:
    outcome = f"over from run {places[step.ended_run]} on" if step.ended_run else None
    return {
        "what": step.kind,
        "run": number(places[step.first_run]),
        "percent": f"{step.ratio - 1:+.1%}",
        "outcome": outcome or ("accepted" if step.accepted else "open"),
    }


def _accepted(one: Accepted, places: dict[str, int]) -> Row:
    return {
        "what": ACCEPTED,
        "run": number(places[one.run_id]),
        "percent": f"{one.ratio - 1:+.1%}" if one.ratio else None,
        "outcome": f"{one.note} ({one.who}, {one.utc[:10]})",
    }
