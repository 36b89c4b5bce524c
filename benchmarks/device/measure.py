"""One launch: load a compiled model in this fresh process, warm it up, time it, keep every sample.

Reads a compiled model and, where there is one, an evaluation set. Writes the raw samples as .npy (int64 nanoseconds, in
call order). Percentiles over several launches belong to the host's `benchmarks/statistics.py`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device import energy, gpu, jetson, memory
from benchmarks.device.environment import temperature_c
from benchmarks.device.evaluate import batch_of, evaluation_for, padded, pixels_of
from benchmarks.device.overhead import loop_overhead, overhead_flags
from benchmarks.device.own_clock import device_time
from benchmarks.device.preprocess import to_input
from benchmarks.device.record import Memory, Overhead, count_flags
from benchmarks.device.sampler import Sampler, probes
from benchmarks.device.timing import Clock, Query, Slowed, elapsed_ms, measure_latency_ns
from benchmarks.device.window import Length, Worker, time_window
from targets import make_target
from targets.base import Array, Batch, CompiledModel, Preprocessing, Session, TensorSpec
from targets.errors import MeasurementError

BLOCK_NS = 500_000_000  # the warm-up compares the medians of blocks this long
OFFLINE_BATCH = 32
MEMORY_RUNS = 10  # the first may allocate more, or less, than the next
ROOT = Path("/")


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
    retries: int  # how often a disturbed launch is measured again before it is kept and marked

    @property
    def length(self) -> Length:
        return Length(min_s=self.min_s, min_queries=self.min_queries, max_s=self.max_s)

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
            retries=0,
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
            retries=2,
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
            retries=2,
        ),
    )
}


def warm_up(query: Query, preset: Preset, clock_ns: Clock = time.perf_counter_ns) -> tuple[float, bool]:
    """Call until the preset's time is over and two blocks agree; returns (seconds, whether they agreed).

    A clock that does not move on over a block ends it: nothing will ever agree.
    """
    begin = clock_ns()
    previous = elapsed_s = 0.0
    settled = preset.settle is None
    while elapsed_s < preset.warmup_s or not settled:
        if elapsed_s >= max(preset.warmup_cap_s, preset.warmup_s):
            break
        block_s = min(BLOCK_NS / 1e9, preset.warmup_s)
        median = float(np.median(measure_latency_ns(query, min_s=block_s, min_queries=1, clock_ns=clock_ns)))
        if preset.settle is not None:
            settled = abs(median - previous) <= preset.settle * previous
        previous = median
        before_s, elapsed_s = elapsed_s, (clock_ns() - begin) / 1e9
        if elapsed_s <= before_s:
            return max(before_s, 0.0), False
    return elapsed_s, settled


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
    device_samples_path: Path | None = None,
    start_temp_c: float | None = None,
    seed: int = 0,
    injected_us: float | None = None,
) -> dict[str, Any]:
    """Measure one launch; returns the fields of a record's launch that this process knows.

    `boundary`: runtime times the session's call on one batch of one, and after it the runtime's own clock (`device`, its samples
    to `device_samples_path`); host_e2e times encoded bytes to label and needs an evaluation set with encoded samples.
    `injected_us` waits so long inside each timed call and says so. Raises MeasurementError where a boundary has nothing to
    measure, or the clock measured nothing at all.
    """
    flags: list[str] = []
    compiled = CompiledModel.load(compiled_dir)
    memory_before = begin_memory(flags)
    loaded = cold_start(compiled, boundary, evaluation_dir, seed)
    query, loop = slowed(loaded.query, injected_us, flags), loop_overhead()
    cool_down(start_temp_c, preset.cool_down_s, flags)
    idle_w = idle_watts(preset.idle_s, flags) if preset.idle_s else None
    with Sampler([*probes(ROOT), *jetson.rail_probes(ROOT)], flags) as sampler:
        warmup_s, settled = warm_up(query, preset)
        if not settled:
            flags.append(f"warm-up: not settled within {preset.warmup_cap_s:g} s")
        used_memory = memory.read_memory(
            memory_before.resident_mib, flags
        )  # before the samples, which are not the model's
        timed = time_window(query, preset.length, Worker.of(compiled), flags, sampler=sampler)
    with samples_path.open("wb") as file:  # np.save would append .npy to another name
        np.save(file, np.asarray(timed.samples_ns, dtype=np.int64))
    overhead = Overhead(**loop, closure_us=timed.closure_us)
    answer = timed.answer(idle_w, flags)
    answer["memory"] = asdict(end_memory(used_memory, memory_before, compiled, flags))
    answer["device"] = _device_answer(compiled, loaded, preset, device_samples_path, flags)
    return {
        "load_ms": loaded.load_ms,
        "first_ms": loaded.first_ms,
        "warmup_s": warmup_s,
        "overhead_us": overhead.null_us,
        "overhead": asdict(overhead),
        **answer,
        "flags": [*dict.fromkeys([*flags, *overhead_flags(overhead)]), *count_flags(len(timed.good_ns))],
    }


def slowed(query: Query, injected_us: float | None, flags: list[str]) -> Query:
    """The query, with a busy wait in it where that is wanted, and said."""
    if injected_us is None:
        return query
    flags.append(f"injected: a busy wait of {injected_us:g} us in every timed call, on purpose. Never ship on this")
    return Slowed(query, round(injected_us * 1e3))


def measure_throughput(compiled_dir: Path, preset: Preset, *, seed: int = 0) -> dict[str, Any]:
    """Offline: samples a second back to back; batch OFFLINE_BATCH where the graph leaves the batch free, else its own."""
    flags: list[str] = []
    compiled = CompiledModel.load(compiled_dir)
    batch = batch_of(compiled.inputs, OFFLINE_BATCH)
    session = _load(compiled, batch)
    query = functools.partial(session.run, synthetic_batch(session.inputs, batch, seed))
    warm_up(query, preset)
    timed = time_window(query, replace(preset.length, min_queries=1), Worker.of(compiled), flags)
    num_samples = batch * len(timed.good_ns)
    return {
        "fps": num_samples / (float(timed.good_ns.sum()) / 1e9),
        "batch": batch,
        "n": num_samples,
        "disturbances": list(timed.disturbances),
    }


def measure_memory(compiled_dir: Path, options: dict[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """The peak of a process that loads the model with other `options` and runs it a few times: nothing is timed."""
    flags: list[str] = []
    compiled = CompiledModel.load(compiled_dir)
    compiled = replace(compiled, options={**compiled.options, **options})
    before = begin_memory(flags)
    batch = batch_of(compiled.inputs, 1)
    session = _load(compiled, batch)
    feeds = synthetic_batch(session.inputs, batch, seed)
    for _ in range(MEMORY_RUNS):
        session.run(feeds)
    used = memory.read_memory(before.resident_mib, flags)
    return {"memory": asdict(end_memory(used, before, compiled, flags)), "flags": flags}


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


def idle_watts(seconds: float, flags: list[str]) -> float | None:
    """By the meter that the machine has."""
    return jetson.idle_watts(seconds) if jetson.rails() else energy.idle_watts(seconds, flags)


def synthetic_batch(inputs: Iterable[TensorSpec], batch: int, seed: int) -> dict[str, Array]:
    """Seeded values for every input: all of uint8's range, 0 and 1 for other integers, [0, 1) for floats."""
    generator = np.random.default_rng(seed)
    return {spec.name: _synthetic(spec, batch, generator) for spec in inputs}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in this process after its first run; `feeds` None where the query makes its own input."""

    query: Query
    feeds: Batch | None
    batch: int
    load_ms: float
    first_ms: float


def cold_start(
    compiled: CompiledModel,
    boundary: str,
    evaluation_dir: Path | None,
    seed: int,
    clock_ns: Clock = time.perf_counter_ns,
) -> Loaded:
    """The runtime's import counts as load, the first call is the first inference."""
    batch = batch_of(compiled.inputs, 1)
    begin = clock_ns()
    session = _load(compiled, batch)
    load_ms = elapsed_ms(begin, clock_ns(), "loading the model")
    feeds = _one_batch(session, batch, compiled, evaluation_dir, seed) if boundary == "runtime" else None
    query = (
        functools.partial(session.run, feeds) if feeds is not None else _whole_way(session, compiled, evaluation_dir)
    )
    first = measure_latency_ns(query, min_s=0.0, min_queries=1, clock_ns=clock_ns)
    return Loaded(
        query=query, feeds=feeds, batch=batch, load_ms=load_ms, first_ms=elapsed_ms(0, first[0], "the first run")
    )


@dataclass(frozen=True)
class MemoryBefore:
    """What was in use before the runtime was imported and the model loaded."""

    resident_mib: float | None
    shared_gpu_mib: float | None


def begin_memory(flags: list[str]) -> MemoryBefore:
    before = MemoryBefore(memory.resident_mib(flags), gpu.shared_mib())
    memory.reset_peak(flags)
    return before


def end_memory(used: Memory, before: MemoryBefore, compiled: CompiledModel, flags: list[str]) -> Memory:
    """With the GPU's share, which is read after the window: to ask for it starts a driver client."""
    gpu_mib, gpu_source = gpu.gpu_memory(before.shared_gpu_mib, flags)
    return replace(used, gpu_mib=gpu_mib, gpu_source=gpu_source, arena=compiled.options.get("arena"))


def _device_answer(
    compiled: CompiledModel, loaded: Loaded, preset: Preset, samples_path: Path | None, flags: list[str]
) -> dict[str, Any] | None:
    if loaded.feeds is None:
        return None
    own = device_time(
        compiled, loaded.feeds, batch=loaded.batch, max_s=preset.min_s, flags=flags, samples_path=samples_path
    )
    return None if own is None else asdict(own)


def _load(compiled: CompiledModel, batch: int) -> Session:
    return make_target(compiled.target, compiled.options).load(compiled, batch=batch)


def _whole_way(session: Session, compiled: CompiledModel, evaluation_dir: Path | None) -> EncodedToLabel:
    if evaluation_dir is None:
        raise MeasurementError("boundary host_e2e: no evaluation set was given. Name one, or measure boundary runtime.")
    evaluation = evaluation_for(compiled, evaluation_dir)
    encoded = evaluation.encoded()
    if not encoded:
        raise MeasurementError(f"{evaluation_dir} has no encoded samples to time. Measure boundary runtime instead.")
    return EncodedToLabel(session, itertools.cycle(encoded), evaluation.preprocessing)


def _one_batch(session: Session, batch: int, compiled: CompiledModel, evaluation_dir: Path | None, seed: int) -> Batch:
    """The first real sample where there is an evaluation set (sparsity can decide a latency), else synthetic values."""
    if evaluation_dir is None:
        return synthetic_batch(session.inputs, batch, seed)
    spec = session.inputs[0]
    x = next(evaluation_for(compiled, evaluation_dir).batches(batch, spec))
    return {spec.name: padded(x, batch)}


def _synthetic(spec: TensorSpec, batch: int, generator: np.random.Generator) -> Array:
    shape, dtype = spec.fixed(batch), np.dtype(spec.dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind in "iub":
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.random(shape, dtype=np.float32).astype(dtype)
