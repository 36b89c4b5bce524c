"""What the stop watch adds to a sample and to an iteration, and whether it gives back a wait of a known size.

Every launch measures it before its warm-up, 40 ms in all, and its record holds it: a reader need not trust another machine's
figures. Limits: facts of a Python loop on a desktop or server CPU; a small board may exceed them, and its record then says so.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.device.record import Overhead
from benchmarks.device.timing import Clock, Query, Slowed, measure_latency_ns
from targets.base import Array, Batch, TensorSpec

NULL_QUERIES = 20_000
SPINS_US = {100: 50, 1000: 20}  # microseconds of a busy wait -> calls
MAX_NULL_US, MAX_NULL_WALL_US, MAX_CLOSURE_US, MAX_SPIN_ERROR = 1.0, 2.0, 2.0, 0.01


class NullSession:
    """A session that answers with nothing at once: what is measured of it is the stop watch."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def run(self, batch: Batch) -> Mapping[str, Array]:
        return batch


NULL: Query = functools.partial(NullSession().run, {})


def null_overhead_us(query: Query = NULL, clock_ns: Clock = time.perf_counter_ns) -> tuple[float, float]:
    """(p50 of a null session's run, an iteration of its loop on the wall), in microseconds."""
    begin = clock_ns()
    samples_ns = measure_latency_ns(query, min_s=0.0, min_queries=NULL_QUERIES, clock_ns=clock_ns)
    return float(np.median(samples_ns)) / 1e3, (clock_ns() - begin) / len(samples_ns) / 1e3


def loop_overhead(query: Query = NULL, clock_ns: Clock = time.perf_counter_ns) -> dict[str, float]:
    """Every field of an Overhead but the closure, which belongs to a window. `query` is what waits are added to."""
    null_us, null_wall_us = null_overhead_us(query, clock_ns)
    spins = {f"spin_{wait_us}_us": spin_us(wait_us, calls, query, clock_ns) for wait_us, calls in SPINS_US.items()}
    return {"null_us": null_us, "null_wall_us": null_wall_us, **spins}


def spin_us(wait_us: float, calls: int, query: Query = NULL, clock_ns: Clock = time.perf_counter_ns) -> float:
    """What a busy wait is measured as: p50 of the query with it less p50 of the query alone."""
    slowed = Slowed(query, round(wait_us * 1e3), clock_ns)
    with_wait, alone = (
        float(np.median(measure_latency_ns(one, min_s=0.0, min_queries=calls, clock_ns=clock_ns)))
        for one in (slowed, query)
    )
    return (with_wait - alone) / 1e3


def closure_us(samples_ns: Sequence[int], wall_ns: int) -> float:
    """(wall - sum of the samples) / n: what of a loop's time stands in no sample."""
    return (wall_ns - sum(samples_ns)) / len(samples_ns) / 1e3


def overhead_flags(overhead: Overhead) -> list[str]:
    """Each figure beyond its limit."""
    spins = {100: overhead.spin_100_us, 1000: overhead.spin_1000_us}
    checks = [
        (overhead.null_us < MAX_NULL_US, f"a call that does nothing is measured as {overhead.null_us:.2f} us"),
        (overhead.null_wall_us < MAX_NULL_WALL_US, f"an iteration takes {overhead.null_wall_us:.2f} us on the wall"),
        (overhead.closure_us < MAX_CLOSURE_US, f"{overhead.closure_us:.2f} us an iteration stand in no sample"),
    ]
    checks += [
        (abs(measured / wait_us - 1) <= MAX_SPIN_ERROR, f"a wait of {wait_us} us is measured as {measured:.1f} us")
        for wait_us, measured in spins.items()
    ]
    return [f"overhead: {message}" for passed, message in checks if not passed]
