"""The timed window: calls one after another, and what the machine and the process did meanwhile.

Counters are read right before and after, other clocks and temperatures by a sampler in a process of its own.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.device import energy, jetson
from benchmarks.device.disturbances import Window, disturbances_of, positive, slow_clock
from benchmarks.device.environment import Snapshot, locked_gpu_mhz, snapshot, with_readings
from benchmarks.device.overhead import closure_us
from benchmarks.device.record import Samples, Telemetry, latency_of
from benchmarks.device.sampler import CPU, GPU, Reading, Sampler
from benchmarks.device.timing import Clock, Query, measure_latency_ns
from targets import TARGETS
from targets.base import Array, CompiledModel
from targets.errors import MeasurementError

Look = Callable[[list[str]], Snapshot]
Judge = Callable[[Samples, Window, Telemetry], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long is timed: both are reached, or `max_s`."""

    min_s: float
    min_queries: int
    max_s: float


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The runtime as a load on the CPU. `busy`: it computes there, or polls for a device that does; `on_cpu`: the former."""

    num_threads: int = 1
    busy: bool = True
    on_cpu: bool = True

    @classmethod
    def of(cls, compiled: CompiledModel) -> Worker:
        on_cpu = bool(TARGETS[compiled.target].on_cpu)
        threads = compiled.options.get("num_threads")
        busy = on_cpu or bool(compiled.options.get("allow_spinning"))
        return cls(num_threads=max(threads, 1) if isinstance(threads, int) else 1, busy=busy, on_cpu=on_cpu)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One window. `samples_ns` are as the clock gave them, `good_ns` those that a clock can have measured."""

    samples_ns: array[int]
    good_ns: Array
    counters: Window
    closure_us: float
    telemetry: Telemetry
    rails: tuple[energy.Reading | None, energy.Reading | None]
    readings: Sequence[Reading]
    disturbances: tuple[str, ...]

    @property
    def wall_s(self) -> float:
        """By the machine's other clock; by the samples where that one ran backwards, which is among the disturbances."""
        return self.counters.wall_s if self.counters.wall_s > 0 else float(self.good_ns.sum()) / 1e9

    def answer(self, idle_w: float | None, flags: list[str]) -> dict[str, Any]:
        """The fields of a record's launch that a window knows."""
        metered = jetson.sampled_energy(
            self.readings, num_queries=len(self.good_ns), wall_s=self.wall_s, idle_w=idle_w, flags=flags
        )
        used = metered or energy.energy_of(
            *self.rails, num_queries=len(self.good_ns), wall_s=self.wall_s, idle_w=idle_w, flags=flags
        )
        return {
            "n": len(self.good_ns),
            "lat_us": asdict(latency_of(self.good_ns)),
            "wall_s": self.wall_s,
            "cpu_s": self.counters.cpu_s,
            "nivcsw": self.counters.nivcsw,
            "majflt": self.counters.majflt,
            "waited_s": self.counters.waited_s,
            "energy": asdict(used),
            "telemetry": asdict(self.telemetry),
            "disturbances": list(self.disturbances),
        }


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Calls one after another, and the counters right before and after. A window is one, turns are several."""

    samples_ns: array[int]
    wall_ns: int
    before: Snapshot
    after: Snapshot


def time_window(
    query: Query,
    length: Length,
    worker: Worker,
    flags: list[str],
    *,
    sampler: Sampler | None = None,
    clock_ns: Clock = time.perf_counter_ns,
    look: Look = snapshot,
) -> Timed:
    """Time a window. Raises MeasurementError where the clock measured nothing above zero in it."""
    rails_before = None if jetson.is_jetson() else energy.read_rails(flags)  # which has no RAPL, and no need to say so
    stretch = time_stretch(query, length, flags, clock_ns=clock_ns, look=look)
    rails = (rails_before, energy.read_rails([]))
    return timed_of([stretch], worker, flags, disturbances_of, sampler=sampler, rails=rails)


def time_stretch(query: Query, length: Length, flags: list[str], *, clock_ns: Clock, look: Look) -> Stretch:
    """What could not be read of the counters goes to `flags` once."""
    before = look(flags)
    begin_ns = clock_ns()
    samples_ns = measure_latency_ns(
        query, min_s=length.min_s, min_queries=length.min_queries, max_s=length.max_s, clock_ns=clock_ns
    )
    return Stretch(samples_ns=samples_ns, wall_ns=clock_ns() - begin_ns, before=before, after=look([]))


def timed_of(
    stretches: Sequence[Stretch],
    worker: Worker,
    flags: list[str],
    judge: Judge,
    *,
    sampler: Sampler | None = None,
    rails: tuple[energy.Reading | None, energy.Reading | None] = (None, None),
) -> Timed:
    """One window of all stretches: counters are summed over them, so that what happened in between counts for nothing.

    Clocks and temperatures are of the whole time. Raises MeasurementError where the clock measured nothing above zero.
    """
    before, after = stretches[0].before, stretches[-1].after
    samples_ns = array("q")
    for stretch in stretches:
        samples_ns.extend(stretch.samples_ns)
    good_ns = positive(samples_ns)
    if len(good_ns) == 0:
        raise MeasurementError(
            f"this machine's clock stood still or ran backwards in all of {len(samples_ns)} calls, so nothing was measured. "
            "Measure on a machine whose monotonic clock can be trusted."
        )
    readings = sampler.readings(before.begins.monotonic_s, after.monotonic_s) if sampler is not None else []
    if passing := after.over_currents_since(before):
        flags.append(f"throttle: {passing} instantaneous over-currents (OC3) in the window; the supply may be too weak")
    telemetry = with_readings(_telemetry(stretches), readings)
    counters = _counters(stretches, worker)
    return Timed(
        samples_ns=samples_ns,
        good_ns=good_ns,
        counters=counters,
        closure_us=closure_us(samples_ns, sum(stretch.wall_ns for stretch in stretches)),
        telemetry=telemetry,
        rails=rails,
        readings=readings,
        disturbances=(*judge(samples_ns, counters, telemetry), *_slow_clocks(readings, telemetry, worker)),
    )


def _counters(stretches: Sequence[Stretch], worker: Worker) -> Window:
    each = [one.after.window_since(one.before, num_threads=worker.num_threads, busy=worker.busy) for one in stretches]
    return replace(
        each[0],
        wall_s=sum(one.wall_s for one in each),
        cpu_s=sum(one.cpu_s for one in each),
        nivcsw=sum(one.nivcsw for one in each),
        majflt=sum(one.majflt for one in each),
        waited_s=_sum([one.waited_s for one in each]),
        slept_s=_sum([one.slept_s for one in each]),
    )


def _telemetry(stretches: Sequence[Stretch]) -> Telemetry:
    """`psi_cpu` is of the stretches alone."""
    each = [
        (one.after.telemetry_since(one.before).psi_cpu, one.after.monotonic_s - one.before.begins.monotonic_s)
        for one in stretches
    ]
    waited = _sum([None if psi is None else psi * wall_s for psi, wall_s in each])
    wall_s = sum(wall_s for _, wall_s in each)
    psi_cpu = None if waited is None or wall_s <= 0 else waited / wall_s
    return replace(stretches[-1].after.telemetry_since(stretches[0].before), psi_cpu=psi_cpu)


def _sum(values: Sequence[float | None]) -> float | None:
    """None where one of them could not be read."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _slow_clocks(readings: list[Reading], telemetry: Telemetry, worker: Worker) -> list[str]:
    """The GPU's clock counts where the GPU computes: at rest it may sleep."""
    locked = {CPU: telemetry.clk_locked_mhz, GPU: None if worker.on_cpu else locked_gpu_mhz()}
    told = [
        slow_clock([one.highest[kind] for one in readings if kind in one.highest], mhz, kind)
        for kind, mhz in locked.items()
    ]
    return [message for message in told if message is not None]
