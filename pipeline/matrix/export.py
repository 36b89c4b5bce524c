"""The records of a matrix as files to commit: every record whole, without the raw samples that it names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import load_records
from pipeline.matrix.run import MODELS
from pipeline.workbench import REPORT_FILE
from targets.base import read_json, write_json
from targets.errors import DataError, IntegrityError

DIGITS = 6  # significant; launches differ in the third


def export_results(out_dir: Path, file: Path) -> Path:
    """Write `file`, {"model, arm": record} as `benchmarks.records.load_records` reads it, and FILE_models.json beside it.

    The second holds what no record says: where each model and its weights come from, and every cell that is missing, with its
    reason. Where a layer ran is in the records as MACs by precision. Times are rounded to six digits. Returns the second file.
    Raises DataError where `out_dir` holds no matrix that came to its end.
    """
    try:
        report = read_json(out_dir / REPORT_FILE)
        names = [note["name"] for note in report["models"]]
    except (IntegrityError, KeyError, TypeError):
        raise DataError(f"{out_dir}: no finished matrix is there. Measure first: edgestill matrix RECIPE.") from None
    measured = {row["model"] for row in report["rows"]}
    records = {
        f"{name}, {stored.arm}": {**_rounded(stored.record.to_json()), "env": stored.record.to_json()["env"]}
        for name in names
        if name in measured
        for stored in load_records(out_dir / MODELS / name)
    }
    _write_lines(file, records)
    told = file.with_name(f"{file.stem}_models.json")
    kept = ("schema_version", "name", "preset", "num_launches", "models", "missing")
    write_json(told, {key: report[key] for key in kept})
    return told


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _write_lines(file: Path, records: Mapping[str, Any]) -> None:
    """A record a line: half the size of an indented file, and a difference shows which records changed."""
    lines = [f"{json.dumps(name)}: {json.dumps(one, allow_nan=False)}" for name, one in records.items()]
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(file)
