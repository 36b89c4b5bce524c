"""One record of an arm, from what its launches answered: medians over launches, estimates over all raw samples, and flags.

Reads the raw samples below `out_dir`; writes nothing.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.device.disturbances import positive
from benchmarks.device.environment import fingerprint
from benchmarks.device.evaluate import batch_of
from benchmarks.device.measure import Preset
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
    Validity,
    validity_of,
)
from benchmarks.device.typed_json import from_json
from benchmarks.statistics import early_stopping_percentile, median_interval
from targets.base import CompiledModel, Placement

if TYPE_CHECKING:
    from benchmarks.bench import Arm

LATENCY, HOST_E2E, THROUGHPUT, OTHER_ARENA = "runtime", "host_e2e", "throughput", "other arena"
MLPERF_OFFLINE_SAMPLES = 24_576
NEVER_VALID = "not valid: "  # begins the first flag of a record that no launch can make valid

Answers = dict[str, list[dict[str, Any]]]  # of one arm: what is measured -> the device program's answers


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a session was measured, the same for all of its arms."""

    config: Preset
    machine: Environment
    seed: int
    out_dir: Path


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_of(arm: Arm, answers: Answers, setting: Setting, *, utc: str) -> Record:
    """The record of one arm. A record that was slowed on purpose is never valid.

    `utc`: the moment of its session, by which its arms are known for pairs.
    """
    compiled = CompiledModel.load(arm.compiled_dir)
    launches = _launches(answers[LATENCY])
    end_to_end = _launches(answers.get(HOST_E2E, []))
    throughput = answers.get(THROUGHPUT, [])
    scenario = _scenario(compiled, setting, arm.injected_us)
    runtime = _runtime(compiled, arm.placement)
    summary = _summary(launches, scenario.batch, setting.out_dir)
    other_arena = answers.get(OTHER_ARENA, [])
    flags = [
        *([] if summary.ci95 else [f"ci95: {len(launches)} launches, 6 are needed"]),
        *_beside(HOST_E2E, [launch.disturbances for launch in end_to_end]),
        *_beside(THROUGHPUT, [answer.get("disturbances", ()) for answer in throughput]),
        *_offline(throughput),
        *_slowed(launches),
        *setting.machine.flags,
    ]
    return Record(
        schema_version=SCHEMA_VERSION,
        run_id=uuid.uuid4().hex,
        utc=utc,
        git=_git(),
        model=_model(compiled, arm.teacher),
        runtime=runtime,
        scenario=scenario,
        launches=launches,
        summary=summary,
        host_e2e=_summary(end_to_end, 1, setting.out_dir) if end_to_end else None,
        throughput=_throughput(throughput) if throughput else None,
        memory=_medians(Memory, [launch.memory for launch in launches]),
        energy=_medians(Energy, [launch.energy for launch in launches]),
        accuracy=None,
        env=_environment(setting.machine, compiled, runtime, scenario, launches),
        telemetry=_medians(Telemetry, [launch.telemetry for launch in launches]),
        validity=_validity(launches, flags, _never_valid(arm, setting.machine)),
        device=_device_summary(launches, scenario.batch, setting.out_dir),
        other_arena=from_json(Memory, other_arena[0]["memory"], "memory") if other_arena else None,
    )


def _launches(answers: Sequence[Mapping[str, Any]]) -> tuple[Launch, ...]:
    return tuple(from_json(Launch, answer, f"launch {answer['i']} of {answer['arm']}") for answer in answers)


def _never_valid(arm: Arm, machine: Environment) -> str | None:
    """Why no launch can make this record one to trust."""
    if arm.injected_us is not None:
        return f"slowed by {arm.injected_us:g} us a call on purpose"
    if (real := machine.hard.get("emulated_on")) is not None:
        return f"{machine.hard['arch']} emulated on {real}: function and accuracy hold, its times are those of no such machine"
    return None


def _validity(launches: Sequence[Launch], flags: Sequence[str], never: str | None) -> Validity:
    validity = validity_of(launches, flags)
    return validity if never is None else replace(validity, ok=False, flags=(f"{NEVER_VALID}{never}", *validity.flags))


def _beside(kind: str, disturbances: Sequence[Sequence[str]]) -> list[str]:
    """What is measured beside the latency does not decide about the record, so that its noise is told and no more."""
    disturbed = [reasons for reasons in disturbances if reasons]
    if not disturbed:
        return []
    return [f"{kind}: {len(disturbed)} of {len(disturbances)} launches were disturbed ({'; '.join(disturbed[0])})"]


def _offline(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    num_samples = sum(answer["n"] for answer in answers)
    if not answers or num_samples >= MLPERF_OFFLINE_SAMPLES:
        return []
    return [f"throughput: over {num_samples} samples, MLPerf's offline takes {MLPERF_OFFLINE_SAMPLES}"]


def _slowed(launches: Sequence[Launch]) -> list[str]:
    """Where the runtime's own clock costs a run something, by how much."""
    slowed = [(one.device.outer_p50_us, one.lat_us.p50) for one in launches if one.device and one.device.slowed]
    if not slowed:
        return []
    with_clock, without = (float(np.median(values)) for values in zip(*slowed, strict=True))
    return [f"device: its clock slows the run down, {with_clock:.1f} us around it and {without:.1f} us without"]


def _summary(launches: Sequence[Launch], batch: int, out_dir: Path) -> Summary:
    p50s_us = [launch.lat_us.p50 for launch in launches]
    all_us = _all_us([launch.samples_file for launch in launches], out_dir)
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


def _device_summary(launches: Sequence[Launch], batch: int, out_dir: Path) -> Summary | None:
    """By the runtime's own clock; None unless every launch could read it."""
    own = [launch.device for launch in launches if launch.device is not None]
    if len(own) < len(launches):
        return None
    p50s_us = [one.lat_us.p50 for one in own]
    all_us = _all_us([one.samples_file for one in own if one.samples_file is not None], out_dir)
    return Summary(
        p25_us=float(np.median([one.lat_us.p25 for one in own])),
        p50_us=float(np.median(p50s_us)),
        ci95=median_interval(p50s_us),
        fps=batch * 1e6 / float(np.median(p50s_us)),
        es_p90_us=early_stopping_percentile(all_us, 90.0),
        es_p99_us=early_stopping_percentile(all_us, 99.0),
        load_ms=None,
        first_ms=None,
    )


def _all_us(samples_files: Sequence[str], out_dir: Path) -> Any:
    return np.concatenate([positive(np.load(out_dir / name)) for name in samples_files]) / 1e3


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


def _scenario(compiled: CompiledModel, setting: Setting, injected_us: float | None) -> Scenario:
    config = setting.config
    return Scenario(
        kind="single_stream",
        preset=config.name,
        batch=batch_of(compiled.inputs, 1),
        boundary=LATENCY,
        warmup_s=config.warmup_s,
        min_s=config.min_s,
        min_q=config.min_queries,
        seed=setting.seed,
        spin=compiled.options.get("allow_spinning"),
        cuda_graph=compiled.options.get("cuda_graph"),
        transfers=True if compiled.target == "tensorrt" else None,
        injected_us=injected_us,
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


def _environment(
    machine: Environment, compiled: CompiledModel, runtime: Runtime, scenario: Scenario, launches: Sequence[Launch]
) -> Environment:
    """The machine's keys and those of this measurement: records are compared only where all of them agree.

    `turns` is there only where processes took turns: their caches are colder than those of a launch on its own.
    """
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
    turns = {"turns": True} if launches[0].turns is not None else {}
    hard = {**machine.hard, **measured, **turns}
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
