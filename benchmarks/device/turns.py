"""One of two processes that take turns: load a model, warm it up, then time a slice whenever it is told to.

Orders come on standard input, one JSON document a line: {"slice_s", "timed"} or {"end"}; each is answered by one line on standard
output. `benchmarks/device/duet.py` gives them. Writes the raw samples as .npy (int64 nanoseconds, in call order).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.device import memory
from benchmarks.device.affinity import hold_to
from benchmarks.device.disturbances import disturbances_in_turns, positive
from benchmarks.device.environment import snapshot
from benchmarks.device.measure import ROOT, Preset, begin_memory, cold_start, end_memory, slowed, warm_up
from benchmarks.device.overhead import loop_overhead, overhead_flags
from benchmarks.device.record import Overhead, Turns, count_flags
from benchmarks.device.sampler import Sampler, probes
from benchmarks.device.timing import Clock, Query, measure_latency_ns
from benchmarks.device.window import Length, Look, Stretch, Timed, Worker, time_stretch, timed_of
from targets.base import CompiledModel
from targets.errors import MeasurementError

DROPPED = 2  # calls at the beginning of a slice: the partner has left the caches cold
LOOK_S, BUSY_SHARE, REST_CAP_S = 0.002, 0.2, 0.2
BESIDE = (
    "device: the runtime's own clock is not read where two processes take turns",
    "energy: two processes took turns, and no meter tells them apart",
)


class Lines(Protocol):
    """Both ends of standard input and output that are needed here."""

    def readline(self) -> str: ...

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


@dataclass(frozen=True)
class Conductor:
    """Who says whose turn it is. `orders` ends when it is gone, and so does this process."""

    orders: Lines
    answers: Lines

    def tell(self, document: dict[str, Any]) -> None:
        self.answers.write(json.dumps(document) + "\n")
        self.answers.flush()

    def next(self) -> dict[str, Any]:
        line = self.orders.readline()
        if not line:
            raise SystemExit(1)
        order: dict[str, Any] = json.loads(line)
        return order


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One turn; `dropped` calls came before what was timed."""

    dropped: int
    stretch: Stretch
    slice_s: float

    @property
    def p25_us(self) -> float:
        """Raises MeasurementError where the clock measured nothing above zero."""
        good_ns = positive(self.stretch.samples_ns)
        if len(good_ns) == 0:
            raise MeasurementError(
                "this machine's clock stood still or ran backwards in all calls of a turn, so nothing was measured. "
                "Measure on a machine whose monotonic clock can be trusted."
            )
        return float(np.percentile(good_ns, 25)) / 1e3


def take_turns(
    compiled_dir: Path,
    preset: Preset,
    conductor: Conductor,
    *,
    samples_path: Path,
    cpus: Sequence[int] | None = None,
    evaluation_dir: Path | None = None,
    seed: int = 0,
    injected_us: float | None = None,
) -> dict[str, Any]:
    """One launch, timed in turns; returns the fields of a record's launch that this process knows, as `measure_launch` does.

    What counts as a disturbance is what befell its own slices. The other arguments are `measure_launch`'s.
    """
    flags: list[str] = []
    compiled = CompiledModel.load(compiled_dir)
    with Sampler(
        probes(ROOT), flags
    ) as sampler:  # begins before `hold_to`, so that it need not interrupt what is timed
        held = hold_to(cpus, flags)
        memory_before = begin_memory(flags)
        loaded = cold_start(compiled, "runtime", evaluation_dir, seed)
        query, loop = slowed(loaded.query, injected_us, flags), loop_overhead()
        warmup_s, settled = warm_up(query, preset)
        if not settled:
            flags.append(f"warm-up: not settled within {preset.warmup_cap_s:g} s")
        used_memory = memory.read_memory(memory_before.resident_mib, flags)
        come_to_rest()
        conductor.tell({"ready": True})
        slices = serve(query, conductor, flags)
        stretches = [one.stretch for one in slices]
        timed = timed_of(stretches, Worker.of(compiled), flags, disturbances_in_turns, sampler=sampler)
    with samples_path.open("wb") as file:  # np.save would append .npy to another name
        np.save(file, np.asarray(timed.samples_ns, dtype=np.int64))
    overhead = Overhead(**loop, closure_us=timed.closure_us)
    answer = _answer(timed, slices, held)
    answer["memory"] = asdict(end_memory(used_memory, memory_before, compiled, flags))
    return {
        "load_ms": loaded.load_ms,
        "first_ms": loaded.first_ms,
        "warmup_s": warmup_s,
        "overhead_us": overhead.null_us,
        "overhead": asdict(overhead),
        **answer,
        "flags": [*dict.fromkeys([*flags, *BESIDE, *overhead_flags(overhead)]), *count_flags(len(timed.good_ns))],
    }


def come_to_rest(
    cpu_s: Callable[[], float] = time.process_time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until no thread of this process uses a CPU, at most REST_CAP_S: those of a runtime may poll for work after a run."""
    for _ in range(round(REST_CAP_S / LOOK_S)):
        before_s = cpu_s()
        sleep(LOOK_S)
        if cpu_s() - before_s <= BUSY_SHARE * LOOK_S:
            return


def serve(
    query: Query,
    conductor: Conductor,
    flags: list[str],
    *,
    clock_ns: Clock = time.perf_counter_ns,
    look: Look = snapshot,
    rest: Callable[[], None] = come_to_rest,
) -> list[Slice]:
    """Time a slice an order until the end is ordered; returns those that were to be timed.

    An answer comes only when this process is at rest: threads that still poll would be in the partner's way.
    """
    slices: list[Slice] = []
    while not (order := conductor.next()).get("end"):
        one = time_slice(query, order["slice_s"], [] if slices else flags, clock_ns=clock_ns, look=look)
        if order["timed"]:
            slices.append(one)
        answer = {"n": len(one.stretch.samples_ns), "own_ns": one.stretch.wall_ns, "p25_us": one.p25_us}
        rest()
        conductor.tell(answer)
    return slices


def time_slice(query: Query, slice_s: float, flags: list[str], *, clock_ns: Clock, look: Look) -> Slice:
    """DROPPED calls, fewer where one takes long, then `slice_s`. The counters are read in between, and so are of what is timed."""
    dropped = measure_latency_ns(query, min_s=0.0, min_queries=DROPPED, max_s=slice_s / 4, clock_ns=clock_ns)
    length = Length(min_s=slice_s, min_queries=1, max_s=math.inf)
    stretch = time_stretch(query, length, flags, clock_ns=clock_ns, look=look)
    return Slice(dropped=len(dropped), stretch=stretch, slice_s=slice_s)


def _answer(timed: Timed, slices: Sequence[Slice], held: tuple[int, ...] | None) -> dict[str, Any]:
    turns = Turns(
        queries=tuple(len(one.stretch.samples_ns) for one in slices),
        p25_us=tuple(one.p25_us for one in slices),
        dropped=sum(one.dropped for one in slices),
        slice_s=slices[-1].slice_s,
        cpus=held,
    )
    return {**timed.answer(None, []), "device": None, "turns": asdict(turns)}
