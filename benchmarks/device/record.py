"""A measurement's record, schema 1: what a launch saw, what it amounts to, and whether it can be trusted.

Writes nothing itself: `to_json` and `validate` are the way out and in. A value that could not be read is null with its
reason in `flags`, never 0. A launch that fails a validity check is kept and says so in `disturbances`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Union

import numpy as np

from benchmarks.device.typed_json import from_json
from targets.base import Array
from targets.errors import MeasurementError

Samples = Union[Sequence[int], "array[int]", Array]

SCHEMA_VERSION = 1
HARNESS_VERSION = 2  # raised when a change of the harness moves its numbers: records across it are not comparable

# Queries below which a percentile is not reported: MLPerf's early stopping, 99 % confidence, one query over the latency.
MIN_QUERIES = {90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}

MAX_PSI_PERCENT = 5.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was measured; `sha256` is over the names and digests of the compiled files."""

    name: str
    sha256: str
    bytes: int
    precision: str
    inputs: tuple[dict[str, Any], ...]
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What ran it. `fallback_ops` are the layers of arithmetic that did not run in the model's precision."""

    name: str
    version: str
    provider: str
    flags: dict[str, Any]
    engine_sha256: str | None = None
    fallback_ops: tuple[str, ...] | None = None
    ops_per_unit: dict[str, int] | None = None  # MACs a sample, by precision


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How it was asked. `boundary`: runtime is the runtime's call as a program makes it, host_e2e is encoded bytes to label;
    device, the runtime's own clock, stands beside it in `Record.device`."""

    kind: str
    preset: str
    batch: int
    boundary: str
    warmup_s: float
    min_s: float
    min_q: int
    seed: int
    transfers: bool | None = None
    cuda_graph: bool | None = None
    spin: bool | None = None
    injected_us: float | None = None  # a busy wait inside each timed call, on purpose: such a record is never valid


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one launch, in microseconds. A percentile with too few queries behind it is None."""

    min: float
    p25: float
    p50: float
    p90: float | None
    p99: float | None
    p999: float | None
    mean: float
    sd: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak resident memory from before the load to the end of the warm-up, the interpreter's own share included."""

    vmhwm_mib: float | None
    baseline_mib: float | None  # resident before the runtime was imported
    pss_mib: float | None
    cgroup_peak_mib: float | None
    gpu_mib: float | None = None
    gpu_source: str | None = None
    arena: bool | None = (
        None  # whether the runtime kept what it allocated for later runs; None where it has no such choice
    )


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Of one inference, in millijoules; `rails` are the raw readings over the timed window in microjoules."""

    source: str | None
    rails: dict[str, int]
    gross_mj: float | None
    idle_w: float | None
    net_mj: float | None
    hz: float | None = None  # None: the counter integrates by itself


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The machine around the timed window. `psi_cpu` is the share of it in which some task waited for a CPU, percent.

    What `num_sampled` readings of another process saw in between: the clocks' median and least, the highest temperature.
    """

    temp_c: float | None
    clk_mhz: float | None
    throttle_delta: int | None
    psi_cpu: float | None
    clk_min_mhz: float | None = None
    clk_locked_mhz: float | None = None  # None: the clock is not locked, and so not judged
    gpu_clk_mhz: float | None = None
    temp_max_c: float | None = None
    num_sampled: int | None = None


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What the harness adds, in microseconds. `closure_us` is (wall - sum of the samples) / n over this launch's own window;
    the others are of loops of their own, around a call that does nothing or that only waits."""

    null_us: float  # p50 of a call that does nothing
    null_wall_us: float  # an iteration of that loop on the wall
    closure_us: float
    spin_100_us: float  # what a busy wait of 100 us is measured as, p50, less the null call
    spin_1000_us: float


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """The boundary `device`: the runtime's own clock around its run, in a pass of its own after the timed window.

    `outer_p50_us` is our stop watch around the same calls; `gap_us`, the median of outer - own, is what the binding, the copy
    of the input and the harness add to a run. `slowed`: reading that clock slows the run down (ONNX Runtime's profiler does).
    """

    clock: str
    slowed: bool
    n: int
    lat_us: Latency
    outer_p50_us: float
    gap_us: float
    samples_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A disturbed launch that was measured again: why, and what it would have said."""

    disturbances: tuple[str, ...]
    p25_us: float
    p50_us: float
    samples_file: str


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How a launch took turns with its partner, a slice of time each, round by round.

    `queries` and `p25_us` are a slice's; `dropped` counts the calls at the beginning of slices that stand nowhere else, because
    the partner had left the caches cold. `cpus`: those that both were held to, None where they were not.
    """

    queries: tuple[int, ...]
    p25_us: tuple[float, ...]
    dropped: int
    slice_s: float
    cpus: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One fresh process. `order` is its place among all launches of the session; `i` counts those of its arm."""

    i: int
    arm: str
    order: int
    n: int
    load_ms: float  # the runtime's import and the model's load, up to the first query
    first_ms: float
    lat_us: Latency
    samples_file: str
    warmup_s: float
    wall_s: float
    cpu_s: float
    nivcsw: int
    majflt: int
    overhead_us: float  # p50 of the same loop around a call that does nothing
    memory: Memory
    energy: Energy
    telemetry: Telemetry
    disturbances: tuple[str, ...]
    flags: tuple[str, ...]
    waited_s: float | None = None  # in which threads of this process were ready to run and had no CPU, summed
    overhead: Overhead | None = None
    device: DeviceTime | None = None
    repeated: tuple[Repeated, ...] = ()  # the tries before this one, all disturbed
    turns: Turns | None = None  # None: it had the machine for itself


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Over the launches: medians of theirs. `ci95` is the order-statistic interval of the median, None below 6 launches;
    `es_p90_us` and `es_p99_us` are MLPerf's early-stopping estimates over all queries."""

    p25_us: float
    p50_us: float
    ci95: tuple[float, float] | None
    fps: float
    es_p90_us: float | None
    es_p99_us: float | None
    load_ms: float | None
    first_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Offline: samples a second, back to back, at the larger batch where the graph leaves it free."""

    fps: float
    batch: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What must agree between two records (`hard`), what is better to agree (`soft`), and what could not be read."""

    hard: dict[str, Any]
    soft: dict[str, Any]
    hard_sha256: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Validity:
    """`ok` while fewer than half of the launches were disturbed: the median over launches is what is compared."""

    ok: bool
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One model on one device under one preset."""

    schema_version: int
    run_id: str
    utc: str
    git: dict[str, Any]
    model: Model
    runtime: Runtime
    scenario: Scenario
    launches: tuple[Launch, ...]
    summary: Summary
    host_e2e: Summary | None
    throughput: Throughput | None
    memory: Memory
    energy: Energy
    accuracy: dict[str, Any] | None
    env: Environment
    telemetry: Telemetry
    validity: Validity
    device: Summary | None = None
    other_arena: Memory | None = None  # of a process whose runtime's arena is set the other way

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latency_of(samples_ns: Samples) -> Latency:
    """Summarise one launch's raw nanoseconds in microseconds."""
    us = np.asarray(samples_ns, dtype=np.float64) / 1e3
    return Latency(
        min=float(us.min()),
        p25=float(np.percentile(us, 25)),
        p50=float(np.percentile(us, 50)),
        p90=percentile(us, 90.0),
        p99=percentile(us, 99.0),
        p999=percentile(us, 99.9),
        mean=float(us.mean()),
        sd=float(us.std(ddof=1)) if us.size > 1 else 0.0,
    )


def percentile(values: Sequence[float] | Array, q: float) -> float | None:
    """The q-th percentile (0..100, linear interpolation), or None where MIN_QUERIES says that there are too few."""
    return float(np.percentile(values, q)) if len(values) >= MIN_QUERIES.get(q, 1) else None


def count_flags(num_queries: int) -> tuple[str, ...]:
    """Why percentiles of this many queries are null."""
    return tuple(
        f"p{q:g}: n too small ({num_queries} of {needed} queries)"
        for q, needed in MIN_QUERIES.items()
        if num_queries < needed and q != 95.0
    )


def validity_of(launches: Sequence[Launch], extra_flags: Sequence[str] = ()) -> Validity:
    """Sum up the launches; a flag that several launches share stands once."""
    disturbed = sum(bool(launch.disturbances) for launch in launches)
    told = [f"launch {launch.i}: {reason}" for launch in launches for reason in launch.disturbances]
    told += [
        f"launch {launch.i}: repeated {len(launch.repeated)} times ({'; '.join(launch.repeated[0].disturbances)})"
        for launch in launches
        if launch.repeated
    ]
    flags = dict.fromkeys([*told, *(flag for launch in launches for flag in launch.flags), *extra_flags])
    return Validity(ok=2 * disturbed < len(launches), flags=tuple(flags))


def validate(values: Mapping[str, Any]) -> Record:
    """Check a record's JSON against schema 1; raises MeasurementError that names the first key at fault."""
    version = values.get("schema_version") if isinstance(values, Mapping) else None
    if version != SCHEMA_VERSION:
        raise MeasurementError(
            f"record: schema_version={version!r}, this edgestill reads {SCHEMA_VERSION}. Measure again, or use its version."
        )
    record: Record = from_json(Record, values, "record")
    if not record.launches:
        raise MeasurementError("record: launches is empty, so nothing was measured. Measure again.")
    for launch in record.launches:
        _check_launch(launch)
    return record


def _check_launch(launch: Launch) -> None:
    latency = launch.lat_us
    ordered = [
        p for p in (latency.min, latency.p25, latency.p50, latency.p90, latency.p99, latency.p999) if p is not None
    ]
    if launch.n < 1 or launch.wall_s <= 0 or ordered != sorted(ordered) or ordered[0] < 0:
        raise MeasurementError(
            f"record: launch {launch.i} of '{launch.arm}' contradicts itself (n={launch.n}, wall_s={launch.wall_s}, "
            f"percentiles {ordered}). Measure again."
        )
