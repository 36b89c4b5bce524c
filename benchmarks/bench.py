"""Measure several compiled models against each other on one device, launch by launch.

Reads compiled models and evaluation sets. Writes out_dir/samples/*.npy (raw nanoseconds) and the device program; returns
one record an arm. Launches of all arms are interleaved in a random order: measured one after the other, 10 to 22 % of
identical models would differ, interleaved none of 101 did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Environment, Record
from benchmarks.device.typed_json import from_json
from benchmarks.devices import Device, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.recording import (
    HOST_E2E,
    LATENCY,
    NEVER_VALID,
    OTHER_ARENA,
    THROUGHPUT,
    Answers,
    Setting,
    record_of,
    utc_now,
)
from benchmarks.statistics import hodges_lehmann, wilcoxon_greater_p
from targets.base import CompiledModel, Placement, read_json
from targets.errors import RecipeError

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
    injected_us: float | None = None  # slowed on purpose, to see whether it is seen; its record is never valid


@dataclass(frozen=True)
class SpeedVerdict:
    """Whether the first record is faster; `ratio` is the baseline's latency over its own (above 1: faster)."""

    faster: bool
    ratio: float
    p: float | None
    basis: str


@dataclass(frozen=True)
class Bench:
    """A session of launches: where they run, what program, and how."""

    device: Device
    program: str
    setting: Setting


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
    retries: int | None = None,
    both_arenas: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Record]:
    """Measure every arm with `launches` fresh processes (None: the preset's number); one record an arm, in their order.

    A disturbed launch is measured again at once, in its round, at most `retries` times (None: the preset's number), then kept
    and marked; its record holds what was repeated, and why. Beside the latency: throughput (unless it is not asked for), and
    encoded bytes to label where the evaluation set has encoded samples, both in a quarter of the window. `both_arenas`: the
    peak memory with the runtime's arena set the other way, for runtimes that have one. Raises DeviceError, TargetError or
    MeasurementError with the device's own words.
    """
    config = PRESETS[preset]
    check_names(arms)
    program = device.put(pack_device_program(out_dir / PROGRAM))
    machine: Environment = from_json(Environment, run_program(device, program, ["environment"]), "environment")
    bench = Bench(device, program, Setting(config=config, machine=machine, seed=seed, out_dir=out_dir))
    tasks = schedule(arms, launches or config.launches, seed, throughput=throughput)
    answers: dict[str, Answers] = {arm.name: {} for arm in arms}
    with device.measuring():
        for task in tasks:
            if on_progress is not None:
                on_progress(task.order, len(tasks), f"{task.arm.name}: {task.kind}, launch {task.index + 1}")
            answer = _until_quiet(bench, task, config.retries if retries is None else retries)
            answers[task.arm.name].setdefault(task.kind, []).append(answer)
        if on_progress is not None:
            on_progress(len(tasks), len(tasks), "measured")
        for arm in arms if both_arenas else ():
            answers[arm.name][OTHER_ARENA] = _other_arena(bench, arm)
    utc = utc_now()
    return [record_of(arm, answers[arm.name], bench.setting, utc=utc) for arm in arms]


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


def untrustworthy(records: Sequence[Record]) -> str | None:
    """Why these records must not decide anything, in one sentence with what to do; None where all are valid."""
    told = []
    for record in (one for one in records if not one.validity.ok):
        disturbed = [launch for launch in record.launches if launch.disturbances]
        first = record.validity.flags[0] if record.validity.flags else ""
        if first.startswith(NEVER_VALID):
            why = first.removeprefix(NEVER_VALID)
        elif disturbed:
            why = f"{len(disturbed)} of {len(record.launches)} launches were disturbed ({'; '.join(disturbed[0].disturbances)})"
        else:
            why = "marked as not valid"
        told.append(f"{record.launches[0].arm}: {why}")
    if not told:
        return None
    return f"{', '.join(told)}. Measure again on a quiet machine; what was measured is kept and marked."


def _kinds(arm: Arm) -> tuple[str, ...]:
    encoded = arm.evaluation_dir is not None and read_json(arm.evaluation_dir / "spec.json")["encoded"]
    return (LATENCY, THROUGHPUT, HOST_E2E) if encoded else (LATENCY, THROUGHPUT)


def check_names(arms: Sequence[Arm]) -> None:
    """Raises RecipeError for two arms of one name, whose samples would be one file."""
    names = [file_name(arm.name) for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"two models to measure are both called '{twice[0]}'. Give each a name of its own.")


def file_name(arm: str) -> str:
    """What an arm's samples are called."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", arm)


def _until_quiet(bench: Bench, task: Task, retries: int) -> dict[str, Any]:
    """The first undisturbed try, else the last; `repeated` holds those before it, with their samples."""
    repeated: list[dict[str, Any]] = []
    while True:
        answer = _launch(bench, task)
        if not answer.get("disturbances") or len(repeated) >= retries:
            return answer if task.kind == THROUGHPUT else {**answer, "repeated": repeated}
        repeated.append({} if task.kind == THROUGHPUT else set_aside(answer, len(repeated), bench.setting.out_dir))


def set_aside(answer: Mapping[str, Any], tries: int, out_dir: Path) -> dict[str, Any]:
    """What a Repeated keeps of a try; its samples give the name to the next one's."""
    kept = Path(answer["samples_file"]).with_suffix(f".try-{tries}.npy")
    (out_dir / answer["samples_file"]).rename(out_dir / kept)
    percentiles = {f"{name}_us": answer["lat_us"][name] for name in ("p25", "p50")}
    return {"disturbances": answer["disturbances"], **percentiles, "samples_file": kept.as_posix()}


def _launch(bench: Bench, task: Task) -> dict[str, Any]:
    """One fresh process; returns its answer, with where its samples lie under `out_dir`."""
    device, config, arm = bench.device, bench.setting.config, task.arm
    common = ["--compiled", device.put(arm.compiled_dir), "--preset", config.name, "--seed", str(bench.setting.seed)]
    timeout_s = 120 + config.cool_down_s + config.idle_s + config.warmup_cap_s + 2 * config.max_s
    if task.kind == THROUGHPUT:
        return run_program(device, bench.program, ["throughput", "--short", *common], timeout_s=timeout_s)
    scratch = device.scratch(bench.setting.out_dir / "samples")
    name, own_name = (f"{file_name(arm.name)}-{kind}-{task.index}.npy" for kind in (task.kind, "device"))
    argv = ["measure", *common, "--boundary", task.kind, "--out", f"{scratch}/{name}"]
    argv += ["--short"] if task.kind == HOST_E2E else ["--device-out", f"{scratch}/{own_name}"]
    if arm.evaluation_dir is not None:
        argv += ["--evaluation", device.put(arm.evaluation_dir)]
    if (start_c := bench.setting.machine.soft.get("temp_c")) is not None:
        argv += ["--start-temp-c", str(start_c)]
    if arm.injected_us is not None:
        argv += ["--inject-us", str(arm.injected_us)]
    answer = run_program(device, bench.program, argv, timeout_s=timeout_s)
    device.get(f"{scratch}/{name}", bench.setting.out_dir / "samples" / name)
    if answer.get("device") is not None:
        device.get(f"{scratch}/{own_name}", bench.setting.out_dir / "samples" / own_name)
        answer["device"]["samples_file"] = f"samples/{own_name}"
    return {"i": task.index, "arm": arm.name, "order": task.order, "samples_file": f"samples/{name}", **answer}


def _other_arena(bench: Bench, arm: Arm) -> list[dict[str, Any]]:
    """The memory of one process with the arena switched; nothing for a target that has none."""
    options = CompiledModel.load(arm.compiled_dir).options
    if "arena" not in options:
        return []
    argv = ["memory", "--compiled", bench.device.put(arm.compiled_dir), "--seed", str(bench.setting.seed)]
    return [run_program(bench.device, bench.program, [*argv, "--options", json.dumps({"arena": not options["arena"]})])]
