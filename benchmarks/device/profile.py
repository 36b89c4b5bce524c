"""Where the time of a run goes: each layer's, as the runtime's own profiler counts it, beside the latency without it.

Reads a compiled model, writes nothing. Works in blocks: each loads a session with the profiler, warms it, times its runs,
and then times as many of a session without, so that both see the same machine. A layer's time is the median over the blocks:
one that was disturbed does not count.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.environment import snapshot
from benchmarks.device.isa import instruction_set
from benchmarks.device.measure import synthetic_batch
from benchmarks.device.timing import Query, measure_latency_ns
from targets import make_target
from targets.base import Batch, CompiledModel, LayerTime, LayerTimer, ProfiledSession, Session, Target
from targets.checks import smallest_batch
from targets.errors import TargetError

CPUINFO = Path("/proc/cpuinfo")
MIN_RUNS, MAX_RUNS = 3, 100  # timed in a block, or warming it: ONNX Runtime writes 750 bytes an operator and run


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How long is looked. A block times `block_s` with the profiler and as many runs without."""

    num_blocks: int
    warmup_s: float
    block_s: float


DEPTHS = {
    "smoke": Depth(num_blocks=3, warmup_s=0.05, block_s=0.1),
    "ci": Depth(num_blocks=7, warmup_s=0.2, block_s=0.5),
    "release": Depth(num_blocks=15, warmup_s=0.5, block_s=1.0),
}


@dataclass(frozen=True)
class Block:
    """What one block saw. `psi_cpu` is the share of its timed runs in which some task waited for a CPU, percent."""

    layers: tuple[LayerTime, ...]
    profiled_ns: array[int]
    plain_ns: array[int]
    psi_cpu: float | None


def profile(compiled_dir: Path, depth: Depth, *, seed: int = 0) -> dict[str, Any]:
    """Profile one model at its smallest batch on seeded synthetic input; times in microseconds a run, MACs a run.

    Raises TargetError for a target that does not time layers, IntegrityError for files that are not those of the compile.
    """
    compiled = CompiledModel.load(compiled_dir)
    target = make_target(compiled.target, compiled.options)
    timer = layer_timer(target)
    batch = smallest_batch(compiled.inputs)
    plain = target.load(compiled, batch=batch)
    feeds = synthetic_batch(plain.inputs, batch, seed)
    query = functools.partial(plain.run, feeds)
    run_ns = float(np.median(measure_latency_ns(query, min_s=depth.warmup_s, min_queries=MIN_RUNS)))
    num_warm, num_runs = (_fitting(seconds, run_ns) for seconds in (depth.warmup_s, depth.block_s))
    blocks, source, resolution_us = [], "", 0.0
    for _ in range(depth.num_blocks):
        profiled = timer.load_profiled(compiled, batch=batch)
        blocks.append(measure_block(plain, profiled, feeds, num_warm=num_warm, num_runs=num_runs))
        source, resolution_us = profiled.source, profiled.resolution_us
    return {
        "source": source,
        "resolution_us": resolution_us,
        "batch": batch,
        "num_blocks": len(blocks),
        "num_runs": num_runs * len(blocks),
        "isa": asdict(instruction_set(_text(CPUINFO))),
        **summary(blocks),
    }


def layer_timer(target: Target) -> LayerTimer:
    """The same target as one that times layers; raises TargetError for one that does not."""
    if not isinstance(target, LayerTimer):
        raise TargetError(
            f"target '{target.name}' does not time single layers: its runtime has no profiler, or the target does not use it. "
            "Measure the whole model with edgestill bench, or profile it on another target."
        )
    return target


def measure_block(plain: Session, profiled: ProfiledSession, feeds: Batch, *, num_warm: int, num_runs: int) -> Block:
    """Time `num_runs` with the profiler, then as many without; each after `num_warm` that are not reported."""
    profiled_query, plain_query = functools.partial(profiled.run, feeds), functools.partial(plain.run, feeds)
    measure_latency_ns(profiled_query, min_s=0.0, min_queries=num_warm)
    profiled.start()
    profiled_ns, waited = _timed(profiled_query, num_runs)
    layers = profiled.layer_times()
    measure_latency_ns(plain_query, min_s=0.0, min_queries=num_warm)
    plain_ns, waited_too = _timed(plain_query, num_runs)
    known = [one for one in (waited, waited_too) if one is not None]
    return Block(layers, profiled_ns, plain_ns, max(known, default=None))


def _timed(query: Query, num_runs: int) -> tuple[array[int], float | None]:
    """(nanoseconds of each run, percent of the time in which some task waited for a CPU)."""
    before = snapshot([])
    samples_ns = measure_latency_ns(query, min_s=0.0, min_queries=num_runs)
    return samples_ns, snapshot([]).telemetry_since(before).psi_cpu


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """Over the blocks: the median and the least time of each layer, and the p50 of the runs with and without profiler."""
    layers = _merged([block.layers for block in blocks])
    waited = [block.psi_cpu for block in blocks if block.psi_cpu is not None]
    return {
        "layers": layers,
        "total_us": sum(layer["time_us"] for layer in layers),
        "p50_us": _p50_us([block.plain_ns for block in blocks]),
        "profiled_p50_us": _p50_us([block.profiled_ns for block in blocks]),
        "psi_cpu": float(np.median(waited)) if waited else None,
    }


def _merged(blocks: Sequence[tuple[LayerTime, ...]]) -> list[dict[str, Any]]:
    """A name that stands several times in one block is told apart by its place among its like."""
    found: dict[tuple[str, int], list[LayerTime]] = {}
    for layers in blocks:
        seen: dict[str, int] = {}
        for layer in layers:
            place = seen[layer.name] = seen.get(layer.name, 0) + 1
            found.setdefault((layer.name, place), []).append(layer)
    return [
        {
            **asdict(same[0]),
            "time_us": float(np.median([layer.time_us for layer in same])),
            "min_us": min(layer.time_us for layer in same),
        }
        for same in found.values()
    ]


def _fitting(seconds: float, run_ns: float) -> int:
    return min(max(round(seconds * 1e9 / max(run_ns, 1.0)), MIN_RUNS), MAX_RUNS)


def _p50_us(samples_ns: Sequence[array[int]]) -> float:
    return float(np.median(np.concatenate([np.asarray(one, dtype=np.float64) for one in samples_ns]))) / 1e3


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
