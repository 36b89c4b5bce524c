"""Why a launch is not trusted: each check of the window, and clocks that jump."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device.disturbances import Window, clock_faults, disturbances_of, positive, quarter_drift, slow_clock
from benchmarks.device.environment import Snapshot, snapshot
from benchmarks.device.record import Launch, Telemetry
from benchmarks.device.typed_json import from_json
from benchmarks.device.window import Length, Worker, time_window
from targets.base import CompiledModel
from targets.errors import MeasurementError

QUIET = Telemetry(temp_c=None, clk_mhz=None, throttle_delta=None, psi_cpu=None)
MS = 1_000_000


def _disturbances(telemetry: Telemetry = QUIET, samples_ns: list[int] | None = None, **changed: Any) -> tuple[str, ...]:
    samples_ns = samples_ns or [31_250_000] * 64
    window = Window(wall_s=sum(max(ns, 0) for ns in samples_ns) / 1e9, cpu_s=1.96, nivcsw=20, majflt=0)
    return disturbances_of(samples_ns, replace(window, **changed), telemetry)


def test_a_quiet_launch_has_no_disturbance_and_what_is_unreadable_is_not_judged() -> None:
    assert _disturbances() == ()
    assert _disturbances(Telemetry(temp_c=40.0, clk_mhz=3000.0, throttle_delta=0, psi_cpu=5.0)) == ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cpu_s": 1.8}, "90% of the time"),
        ({"nivcsw": 21}, "involuntary switches"),
        ({"majflt": 1}, "read from disk"),
        ({"telemetry": replace(QUIET, psi_cpu=5.1)}, "5.1 % of the time"),
        ({"telemetry": replace(QUIET, throttle_delta=3)}, "throttled 3 times"),
        ({"samples_ns": [31 * MS] * 32 + [32 * MS] * 32}, "+3.2%"),
        ({"slept_s": 0.5}, "suspended for 0.5 s"),
        ({"num_threads": 2, "waited_s": 0.2}, "threads waited for a CPU in 10% of the time"),
    ],
)
def test_each_disturbance_is_told(changed: dict[str, Any], said: str) -> None:
    told = _disturbances(**changed)

    assert len(told) == 1
    assert said in told[0]


def test_several_threads_may_sleep_at_joins_and_switch_each_but_not_stand_in_a_queue() -> None:
    assert _disturbances(num_threads=2, cpu_s=2.4, nivcsw=40, waited_s=0.05) == ()
    assert _disturbances(num_threads=2, cpu_s=3.9, nivcsw=41) != ()
    assert _disturbances(num_threads=2, cpu_s=1.8) != ()
    assert _disturbances(num_threads=1, waited_s=0.2) == ()  # with one thread its CPU time says it


def test_a_process_that_sleeps_while_a_device_computes_needs_no_cpu() -> None:
    assert _disturbances(cpu_s=0.1, busy=False) == ()


@pytest.mark.parametrize(
    ("target", "options", "worker"),
    [
        ("openvino-cpu", {"num_threads": 2}, Worker(num_threads=2)),
        ("onnxruntime-cpu", {"num_threads": 1, "allow_spinning": False}, Worker()),
        ("executorch", {"num_threads": 1}, Worker()),
        ("tensorrt", {"allow_spinning": True}, Worker(on_cpu=False)),
        ("tensorrt", {"allow_spinning": False}, Worker(on_cpu=False, busy=False)),
    ],
)
def test_who_works_follows_from_the_target(
    target: str, options: dict[str, Any], worker: Worker, compiled: CompiledModel
) -> None:
    assert Worker.of(replace(compiled, target=target, options=options)) == worker


@pytest.mark.parametrize(
    ("readings_mhz", "slow"),
    [
        ([1900] * 9, False),
        ([1899] * 2 + [2000] + [1899] * 2, False),
        ([2000, 1899, 1000, 1899, 2000], True),
        ([], False),
    ],
)
def test_a_locked_clock_may_be_read_low_twice_but_not_three_times_in_a_row(
    readings_mhz: list[float], slow: bool
) -> None:
    assert (slow_clock(readings_mhz, 2000.0, "cpu") is not None) is slow
    assert slow_clock(readings_mhz, None, "cpu") is None


@given(st.lists(st.integers(1, 1000), min_size=16, max_size=64), st.integers(2, 50))
def test_drift_is_relative_and_zero_for_a_constant(samples_ns: list[int], factor: int) -> None:
    assert quarter_drift([factor] * 16) == 0.0
    assert quarter_drift([value * factor for value in samples_ns]) == pytest.approx(quarter_drift(samples_ns))
    assert quarter_drift(samples_ns[:15]) is None


# Clocks that jump


@pytest.mark.parametrize(
    ("samples_ns", "wall_s", "said"),
    [
        ([10 * MS] * 99 + [0], 1.0, "in 1 of 100 calls"),
        ([10 * MS] * 99 + [-5], 1.0, "in 1 of 100 calls"),
        ([10 * MS] * 99 + [3600 * 1000 * MS], 3601.0, "one call took 3.6e+03 s, 360000 times the median"),
        ([10 * MS] * 100, 5.0, "took 1 s of a window of 5 s"),
        ([10 * MS] * 100, 0.2, "took 1 s of a window of 0.2 s"),
    ],
)
def test_a_clock_that_jumps_is_told(samples_ns: list[int], wall_s: float, said: str) -> None:
    (told,) = clock_faults(samples_ns, Window(wall_s=wall_s, cpu_s=wall_s, nivcsw=0, majflt=0))

    assert said in told


def test_two_clocks_that_agree_are_no_fault_even_for_the_shortest_calls() -> None:
    quick = clock_faults([100] * 1_000_000, Window(wall_s=0.3, cpu_s=0.3, nivcsw=0, majflt=0))
    slow = clock_faults([1_500 * MS] * 4, Window(wall_s=6.01, cpu_s=6.0, nivcsw=0, majflt=0))

    assert (quick, slow) == ((), ())


class Machine:
    """A stop watch whose stamps are given, and counters whose monotonic clock moves by `wall_s` a look."""

    def __init__(self, stamps_ns: list[int], wall_s: float) -> None:
        self.stamps, self.wall_s, self.looks = iter(stamps_ns), wall_s, 0
        self.last = stamps_ns[-1]

    def now_ns(self) -> int:
        return next(self.stamps, self.last)

    def look(self, flags: list[str]) -> Snapshot:
        self.looks += 1
        now_s = 1000.0 + self.looks * self.wall_s
        return replace(snapshot([]), monotonic_s=now_s, boottime_s=now_s, left=None)


def _timed(stamps_ns: list[int], wall_s: float, num_queries: int) -> dict[str, Any]:
    machine = Machine(stamps_ns, wall_s)
    length = Length(min_s=0.0, min_queries=num_queries, max_s=1e9)
    timed = time_window(lambda: None, length, Worker(), [], clock_ns=machine.now_ns, look=machine.look)
    return timed.answer(None, [])


def _stamps(*samples_ns: int) -> list[int]:
    """Of a window's begin, the loop's begin, each call's two and the end."""
    edges = [0, 0]
    for sample_ns in samples_ns:
        edges += [edges[-1], edges[-1] + sample_ns]
    return [*edges, edges[-1]]


@pytest.mark.parametrize("wall_s", [0.004, 0.0, -1.0])
@pytest.mark.parametrize("last_ns", [MS, 0, -5 * MS, 3600_000 * MS])
def test_no_clock_makes_a_negative_number_or_a_crash(wall_s: float, last_ns: int) -> None:
    answer = _timed(_stamps(MS, MS, MS, last_ns), wall_s, 4)

    numbers = [answer["wall_s"], *(value for value in answer["lat_us"].values() if value is not None)]
    assert min(numbers) > 0 or answer["lat_us"]["sd"] == 0.0
    assert min(numbers) >= 0
    assert answer["n"] == (4 if last_ns > 0 else 3)
    assert bool(answer["disturbances"]) or (wall_s > 0 and last_ns == MS)
    launch = {"load_ms": 1.0, "first_ms": 1.0, "warmup_s": 0.5, "overhead_us": 0.1, "flags": [], **answer}
    memory = {"vmhwm_mib": None, "baseline_mib": None, "pss_mib": None, "cgroup_peak_mib": None}
    from_json(Launch, {**launch, "memory": memory, "i": 0, "arm": "a", "order": 0, "samples_file": "s"}, "launch")


def test_a_window_without_one_good_sample_is_refused() -> None:
    with pytest.raises(MeasurementError, match="stood still or ran backwards in all of 1 calls"):
        _timed(_stamps(-5), 1.0, 4)


def test_only_samples_above_zero_are_summarised() -> None:
    assert positive(np.array([3, 0, -1, 2])).tolist() == [3, 2]
