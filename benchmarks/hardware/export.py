"""The comparison for other programs: report.json and report.csv, every value of every row.

A value that could not be read is null, or empty, and its reason stands beside it; it is never 0. Text that a spreadsheet would
take for a formula gets an apostrophe before it in the CSV; in the JSON it stands as it is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from benchmarks.hardware.findings import Findings
from benchmarks.hardware.rows import HardwareRow
from benchmarks.hardware.scores import Score
from benchmarks.records import Stored

SCHEMA_VERSION = 1
FORMULA = ("=", "+", "-", "@", "\t", "\r")
INTERVALS = ("p50_ci95_ms", "accuracy_ci95", "delta_ci95")


def document_of(findings: Findings) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "title": findings.title,
        "headline": findings.headline,
        "baseline": findings.baseline.label(findings.varying),
        "rows": [row_document(row, findings.varying) for row in findings.rows],
        "scores": [_score_document(score, findings.varying) for score in findings.scores],
        "older": [_older_document(one) for one in findings.older],
    }


def row_document(row: HardwareRow, varying: frozenset[str]) -> dict[str, Any]:
    """One row, flat but for its shares, its reasons and why values are absent."""
    record = row.stored.record
    return {
        "name": row.identity.label(varying),
        **row.flat(),
        "shares": dict(row.shares),
        "fallback_ops": None if row.fallback_ops is None else list(row.fallback_ops),
        "disturbances": list(row.reasons),
        "notes": list(row.notes),
        "absent": dict(row.absent),
        "preset": record.scenario.preset,
        "num_queries": sum(launch.n for launch in record.launches),
        "utc": record.utc,
        "run_id": record.run_id,
        "sha256": record.model.sha256,
        "hard_sha256": record.env.hard_sha256,
        "flags": list(record.validity.flags),
    }


def csv_of(findings: Findings) -> str:
    """RFC 4180: a heading, a line a row; intervals are two columns, lists are joined by semicolons."""
    lines = [_csv_row(row_document(row, findings.varying)) for row in findings.rows]
    scores = {score.configuration: score for score in findings.scores}
    for row, line in zip(findings.rows, lines, strict=True):
        line["times_baseline"] = _ratio(row, scores[row.identity.configuration], findings.varying)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_row(document: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in document.items():
        if name in INTERVALS:
            cells[f"{name}_low"], cells[f"{name}_high"] = value if value is not None else ("", "")
        else:
            cells[name] = _cell(value)
    return cells


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return _text("; ".join(f"{key}: {item}" for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return _text("; ".join(str(item) for item in value))
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _ratio(row: HardwareRow, score: Score, varying: frozenset[str]) -> float | str:
    return score.ratios.get(row.identity.model_label(varying), "")


def _score_document(score: Score, varying: frozenset[str]) -> dict[str, Any]:
    return {
        "configuration": score.configuration.label(varying),
        "times_baseline": score.speed,
        "per_joule_times_baseline": score.per_joule,
        "num_models": len(score.ratios),
        "num_models_with_energy": score.num_energy,
        "ratios": dict(score.ratios),
        "missing_models": list(score.missing),
        "models_without_baseline": list(score.beyond),
        "not_valid_models": list(score.doubtful),
    }


def _older_document(stored: Stored) -> dict[str, Any]:
    record = stored.record
    return {
        "run_id": record.run_id,
        "utc": record.utc,
        "model": record.model.name,
        "precision": record.model.precision,
        "runtime": record.runtime.name,
        "p50_ms": record.summary.p50_us / 1e3,
        "valid": record.validity.ok,
    }
