"""One launch: load a compiled model in this fresh process, warm it up, time it, keep every sample.

Reads a compiled model and, where there is one, an evaluation set. Writes the raw samples as .npy (int64 nanoseconds, in
call order). Percentiles over several launches belong to the host's `benchmarks/statistics.py`.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device import energy, memory
from benchmarks.device.environment import Snapshot, snapshot, temperature_c
from benchmarks.device.evaluate import batch_of, evaluation_for, padded, pixels_of
from benchmarks.device.preprocess import to_input
from benchmarks.device.record import Energy, Memory, Telemetry, count_flags, disturbances_of, latency_of
from targets import make_target
from targets.base import Array, Batch, CompiledModel, Preprocessing, Session, TensorSpec
from targets.errors import MeasurementError

Query = Callable[[], object]
Clock = Callable[[], int]

BLOCK_NS = 500_000_000  # the warm-up compares the medians of blocks this long
NULL_QUERIES = 20_000  # the harness's own overhead is the median of so many calls that do nothing
OFFLINE_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How long a launch is, and how many launches make a measurement."""

    name: str
    warmup_s: float
    settle: float | None  # warm until the medians of two blocks agree within this share ...
    warmup_cap_s: float  # ... or so much time is spent
    min_s: float
    min_queries: int
    max_s: float  # a slow model stops here with fewer queries; its percentiles are then null
    launches: int
    cool_down_s: float  # at most, waiting for the temperature of the first launch + 2 C
    idle_s: float  # how long the machine's idle power is read; 0: no baseline

    def shortened(self) -> Preset:
        """A quarter of the window, for what is measured beside the latency: host_e2e and throughput."""
        return replace(self, min_s=self.min_s / 4, min_queries=64, warmup_s=self.warmup_s / 4, settle=None)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            warmup_s=0.5,
            settle=None,
            warmup_cap_s=0.5,
            min_s=1.0,
            min_queries=64,
            max_s=10.0,
            launches=3,
            cool_down_s=0.0,
            idle_s=0.0,
        ),
        Preset(
            name="ci",
            warmup_s=2.0,
            settle=0.01,
            warmup_cap_s=30.0,
            min_s=10.0,
            min_queries=662,
            max_s=100.0,
            launches=10,
            cool_down_s=60.0,
            idle_s=0.0,
        ),
        Preset(
            name="release",
            warmup_s=2.0,
            settle=0.01,
            warmup_cap_s=30.0,
            min_s=60.0,
            min_queries=6636,
            max_s=600.0,
            launches=20,
            cool_down_s=300.0,
            idle_s=10.0,
        ),
    )
}


def measure_latency_ns(
    query: Query, *, min_s: float, min_queries: int, max_s: float = math.inf, clock_ns: Clock = time.perf_counter_ns
) -> array[int]:
    """Time calls one after another until `min_s` and `min_queries` are both reached, or `max_s`; in call order.

    Two stamps a call, nothing else between them; the collector is off. At least one call is made. Int64, 8 bytes a
    sample: a list would take 40, which is 400 MB for a minute of a quick model.
    """
    samples_ns = array("q", [0]) * max(min_queries, 1)
    num_done = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = now = clock_ns()
        enough, limit = begin + round(min_s * 1e9), begin + max_s * 1e9
        while num_done == 0 or ((now < enough or num_done < min_queries) and now < limit):
            if num_done == len(samples_ns):
                samples_ns.extend(samples_ns)  # outside of the stamps; doubles, so it is rare
            start = clock_ns()
            query()
            now = clock_ns()
            samples_ns[num_done] = now - start
            num_done += 1
    finally:
        if collecting:
            gc.enable()
    return samples_ns[:num_done]


def warm_up(query: Query, preset: Preset, clock_ns: Clock = time.perf_counter_ns) -> tuple[float, bool]:
    """Call until the preset's time is over and two blocks agree; returns (seconds, whether they agreed)."""
    begin = clock_ns()
    previous = 0.0
    settled = preset.settle is None
    while (elapsed_s := (clock_ns() - begin) / 1e9) < preset.warmup_s or not settled:
        if elapsed_s >= max(preset.warmup_cap_s, preset.warmup_s):
            break
        block_s = min(BLOCK_NS / 1e9, preset.warmup_s)
        median = float(np.median(measure_latency_ns(query, min_s=block_s, min_queries=1, clock_ns=clock_ns)))
        if preset.settle is not None:
            settled = abs(median - previous) <= preset.settle * previous
        previous = median
    return elapsed_s, settled


def null_overhead_us(clock_ns: Clock = time.perf_counter_ns) -> float:
    """Median of the same loop around a call that does nothing, in microseconds: what the harness adds to each sample."""
    samples = measure_latency_ns(_nothing, min_s=0.0, min_queries=NULL_QUERIES, clock_ns=clock_ns)
    return float(np.median(samples)) / 1e3


@dataclass(frozen=True)
class EncodedToLabel:
    """The whole way of one image: encoded bytes -> decode -> resize and crop -> input tensor -> logits -> class id."""

    session: Session
    encoded: Iterator[bytes]
    preprocessing: Preprocessing

    def __call__(self) -> int:
        x_NCHW = pixels_of(next(self.encoded), self.preprocessing)
        spec = self.session.inputs[0]
        outputs = self.session.run({spec.name: to_input(x_NCHW, self.preprocessing, spec)})
        return int(np.argmax(outputs[self.session.outputs[0].name]))


def measure_launch(
    compiled_dir: Path,
    preset: Preset,
    *,
    boundary: str,
    samples_path: Path,
    evaluation_dir: Path | None = None,
    start_temp_c: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure one launch; returns the fields of a record's launch that this process knows.

    `boundary`: runtime times the session's call on one batch of one; host_e2e times encoded bytes to label and needs an
    evaluation set with encoded samples. Raises MeasurementError where a boundary has nothing to measure.
    """
    flags: list[str] = []
    baseline_mib = memory.resident_mib(flags)
    compiled = CompiledModel.load(compiled_dir)
    memory.reset_peak(flags)
    query, load_ms, first_ms = _cold_start(compiled, boundary, evaluation_dir, seed)
    overhead_us = null_overhead_us()
    cool_down(start_temp_c, preset.cool_down_s, flags)
    idle_w = energy.idle_watts(preset.idle_s, flags) if preset.idle_s else None
    warmup_s, settled = warm_up(query, preset)
    if not settled:
        flags.append(f"warm-up: not settled within {preset.warmup_cap_s:g} s")
    used_memory = memory.read_memory(baseline_mib, flags)  # before the samples, which are not the model's

    rails_before, before = energy.read_rails(flags), snapshot(flags)
    samples_ns = measure_latency_ns(query, min_s=preset.min_s, min_queries=preset.min_queries, max_s=preset.max_s)
    after, rails_after = snapshot([]), energy.read_rails([])

    with samples_path.open("wb") as file:  # np.save would append .npy to another name
        np.save(file, np.asarray(samples_ns, dtype=np.int64))
    wall_s = after.monotonic_s - before.monotonic_s
    used = energy.energy_of(rails_before, rails_after, num_queries=len(samples_ns), wall_s=wall_s, idle_w=idle_w)
    report = {"load_ms": load_ms, "first_ms": first_ms, "warmup_s": warmup_s, "overhead_us": overhead_us}
    return report | _window(samples_ns, before, after, used_memory, used, flags)


def measure_throughput(compiled_dir: Path, preset: Preset, *, seed: int = 0) -> dict[str, Any]:
    """Offline: samples a second back to back; batch OFFLINE_BATCH where the graph leaves the batch free, else its own."""
    compiled = CompiledModel.load(compiled_dir)
    batch = batch_of(compiled.inputs, OFFLINE_BATCH)
    session = _load(compiled, batch)
    query = functools.partial(session.run, synthetic_batch(session.inputs, batch, seed))
    warm_up(query, preset)
    samples = measure_latency_ns(query, min_s=preset.min_s, min_queries=1, max_s=preset.max_s)
    return {"fps": batch * len(samples) / (sum(samples) / 1e9), "batch": batch, "n": batch * len(samples)}


def cool_down(
    start_temp_c: float | None,
    cap_s: float,
    flags: list[str],
    *,
    read_c: Callable[[list[str]], float | None] = temperature_c,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait, at most `cap_s`, until the machine is within 2 C of where the first launch began."""
    waited_s = 0.0
    if start_temp_c is None or cap_s <= 0:
        return
    while (now_c := read_c(flags)) is not None and now_c > start_temp_c + 2.0:
        if waited_s >= cap_s:
            flags.append(
                f"cool-down: still {now_c:.0f} C after {cap_s:g} s, the first launch began at {start_temp_c:.0f} C"
            )
            return
        sleep(1.0)
        waited_s += 1.0


def synthetic_batch(inputs: Iterable[TensorSpec], batch: int, seed: int) -> dict[str, Array]:
    """Seeded values for every input: all of uint8's range, 0 and 1 for other integers, [0, 1) for floats."""
    generator = np.random.default_rng(seed)
    return {spec.name: _synthetic(spec, batch, generator) for spec in inputs}


def _cold_start(
    compiled: CompiledModel, boundary: str, evaluation_dir: Path | None, seed: int
) -> tuple[Query, float, float]:
    """(query, load_ms, first_ms): the runtime's import counts as load, the first call is the first inference."""
    begin = time.perf_counter_ns()
    session = _load(compiled, batch_of(compiled.inputs, 1))
    loaded = time.perf_counter_ns()
    query = _query(session, compiled, boundary, evaluation_dir, seed)
    first = measure_latency_ns(query, min_s=0.0, min_queries=1)
    return query, (loaded - begin) / 1e6, first[0] / 1e6


def _load(compiled: CompiledModel, batch: int) -> Session:
    return make_target(compiled.target, compiled.options).load(compiled, batch=batch)


def _query(session: Session, compiled: CompiledModel, boundary: str, evaluation_dir: Path | None, seed: int) -> Query:
    if boundary == "runtime":
        return functools.partial(session.run, _one_batch(session, compiled, evaluation_dir, seed))
    if evaluation_dir is None:
        raise MeasurementError("boundary host_e2e: no evaluation set was given. Name one, or measure boundary runtime.")
    evaluation = evaluation_for(compiled, evaluation_dir)
    encoded = evaluation.encoded()
    if not encoded:
        raise MeasurementError(f"{evaluation_dir} has no encoded samples to time. Measure boundary runtime instead.")
    return EncodedToLabel(session, itertools.cycle(encoded), evaluation.preprocessing)


def _one_batch(session: Session, compiled: CompiledModel, evaluation_dir: Path | None, seed: int) -> Batch:
    """The first real sample where there is an evaluation set (sparsity can decide a latency), else synthetic values."""
    batch = batch_of(compiled.inputs, 1)
    if evaluation_dir is None:
        return synthetic_batch(session.inputs, batch, seed)
    spec = session.inputs[0]
    x = next(evaluation_for(compiled, evaluation_dir).batches(batch, spec))
    return {spec.name: padded(x, batch)}


def _window(
    samples_ns: array[int],
    before: Snapshot,
    after: Snapshot,
    used_memory: Memory,
    used_energy: Energy,
    flags: list[str],
) -> dict[str, Any]:
    telemetry: Telemetry = after.telemetry_since(before)
    counters: dict[str, Any] = {
        "wall_s": after.monotonic_s - before.monotonic_s,
        "cpu_s": after.cpu_s - before.cpu_s,
        "nivcsw": after.nivcsw - before.nivcsw,
        "majflt": after.majflt - before.majflt,
    }
    return {
        "n": len(samples_ns),
        "lat_us": asdict(latency_of(samples_ns)),
        **counters,
        "memory": asdict(used_memory),
        "energy": asdict(used_energy),
        "telemetry": asdict(telemetry),
        "disturbances": list(disturbances_of(samples_ns, telemetry=telemetry, **counters)),
        "flags": [*dict.fromkeys(flags), *count_flags(len(samples_ns))],
    }


def _synthetic(spec: TensorSpec, batch: int, generator: np.random.Generator) -> Array:
    shape, dtype = spec.fixed(batch), np.dtype(spec.dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind in "iub":
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.random(shape, dtype=np.float32).astype(dtype)


def _nothing() -> None:
    return None
