"""The measured directory of one model: all of its cells against each other, launch by launch; kept while nothing changed.

Writes OUT/models/NAME whole or not at all: records.json {arm: record}, placements.json, samples/ and measured.json, which holds
what the figures hang on: the compiled cells, how long is measured, the machine, the source of the harness. Killed in the middle,
a model is measured from its beginning: rows of one model are comparable because their launches lie close together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.environment import environment
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Record
from benchmarks.devices import Device
from benchmarks.pack import PROGRAM
from benchmarks.records import load_records, write_records
from pipeline.matrix.cells import Cell
from pipeline.matrix.recipe import MatrixBench
from pipeline.matrix.steps import Prepared
from pipeline.progress import Task
from pipeline.workspace import differences, key_parts
from targets.base import read_json, write_json
from targets.errors import EdgestillError

MEASURED_FILE = "measured.json"
START_S = 1.2  # what a process, its imports and its load take, about


def key_of(model: Prepared, bench: MatrixBench, seed: int) -> dict[str, Any]:
    """What the figures of a model hang on, as plain JSON."""
    config = {**bench.model_dump(mode="json"), "seed": seed, "machine": environment().hard}
    parts: dict[str, Any] = json.loads(json.dumps(key_parts(config, model.built, "benchmarks.bench")))
    return parts


def kept(directory: Path, key: Mapping[str, Any]) -> dict[str, Record] | str:
    """The records that were measured under this key, else in a line why there are none."""
    if not (directory / MEASURED_FILE).is_file():
        return "not measured yet"
    try:
        before = read_json(directory / MEASURED_FILE)
        changes = differences(before, key)
        records = {stored.arm: stored.record for stored in load_records(directory)}
    except (EdgestillError, AttributeError) as error:
        return f"cannot be read, so measured again: {error}"
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return f"measured again, changed: {'; '.join(changes[:3])}{more}"
    return records


def measure(
    model: Prepared,
    bench: MatrixBench,
    key: Mapping[str, Any],
    directory: Path,
    *,
    device: Device,
    seed: int,
    task: Task,
) -> dict[str, Record]:
    """Measure every cell of a model in rounds of an order of their own; a record an arm. `task` counts launches.

    Records of the same key that are there already stay, unless more of them were disturbed: never for their speed.
    """
    # The workspace is locked: what lies there was left by a run that was killed.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arms = [Arm(cell.arm, path, placement=cell.placement) for cell, path in model.compiled]
    try:
        measured = measure_arms(
            device,
            arms,
            preset=bench.preset,
            launches=bench.launches,
            seed=seed,
            out_dir=partial,
            throughput=bench.throughput,
            on_progress=lambda done, _, detail: task.advance(1 if done else 0, f"{model.name}, {detail}"),
        )
        records = {cell.arm: _told(record, cell) for (cell, _), record in zip(model.compiled, measured, strict=True)}
        (partial / PROGRAM).unlink(missing_ok=True)
        write_json(partial / MEASURED_FILE, key)
        write_records(partial, records, {arm.name: arm.placement for arm in arms})
        before = kept(directory, key)
        if not isinstance(before, str) and num_disturbed(before) <= num_disturbed(records):
            return before
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return records


def num_disturbed(records: Mapping[str, Record]) -> int:
    """How many cells cannot be trusted."""
    return sum(not record.validity.ok for record in records.values())


def num_launches(model: Prepared, bench: MatrixBench) -> int:
    """How many processes measure it."""
    return len(model.compiled) * (bench.launches or PRESETS[bench.preset].launches) * (2 if bench.throughput else 1)


def estimate_s(models: Sequence[Prepared], bench: MatrixBench) -> float:
    """Seconds that measuring takes on a quiet machine, for nets that answer within a few milliseconds. A slow net takes longer:
    its queries of the least number may fill more than the window."""
    config = PRESETS[bench.preset]
    window_s = config.warmup_s + config.min_s
    a_launch_s = window_s * (1.25 if bench.throughput else 1.0) + START_S * (2 if bench.throughput else 1)
    return sum(len(model.compiled) for model in models) * (bench.launches or config.launches) * a_launch_s


def _told(record: Record, cell: Cell) -> Record:
    """With the accuracy that the cell is known to have, or the reason why there is none."""
    flags = (*record.validity.flags, *cell.flags)
    accuracy = None if cell.accuracy is None else dict(cell.accuracy)
    return replace(record, accuracy=accuracy, validity=replace(record.validity, flags=flags))
