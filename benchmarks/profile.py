"""`edgestill profile`: what each layer of a compiled model takes, and how far the whole is from what the machine can multiply.

Reads a compiled directory, runs the device program on it in a fresh process, measures or finds the peaks of the precisions
that its products ran in. Writes profiles.json beside records.json where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.environment import fingerprint
from benchmarks.device.profile import DEPTHS
from benchmarks.device.record import MAX_PSI_PERCENT
from benchmarks.devices import Device, run_program
from benchmarks.peak import Machine, peak_of
from benchmarks.profile_report import Layer, Profile
from benchmarks.records import PROFILES_FILE, load_records
from targets.base import CompiledModel, read_json, write_json
from targets.errors import DataError, MeasurementError, RecipeError

Say = Callable[[str], None]


def profile_compiled(
    device: Device,
    program: str,
    compiled_dir: Path,
    *,
    preset: str = "ci",
    fresh_peak: bool = False,
    strict: bool = False,
    cache_dir: Path | None = None,
    say: Say | None = None,
) -> Profile:
    """Profile a compiled model where it lies; `say` is told what is measured next.

    `strict`: a machine that did other work is in `failure` (exit 7). Raises IntegrityError for changed files, TargetError for
    a target that times no layers, RecipeError for an unknown preset.
    """
    if preset not in DEPTHS:
        raise RecipeError(f"--preset {preset}: there is no such preset. Known: {', '.join(DEPTHS)}.")
    tell = say or _silent
    compiled = CompiledModel.load(compiled_dir)
    with device.measuring():
        tell(f"layers of {compiled.name}")
        there = device.put(compiled_dir)
        answer = run_program(device, program, ["profile", "--compiled", there, "--preset", preset])
        environment = run_program(device, program, ["environment"])
        profiled = _profile_of(compiled, answer, preset, environment["hard"].get("cpu"))
        machine = Machine(
            hard_sha256=environment["hard_sha256"],
            target=compiled.target,
            options=compiled.options,
            toolchain=compiled.toolchain,
        )
        peaks = []
        for precision in profiled.macs:
            tell(f"peak of {precision}")
            peaks.append(
                peak_of(machine, precision, device=device, program=program, fresh=fresh_peak, cache_dir=cache_dir)
            )
    return strictly(replace(profiled, peaks=tuple(peaks)), strict)


def arms_of(compiled: CompiledModel, directory: Path) -> dict[str, Path]:
    """Arm -> folder of the records in `directory` that are of this compiled model: the same files, target and options.

    Raises DataError where there is none.
    """
    digest = fingerprint(compiled.files)
    arms = {
        stored.arm: stored.directory
        for stored in load_records(directory)
        if stored.record.model.sha256 == digest
        and stored.record.runtime.name == compiled.target
        and dict(stored.record.runtime.flags) == dict(compiled.options)
    }
    if not arms:
        raise DataError(
            f"{directory} holds no record of {compiled.name} ({compiled.precision}, {compiled.target}) with these files and "
            "options. Profile the compiled directory that was measured, e.g. bench/compiled/int8."
        )
    return arms


def add_to_records(profile: Profile, arms: Mapping[str, Path]) -> None:
    """Keep a profile in profiles.json beside records.json, under the arms that `arms_of` named."""
    for arm, folder in arms.items():
        path = folder / PROFILES_FILE
        kept: dict[str, Any] = read_json(path) if path.is_file() else {}
        write_json(path, {**kept, arm: profile.to_json()})


def _profile_of(compiled: CompiledModel, answer: dict[str, Any], preset: str, cpu: str | None) -> Profile:
    return Profile(
        model=compiled.name,
        model_sha256=fingerprint(compiled.files),
        target=compiled.target,
        precision=compiled.precision,
        toolchain=compiled.toolchain,
        options=compiled.options,
        cpu=cpu,
        isa=answer["isa"],
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
        source=answer["source"],
        resolution_us=answer["resolution_us"],
        batch=answer["batch"],
        num_runs=answer["num_runs"],
        num_blocks=answer["num_blocks"],
        preset=preset,
        layers=tuple(Layer(**layer) for layer in answer["layers"]),
        total_us=answer["total_us"],
        p50_us=answer["p50_us"],
        profiled_p50_us=answer["profiled_p50_us"],
        psi_cpu=answer["psi_cpu"],
        peaks=(),
    )


def strictly(profile: Profile, strict: bool) -> Profile:
    """Under `strict`, with a failure (exit 7) where other work was in the way; else as it is."""
    if not strict or not profile.busy:
        return profile
    return replace(
        profile,
        failure=MeasurementError(
            f"{profile.model}: other work waited for a CPU in {profile.psi_cpu:.0f} % of the time, {MAX_PSI_PERCENT:g} % is "
            "allowed. Profile again on a quiet machine; what was measured is kept."
        ),
    )


def _silent(_: str) -> None:
    return None
