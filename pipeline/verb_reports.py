"""What the verbs on a person's own model answer: `to_json()` for machines, `text()` for people, `failure` for the exit code.

Values only: nothing here runs, reads or writes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.device.record import Record
from pipeline.differences import OutputDifference
from targets.base import Placement
from targets.errors import EdgestillError
from targets.lint import Finding

MIB = 2**20
SCHEMA_VERSION = 1
SMOKE = "smoke: a short look that shows that it runs. Quote figures of --preset ci or release."
NUM_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured model; None where a value could not be read or has too few queries behind it."""

    arm: str
    precision: str
    int8_share: float
    p50_ms: float
    p50_ci95_ms: tuple[float, float] | None
    p90_ms: float | None
    p99_ms: float | None
    num_queries: int
    num_launches: int
    throughput_fps: float | None
    load_ms: float | None
    first_ms: float | None
    peak_rss_mib: float | None
    size_mib: float
    valid: bool
    flags: tuple[str, ...]


def row_of(arm: str, record: Record) -> Row:
    """The line of a table that a record amounts to."""
    summary, macs = record.summary, record.runtime.ops_per_unit or {}
    return Row(
        arm=arm,
        precision=record.model.precision,
        int8_share=macs.get("int8", 0) / total if (total := sum(macs.values())) else 0.0,
        p50_ms=summary.p50_us / 1e3,
        p50_ci95_ms=(summary.ci95[0] / 1e3, summary.ci95[1] / 1e3) if summary.ci95 else None,
        p90_ms=_ms(summary.es_p90_us),
        p99_ms=_ms(summary.es_p99_us),
        num_queries=sum(launch.n for launch in record.launches),
        num_launches=len(record.launches),
        throughput_fps=record.throughput.fps if record.throughput else None,
        load_ms=summary.load_ms,
        first_ms=summary.first_ms,
        peak_rss_mib=record.memory.vmhwm_mib,
        size_mib=record.model.bytes / MIB,
        valid=record.validity.ok,
        flags=record.validity.flags,
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What became of a float graph: `ships` is int8 or the fastest float precision; None where nothing was measured."""

    out_dir: Path
    model: str
    target: str
    scheme: str
    dialect: str
    preset: str
    num_calibration: int
    num_held_out: int
    calibration: str
    notes: tuple[str, ...]
    rungs: tuple[Mapping[str, Any], ...]
    findings: tuple[Finding, ...]
    differences: tuple[OutputDifference, ...]
    rewrites: tuple[Mapping[str, Any], ...]
    placement: Placement | None
    rows: tuple[Row, ...]
    ships: str | None
    why: str
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return _document("quantize", self)

    def text(self) -> str:
        compared = "held-out samples" if self.num_held_out else "the calibration samples themselves: none was left over"
        head = f"{self.model} for {self.target}, scheme {self.scheme}, dialect {self.dialect}"
        lines = [head, f"calibration  {self.num_calibration} samples; {self.calibration}"]
        lines += [f"note         {note}" for note in self.notes]
        lines += [_rung_line(rung) for rung in self.rungs]
        lines += [*map(_rewrite_line, self.rewrites), *_finding_lines(self.findings)]
        lines += [
            *_placement_lines(self.placement),
            "",
            f"what moved, hop by hop, on {compared}",
            *table([_difference_cells(one) for one in self.differences]),
        ]
        lines += ["", *_measured_lines(self.rows, self.preset)] if self.rows else []
        return "\n".join([*lines, "", self.why, f"written to {self.out_dir}"])


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """Where each layer of a compiled model runs."""

    out_dir: Path
    model: str
    target: str
    precision: str
    toolchain: str
    size_mib: float
    findings: tuple[Finding, ...]
    placement: Placement
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return _document("compile", self)

    def text(self) -> str:
        head = f"{self.model} for {self.target}: {self.precision}, {self.toolchain}, {self.size_mib:.2f} MiB"
        layers = [
            {"layer": layer.name, "op": layer.op, "runs in": layer.precision, "MACs": f"{layer.macs:,}"}
            for layer in self.placement.layers
        ]
        linted = _finding_lines(self.findings) if self.precision == "int8" else []
        lines = [head, *linted, *_placement_lines(self.placement), *table(layers), f"written to {self.out_dir}"]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Latency, throughput, load and memory of one model in each precision that was compiled."""

    out_dir: Path
    model: str
    target: str
    preset: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return _document("bench", self)

    def text(self) -> str:
        lines = [f"{self.model} on {self.target}", *(f"note  {one}" for one in self.notes)]
        lines += _measured_lines(self.rows, self.preset)
        return "\n".join([*lines, f"written to {self.out_dir}"])


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """What is known to keep a target from running a graph in INT8."""

    model: str
    target: str
    findings: tuple[Finding, ...]
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return _document("lint", self)

    def text(self) -> str:
        return "\n".join([f"{self.model} for {self.target}", *_finding_lines(self.findings, limit=None)])


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows of one set of columns as aligned lines, the column names first; nothing for no rows."""
    if not rows:
        return []
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _document(verb: str, report: Any) -> dict[str, Any]:
    values = {name: getattr(report, name) for name in report.__dataclass_fields__}
    failure = values.pop("failure")
    placement = values.get("placement")
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        **{key: [asdict(one) for one in value] if _is_records(value) else value for key, value in values.items()},
        **({"placement": placement.to_json()} if placement is not None else {}),
        **({"out_dir": str(values["out_dir"])} if "out_dir" in values else {}),
        "error": str(failure) if failure else None,
        "exit_code": failure.exit_code if failure else 0,
    }


def _is_records(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and hasattr(value[0], "__dataclass_fields__")


def _ms(value_us: float | None) -> float | None:
    return None if value_us is None else value_us / 1e3


def _finding_lines(findings: Sequence[Finding], limit: int | None = NUM_NAMED) -> list[str]:
    if not findings:
        return ["lint         nothing found"]
    named = findings[:limit]
    shown = []
    for advice, same in groupby(named, key=lambda one: one.advice):
        shown += [f"lint         {one.severity} {one.code} {one.node}: {one.message}" for one in same]
        shown.append(f"             {advice}")
    more = len(findings) - len(named)
    return [*shown, *([f"lint         and {more} more findings"] if more else [])]


def _rung_line(rung: Mapping[str, Any]) -> str:
    gates = "; ".join(f"{gate['name']} {'passed' if gate['passed'] else 'missed'}" for gate in rung["gates"])
    left = f"; left in float: {', '.join(rung['left_in_float'])}" if rung["left_in_float"] else ""
    return f"rung         {rung['rung']}: {gates}{left}"


def _rewrite_line(proof: Mapping[str, Any]) -> str:
    claim = "exact" if proof["exact"] else "rounds"
    moved = f"max |delta| {proof['max_abs_delta']:.3g} ({proof['share_of_range']:.2%} of the range)"
    return f"rewrite      {proof['rewrite']}: {proof['num_changes']} places, {claim}, {moved}"


def _placement_lines(placement: Placement | None) -> list[str]:
    if placement is None:
        return []
    total = sum(layer.macs for layer in placement.layers)
    macs: dict[str, int] = {}
    for layer in placement.layers:
        macs[layer.precision] = macs.get(layer.precision, 0) + layer.macs
    shares = (
        ", ".join(f"{precision} {part / total:.1%}" for precision, part in macs.items()) if total else "none to count"
    )
    return [f"placement    {shares} of {total / 1e6:.2f} M MACs ({placement.source})"]


def _difference_cells(difference: OutputDifference) -> dict[str, str]:
    return {
        "hop": difference.hop,
        "against": difference.against,
        "output": difference.name,
        "n": str(difference.num_samples),
        "cosine mean": f"{difference.cosine_mean:.5f}",
        "cosine min": f"{difference.cosine_min:.5f}",
        "max |delta|": f"{difference.max_abs_delta:.4g}",
        "same class": _cell(difference.agreement, ".1%"),
    }


def _measured_lines(rows: Sequence[Row], preset: str) -> list[str]:
    """The table, whether it can be trusted, and what could not be read."""
    lines = table([_row_cells(row) for row in rows])
    lines.append(f"{rows[0].num_launches} launches each, interleaved, one sample at a time, seeded synthetic input")
    if preset == "smoke":
        lines.append(SMOKE)
    for row in rows:
        disturbed = [flag for flag in row.flags if flag.startswith("launch ")]
        if not row.valid:
            lines.append(f"not trustworthy: {row.arm}: {'; '.join(disturbed[:2])}")
    return lines


def _row_cells(row: Row) -> dict[str, str]:
    interval = f" [{row.p50_ci95_ms[0]:.3f}, {row.p50_ci95_ms[1]:.3f}]" if row.p50_ci95_ms else ""
    return {
        "model": row.arm,
        "p50 ms": f"{row.p50_ms:.3f}{interval}",
        "p90 ms": _cell(row.p90_ms, ".3f"),
        "p99 ms": _cell(row.p99_ms, ".3f"),
        "n": str(row.num_queries),
        "samples/s": _cell(row.throughput_fps, ".0f"),
        "load ms": _cell(row.load_ms, ".0f"),
        "first ms": _cell(row.first_ms, ".2f"),
        "peak RSS MiB": _cell(row.peak_rss_mib, ".0f"),
        "size MiB": f"{row.size_mib:.2f}",
        "INT8 MACs": f"{row.int8_share:.1%}",
        "valid": "yes" if row.valid else "no",
    }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
