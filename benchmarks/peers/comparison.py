"""Float, ours and the peers on their targets: tried, asked, measured in the same rounds; one row each.

A graph that a runtime refuses is a row with the runtime's words; the others are measured without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench import Arm
from benchmarks.device.record import Record
from benchmarks.peers.candidates import Candidate
from benchmarks.peers.images import Images
from benchmarks.peers.ratios import PairedRatio, paired_ratio
from benchmarks.peers.rounds import measure_rounds, p25s_us
from benchmarks.peers.trial import INT8, Bench, Trial, accuracy, agreement, cosines, try_graph
from targets.base import Preprocessing
from targets.errors import EdgestillError

FP32 = "fp32"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A graph on a target, before it is tried; `name` is fp32, bf16, or the candidate's."""

    target: str
    name: str
    precision: str
    model: Path | None
    error: str | None = None

    @property
    def arm(self) -> str:
        return f"{self.target} {self.name}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.arm.lower())


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of it. `faster_than_fp32` is FP32's latency over this one's on the same target; None without a graph."""

    target: str
    name: str
    precision: str
    error: str | None
    num_bytes: int | None = None
    int8_share: float | None = None
    num_convolutions: int | None = None
    num_int8_convolutions: int | None = None
    agreement: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None
    cosines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    p25_us: float | None = None
    p50_us: float | None = None
    p50_ci95_us: tuple[float, float] | None = None
    faster_than_fp32: PairedRatio | None = None
    valid: bool | None = None
    launches: tuple[Mapping[str, Any], ...] = ()

    @property
    def p25s_us(self) -> list[float]:
        return [launch["p25_us"] for launch in self.launches]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`machine` is the records' environment: hard keys, soft keys, and what could not be read."""

    rows: tuple[Row, ...]
    machine: Mapping[str, Any]

    def row(self, target: str, name: str) -> Row:
        return next(row for row in self.rows if (row.target, row.name) == (target, name))


def float_entries(target: str, precisions: Sequence[str], floats: Path) -> list[Entry]:
    return [Entry(target=target, name=name, precision=name, model=floats) for name in precisions]


def entry_of(candidate: Candidate, target: str) -> Entry:
    return Entry(target=target, name=candidate.name, precision=INT8, model=candidate.path, error=candidate.error)


def compare(
    bench: Bench,
    entries: Sequence[Entry],
    floats: Path,
    images: Images,
    preprocessing: Preprocessing,
    *,
    preset: str,
    rounds: int,
    work_dir: Path,
    sources: Mapping[str, Any],
    say: Say,
) -> Comparison:
    """One row an entry. Each target's FP32 must be among the entries: everything is told against it."""
    trials, errors = _trials(bench, entries, floats, images, preprocessing, work_dir, say)
    arms = [
        Arm(name, trial.compiled_dir, images.evaluation_dir, trial.placement, None) for name, trial in trials.items()
    ]
    records = measure_rounds(arms, preset=preset, rounds=rounds, out_dir=work_dir / "rounds", sources=sources, say=say)
    rows = tuple(_row(entry, errors.get(entry.arm), trials, records, images) for entry in entries)
    return Comparison(rows=rows, machine=asdict(next(iter(records.values())).env))


def _trials(
    bench: Bench,
    entries: Sequence[Entry],
    floats: Path,
    images: Images,
    preprocessing: Preprocessing,
    work_dir: Path,
    say: Say,
) -> tuple[dict[str, Trial], dict[str, str]]:
    """(what runs, why others do not), by arm. A float graph that does not run is no row: it is raised."""
    trials: dict[str, Trial] = {}
    errors = {entry.arm: entry.error for entry in entries if entry.error is not None}
    for entry in entries:
        if entry.model is None:
            continue
        say(f"compile and ask: {entry.arm}")
        try:
            trials[entry.arm] = try_graph(
                bench,
                entry.model,
                floats,
                target=entry.target,
                precision=entry.precision,
                preprocessing=preprocessing,
                images=images,
                out_dir=work_dir / entry.folder,
            )
        except EdgestillError as error:
            if entry.precision != INT8:
                raise
            errors[entry.arm] = str(error)
    return trials, errors


def _row(
    entry: Entry, error: str | None, trials: Mapping[str, Trial], records: Mapping[str, Record], images: Images
) -> Row:
    named: dict[str, Any] = {"target": entry.target, "name": entry.name, "precision": entry.precision}
    if error is not None:
        return Row(**named, error=error)
    trial, record = trials[entry.arm], records[entry.arm]
    floats, float_record = trials[f"{entry.target} {FP32}"], records[f"{entry.target} {FP32}"]
    in_int8, num_convolutions = trial.convolutions
    return Row(
        **named,
        error=None,
        num_bytes=trial.num_bytes,
        int8_share=trial.placement.int8_share,
        num_convolutions=num_convolutions,
        num_int8_convolutions=in_int8,
        **_answers(floats, trial, images),
        p25_us=record.summary.p25_us,
        p50_us=record.summary.p50_us,
        p50_ci95_us=record.summary.ci95,
        faster_than_fp32=paired_ratio(p25s_us(float_record), p25s_us(record)),
        valid=record.validity.ok,
        launches=tuple(
            {
                "p25_us": launch.lat_us.p25,
                "p50_us": launch.lat_us.p50,
                "n": launch.n,
                "disturbances": list(launch.disturbances),
            }
            for launch in record.launches
        ),
    )


def _answers(floats: Trial, trial: Trial, images: Images) -> dict[str, Any]:
    """Against FP32 on the same target. Top-1 is asked of a single output (N, K) only."""
    told: dict[str, Any] = {"cosines": cosines(floats.outputs, trial.outputs)}
    if len(floats.outputs) == 1 and next(iter(floats.outputs.values())).ndim == 2:
        ((name, floats_NK),) = floats.outputs.items()
        told["agreement"] = agreement(floats_NK, trial.outputs[name])
        if images.labels is not None:
            told["accuracy"] = accuracy(floats_NK, trial.outputs[name], images.labels)
    return told
