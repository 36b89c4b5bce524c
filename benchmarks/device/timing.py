"""The stop watch: one loop that times calls, and a busy wait of a known size to try it on.

A clock that stands still, runs backwards or leaps ends the loop early; what it measured is returned as it is, and
`benchmarks/device/disturbances.py` says what is wrong with it.
"""

from __future__ import annotations

import gc
import math
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from targets.errors import MeasurementError

Query = Callable[[], object]
Clock = Callable[[], int]

STALLED = 1024  # calls in which a clock that goes has moved on


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
        begin = start = now = looked = clock_ns()
        enough, limit = begin + round(min_s * 1e9), begin + max_s * 1e9
        while num_done == 0 or ((now < enough or num_done < min_queries) and begin <= start <= now < limit):
            if num_done == len(samples_ns):  # outside of the stamps, and rare: the room doubles
                if now <= looked and num_done >= STALLED:
                    break
                looked = now
                samples_ns.extend(samples_ns)
            start = clock_ns()
            query()
            now = clock_ns()
            samples_ns[num_done] = now - start
            num_done += 1
    finally:
        if collecting:
            gc.enable()
    return samples_ns[:num_done]


def elapsed_ms(begin_ns: int, end_ns: int, what: str) -> float:
    """Milliseconds between two stamps; raises MeasurementError where the clock did not move on."""
    if end_ns <= begin_ns:
        raise MeasurementError(
            f"{what} took {(end_ns - begin_ns) / 1e6:g} ms by this machine's clock, which stands still or runs backwards. "
            "Measure on a machine whose monotonic clock can be trusted."
        )
    return (end_ns - begin_ns) / 1e6


@dataclass(frozen=True)
class Slowed:
    """A query and, after it, a busy wait of `wait_ns` on the clock that times it: a slow-down of a known size."""

    query: Query
    wait_ns: int
    clock_ns: Clock = time.perf_counter_ns

    def __call__(self) -> object:
        answer = self.query()
        clock_ns = self.clock_ns
        enough = clock_ns() + self.wait_ns
        while clock_ns() < enough:
            pass
        return answer
