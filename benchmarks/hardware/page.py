"""The hardware comparison: one offline page, the same tables in Markdown, every value in CSV and JSON.

Reads stored records. Writes index.html, report.md, report.csv and report.json. The page sorts, filters and draws by itself;
its tables stand in it as they are, so that it prints and reads without a script as well. Names are not trusted: see
`benchmarks/report_page.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.hardware.export import csv_of, document_of
from benchmarks.hardware.figures import curve_of, history_of, layers_of
from benchmarks.hardware.findings import Findings, findings_of
from benchmarks.hardware.headline import alerts_of, facts_of, lead_of
from benchmarks.hardware.identity import counted
from benchmarks.hardware.rows import HardwareRow
from benchmarks.hardware.tables import (
    IDENTITY,
    MORE_IS_BETTER,
    absences,
    accuracy_names,
    columns_of,
    is_fraction,
    results_table,
    scores_table,
    sort_keys,
)
from benchmarks.records import Stored
from benchmarks.report_figures import base_axis, base_layout
from benchmarks.report_page import environment, escape_markdown, page_scripts, write_text
from benchmarks.report_tables import Column, name_of, percent
from targets.base import write_json

FACETS = (
    "model",
    "shape",
    "precision",
    "runtime",
    "version",
    "options",
    "threads",
    "device",
    "num_cpus",
    "power_mode",
    "batch",
    "taken",
)
NUM_OPS, NUM_MISSING = 40, 5

History = Mapping[str, Sequence[Mapping[str, Any]]]


def render_hardware_report(
    stored: Sequence[Stored],
    out_dir: Path,
    *,
    baseline: str | None = None,
    history: History | None = None,
    title: str | None = None,
) -> Path:
    """Write index.html, report.md, report.csv and report.json into `out_dir`; returns the path of the page.

    `baseline` names a configuration, whole or by words that fit one only; `history` holds points {utc, p50_ms, mark} by the
    name of their series, `mark` a text or None. Raises DataError without a record, RecipeError for an unknown baseline.
    """
    return write_report(findings_of(stored, baseline=baseline, title=title), out_dir, history)


def write_report(findings: Findings, out_dir: Path, history: History | None = None) -> Path:
    out_dir.mkdir(parents=True, exist_ok=True)
    page = _page(findings, history)
    markdown = environment(escape_markdown).get_template("hardware.md.j2")
    write_text(out_dir / "report.md", markdown.render(page))
    with (out_dir / "report.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(csv_of(findings))
    write_json(out_dir / "report.json", document_of(findings))
    page_path = out_dir / "index.html"
    scripts = page_scripts("hardware_figures.js", "hardware.js")
    write_text(page_path, environment().get_template("hardware.html.j2").render(page | scripts))
    return page_path


def _page(findings: Findings, history: History | None) -> dict[str, Any]:
    """Everything that both templates show."""
    rows, names = findings.rows, findings.varying
    columns = columns_of(rows, names)
    curves = {row.key: curve_of(row, len(rows)) for row in rows}
    baseline = findings.baseline.label(names)
    lines = history_of(history)
    return {
        "title": findings.title,
        "headline": findings.headline,
        "lead": lead_of(rows, findings.scores, findings.baseline, names),
        "alerts": alerts_of(rows),
        "num_invalid": findings.num_invalid,
        "facts": facts_of(rows, findings.baseline, names, len(findings.older)),
        "facets": _facets(rows, names),
        "wide": [column.key for column in columns[1:] if column in IDENTITY],  # on a phone they stand under the model
        "results": results_table(counted(len(rows), "row"), rows, columns),
        "rows": [_shown(row, names, curves[row.key]) for row in rows],
        "scores": scores_table(f"Times as fast as {baseline}", findings.scores, findings.baseline, names),
        "baseline": baseline,
        "missing_models": _missing_models(findings),
        "metrics": accuracy_names(rows),
        "colours": _colours(rows),
        "has_energy": any(row.accuracy and row.gross_mj for row in rows),
        "has_curves": any(quantiles for quantiles, _ in curves.values()),
        "missing_samples": _missing_samples(curves),
        "has_layers": any(row.stored.profile for row in rows),
        "history": [line["name"] for line in lines],
        "absences": absences(rows),
        "data": _data(findings, columns, curves, lines),
    }


def _facets(rows: Sequence[HardwareRow], varying: frozenset[str]) -> list[dict[str, Any]]:
    """What rows can be filtered by: every field that differs, and validity where it does."""
    labels = {column.key: column.name for column in IDENTITY}
    values = [_facets_of(row, varying) for row in rows]
    found = []
    for name in (*FACETS, "validity"):
        counts = Counter(value[name] for value in values)
        if len(counts) > 1 and (name in varying or name == "validity"):
            options = sorted(counts.items(), key=lambda item: _natural(item[0]))
            found.append({"name": name, "label": labels.get(name, "Validity"), "options": options})
    return found


def _natural(text: str) -> tuple[float, str]:
    return (float(text), "") if text.isdecimal() else (float("inf"), text.casefold())


def _facets_of(row: HardwareRow, varying: frozenset[str]) -> dict[str, str]:
    values = row.identity.fields()
    return {
        **{name: name_of(values[name]) for name in FACETS},
        "model": row.identity.model_label(varying),
        "validity": "valid" if row.valid else "not valid",
    }


def _shown(row: HardwareRow, varying: frozenset[str], curve: tuple[list[float], list[str]]) -> dict[str, Any]:
    """What a row's line, and its place under Placement, hold beside its cells."""
    ops = list(row.fallback_ops or ())
    return {
        "key": row.key,
        "label": row.identity.label(varying),
        "configuration": row.identity.configuration.label(varying),
        "valid": row.valid,
        "reasons": row.reasons,
        "notes": row.notes,
        "has_curve": bool(curve[0]),
        "shares": [(precision, percent(share)) for precision, share in row.shares.items()],
        "ops": ops[:NUM_OPS],
        "num_ops": len(ops),
    }


def _colours(rows: Sequence[HardwareRow]) -> list[tuple[str, str]]:
    """(class, name) of the precisions that occur, for the keys of the figures."""
    found = {one for row in rows for one in (row.precision, *row.shares)}
    names = [
        (name, words)
        for name, words, precisions in (
            ("int8", "INT8", {"int8"}),
            ("bf16", "BF16 or FP16", {"bf16", "fp16"}),
            ("fp32", "FP32", {"fp32"}),
        )
        if precisions & found
    ]
    return [*names, *([("other", "other")] if found - {"int8", "bf16", "fp16", "fp32"} else [])]


def _missing_models(findings: Findings) -> list[tuple[str, str]]:
    """Which of the baseline's models a configuration lacks."""
    return [
        (score.configuration.label(findings.varying), ", ".join(score.missing))
        for score in findings.scores
        if score.missing
    ]


def _missing_samples(curves: Mapping[str, tuple[list[float], list[str]]]) -> list[str]:
    missing = [file for _, files in curves.values() for file in files]
    more = len(missing) - NUM_MISSING
    return missing if more <= 0 else [*missing[:NUM_MISSING], f"and {more:,} more files"]


def _data(
    findings: Findings, columns: Sequence[Column], curves: Mapping[str, tuple[list[float], list[str]]], history: Any
) -> dict[str, Any]:
    """What the page's own script reads: by what it sorts, filters and draws."""
    rows = findings.rows
    return {
        "columns": [
            {"key": one.key, "label": one.label, "falls": one.key.partition(" ")[0] in MORE_IS_BETTER}
            for one in columns
        ],
        "rows": [_drawn(row, findings, columns, curves[row.key][0]) for row in rows],
        "metrics": [{"name": name, "is_fraction": is_fraction(rows, name)} for name in accuracy_names(rows)],
        "history": history,
        "layout": base_layout(),
        "axis": base_axis(""),
    }


def _drawn(row: HardwareRow, findings: Findings, columns: Sequence[Column], curve: list[float]) -> dict[str, Any]:
    names, accuracy = findings.varying, row.accuracy
    facets = _facets_of(row, names)
    configuration = row.identity.configuration
    return {
        "key": row.key,
        "label": row.identity.label(names),
        "model": facets["model"],
        "precision": row.precision,
        "group": configuration.label(names).replace(f" {configuration.precision}", "", 1),
        "facets": facets,
        "valid": row.valid,
        "sort": sort_keys(row, columns),
        "p50": row.p50_ms,
        "ci": row.p50_ci95_ms,
        "size": row.size_mib,
        "mj": row.gross_mj,
        "accuracy": {"name": accuracy.name, "value": accuracy.value, "ci": accuracy.ci95} if accuracy else None,
        "curve": curve,
        "layers": layers_of(row.stored.profile, len(findings.rows)),
    }
