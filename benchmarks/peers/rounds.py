"""Compiled models measured in rounds, each arm once a round in an order of its own; a round that is done stays done.

Writes round-00.json, ... (records, schema 1) and the raw samples under `out_dir`. Killed and started again, it goes on with
the next round: pairs stand within a round, so nothing is lost by a pause between two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.environment import fingerprint
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Record, validate, validity_of
from benchmarks.devices import Local
from benchmarks.peers.kept import kept
from benchmarks.statistics import median_interval
from targets.base import CompiledModel

START_S = 1.0  # what starting a process, importing and loading take, about


def measure_rounds(
    arms: Sequence[Arm],
    *,
    preset: str,
    rounds: int,
    out_dir: Path,
    sources: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Record]:
    """A record an arm over all rounds, by the arm's name. Rounds kept from other models or other sources do not count."""
    digests = {arm.name: fingerprint(CompiledModel.load(arm.compiled_dir).files) for arm in arms}
    key = {"preset": preset, "arms": digests, "sources": dict(sources)}
    say(f"{rounds} rounds of {len(arms)} arms, about {estimate_s(len(arms), preset, rounds) / 60:.0f} minutes")
    measured = []
    for index in range(rounds):
        make = functools.partial(_round, arms, preset, index, out_dir)
        measured.append(kept(out_dir / f"round-{index:02}.json", key, make))
        say(f"round {index + 1} of {rounds}")
    return {arm.name: joined([validate(one[arm.name]) for one in measured]) for arm in arms}


def estimate_s(num_arms: int, preset: str, rounds: int) -> float:
    """Seconds on a quiet machine: latency, and throughput in a quarter of the window."""
    config = PRESETS[preset]
    return rounds * num_arms * (1.25 * (config.warmup_s + config.min_s) + 2 * START_S)


def joined(records: Sequence[Record]) -> Record:
    """One record over rounds of one launch each. Estimates that need every raw sample are None."""
    first = records[0]
    launches = tuple(replace(record.launches[0], i=i) for i, record in enumerate(records))
    p50s_us = [launch.lat_us.p50 for launch in launches]
    summary = replace(
        first.summary,
        p25_us=float(np.median([launch.lat_us.p25 for launch in launches])),
        p50_us=float(np.median(p50s_us)),
        ci95=median_interval(p50s_us),
        fps=float(np.median([record.summary.fps for record in records])),
        es_p90_us=None,
        es_p99_us=None,
        load_ms=float(np.median([launch.load_ms for launch in launches])),
        first_ms=float(np.median([launch.first_ms for launch in launches])),
    )
    validity = validity_of(launches, first.env.flags)
    return replace(
        first, launches=launches, summary=summary, validity=validity, device=None
    )  # its own clock: one round only


def p25s_us(record: Record) -> list[float]:
    """The quietest statistic between launches, in the order of the rounds."""
    return [launch.lat_us.p25 for launch in record.launches]


def _round(arms: Sequence[Arm], preset: str, index: int, out_dir: Path) -> dict[str, Any]:
    records = measure_arms(
        Local(), arms, preset=preset, launches=1, seed=index, throughput=False, out_dir=out_dir / f"round-{index:02}"
    )
    return {arm.name: record.to_json() for arm, record in zip(arms, records, strict=True)}
