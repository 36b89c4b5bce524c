"""`edgestill report` over records: several measured directories side by side, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardware.findings import findings_of
from benchmarks.hardware.page import History, write_report
from benchmarks.records import load_all
from targets.errors import EdgestillError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HardwareReport:
    """Where the page is and what it says in a sentence."""

    page: Path
    headline: str
    baseline: str
    num_rows: int
    num_invalid: int
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "verb": "report",
            "page": str(self.page),
            "headline": self.headline,
            "baseline": self.baseline,
            "num_rows": self.num_rows,
            "num_invalid": self.num_invalid,
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        invalid = f", {self.num_invalid:,} of them not valid" if self.num_invalid else ""
        lines = [
            self.headline,
            f"rows         {self.num_rows:,}{invalid}",
            f"baseline     {self.baseline}",
            f"written to   {self.page} (report.md, report.csv and report.json beside it)",
        ]
        return "\n".join(lines)


def hardware_report(
    paths: Sequence[Path],
    out_dir: Path,
    *,
    baseline: str | None = None,
    title: str | None = None,
    history: History | None = None,
) -> HardwareReport:
    """Compare all records under `paths` and write the page into `out_dir`.

    Raises DataError where there is none, MeasurementError for one of another schema, RecipeError for an unknown baseline.
    """
    findings = findings_of(load_all(paths), baseline=baseline, title=title)
    return HardwareReport(
        page=write_report(findings, out_dir, history),
        headline=findings.headline,
        baseline=findings.baseline.label(findings.varying),
        num_rows=len(findings.rows),
        num_invalid=findings.num_invalid,
    )
