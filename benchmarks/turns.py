"""Measure two compiled models against each other on one device, pair by pair of fresh processes that take turns.

Reads compiled models. Writes out_dir/samples/*.npy (raw nanoseconds) and the device program; returns a record of either. Where
several models are to be measured, or their absolute latency matters, `benchmarks/bench.py` gives each the machine for itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, OnProgress, check_names, file_name, set_aside
from benchmarks.device.duet import PATIENCE_S, in_turns, log_ratios
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Environment, Launch, Record
from benchmarks.device.typed_json import from_json
from benchmarks.devices import Device, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.recording import LATENCY, Setting, record_of, utc_now
from targets.errors import RecipeError

START_S, BESIDE = 0.75, 1.35  # a process until it is loaded; its turns with what stands between them, per second timed
PARTNER = "the partner: "  # begins what disturbed the other process of a pair


@dataclass(frozen=True)
class Session:
    """Where the pairs run, what program, and how."""

    device: Device
    program: str
    setting: Setting
    arms: tuple[Arm, Arm]
    same_cpus: bool
    chance: str


def measure_by_turns(
    device: Device,
    a: Arm,
    b: Arm,
    *,
    preset: str,
    pairs: int | None = None,
    seed: int = 0,
    out_dir: Path,
    retries: int | None = None,
    same_cpus: bool = True,
    chance: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Record, Record]:
    """Measure `pairs` pairs (None: the preset's number); launch i of both records was one pair.

    A pair in which either process was disturbed is measured again at once, at most `retries` times (None: the preset's
    number), then kept, the disturbed one marked. `same_cpus`: both are held to as many CPUs as the model has threads, of equal
    ones to others in each pair. `chance` seeds who is first, who begins a round, and the CPUs: None draws it anew, so that nothing
    that recurs on a machine can agree with it. Raises DeviceError, TargetError or MeasurementError with the device's own words.
    """
    check_preset(preset)
    _check_arms(a, b)
    config = in_turns(preset)
    program = device.put(pack_device_program(out_dir / PROGRAM))
    machine: Environment = from_json(Environment, run_program(device, program, ["environment"]), "environment")
    setting = Setting(config=config, machine=machine, seed=seed, out_dir=out_dir)
    session = Session(device, program, setting, (a, b), same_cpus, chance or secrets.token_hex(8))
    total = pairs or config.launches
    answers: list[list[dict[str, Any]]] = [[], []]
    with device.measuring():
        for index in range(total):
            if on_progress is not None:
                on_progress(index, total, f"pair {index + 1}")
            pair = _until_quiet(session, index, config.retries if retries is None else retries)
            for of_arm, answer in zip(answers, pair, strict=True):
                of_arm.append(answer)
    if on_progress is not None:
        on_progress(total, total, "measured")
    utc = utc_now()
    record_a, record_b = (
        record_of(arm, {LATENCY: of_arm}, setting, utc=utc) for arm, of_arm in zip((a, b), answers, strict=True)
    )
    return record_a, record_b


def pair_difference(a: Launch, b: Launch) -> float | None:
    """ln B - ln A of the p25 of a pair: the median over its rounds, in which both ran within a slice of each other.

    None for launches that did not take turns. A disturbance of some rounds moves it less than it moves the p25 of all samples.
    """
    if a.turns is None or b.turns is None or len(a.turns.p25_us) != len(b.turns.p25_us):
        return None
    return float(np.median(log_ratios({"p25_us": a.turns.p25_us}, {"p25_us": b.turns.p25_us})))


def pair_differences(a: Record, b: Record) -> list[float] | None:
    """Of every pair, in their order; None for records that were not measured by turns."""
    by_index = [sorted(record.launches, key=lambda one: one.i) for record in (a, b)]
    found = [pair_difference(ours, theirs) for ours, theirs in zip(*by_index, strict=False)]
    known = [one for one in found if one is not None]
    return known if known and len(known) == len(found) else None


def expected_s(preset: str, pairs: int | None = None) -> float:
    """About how long it takes where models load and run quickly and nothing is repeated."""
    check_preset(preset)
    config = in_turns(preset)
    return (pairs or config.launches) * 2 * (START_S + config.warmup_s + BESIDE * config.min_s)


def check_preset(preset: str) -> None:
    """Raises RecipeError for one that does not exist."""
    if preset not in PRESETS:
        raise RecipeError(f"--preset {preset}: there is no such preset. Known: {', '.join(PRESETS)}.")


def _check_arms(a: Arm, b: Arm) -> None:
    check_names((a, b))
    if (a.evaluation_dir is None) != (b.evaluation_dir is None):
        raise RecipeError("only one of two models that take turns has an evaluation set. Give both one, or none.")


def _until_quiet(session: Session, index: int, retries: int) -> list[dict[str, Any]]:
    """The first undisturbed try, else the last; `repeated` holds those before it, with their samples."""
    repeated: list[list[dict[str, Any]]] = [[], []]
    for tries in range(retries + 1):
        pair = _pair(session, index, tries)
        if tries == retries or not any(answer["disturbances"] for answer in pair):
            break
        for kept, answer, partner in zip(repeated, pair, pair[::-1], strict=True):
            why = [*answer["disturbances"], *(PARTNER + reason for reason in partner["disturbances"])]
            kept.append(set_aside({**answer, "disturbances": why}, tries, session.setting.out_dir))
    return [{**answer, "repeated": kept} for answer, kept in zip(pair, repeated, strict=True)]


def _pair(session: Session, index: int, tries: int) -> list[dict[str, Any]]:
    """Two fresh processes; returns their answers, with where their samples lie under `out_dir`."""
    device, setting, config = session.device, session.setting, session.setting.config
    scratch = device.scratch(setting.out_dir / "samples")
    names = [f"{file_name(arm.name)}-turns-{index}.npy" for arm in session.arms]
    timeout_s = config.cool_down_s + 4 * (PATIENCE_S + config.warmup_cap_s + config.max_s)
    answer = run_program(device, session.program, _argv(session, index, tries, scratch, names), timeout_s=timeout_s)
    for name in names:
        device.get(f"{scratch}/{name}", setting.out_dir / "samples" / name)
    return [
        {
            "i": index,
            "arm": arm.name,
            "order": 2 * index + int(place != answer["first"]),
            "samples_file": f"samples/{name}",
            **launch,
        }
        for place, (arm, name, launch) in enumerate(zip(session.arms, names, answer["launches"], strict=True))
    ]


def _argv(session: Session, index: int, tries: int, scratch: str, names: Sequence[str]) -> list[str]:
    """Another try is another throw: it may be put on other CPUs."""
    device, arms, setting = session.device, session.arms, session.setting
    argv = ["turns", "--compiled", *(device.put(arm.compiled_dir) for arm in arms), "--preset", setting.config.name]
    argv += ["--seed", str(setting.seed), "--chance", f"{session.chance}, pair {index}, try {tries}"]
    argv += ["--out", *(f"{scratch}/{name}" for name in names)]
    if any(arm.injected_us is not None for arm in arms):
        argv += ["--inject-us", *(str(arm.injected_us or 0.0) for arm in arms)]
    if sets := [arm.evaluation_dir for arm in arms if arm.evaluation_dir is not None]:
        argv += ["--evaluation", *(device.put(path) for path in sets)]
    if (start_c := setting.machine.soft.get("temp_c")) is not None:
        argv += ["--start-temp-c", str(start_c)]
    return argv if session.same_cpus else [*argv, "--any-cpus"]
