"""The boundary `device`, on a target whose runtime has a clock of its own, and on those that have none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.device import own_clock
from benchmarks.device.own_clock import NUM_QUERIES, NUM_WARM, device_time
from targets.base import Batch, CompiledModel


class Session:
    """Each run takes 10 us by the runtime's clock and 12 by ours; the first ones, warming up, ten times as long."""

    clock, slowed = "a fake's clock", False
    inputs = outputs = ()

    def __init__(self) -> None:
        self.now_ns, self.own_us = 0, list[float]()

    def run(self, batch: Batch) -> Mapping[str, Any]:
        factor = 10 if len(self.own_us) < NUM_WARM else 1
        self.own_us.append(10.0 * factor)
        self.now_ns += 12_000 * factor
        return {}

    def run_times_us(self) -> list[float]:
        return self.own_us


class Target:
    name = "fake"

    def __init__(self, load: Callable[[], Session]) -> None:
        self.load = load

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> Session:
        return self.load()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda target: monkeypatch.setattr(own_clock, "make_target", lambda name, options: target)


def _measure(compiled: CompiledModel, flags: list[str], session: Session | None = None, **changed: Any) -> Any:
    clock = (lambda: session.now_ns) if session else itertools.count(0, 1000).__next__
    return device_time(compiled, {}, batch=1, max_s=1.0, flags=flags, clock_ns=clock, **changed)


def test_both_clocks_time_the_same_calls_and_the_warm_up_is_left_out(
    compiled: CompiledModel, use: Callable[[Any], None], tmp_path: Path
) -> None:
    session, flags = Session(), list[str]()
    use(Target(lambda: session))

    found = _measure(compiled, flags, session, samples_path=tmp_path / "own.npy")

    assert (found.n, found.lat_us.p50, found.lat_us.mean) == (NUM_QUERIES, 10.0, 10.0)
    assert (found.outer_p50_us, found.gap_us) == (12.0, pytest.approx(2.0))
    assert (found.clock, found.slowed, found.lat_us.p90, found.lat_us.p99) == ("a fake's clock", False, 10.0, None)
    assert np.load(tmp_path / "own.npy").tolist() == [10_000] * NUM_QUERIES
    assert flags == []


def test_a_target_without_such_a_clock_is_null_with_a_reason(
    compiled: CompiledModel, use: Callable[[Any], None]
) -> None:
    flags: list[str] = []
    use(type("Bare", (), {"name": "bare"})())

    assert _measure(compiled, flags) is None
    assert flags == ["device: target 'bare' tells no clock of its runtime's own around a run"]


def test_a_pass_that_fails_costs_only_itself(compiled: CompiledModel, use: Callable[[Any], None]) -> None:
    def broken() -> Session:
        raise RuntimeError("no profiler\n  in this build")

    flags: list[str] = []
    use(Target(broken))

    assert _measure(compiled, flags) is None
    assert flags == ["device: RuntimeError: no profiler in this build"]


@pytest.mark.parametrize("times_us", [[], [10.0] * 3, [10.0] * (NUM_WARM + NUM_QUERIES - 1) + [0.0]])
def test_a_clock_that_lost_runs_or_stood_still_is_not_believed(
    times_us: list[float], compiled: CompiledModel, use: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, flags = Session(), list[str]()
    monkeypatch.setattr(session, "run_times_us", lambda: times_us)
    use(Target(lambda: session))

    assert _measure(compiled, flags, session) is None
    assert flags[0].startswith("device: a fake's clock told")


def test_our_own_clock_that_goes_back_is_not_believed_either(
    compiled: CompiledModel, use: Callable[[Any], None]
) -> None:
    session, flags = Session(), list[str]()
    use(Target(lambda: session))
    back = itertools.count(10**9, -1000)

    assert device_time(compiled, {}, batch=1, max_s=1.0, flags=flags, clock_ns=back.__next__) is None
    assert len(flags) == 1
