"""What `edgestill matrix` answers: a row a cell, and every cell that is no row with its reason. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.record import Record
from benchmarks.matrix_notes import missing_lines
from pipeline.matrix.cells import Cell
from pipeline.verb_reports import MIB, SCHEMA_VERSION, SMOKE, table
from targets.errors import EdgestillError

NUM_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One measured cell; None where a value could not be read or means nothing (`flags` say why)."""

    model: str
    target: str
    precision: str
    num_threads: int | None
    p50_ms: float
    p50_ci95_ms: tuple[float, float] | None
    int8_share: float
    peak_rss_mib: float | None
    size_mib: float
    accuracy: Mapping[str, Any] | None
    valid: bool
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A cell that was asked for and is not there."""

    model: str
    target: str
    precision: str
    num_threads: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelNote:
    """Where a model comes from, and what its weights are worth; `kept`: its records were there already."""

    name: str
    source: str
    weights: str
    image: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """Models x runtimes x precisions x threads, measured on one machine."""

    out_dir: Path
    name: str
    preset: str
    num_launches: int
    models: tuple[ModelNote, ...]
    rows: tuple[MatrixRow, ...]
    missing: tuple[Missing, ...]
    seconds: float
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "verb": "matrix",
            "out_dir": str(self.out_dir),
            "name": self.name,
            "preset": self.preset,
            "num_launches": self.num_launches,
            "models": [asdict(note) for note in self.models],
            "rows": [asdict(row) for row in self.rows],
            "missing": [asdict(one) for one in self.missing],
            "seconds": round(self.seconds, 1),
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        lines = [*table([_cells(row) for row in self.rows]), ""]
        lines += [f"{note.name}: {note.source}, {note.image}; {note.weights}" for note in self.models]
        lines += missing_lines([asdict(one) for one in self.missing])
        lines += _disturbed_lines(self.rows)
        launches = f"{self.num_launches} launch{'es' * (self.num_launches > 1)}"
        lines.append(f"{launches} a cell, interleaved within a model, one sample at a time")
        lines += [SMOKE] if self.preset == "smoke" else []
        num_kept = sum(note.kept for note in self.models)
        again = f"; {num_kept} of {len(self.models)} models were measured before" if num_kept else ""
        return "\n".join([*lines, f"written to {self.out_dir}, {self.seconds:.0f} s{again}"])


def matrix_row(model: str, cell: Cell, record: Record) -> MatrixRow:
    """The row that a record amounts to."""
    summary = record.summary
    return MatrixRow(
        model=model,
        target=cell.target,
        precision=cell.precision,
        num_threads=cell.num_threads,
        p50_ms=summary.p50_us / 1e3,
        p50_ci95_ms=None if summary.ci95 is None else (summary.ci95[0] / 1e3, summary.ci95[1] / 1e3),
        int8_share=cell.placement.int8_share if cell.placement else 0.0,
        peak_rss_mib=record.memory.vmhwm_mib,
        size_mib=record.model.bytes / MIB,
        accuracy=record.accuracy,
        valid=record.validity.ok,
        flags=record.validity.flags,
    )


def _disturbed_lines(rows: Sequence[MatrixRow]) -> list[str]:
    disturbed = [row for row in rows if not row.valid]
    lines = [
        f"not trustworthy: {row.model} {row.target} {row.precision}: "
        f"{next((flag for flag in row.flags if flag.startswith('launch ')), 'see its flags')}"
        for row in disturbed[:NUM_NAMED]
    ]
    more = f"and {len(disturbed) - NUM_NAMED} more; " if len(disturbed) > NUM_NAMED else ""
    return (
        [*lines, f"{more}{len(disturbed)} of {len(rows)} cells: measure these models again with --again"]
        if lines
        else []
    )


def _cells(row: MatrixRow) -> dict[str, str]:
    interval = f" [{row.p50_ci95_ms[0]:.3f}, {row.p50_ci95_ms[1]:.3f}]" if row.p50_ci95_ms else ""
    accuracy = row.accuracy
    return {
        "model": row.model,
        "runtime": row.target,
        "precision": row.precision,
        "threads": "-" if row.num_threads is None else str(row.num_threads),
        "p50 ms": f"{row.p50_ms:.3f}{interval}",
        "INT8 MACs": f"{row.int8_share:.1%}",
        "accuracy": "-" if accuracy is None else f"{accuracy['value']:.1%} {accuracy['metric']}, n {accuracy['n']}",
        "peak RSS MiB": "-" if row.peak_rss_mib is None else f"{row.peak_rss_mib:.0f}",
        "size MiB": f"{row.size_mib:.2f}",
        "valid": "yes" if row.valid else "no",
    }
