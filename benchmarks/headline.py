"""The table of a README, from a report's summary: `python -m benchmarks.headline docs/results/fashion_mnist.json`.

Reads summary.json (schema 1, as `edgestill run` writes it). Prints Markdown: each model on each target, the teacher first,
then who measured what where, so that no number stands in a document that a file of the repository does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.base import read_json

COLUMNS = (
    "target",
    "model",
    "precision",
    "top-1, % (95 % CI)",
    "p50, ms",
    "p99, ms",
    "size, KiB",
    "MACs in INT8",
    "ships",
)


def headline(summary: Mapping[str, Any]) -> str:
    """Markdown lines: a table of every arm of every target, and a line of provenance. What failed its checks is marked."""
    rows = [
        _cells(target, row, summary)
        for target in summary["targets"]
        for row in sorted(target["rows"], key=_teacher_first)
    ]
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows), "", _provenance(summary)]
    return "\n".join(lines)


def _teacher_first(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["role"] != "teacher", -row["p50_ms"]


def _cells(target: Mapping[str, Any], row: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    model = next(model for model in summary["models"] if model["role"] == row["role"])
    low, high = _interval(row, summary)
    return [
        target["target"],
        f"{row['role']} {model['name']}, {model['parameters'] / 1e3:,.0f} K",
        row["precision"],
        f"{row['top1']:.2%} ({low:.1%} to {high:.1%})".replace("%", ""),
        f"{row['p50_ms']:.3f}{' (not valid)' if row.get('valid') is False else ''}",
        f"{row['p99_ms']:.3f}" if row["p99_ms"] is not None else "n too small",
        f"{row['size_mib'] * 1024:,.0f}",
        f"{row['int8_share']:.0%}",
        "**yes**" if (row["role"], row["precision"]) == ("student", target["shipped"]) else "",
    ]


def _interval(row: Mapping[str, Any], summary: Mapping[str, Any]) -> tuple[float, float]:
    from benchmarks.statistics import wilson_interval

    n = summary["data"]["num_test"]
    return wilson_interval(round(row["top1"] * n), n)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(summary: Mapping[str, Any]) -> str:
    machine, versions = summary["machine"], summary["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "nncf", "openvino", "onnxruntime"))
    marked = f" Marked {summary['marked']}." if summary["marked"] else ""
    return (
        f"{summary['data']['source']}, n = {summary['data']['num_test']:,} test images, scored on the device; "
        f"{summary['utc'][:10]}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {names}; "
        f"one thread, batch 1, median of fresh processes; the run took {summary['seconds'] / 60:.0f} minutes.{marked}"
    )


if __name__ == "__main__":
    print(headline(read_json(Path(sys.argv[1]))))
