"""Why a launch cannot be trusted: the validity checks, in words. What was not readable is not judged.

The limits are those of a quiet machine. A launch that fails a check is kept and marked, or measured again; its samples are
never mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.device.record import MAX_PSI_PERCENT, Samples, Telemetry
from targets.base import Array

MIN_CPU_SHARE = 0.95
MAX_WAITED_SHARE = 0.05
MAX_SWITCHES_PER_S = 10.0
MAX_DRIFT = 0.02
MIN_HALF, MEDIAN_ERROR = 4, 1.2533  # rounds of a half; the standard error of a normal median, in sd / sqrt(n)
MIN_CLOCK_SHARE, MAX_SLOW_READINGS = 0.95, 2  # the third reading in a row below is one too many
# A call this long, and this many times the median: no runtime does that, a clock that leaps or a suspended machine does.
LEAP_S, LEAP_TIMES = 1.0, 100.0
SLEPT_S = 0.01
# What the window may hold besides the calls: the counters that are read around it, and two microseconds an iteration.
OUTSIDE_S, OUTSIDE_SHARE, OUTSIDE_EACH_S = 0.05, 0.01, 2e-6


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the counters of the process moved by while it was timed. `num_threads`: of the runtime.

    `busy`: the process itself computes, or polls for a device that does; one that sleeps meanwhile needs no CPU.
    """

    wall_s: float
    cpu_s: float
    nivcsw: int
    majflt: int
    waited_s: float | None = None
    slept_s: float | None = None
    num_threads: int = 1
    busy: bool = True


def disturbances_of(samples_ns: Samples, window: Window, telemetry: Telemetry) -> tuple[str, ...]:
    """The checks that a launch fails, in words; empty for a quiet one."""
    found = disturbances_in_turns(samples_ns, window, telemetry)
    return found if window.wall_s <= 0 else (*found, *_drift(samples_ns))


def disturbances_in_turns(samples_ns: Samples, window: Window, telemetry: Telemetry) -> tuple[str, ...]:
    """The same for a process that takes turns, of its own slices: a drift that its partner shares disturbs nothing."""
    faults = clock_faults(samples_ns, window)
    if window.wall_s <= 0:
        return faults
    return (*faults, *_machine(window, telemetry), *_process(window))


def drift_apart(log_ratios: Sequence[float]) -> str | None:
    """In words, if ln(B / A) a round moved between the halves of a pair: then one of the two had not settled.

    Beyond MAX_DRIFT and three standard errors of a difference of two medians, from the scatter within the halves (1.4826 MAD).
    """
    rounds = np.asarray(log_ratios, dtype=np.float64)
    half = rounds.size // 2
    if half < MIN_HALF:
        return None
    first, last = rounds[:half], rounds[-half:]
    moved = float(np.median(last) - np.median(first))
    from_medians = np.concatenate([first - np.median(first), last - np.median(last)])
    scatter = 1.4826 * float(np.median(np.abs(from_medians)))
    noise = 3.0 * MEDIAN_ERROR * scatter * (2.0 / half) ** 0.5
    if abs(moved) <= MAX_DRIFT + noise:
        return None
    return f"B against A changed by {np.expm1(moved):+.1%} between the halves of the pair"


def clock_faults(samples_ns: Samples, window: Window) -> tuple[str, ...]:
    """What no call can have taken: nothing, less than nothing, or a time that another clock does not know of."""
    all_ns = np.asarray(samples_ns, dtype=np.float64)
    good_ns = all_ns[all_ns > 0]
    bad = all_ns.size - good_ns.size
    total_s, longest_s = float(good_ns.sum()) / 1e9, float(good_ns.max(initial=0.0)) / 1e9
    times = longest_s * 1e9 / float(np.median(good_ns)) if good_ns.size else 0.0
    outside_s = window.wall_s - total_s
    allowed_s = OUTSIDE_S + OUTSIDE_SHARE * max(window.wall_s, 0.0) + OUTSIDE_EACH_S * all_ns.size
    checks = (
        (not bad, f"the clock stood still or ran backwards in {bad} of {all_ns.size} calls"),
        (window.wall_s > 0, f"by the machine's other clock the window took {window.wall_s:.3g} s"),
        (abs(outside_s) <= allowed_s, f"the calls took {total_s:.3g} s of a window of {window.wall_s:.3g} s"),
        (
            longest_s <= LEAP_S or times <= LEAP_TIMES,
            f"one call took {longest_s:.3g} s, {times:.0f} times the median: the clock leapt or the machine stood still",
        ),
        ((window.slept_s or 0.0) <= SLEPT_S, f"the machine was suspended for {window.slept_s or 0.0:.3g} s"),
    )
    return _failed(checks)


def slow_clock(readings_mhz: Sequence[float], locked_mhz: float | None, kind: str) -> str | None:
    """In words, if a clock that is locked (None: it is not) was found below 95 % of itself three times in a row."""
    in_a_row = 0
    for mhz in readings_mhz if locked_mhz is not None else ():
        in_a_row = in_a_row + 1 if mhz < MIN_CLOCK_SHARE * (locked_mhz or 0.0) else 0
        if in_a_row > MAX_SLOW_READINGS:
            return f"the {kind} clock fell to {min(readings_mhz):.0f} MHz, it is locked at {locked_mhz:.0f} MHz"
    return None


def quarter_drift(samples_ns: Samples) -> float | None:
    """Relative change of the median from the first quarter of the samples to the last; None below 16 samples."""
    quarter = len(samples_ns) // 4
    if quarter < 4:
        return None
    first, last = np.median(samples_ns[:quarter]), np.median(samples_ns[-quarter:])
    return float(last / first - 1.0) if first > 0 else None


def positive(samples_ns: Samples) -> Array:
    """The samples that a clock can have measured: above zero."""
    all_ns = np.asarray(samples_ns)
    kept: Array = all_ns[all_ns > 0]
    return kept


def _machine(window: Window, telemetry: Telemetry) -> tuple[str, ...]:
    psi, throttled = telemetry.psi_cpu, telemetry.throttle_delta
    checks = (
        (psi is None or psi <= MAX_PSI_PERCENT, f"other work waited for a CPU in {psi or 0.0:.1f} % of the time"),
        (window.majflt == 0, f"{window.majflt} pages were read from disk"),
        (not throttled, f"throttled {throttled} times"),
    )
    return _failed(checks)


def _process(window: Window) -> tuple[str, ...]:
    """The process and its CPU. With one thread its CPU time is the wall's.

    With several it is no multiple of the wall: threads sleep at joins, so the process passes while one of its threads stands
    in a queue and all others wait for it. There the time in which threads were ready and had no CPU is judged as well.
    """
    wall_s, waited_s = window.wall_s, window.waited_s or 0.0
    per_s = window.nivcsw / wall_s
    checks = (
        (
            not window.busy or window.cpu_s >= MIN_CPU_SHARE * wall_s,
            f"had the CPU for {window.cpu_s / wall_s:.0%} of the time only",
        ),
        (
            window.num_threads == 1 or waited_s <= MAX_WAITED_SHARE * wall_s,
            f"its threads waited for a CPU in {waited_s / wall_s:.0%} of the time",
        ),
        (per_s <= MAX_SWITCHES_PER_S * window.num_threads, f"{per_s:.0f} involuntary switches a second"),
    )
    return _failed(checks)


def _drift(samples_ns: Samples) -> tuple[str, ...]:
    drift = quarter_drift(positive(samples_ns))
    checks = (
        (drift is None or abs(drift) <= MAX_DRIFT, f"the last quarter differs from the first by {drift or 0.0:+.1%}"),
    )
    return _failed(checks)


def _failed(checks: Sequence[tuple[bool, str]]) -> tuple[str, ...]:
    return tuple(message for passed, message in checks if not passed)
