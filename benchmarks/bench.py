"""Measure several compiled models against each other on one device, launch by launch.

Reads compiled models and evaluation sets. Writes out_dir/samples/*.npy (raw nanoseconds) and the device program; returns
one record an arm. Launches of all arms are interleaved in a random order: measured one after the other, 10 to 22 % of
identical models would differ, interleaved none of 101 did.
"""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.environment import fingerprint
from benchmarks.device.evaluate import batch_of
from benchmarks.device.measure import PRESETS, Preset
from benchmarks.device.record import (
    SCHEMA_VERSION,
    Energy,
    Environment,
    Launch,
    Memory,
    Model,
    Record,
    Runtime,
    Scenario,
    Summary,
    Telemetry,
    Throughput,
    from_json,
    validity_of,
)
from benchmarks.devices import Device, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.statistics import early_stopping_percentile, hodges_lehmann, median_interval, wilcoxon_greater_p
from targets.base import CompiledModel, Placement, read_json
from targets.errors import RecipeError

LATENCY, HOST_E2E, THROUGHPUT = "runtime", "host_e2e", "throughput"
MIN_PAIRS = 7  # fewer pairs cannot reach p < 0.01 in the exact test
MAX_P = 0.01

OnProgress = Callable[[int, int, str], None]  # launches done, launches in all, what begins now


@dataclass(frozen=True)
class Arm:
    """One compiled model among those that are compared; `name` is unique and stands in the record's launches."""

    name: str
    compiled_dir: Path
    evaluation_dir: Path | None = None
    placement: Placement | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class SpeedVerdict:
    """Whether the first record is faster; `ratio` is the baseline's latency over its own (above 1: faster)."""

    faster: bool
    ratio: float
    p: float | None
    basis: str


@dataclass(frozen=True)
class Task:
    """One launch to come: what is measured of which arm."""

    arm: Arm
    kind: str
    index: int  # among the arm's launches of this kind
    order: int  # among all launches of the session


def measure_arms(
    device: Device,
    arms: Sequence[Arm],
    *,
    preset: str,
    launches: int | None = None,
    seed: int = 0,
    out_dir: Path,
    throughput: bool = True,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """Measure every arm with `launches` fresh processes (None: the preset's number); one record an arm, in their order.

    Beside the latency: throughput (unless it is not asked for), and encoded bytes to label where the evaluation set has
    encoded samples, both in a quarter of the window. Raises DeviceError, TargetError or MeasurementError with the device's
    own words.
    """
    config = PRESETS[preset]
    _check_names(arms)
    program = device.put(pack_device_program(out_dir / PROGRAM))
    machine: Environment = from_json(Environment, run_program(device, program, ["environment"]), "environment")
    tasks = schedule(arms, launches or config.launches, seed, throughput=throughput)
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task in tasks:
        if on_progress is not None:
            on_progress(task.order, len(tasks), f"{task.arm.name}: {task.kind}, launch {task.index + 1}")
        answer = _launch(device, program, task, config, machine, seed, out_dir)
        answers.setdefault((task.arm.name, task.kind), []).append(answer)
    if on_progress is not None:
        on_progress(len(tasks), len(tasks), "measured")
    return [_record(arm, answers, config, machine, seed, out_dir) for arm in arms]


def schedule(arms: Sequence[Arm], launches: int, seed: int, *, throughput: bool = True) -> list[Task]:
    """Rounds of one launch an arm and kind, each round in an order of its own."""
    generator = np.random.default_rng(seed)
    kinds = [(arm, kind) for arm in arms for kind in _kinds(arm) if throughput or kind != THROUGHPUT]
    tasks: list[Task] = []
    for index in range(launches):
        for place in generator.permutation(len(kinds)):
            arm, kind = kinds[place]
            tasks.append(Task(arm, kind, index, len(tasks)))
    return tasks


def compare_speed(candidate: Record, baseline: Record) -> SpeedVerdict:
    """Is `candidate` faster, by the p25 of each launch (the quietest statistic between launches of one model)?

    From MIN_PAIRS launches on: faster iff the exact one-sided Wilcoxon test of ln(baseline / candidate), paired by round,
    gives p < 0.01 and their Hodges-Lehmann shift is above zero. Below: the plain ratio of the medians, called smoke.
    """
    ours = np.array([launch.lat_us.p25 for launch in candidate.launches])
    theirs = np.array([launch.lat_us.p25 for launch in baseline.launches])
    num_pairs = min(len(ours), len(theirs))
    if num_pairs < MIN_PAIRS:
        ratio = float(np.median(theirs) / np.median(ours))
        return SpeedVerdict(ratio > 1, ratio, None, f"smoke: ratio of median p25 over {num_pairs} launches, no test")
    differences = np.log(theirs[:num_pairs]) - np.log(ours[:num_pairs])
    shift, p = hodges_lehmann(differences), wilcoxon_greater_p(differences)
    basis = f"exact Wilcoxon over {num_pairs} interleaved pairs of launches, p25"
    return SpeedVerdict(p < MAX_P and shift > 0, float(np.exp(shift)), p, basis)


def _kinds(arm: Arm) -> tuple[str, ...]:
    encoded = arm.evaluation_dir is not None and read_json(arm.evaluation_dir / "spec.json")["encoded"]
    return (LATENCY, THROUGHPUT, HOST_E2E) if encoded else (LATENCY, THROUGHPUT)


def _check_names(arms: Sequence[Arm]) -> None:
    names = [_file_name(arm.name) for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"two models to measure are both called '{twice[0]}'. Give each a name of its own.")


def _file_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", arm)


def _launch(
    device: Device, program: str, task: Task, config: Preset, machine: Environment, seed: int, out_dir: Path
) -> dict[str, Any]:
    """One fresh process; returns its answer, with where its samples lie under `out_dir`."""
    compiled = device.put(task.arm.compiled_dir)
    common = ["--compiled", compiled, "--preset", config.name, "--seed", str(seed)]
    timeout_s = 120 + config.cool_down_s + config.idle_s + config.warmup_cap_s + 2 * config.max_s
    if task.kind == THROUGHPUT:
        return run_program(device, program, ["throughput", "--short", *common], timeout_s=timeout_s)
    samples = f"samples/{_file_name(task.arm.name)}-{task.kind}-{task.index}.npy"
    argv = ["measure", *common, "--boundary", task.kind]
    argv += ["--out", f"{device.scratch(out_dir / 'samples')}/{Path(samples).name}"]
    if task.kind == HOST_E2E:
        argv += ["--short"]
    if task.arm.evaluation_dir is not None:
        argv += ["--evaluation", device.put(task.arm.evaluation_dir)]
    if (start_c := machine.soft.get("temp_c")) is not None:
        argv += ["--start-temp-c", str(start_c)]
    answer = run_program(device, program, argv, timeout_s=timeout_s)
    device.get(argv[argv.index("--out") + 1], out_dir / samples)
    return {"i": task.index, "arm": task.arm.name, "order": task.order, "samples_file": samples, **answer}


def _record(
    arm: Arm,
    answers: Mapping[tuple[str, str], list[dict[str, Any]]],
    config: Preset,
    machine: Environment,
    seed: int,
    out_dir: Path,
) -> Record:
    compiled = CompiledModel.load(arm.compiled_dir)
    launches = _launches(answers[arm.name, LATENCY])
    end_to_end = _launches(answers.get((arm.name, HOST_E2E), []))
    scenario = _scenario(compiled, config, seed)
    runtime = _runtime(compiled, arm.placement)
    summary = _summary(launches, scenario.batch, out_dir)
    missing = [] if summary.ci95 else [f"ci95: {len(launches)} launches, 6 are needed"]
    return Record(
        schema_version=SCHEMA_VERSION,
        run_id=uuid.uuid4().hex,
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
        git=_git(),
        model=_model(compiled, arm.teacher),
        runtime=runtime,
        scenario=scenario,
        launches=launches,
        summary=summary,
        host_e2e=_summary(end_to_end, 1, out_dir) if end_to_end else None,
        throughput=_throughput(answers[arm.name, THROUGHPUT]) if (arm.name, THROUGHPUT) in answers else None,
        memory=_medians(Memory, [launch.memory for launch in launches]),
        energy=_medians(Energy, [launch.energy for launch in launches]),
        accuracy=None,
        env=_environment(machine, compiled, runtime, scenario),
        telemetry=_medians(Telemetry, [launch.telemetry for launch in launches]),
        validity=validity_of(launches, [*missing, *machine.flags]),
    )


def _launches(answers: Sequence[Mapping[str, Any]]) -> tuple[Launch, ...]:
    return tuple(from_json(Launch, answer, f"launch {answer['i']} of {answer['arm']}") for answer in answers)


def _summary(launches: Sequence[Launch], batch: int, out_dir: Path) -> Summary:
    p50s_us = [launch.lat_us.p50 for launch in launches]
    all_us = np.concatenate([np.load(out_dir / launch.samples_file) for launch in launches]) / 1e3
    return Summary(
        p25_us=float(np.median([launch.lat_us.p25 for launch in launches])),
        p50_us=float(np.median(p50s_us)),
        ci95=median_interval(p50s_us),
        fps=float(np.median([batch * launch.n / launch.wall_s for launch in launches])),
        es_p90_us=early_stopping_percentile(all_us, 90.0),
        es_p99_us=early_stopping_percentile(all_us, 99.0),
        load_ms=float(np.median([launch.load_ms for launch in launches])),
        first_ms=float(np.median([launch.first_ms for launch in launches])),
    )


def _throughput(answers: Sequence[Mapping[str, Any]]) -> Throughput:
    fps = float(np.median([answer["fps"] for answer in answers]))
    return Throughput(fps=fps, batch=answers[0]["batch"], n=sum(answer["n"] for answer in answers))


def _medians(kind: type[Any], values: Sequence[Any]) -> Any:
    """Field by field over the launches: the median of numbers, None where no launch could read it, else the first."""
    rows = [asdict(value) for value in values]
    return kind(**{key: _median([row[key] for row in rows if row[key] is not None]) for key in rows[0]})


def _median(values: Sequence[Any]) -> Any:
    if not values or isinstance(values[0], (str, dict, bool)):
        return values[0] if values else None
    median = float(np.median(values))
    return round(median) if isinstance(values[0], int) else median


def _scenario(compiled: CompiledModel, config: Preset, seed: int) -> Scenario:
    return Scenario(
        kind="single_stream",
        preset=config.name,
        batch=batch_of(compiled.inputs, 1),
        boundary=LATENCY,
        warmup_s=config.warmup_s,
        min_s=config.min_s,
        min_q=config.min_queries,
        seed=seed,
        spin=compiled.options.get("allow_spinning"),
        cuda_graph=compiled.options.get("cuda_graph"),
        transfers=True if compiled.target == "tensorrt" else None,
    )


def _model(compiled: CompiledModel, teacher: str | None) -> Model:
    return Model(
        name=compiled.name,
        sha256=fingerprint(compiled.files),
        bytes=compiled.size_bytes,
        precision=compiled.precision,
        inputs=tuple({**asdict(spec), "shape": list(spec.shape)} for spec in compiled.inputs),
        teacher=teacher,
    )


def _runtime(compiled: CompiledModel, placement: Placement | None) -> Runtime:
    macs: dict[str, int] = {}
    for layer in placement.layers if placement else ():
        macs[layer.precision] = macs.get(layer.precision, 0) + layer.macs
    fallen_back = (
        [layer.name for layer in placement.layers if layer.precision != compiled.precision] if placement else []
    )
    return Runtime(
        name=compiled.target,
        version=compiled.toolchain,
        provider="cpu" if compiled.target.endswith("cpu") else compiled.target,
        flags=dict(compiled.options),
        fallback_ops=tuple(fallen_back) if placement else None,
        ops_per_unit=macs if placement else None,
    )


def _environment(machine: Environment, compiled: CompiledModel, runtime: Runtime, scenario: Scenario) -> Environment:
    """The machine's keys and those of this measurement: records are compared only where all of them agree."""
    measured = {
        "model": compiled.name,
        "precision": compiled.precision,
        "shapes": [list(spec.shape) for spec in compiled.inputs],
        "runtime": f"{runtime.name} {runtime.version}",
        "flags": runtime.flags,
        "scenario": scenario.kind,
        "boundary": scenario.boundary,
        "batch": scenario.batch,
    }
    hard = {**machine.hard, **measured}
    return Environment(hard=hard, soft=machine.soft, hard_sha256=fingerprint(hard), flags=machine.flags)


def _git() -> dict[str, Any]:
    """The revision of edgestill's own sources, None where they are an installed copy."""
    status = _ask_git("status", "--porcelain", "--untracked-files=no")
    return {"sha": _ask_git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _ask_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
