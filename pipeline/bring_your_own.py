"""The front doors for a model of a person's own: quantize, compile, bench and lint any ONNX graph; no recipe, no labels.

Reads an ONNX file (or a compiled directory, or a bundle) and calibration samples. Each verb writes one directory, whole or
not at all, with report.json in it, and returns a report. What is compiled and measured runs in the device program, in fresh
processes. Imports no torch before something is to be quantized.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import Arm, compare_speed, measure_arms, untrustworthy
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Record
from benchmarks.device.verify import check_machine
from benchmarks.pack import FIRST_RUN
from benchmarks.recording import NEVER_VALID
from benchmarks.records import write_records
from pipeline.calibration import Calibration, read_calibration
from pipeline.gates import ERROR_OF_GATE, Gate, first_failure, lint_gate, placement_gate, why_not
from pipeline.graphs.files import HALF_DIALECTS, describe, read_graph
from pipeline.onnx_ladder import Climb, Demands, Rung, climb
from pipeline.own_graph import check_runs, float_graph, import_float
from pipeline.own_model import compiled_in
from pipeline.progress import Progress, Quiet
from pipeline.recipe import TargetConfig
from pipeline.scheme_choice import own_scheme
from pipeline.schemes import dialect_of, scheme_of
from pipeline.verb_reports import MIB, BenchReport, CompileReport, LintReport, QuantizeReport, Row, row_of
from pipeline.workbench import INT8, REPORT_FILE, Workbench, whole_directory
from targets import make_target
from targets.base import CompiledModel, Exported, Placement, write_json
from targets.errors import EdgestillError, MeasurementError, RecipeError
from targets.lint import Finding, lint

ADVICE = {
    "lint": "Mend what the findings name, or let `edgestill quantize` make the graph from the float model for this target.",
    "compile": "Export the model with other operators, take another target, or stay with float.",
    "likeness": "Give more and more typical calibration samples, leave the worst layers in float (--method mixed), or stay with "
    "float.",
    "placement": "See which layers run in float, ask for less (--min-int8-share), take another target, or stay with float.",
}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is wanted of a model: the target, the directory, the gate, how long is measured. Raises RecipeError."""

    target: str
    out_dir: Path
    options: Mapping[str, Any]
    preset: str
    launches: int | None
    progress: Progress
    keep: tuple[Path, ...]  # what is read, and so must not lie in out_dir
    kit: bool = False  # for a device that is not connected: nothing is compiled or measured here

    def __post_init__(self) -> None:
        make_target(self.target, self.options)
        if self.preset not in PRESETS:
            raise RecipeError(f"--preset {self.preset}: there is no such preset. Known: {', '.join(PRESETS)}.")


def quantize_model(
    model: Path,
    calibration: Path,
    *,
    target: str,
    options: Mapping[str, Any] | None = None,
    out_dir: Path,
    num_samples: int = 128,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | None = None,
    scheme: str | None = None,
    demands: Demands | None = None,
    kit: bool = False,
    preset: str = "smoke",
    launches: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Float ONNX + calibration (a folder of images, or an NPZ file) -> out_dir/model.onnx in INT8, proved on the target.

    mean and std are in pixel units, 0..255; resize is the shorter side in pixels; scheme None is the target's own. `kit`: the
    target is not on this machine; what its first run there needs is written to out_dir in place of a proof. Raises ModelError,
    DataError, RecipeError or TargetError for what cannot be begun. INT8 that does not pass the demands is in `failure`: what
    was made is written all the same, so that it can be looked at.
    """
    order = Order(
        target=target,
        out_dir=out_dir,
        options=options or {},
        preset=preset,
        launches=launches,
        progress=progress or Quiet(),
        keep=(model, calibration),
        kit=kit,
    )
    inputs = describe(float_graph(model), name=model.stem, out_dir=model.parent).inputs
    samples = read_calibration(
        calibration, inputs, num_samples=num_samples, mean=mean, std=std, resize=resize, progress=order.progress
    )
    return quantize_with(model, samples, order, scheme=scheme, demands=demands)


def quantize_with(
    model: Path,
    calibration: Calibration,
    order: Order,
    *,
    scheme: str | None = None,
    demands: Demands | None = None,
) -> QuantizeReport:
    """The same from samples that are there already."""
    target = make_target(order.target, order.options)
    wanted = scheme_of(scheme or own_scheme(target, here=not order.kit)).name
    with (
        whole_directory(order.out_dir, "quantize", keep=order.keep) as out_dir,
        tempfile.TemporaryDirectory() as scratch,
    ):
        floats = import_float(model, calibration, Path(scratch) / "float", half=target.dialect in HALF_DIALECTS)
        check_runs(floats, calibration.samples[0])
        job = Climb(
            floats=floats,
            calibration=calibration,
            demands=demands or Demands(),
            scheme=wanted,
            dialect=dialect_of(wanted, target.dialect),
            runtime=target.dialect,
            bench=None if order.kit else Workbench.open(order.target, order.options, Path(scratch)),
            progress=order.progress,
        )
        report = _quantize(job, order, out_dir, Path(scratch))
        write_json(out_dir / REPORT_FILE, report.to_json())
    return report


def compile_model(
    model: Path,
    *,
    target: str,
    options: Mapping[str, Any] | None = None,
    out_dir: Path,
    precision: str | None = None,
    min_int8_share: float = 0.95,
    progress: Progress | None = None,
) -> CompileReport:
    """Lint and compile an ONNX file, float or Q/DQ, in `precision` (None: int8 for Q/DQ, else fp32), with its placement.

    Raises ModelError or TargetError where it cannot be compiled; errors of the linter and too small a share of INT8 are in
    `failure`.
    """
    _check_share(min_int8_share)
    progress = progress or Quiet()
    with whole_directory(out_dir, "compile", keep=(model,)) as partial, tempfile.TemporaryDirectory() as scratch:
        bench = Workbench.open(target, options or {}, Path(scratch))
        with progress.task(f"compile for {target}"):
            exported, wanted, placement = bench.compile_given(model, precision, Path(scratch), partial)
            findings = _findings(exported, target) if wanted == INT8 else ()
        gates = _int8_gates(findings, placement, min_int8_share) if wanted == INT8 else []
        compiled = CompiledModel.load(partial)
        report = CompileReport(
            out_dir=out_dir,
            model=model.name,
            target=target,
            precision=wanted,
            toolchain=compiled.toolchain,
            size_mib=compiled.size_bytes / MIB,
            findings=findings,
            placement=placement,
            failure=_failure(gates, target),
        )
        write_json(partial / REPORT_FILE, report.to_json())
    return report


def bench_model(
    model: Path,
    *,
    target: str,
    options: Mapping[str, Any] | None = None,
    out_dir: Path,
    preset: str = "ci",
    launches: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure an ONNX file in each precision that the target offers for it, or a compiled directory, or a bundle, as it is.

    What is compiled already brings its own target and options; `target` and `options` are then not looked at. An
    untrustworthy measurement is written and marked; under `strict` it is in `failure` (exit 7) as well.
    """
    compiled_dir = compiled_in(model)
    if compiled_dir is not None:
        compiled = CompiledModel.load(compiled_dir)
        check_machine(compiled)
        target, options = compiled.target, compiled.options
    order = Order(
        target=target,
        out_dir=out_dir,
        options=options or {},
        preset=preset,
        launches=launches,
        progress=progress or Quiet(),
        keep=(model,),
    )
    with whole_directory(out_dir, "bench", keep=order.keep) as partial, tempfile.TemporaryDirectory() as scratch:
        bench = Workbench.open(target, order.options, Path(scratch))
        if compiled_dir is None:
            arms, notes = _compile_all(bench, bench.take_in(model, Path(scratch)), order, partial)
        else:
            arms, notes = [Arm(compiled.precision, compiled_dir, placement=bench.placement(compiled_dir))], ()
        records = _measure(bench, arms, order, partial)
        report = BenchReport(
            out_dir=out_dir,
            model=model.name,
            target=target,
            preset=preset,
            rows=_rows(arms, records),
            notes=notes,
            failure=_untrustworthy(records) if strict else None,
        )
        write_json(partial / REPORT_FILE, report.to_json())
    return report


def lint_model(model: Path, *, target: str) -> LintReport:
    """What is known to keep `target` from running a Q/DQ graph in INT8; an error among it is in `failure` (exit 5)."""
    dialect = make_target(target, {}).dialect
    read_graph(model)  # refuses what is no whole ONNX model
    findings = tuple(lint(model, dialect))
    gates = [lint_gate([asdict(finding) for finding in findings])]
    return LintReport(model=model.name, target=target, findings=findings, failure=_failure(gates, target))


def _findings(exported: Exported, target: str) -> tuple[Finding, ...]:
    return tuple(lint(exported.half_model_path or exported.model_path, make_target(target, {}).dialect))


def _int8_gates(findings: Sequence[Finding], placement: Placement, min_int8_share: float) -> list[Gate]:
    return [lint_gate([asdict(one) for one in findings]), placement_gate(placement.int8_share, min_int8_share)]


def _quantize(job: Climb, order: Order, out_dir: Path, scratch: Path) -> QuantizeReport:
    """Climb, then measure what passed: `out_dir` becomes the directory that is handed over."""
    rungs, rung_dir = climb(job, scratch / "rungs")
    shutil.copytree(rung_dir, out_dir, dirs_exist_ok=True)
    last = rungs[-1]
    proof = _write_kit(job, last, order, out_dir) if order.kit else _measured(job, last, order, out_dir)
    failed = first_failure(last.gates)
    return QuantizeReport(
        out_dir=order.out_dir,
        model=job.floats.name,
        target=order.target,
        scheme=job.scheme,
        dialect=job.dialect,
        preset=order.preset,
        num_calibration=len(job.calibration.samples),
        num_held_out=len(job.calibration.held_out),
        calibration=job.calibration.how,
        notes=(*job.calibration.notes, *proof.notes),
        rungs=tuple(rung.to_json() for rung in rungs),
        findings=last.findings,
        differences=last.differences,
        rewrites=last.rewrites,
        placement=last.placement,
        rows=proof.rows,
        ships=None if failed else proof.ships,
        why=f"INT8 does not ship: {why_not(failed)}" if failed else proof.why,
        failure=_failure(last.gates, order.target),
    )


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was measured. `ships` is a precision, None where nothing was measured."""

    rows: tuple[Row, ...] = ()
    ships: str | None = None
    why: str = ""
    notes: tuple[str, ...] = ()


def _measured(job: Climb, last: Rung, order: Order, out_dir: Path) -> Proof:
    """Compile float in every precision of the target and measure INT8 against it."""
    if last.placement is None or job.bench is None:
        return Proof()
    with order.progress.task(f"compile float for {order.target}"):
        floats, notes = job.bench.compile_floats(job.floats, out_dir / "compiled")
    arms = _arms({INT8: last.placement, **floats}, out_dir / "compiled")
    records = _measure(job.bench, arms, order, out_dir)
    ships, why = _faster(records)
    return Proof(rows=_rows(arms, records), ships=ships, why=why, notes=notes)


def _write_kit(job: Climb, last: Rung, order: Order, out_dir: Path) -> Proof:
    """The kit beside the graph, with what the graph itself answers as what the device has to reach."""
    from pipeline.stages.kit import kit_of_graph

    kit_of_graph(
        out_dir,
        target=TargetConfig(
            name=order.target, options=dict(order.options), min_int8_share=job.demands.min_int8_share, device="kit"
        ),
        floats=job.floats,
        samples=job.compared,
        preprocessing=job.calibration.preprocessing,
        agreement=last.differences[0].agreement if len(job.floats.outputs) == 1 else None,
    )
    return Proof(
        why=f"nothing was compiled or measured here; copy kit/ and the program to the device, then: {FIRST_RUN}"
    )


def _compile_all(
    bench: Workbench, exported: Exported, order: Order, out_dir: Path
) -> tuple[list[Arm], tuple[str, ...]]:
    """A Q/DQ graph as INT8, a float graph in each float precision of the target; and which of them cannot be built."""
    compiled_dir = out_dir / "compiled"
    with order.progress.task(f"compile for {order.target}"):
        if exported.scheme:
            return _arms({INT8: bench.compile(exported, INT8, compiled_dir / INT8)}, compiled_dir), ()
        placements, refused = bench.compile_floats(exported, compiled_dir)
    return _arms(placements, compiled_dir), tuple(refused)


def _measure(bench: Workbench, arms: Sequence[Arm], order: Order, out_dir: Path) -> dict[str, Record]:
    """One record an arm, kept in bench/records.json beside the raw samples."""
    with order.progress.task(f"measure {order.target}") as task:
        records = measure_arms(
            bench.device,
            arms,
            preset=order.preset,
            launches=order.launches,
            out_dir=out_dir / "bench",
            on_progress=lambda done, total, detail: task.advance(1, f"{detail} ({done}/{total})"),
        )
    by_arm = {arm.name: record for arm, record in zip(arms, records, strict=True)}
    write_records(out_dir / "bench", by_arm, {arm.name: arm.placement for arm in arms})
    return by_arm


def _arms(placements: Mapping[str, Placement], compiled_dir: Path) -> list[Arm]:
    return [Arm(precision, compiled_dir / precision, placement=one) for precision, one in placements.items()]


def _rows(arms: Sequence[Arm], records: Mapping[str, Record]) -> tuple[Row, ...]:
    return tuple(row_of(arm.name, records[arm.name]) for arm in arms)


def _faster(records: Mapping[str, Record]) -> tuple[str, str]:
    """(what ships, why): INT8 ships where it is faster than the fastest float, and, told so, where no record may decide."""
    floats = {name: record for name, record in records.items() if name != INT8}
    fastest = min(floats, key=lambda name: floats[name].summary.p25_us)
    if (doubt := _doubt([records[INT8], floats[fastest]])) is not None:
        return INT8, f"INT8 ships, but whether it is faster than {fastest} was not judged: {doubt}"
    speed = compare_speed(records[INT8], floats[fastest])
    told = f"INT8 takes {1 / speed.ratio:.2f} of the time of {fastest}, the fastest float ({speed.basis})"
    return (INT8, f"INT8 ships: {told}") if speed.faster else (fastest, f"float ships ({fastest}): {told}")


def _doubt(records: Sequence[Record]) -> str | None:
    """Why these records decide nothing. Preset smoke makes no claim to trust, so a disturbance is let pass there; a record
    that no launch can make valid (emulated, slowed on purpose) never is."""
    never = any(flag.startswith(NEVER_VALID) for record in records for flag in record.validity.flags[:1])
    smoke = all(record.scenario.preset == "smoke" for record in records)
    return None if smoke and not never else untrustworthy(records)


def _check_share(min_int8_share: float) -> None:
    if not 0 <= min_int8_share <= 1:
        raise RecipeError(f"--min-int8-share {min_int8_share}: it is a share of all MACs. Give 0 to 1.")


def _failure(gates: Sequence[Gate], target: str) -> EdgestillError | None:
    failed = first_failure(gates)
    if failed is None:
        return None
    return ERROR_OF_GATE[failed.name](
        f"{target}: INT8 does not pass the gate {why_not(failed)}.\n{ADVICE[failed.name]}"
    )


def _untrustworthy(records: Mapping[str, Record]) -> EdgestillError | None:
    told = untrustworthy(list(records.values()))
    return None if told is None else MeasurementError(told)
