"""What the harness says of itself: on clocks that step as told, never on this machine's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks.device.overhead import closure_us, loop_overhead, null_overhead_us, overhead_flags, spin_us
from benchmarks.device.record import Overhead
from benchmarks.device.timing import Slowed, measure_latency_ns

FINE = Overhead(null_us=0.06, null_wall_us=0.14, closure_us=0.1, spin_100_us=100.1, spin_1000_us=1000.4)


class Steady:
    """A clock that moves on by `step_ns` at each look."""

    def __init__(self, step_ns: int) -> None:
        self.ticks = itertools.count(0, step_ns)

    def __call__(self) -> int:
        return next(self.ticks)


def test_a_null_session_is_measured_as_what_lies_between_two_stamps() -> None:
    null_us, wall_us = null_overhead_us(clock_ns=Steady(50))

    assert null_us == pytest.approx(0.05)
    assert wall_us == pytest.approx(0.1, rel=1e-3)  # two looks an iteration


@pytest.mark.parametrize("wait_us", [100, 1000])
@pytest.mark.parametrize("step_ns", [70, 300, 999])
def test_a_wait_is_given_back_within_two_looks_at_the_clock(step_ns: int, wait_us: int) -> None:
    measured_us = spin_us(wait_us, 5, clock_ns=Steady(step_ns))

    assert wait_us <= measured_us <= wait_us + 2 * step_ns / 1e3


def test_the_wait_comes_on_top_of_what_the_query_takes_and_its_answer_stays() -> None:
    clock = Steady(1000)
    slow = Slowed(lambda: [clock() for _ in range(5)][:1], 10_000, clock)

    samples_ns = measure_latency_ns(slow, min_s=0.0, min_queries=1, clock_ns=clock)

    assert samples_ns[0] >= 15_000
    assert len(slow()) == 1  # type: ignore[arg-type]


def test_every_figure_but_the_closure_comes_from_the_loop() -> None:
    found = Overhead(**loop_overhead(clock_ns=Steady(20)), closure_us=0.0)

    assert found.spin_100_us == pytest.approx(100.0, rel=0.01)
    assert found.spin_1000_us == pytest.approx(1000.0, rel=0.01)


def test_the_closure_is_what_stands_in_no_sample() -> None:
    assert closure_us([1000, 2000, 3000], wall_ns=6900) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"null_us": 1.0}, "does nothing is measured as 1.00 us"),
        ({"null_wall_us": 2.5}, "2.50 us on the wall"),
        ({"closure_us": 2.5}, "2.50 us an iteration stand in no sample"),
        ({"spin_100_us": 98.0}, "a wait of 100 us is measured as 98.0 us"),
        ({"spin_1000_us": 1011.0}, "a wait of 1000 us is measured as 1011.0 us"),
    ],
)
def test_a_figure_beyond_its_limit_is_told(changed: dict[str, float], said: str) -> None:
    (flag,) = overhead_flags(replace(FINE, **changed))

    assert said in flag
    assert overhead_flags(FINE) == []
