"""The boundary `device`: a run by the runtime's own clock, in a pass of its own after the timed window.

Our stop watch stands around the same calls, so that each pair of times says what the binding, the copy of the input and the
harness add to that run. A runtime without such a clock, or one whose pass fails, leaves None and the reason in `flags`.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np

from benchmarks.device.disturbances import positive
from benchmarks.device.record import DeviceTime, latency_of
from benchmarks.device.timing import Clock, measure_latency_ns
from targets import make_target
from targets.base import Array, Batch, Clocked, ClockedSession, CompiledModel

NUM_WARM, NUM_QUERIES = 20, 200  # ONNX Runtime's profiler writes 750 bytes an operator and run


def device_time(
    compiled: CompiledModel,
    feeds: Batch,
    *,
    batch: int,
    max_s: float,
    flags: list[str],
    samples_path: Path | None = None,
    clock_ns: Clock = time.perf_counter_ns,
) -> DeviceTime | None:
    """NUM_QUERIES runs, or as many as `max_s` allows; `samples_path` gets the runtime's own times, int64 nanoseconds."""
    target = make_target(compiled.target, compiled.options)
    if not isinstance(target, Clocked):
        flags.append(f"device: target '{target.name}' tells no clock of its runtime's own around a run")
        return None
    try:
        session = target.load_clocked(compiled, batch=batch)
        own_us, outer_us = _both_us(session, feeds, max_s, clock_ns)
    except Exception as error:  # the runtimes' own classes: what was measured before is not lost for them
        flags.append(f"device: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    if len(own_us) == 0 or len(own_us) != len(outer_us) or own_us.min() <= 0:
        flags.append(f"device: {session.clock} told {len(own_us)} times above zero of {len(outer_us)} runs")
        return None
    own_ns = np.rint(own_us * 1e3).astype(np.int64)
    if samples_path is not None:
        with samples_path.open("wb") as file:
            np.save(file, own_ns)
    return DeviceTime(
        clock=session.clock,
        slowed=session.slowed,
        n=len(own_ns),
        lat_us=latency_of(own_ns),
        outer_p50_us=float(np.median(outer_us)),
        gap_us=float(np.median(outer_us - own_us)),
    )


def _both_us(session: ClockedSession, feeds: Batch, max_s: float, clock_ns: Clock) -> tuple[Array, Array]:
    """(the runtime's own, ours) of the same runs, those that warm it up left out."""
    query = functools.partial(session.run, feeds)
    warm = measure_latency_ns(query, min_s=0.0, min_queries=NUM_WARM, max_s=max_s / 4, clock_ns=clock_ns)
    outer_ns = measure_latency_ns(query, min_s=0.0, min_queries=NUM_QUERIES, max_s=max_s, clock_ns=clock_ns)
    own_us = np.asarray(session.run_times_us()[len(warm) :], dtype=np.float64)
    good = positive(outer_ns)
    return own_us, (good if len(good) == len(outer_ns) else np.zeros(0)) / 1e3
