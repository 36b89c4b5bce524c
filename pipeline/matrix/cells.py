"""The cells of one model on one runtime: quantized once, compiled in each precision for each number of threads.

Reads a float graph and its samples, or the graphs of a run's student. Writes graph/ (INT8), one directory a compiled cell, and
cells.json. A cell that cannot be is a value with its reason. What misses a gate is measured all the same, and says so: the
matrix tells how fast a runtime is, `edgestill quantize` decides what ships.
"""

# Shapes: N samples, K classes.

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.statistics import wilson_interval
from pipeline.artifacts import Artifact
from pipeline.calibration import Calibration, Sample
from pipeline.differences import Answers, differences
from pipeline.gates import first_failure, why_not
from pipeline.graphs.proof import node_by_node
from pipeline.matrix.recipe import MatrixTarget
from pipeline.onnx_ladder import Climb, Demands, Rung, climb
from pipeline.progress import Progress
from pipeline.schemes import dialect_of, scheme_of
from pipeline.workbench import Workbench
from targets import make_target
from targets.base import Exported, Placement, read_json, write_json
from targets.errors import DeviceError, EdgestillError, TargetError

INT8 = "int8"
CELLS_FILE = "cells.json"
GRAPH_DIR = "graph"  # what the INT8 cells are compiled from, and a student's float cells from graph-float
Accuracy = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One compiled model; `error` says why there is none. `flags` are for its record: why accuracy is null, a missed gate."""

    target: str
    precision: str
    num_threads: int | None  # None: the target has no such option
    error: str | None = None
    placement: Placement | None = None
    accuracy: Accuracy | None = None
    flags: tuple[str, ...] = ()

    @property
    def arm(self) -> str:
        threads = "" if self.num_threads is None else f" {self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.target} {self.precision}{threads}"

    @property
    def folder(self) -> str:
        return self.precision if self.num_threads is None else f"{self.precision}-{self.num_threads}t"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "placement": self.placement.to_json() if self.placement else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        placement = values["placement"]
        typed = {**values, "flags": tuple(values["flags"])}
        return cls(**{**typed, "placement": Placement.from_json(placement) if placement else None})


@dataclass(frozen=True)
class BuiltCells(Artifact):
    """Every cell of one model on one runtime; cell `c` is compiled in dir/c.folder."""

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(Cell.from_json(values) for values in read_json(self.dir / CELLS_FILE))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The cells of one runtime, before they are built."""

    target: MatrixTarget
    precisions: tuple[str, ...]
    threads: tuple[int | None, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What of it decides the cells, as plain JSON."""
        target = self.target.model_dump(mode="json")
        return {"target": target, "precisions": list(self.precisions), "threads": list(self.threads)}

    def options(self, num_threads: int | None) -> dict[str, Any]:
        return {**self.target.options, **({} if num_threads is None else {"num_threads": num_threads})}

    def cells(self) -> Iterator[Cell]:
        for precision in self.precisions:
            for num_threads in self.threads:
                yield Cell(target=self.target.name, precision=precision, num_threads=num_threads)

    def refused(self, error: str) -> list[Cell]:
        return [replace(cell, error=error) for cell in self.cells()]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """`asked_of` names the held-out samples that agreement with float is told for; None, where it means nothing: `unasked`."""

    asked_of: str | None
    unasked: str = ""


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """What is compiled: `int8` is a graph, or why there is none. `flags` go to the INT8 cells."""

    floats: Exported
    int8: Exported | str
    flags: tuple[str, ...] = ()


def build_net(
    wanted: Wanted,
    floats: Exported,
    calibration: Calibration,
    demands: Demands,
    claims: Claims,
    out_dir: Path,
    progress: Progress,
) -> None:
    """Quantize and compile a float graph. Raises TargetError where the runtime is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench.open(wanted.target.name, wanted.options(wanted.threads[0]), Path(folder))
        graphs = Graphs(floats=floats, int8="int8 was not asked for")
        if INT8 in wanted.precisions:
            graphs = _quantized(
                bench, floats, calibration, demands, out_dir / GRAPH_DIR, Path(folder) / "rungs", progress
            )
        cells = _compile_all(bench, wanted, graphs, out_dir, progress)
        if claims.asked_of is None or not calibration.held_out:
            why = claims.unasked or "no sample was left over to be held out"
            cells = [replace(cell, flags=(*cell.flags, f"accuracy: {why}")) for cell in cells]
        else:
            cells = _ask_all(bench, cells, floats, calibration.held_out, claims.asked_of, out_dir, progress)
    write_json(out_dir / CELLS_FILE, [cell.to_json() for cell in cells])


def build_student(
    wanted: Wanted,
    graphs: Graphs,
    accuracies: Mapping[str, Accuracy],
    name: str,
    out_dir: Path,
    progress: Progress,
) -> None:
    """Compile a run's student under the name that it has in the matrix; `accuracies` is by precision."""
    int8 = graphs.int8 if isinstance(graphs.int8, str) else _renamed(graphs.int8, name, out_dir / GRAPH_DIR)
    graphs = replace(graphs, floats=_renamed(graphs.floats, name, out_dir / f"{GRAPH_DIR}-float"), int8=int8)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench.open(wanted.target.name, wanted.options(wanted.threads[0]), Path(folder))
        cells = _compile_all(bench, wanted, graphs, out_dir, progress)
    unknown = f"accuracy: the run did not ask it on {wanted.target.name}"
    told = [
        replace(cell, accuracy=accuracies[cell.precision])
        if cell.precision in accuracies
        else replace(cell, flags=(*cell.flags, unknown))
        for cell in cells
    ]
    write_json(out_dir / CELLS_FILE, [cell.to_json() for cell in told])


def _renamed(exported: Exported, name: str, out_dir: Path) -> Exported:
    """A copy whose records bear one name for float and INT8: a run's exports have two."""
    shutil.copytree(exported.directory, out_dir, ignore=shutil.ignore_patterns("stage.json"))
    renamed = replace(exported, name=name, directory=out_dir)
    renamed.save()
    return renamed


def _quantized(
    bench: Workbench,
    floats: Exported,
    calibration: Calibration,
    demands: Demands,
    out_dir: Path,
    scratch: Path,
    progress: Progress,
) -> Graphs:
    """The last rung that `edgestill quantize` would try; a missed gate is a flag, a refusal the reason."""
    target = make_target(bench.target, bench.options)
    scheme = scheme_of(target.scheme).name
    job = Climb(
        floats=floats,
        calibration=calibration,
        demands=demands,
        scheme=scheme,
        dialect=dialect_of(scheme, target.dialect),
        runtime=target.dialect,
        bench=bench,
        progress=progress,
    )
    try:
        rungs, rung_dir = climb(job, scratch)
    except EdgestillError as error:
        return Graphs(floats=floats, int8=str(error))
    shutil.copytree(rung_dir, out_dir, ignore=shutil.ignore_patterns("compiled"))
    return Graphs(floats=floats, int8=Exported.load(out_dir), flags=_told(rungs[-1]))


def _told(rung: Rung) -> tuple[str, ...]:
    failed = first_failure(rung.gates)
    left = f"int8: {len(rung.left_in_float)} layers were left in float" if rung.left_in_float else None
    missed = f"int8: would not ship, {why_not(failed)}" if failed else None
    return tuple(flag for flag in (left, missed) if flag is not None)


def _compile_all(bench: Workbench, wanted: Wanted, graphs: Graphs, out_dir: Path, progress: Progress) -> list[Cell]:
    cells = list(wanted.cells())
    built = []
    with progress.task(f"compile for {bench.target}", total=len(cells)) as task:
        for cell in cells:
            there = replace(bench, options=wanted.options(cell.num_threads))
            built.append(_compiled(there, cell, graphs, out_dir))
            task.advance(detail=cell.arm)
    return built


def _compiled(bench: Workbench, cell: Cell, graphs: Graphs, out_dir: Path) -> Cell:
    in_int8 = cell.precision == INT8
    graph = graphs.int8 if in_int8 else graphs.floats
    num_cpus = len(os.sched_getaffinity(0))
    if cell.num_threads is not None and cell.num_threads > num_cpus:
        return replace(cell, error=f"{cell.num_threads} threads were asked for, this machine gives {num_cpus} CPU")
    if not in_int8 and cell.precision not in bench.float_precisions:
        offered = " and ".join(bench.float_precisions)
        return replace(cell, error=f"{bench.target} does not offer {cell.precision} here, but {offered}")
    if isinstance(graph, str):
        return replace(cell, error=graph)
    try:
        placement = bench.compile(graph, cell.precision, out_dir / cell.folder)
    except (TargetError, DeviceError) as error:  # refused, or not survived
        return replace(cell, error=str(error))
    return replace(cell, placement=placement, flags=graphs.flags if in_int8 else ())


def _ask_all(
    bench: Workbench,
    cells: Sequence[Cell],
    floats: Exported,
    held_out: Sequence[Sample],
    asked_of: str,
    out_dir: Path,
    progress: Progress,
) -> list[Cell]:
    """Agreement with the float graph, run node by node; threads change no answer worth telling, so one cell a precision."""
    with progress.task(f"ask {len(held_out)} held-out samples"):
        expected = node_by_node(floats.model_path, held_out)
        first = {cell.precision: cell for cell in reversed(cells) if cell.error is None}
        asked = {
            precision: _asked(bench, out_dir / cell.folder, held_out, expected, asked_of)
            for precision, cell in first.items()
        }
    told = []
    for cell in cells:
        accuracy, flags = asked.get(cell.precision, (None, ()))
        told.append(cell if cell.error is not None else replace(cell, accuracy=accuracy, flags=(*cell.flags, *flags)))
    return told


def _asked(
    bench: Workbench, compiled_dir: Path, held_out: Sequence[Sample], expected: Answers, asked_of: str
) -> tuple[Accuracy | None, tuple[str, ...]]:
    """(the record's accuracy, or the flags that say why there is none)."""
    try:
        rows = differences("compiled", "float graph", expected, bench.answers(compiled_dir, held_out))
    except EdgestillError as error:
        return None, (f"accuracy: {error}",)
    if len(rows) != 1 or rows[0].agreement is None:
        return None, (f"accuracy: agreement is for one output of classes, the model has {len(rows)} outputs",)
    share, n = rows[0].agreement, sum(len(answer_NK) for answer_NK in expected[rows[0].name])
    return {
        "dataset": asked_of,
        "n": n,
        "metric": "agreement",
        "value": share,
        "ci95": list(wilson_interval(round(share * n), n)),
    }, ()
