"""`edgestill compare`: two models are measured in one session, or two recorded runs are read, and B is judged against A.

Reads bundles, compiled directories, ONNX files, or records. Writes one directory, whole or not at all: records.json, the raw
samples, report.json. Imports no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bench import Arm
from benchmarks.compare import NAMES, compare
from benchmarks.comparison import Comparison
from benchmarks.device.duet import in_turns
from benchmarks.device.record import Record
from benchmarks.device.verify import check_machine
from benchmarks.devices import Local
from benchmarks.records import RECORDS_FILE, Stored, load_records, one_session, write_records
from benchmarks.selftest import NUM_PAIRS, SelfTest, check_size, selftest
from benchmarks.turns import check_preset, expected_s, measure_by_turns, pair_differences
from pipeline.own_model import compiled_in, is_compiled
from pipeline.progress import Progress, Quiet
from pipeline.workbench import REPORT_FILE, Workbench, whole_directory
from targets.base import CompiledModel, Placement, write_json
from targets.errors import MeasurementError, RecipeError

SELFTEST_WINDOWS = 301  # with no false alarm among them, at most 1 % of comparisons are wrong


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A or B: compiled, with where its layers run."""

    label: str
    compiled_dir: Path
    placement: Placement


def compare_models(
    a: Path,
    b: Path,
    *,
    target: str = "onnxruntime-cpu",
    options: Mapping[str, Any] | None = None,
    precision: str | None = None,
    out_dir: Path = Path("compare"),
    preset: str = "ci",
    launches: int | None = None,
    metrics: Sequence[str] = NAMES,
    max_p99_ms: float | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Judge B against A: bundles, compiled directories or ONNX files, or two recorded runs (PATH, or PATH:ARM).

    Models are measured here, in `launches` pairs of fresh processes that take turns. Bundles and compiled directories bring their
    own target and options; an ONNX file is compiled for `target` (a Q/DQ graph as INT8, a float graph in `precision`, fp32 by
    default). Recorded runs are read: arms of one session are judged as such, records measured apart only beyond 10 %. Worse:
    `failure` with exit 4; `strict`: exit 7 where half of the launches of either were disturbed. Raises an EdgestillError.
    """
    _check(preset, metrics)
    recorded = [_recorded(path) for path in (a, b)]
    if all(recorded):
        first, second = recorded
        assert first is not None
        assert second is not None
        labels = (f"{a} ({first.arm})", f"{b} ({second.arm})")
        found = compare(
            first.record,
            second.record,
            interleaved=one_session(first, second),
            metrics=metrics,
            max_p99_ms=max_p99_ms,
            labels=labels,
        )
        return _strictly(found, strict)
    if any(recorded):
        raise RecipeError(
            f"{a} and {b}: one is a recorded run, the other a model. Give two models, or two recorded runs."
        )
    with whole_directory(out_dir, "compare", keep=(a, b)) as partial, tempfile.TemporaryDirectory() as scratch:
        subjects = _subjects((a, b), target, options or {}, precision, Path(scratch))
        records = _measure(subjects["A"], subjects["B"], preset, launches, partial, progress or Quiet())
        labels = (subjects["A"].label, subjects["B"].label)
        found = compare(records["A"], records["B"], metrics=metrics, max_p99_ms=max_p99_ms, labels=labels)
        found = _strictly(found, strict)
        write_json(partial / REPORT_FILE, found.to_json())
    return found


def selftest_model(
    model: Path,
    *,
    target: str = "onnxruntime-cpu",
    options: Mapping[str, Any] | None = None,
    precision: str | None = None,
    out_dir: Path = Path("compare"),
    preset: str = "smoke",
    launches: int | None = None,
    num_pairs: int = NUM_PAIRS,
    progress: Progress | None = None,
) -> SelfTest:
    """Measure one model against itself, `launches` pairs, and tell how often a comparison of `num_pairs` would have failed it."""
    _check(preset, ())
    pairs = launches or num_pairs + SELFTEST_WINDOWS - 1
    check_size(pairs, num_pairs)
    with (
        whole_directory(out_dir, "compare --selftest", keep=(model,)) as partial,
        tempfile.TemporaryDirectory() as scratch,
    ):
        subject = _subject(model, target, options or {}, precision, Path(scratch))
        records = _measure(subject, subject, preset, pairs, partial, progress or Quiet())
        found = selftest(pair_differences(records["A"], records["B"]) or [], num_pairs=num_pairs)
        write_json(partial / REPORT_FILE, found.to_json())
    return found


def _check(preset: str, metrics: Sequence[str]) -> None:
    check_preset(preset)
    if unknown := [name for name in metrics if name not in NAMES]:
        raise RecipeError(f"--metric {unknown[0]}: there is no such metric. Known: {', '.join(NAMES)}.")


def _recorded(given: Path) -> Stored | None:
    """The record at PATH or PATH:ARM; None for a model. Raises RecipeError where PATH holds several and none is named."""
    before, colon, after = str(given).rpartition(":")
    path, arm = (Path(before), after) if colon and not given.exists() else (given, "")
    if path.suffix == ".onnx" or not path.exists() or is_compiled(path):
        return None
    if path.is_dir() and not any(path.rglob(RECORDS_FILE)):
        return None
    found = load_records(path)
    named = [stored for stored in found if arm in ("", stored.arm)]
    if len(named) != 1:
        arms = ", ".join(f"{path}:{stored.arm}" for stored in found[:6])
        raise RecipeError(f"{given}: {len(named)} of the records there are meant. Name one: {arms}.")
    return named[0]


def _subjects(
    paths: tuple[Path, Path], target: str, options: Mapping[str, Any], precision: str | None, scratch: Path
) -> dict[str, Subject]:
    return {
        name: _subject(path, target, options, precision, scratch / name) for name, path in zip("AB", paths, strict=True)
    }


def _subject(model: Path, target: str, options: Mapping[str, Any], precision: str | None, scratch: Path) -> Subject:
    compiled_dir = compiled_in(model)
    if compiled_dir is not None:
        compiled = CompiledModel.load(compiled_dir)
        check_machine(compiled)
        bench = Workbench.open(compiled.target, compiled.options, scratch)
        label = f"{model} ({compiled.precision}, {compiled.toolchain})"
        return Subject(label=label, compiled_dir=compiled_dir, placement=bench.placement(compiled_dir))
    bench = Workbench.open(target, options, scratch)
    _, wanted, placement = bench.compile_given(model, precision, scratch, scratch / "compiled")
    label = f"{model} ({wanted}, {target})"
    return Subject(label=label, compiled_dir=scratch / "compiled", placement=placement)


def _measure(
    a: Subject, b: Subject, preset: str, launches: int | None, out_dir: Path, progress: Progress
) -> dict[str, Record]:
    arms = [Arm(name, one.compiled_dir, placement=one.placement) for name, one in (("A", a), ("B", b))]
    pairs, seconds = launches or in_turns(preset).launches, expected_s(preset, launches)
    about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
    progress.say(f"{pairs} pairs of fresh processes that take turns: about {about}, more where pairs are disturbed")
    with progress.task("compare", pairs) as task:
        records = measure_by_turns(
            Local(),
            *arms,
            preset=preset,
            pairs=launches,
            out_dir=out_dir,
            on_progress=lambda done, total, detail: task.advance(int(done > 0), detail),
        )
    by_arm = {arm.name: record for arm, record in zip(arms, records, strict=True)}
    write_records(out_dir, by_arm, {arm.name: arm.placement for arm in arms})
    return by_arm


def _strictly(found: Comparison, strict: bool) -> Comparison:
    doubtful = [name for name, one in (("A", found.a), ("B", found.b)) if not one["valid"]]
    if not strict or not doubtful:
        return found
    failure = MeasurementError(
        f"{' and '.join(doubtful)}: half of the launches or more were disturbed. Measure again on a quiet machine."
    )
    return replace(found, failure=failure)
