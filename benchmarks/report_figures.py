"""Figures of a report, as plain plotly dictionaries.

Reads parts of a summary (mappings from JSON; any value may be null); a figure without a point is None. Colours are
names of the page's own (`var(--int8)`): the page sets them to what its theme has, so that one figure serves light, dark
and print. Labels come from outside and are escaped, since plotly reads tags in any text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from benchmarks.report_tables import name_of

Figure = dict[str, Any]
Row = Mapping[str, Any]
Point = tuple[float, float]

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "hexagon")
_PRECISIONS = {"int8": "int8", "fp32": "fp32", "bf16": "half", "fp16": "half"}


def colour_of(precision: str | None) -> str:
    return f"var(--{_PRECISIONS.get(precision or '', 'other')})"


def is_dominated(point: Point, points: Sequence[Point]) -> bool:
    """Whether another point is at least as fast and as accurate, and better in one. A point is (latency, top-1)."""
    latency, top1 = point
    return any(x <= latency and y >= top1 and (x, y) != point for x, y in points)


def pareto_figure(targets: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Top-1 over p50 latency; within a target, what a valid row beats in both is grey. What is not valid is hollow."""
    traces = [trace for index, target in enumerate(targets) for trace in _pareto_traces(target, index)]
    if not traces:
        return None
    latencies_ms = [x for trace in traces for x in trace["x"]]
    layout = base_layout(
        height=400,
        xaxis=_log_axis("p50 latency, ms, log scale (left is faster)", latencies_ms, margin=0.08),
        yaxis=base_axis("top-1 on test, %"),
        showlegend=len(targets) > 1,
    )
    return {"data": traces, "layout": layout}


def _pareto_traces(target: Mapping[str, Any], index: int) -> list[Figure]:
    """The line that joins the valid rows that no other beats, and all rows, on it and beside it."""
    rows = [row for row in target.get("rows") or () if (row.get("p50_ms") or 0) > 0 and row.get("top1") is not None]
    if not rows:
        return []
    rows.sort(key=lambda row: (row["p50_ms"], row["top1"]))
    believed = [_point(row) for row in rows if is_believed(row)]
    front = [point for point in believed if not is_dominated(point, believed)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in front],
        "y": [y for _, y in front],
        "line": {"shape": "hv", "width": 1, "dash": "dot", "color": "var(--muted)"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [line, _pareto_markers(rows, believed, front, escape(name_of(target.get("target"))), index)]


def is_believed(row: Row) -> bool:
    """Whether a row may beat others: it is valid, or nobody says that it is not."""
    return row.get("valid") is not False


def _point(row: Row) -> Point:
    return row["p50_ms"], 100 * row["top1"]


def _label(row: Row) -> str:
    return escape(name_of(row.get("arm"))) + ("" if is_believed(row) else " (not valid)")


def _pareto_markers(
    rows: Sequence[Row], believed: Sequence[Point], front: Sequence[Point], name: str, index: int
) -> Figure:
    """Only the ends of the front are labelled, towards the middle of the plot: between them labels would collide."""
    points, symbol, ends = [_point(row) for row in rows], SYMBOLS[index % len(SYMBOLS)], {*front[:1], *front[-1:]}
    side = "bottom" if index % 2 else "top"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "text": [_label(row) if is_believed(row) and _point(row) in ends else "" for row in rows],
        "textposition": [f"{side} {'right' if point in front[:1] else 'left'}" for point in points],
        "customdata": [_label(row) for row in rows],
        "cliponaxis": False,
        "marker": {
            "size": 11,
            "symbol": [symbol if is_believed(row) else f"{symbol}-open" for row in rows],
            "color": [
                "var(--dominated)" if is_dominated(_point(row), believed) else colour_of(row.get("precision"))
                for row in rows
            ],
        },
        "hovertemplate": "%{customdata}<br>%{x:.3g} ms, %{y:.2f} %<extra>%{fullData.name}</extra>",
    }


def ecdf_figure(target: Mapping[str, Any]) -> Figure | None:
    """The share of single calls that are answered within a time, a line a row; teachers are dashed.

    A time that no clock can have measured, of 0 or less, is left out.
    """
    curves = [
        (row, sorted(ms for ms in row.get("latency_ecdf_ms") or () if ms > 0)) for row in target.get("rows") or ()
    ]
    traces = [_ecdf_trace(row, quantiles_ms) for row, quantiles_ms in curves if quantiles_ms]
    if not traces:
        return None
    layout = base_layout(
        height=320,
        xaxis=_log_axis("latency, ms, log scale", [x for trace in traces for x in trace["x"]], margin=0.02),
        yaxis=base_axis("calls answered, %", range=[0, 101]),
        showlegend=True,
    )
    return {"data": traces, "layout": layout}


def _ecdf_trace(row: Row, quantiles_ms: Sequence[float]) -> Figure:
    dash = "dash" if row.get("role") == "teacher" else "solid"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _label(row),
        "x": list(quantiles_ms),
        "y": [100 * (index + 1) / len(quantiles_ms) for index in range(len(quantiles_ms))],
        "line": {"shape": "hv", "width": 2, "dash": dash, "color": colour_of(row.get("precision"))},
        "hovertemplate": "%{y:.0f} % within %{x:.3g} ms",
    }


_PANELS = (
    ("top-1, %", (("validation_top1", "validation", "solid"), ("train_top1", "training", "dot")), 100),
    ("loss", (("loss", "loss", "solid"),), 1),
    ("shown, %", (("shown_fraction", "pacing: samples shown", "solid"),), 100),
    ("T", (("temperature", "temperature", "solid"),), 1),
    ("teacher, %", (("teacher_factor", "weight of what the teacher says", "solid"),), 100),
)


def training_figure(stage: Mapping[str, Any]) -> Figure | None:
    """Accuracy, loss and, with a curriculum, what moves along its axes, one panel under the other over the epochs."""
    epochs = stage.get("epochs") or ()
    panels = [panel for panel in _PANELS if any(epoch.get(key) is not None for key, *_ in panel[1] for epoch in epochs)]
    if not panels:
        return None
    layout = base_layout(
        height=70 + 130 * len(panels), showlegend=True, xaxis=base_axis("epoch", dtick=max(1, len(epochs) // 10))
    )
    traces: list[Figure] = []
    for index, (title, curves, scale) in enumerate(panels):
        axis = f"y{index + 1}".removesuffix("1")
        bottom = 1 - (index + 1) / len(panels)
        layout[f"yaxis{axis[1:]}"] = base_axis(
            title,
            domain=[bottom + 0.04, bottom + 1 / len(panels)],
            nticks=5,
            rangemode="normal" if index == 0 else "tozero",
        )
        traces += [_curve(epochs, *curve, scale, axis, index) for curve in curves]
    layout["xaxis"]["anchor"] = axis  # the epochs stand under the lowest panel
    if stage.get("best_epoch") is not None:
        layout["shapes"] = [_best_epoch(stage["best_epoch"])]
    return {"data": traces, "layout": layout}


def _curve(
    epochs: Sequence[Mapping[str, Any]], key: str, name: str, dash: str, scale: int, axis: str, panel: int
) -> Figure:
    points = [
        (epoch["epoch"], scale * epoch[key]) for epoch in epochs if None not in (epoch.get("epoch"), epoch.get(key))
    ]
    colour = ("var(--int8)", "var(--half)", "var(--fp32)")[panel % 3]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "yaxis": axis,
        "line": {"width": 2, "dash": dash, "color": colour},
        "marker": {"size": 5},
        "hovertemplate": "epoch %{x}: %{y:.4g}",
    }


def _best_epoch(epoch: int) -> Figure:
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": epoch,
        "x1": epoch,
        "y0": 0,
        "y1": 1,
        "line": {"width": 1, "dash": "dot", "color": "var(--muted)"},
    }


def base_axis(title: str, **more: Any) -> Figure:
    """What every axis of ours looks like."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,  # a finger that scrolls the page must not zoom
        **more,
    }


def _log_axis(title: str, values: Sequence[float], margin: float) -> Figure:
    """Ticks in plain figures; `margin` is left free on either side, as a share of the span, for labels."""
    low, high = log10(min(values)), log10(max(values))
    free = margin * max(high - low, 0.3)
    decades = range(floor(low - free), ceil(high + free) + 1)
    ticks = [
        digit * 10.0**decade for decade in decades for digit in ((1, 1.5, 2, 3, 5, 7) if high - low < 1.5 else (1, 3))
    ]
    return base_axis(
        title, type="log", range=[low - free, high + free], tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]
    )


def base_layout(**more: Any) -> Figure:
    """What every figure of ours looks like, in names of the page's colours."""
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--text)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 48, "r": 16, "t": 24, "b": 40},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        **more,
    }
