"""One of two processes that take turns, with orders and clocks of the tests' own."""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device.affinity import choose_cpus, hold_to
from benchmarks.device.disturbances import Window, disturbances_in_turns, disturbances_of
from benchmarks.device.duet import in_turns
from benchmarks.device.environment import Snapshot
from benchmarks.device.record import Launch, Telemetry
from benchmarks.device.turns import DROPPED, Conductor, come_to_rest, serve, take_turns
from benchmarks.device.typed_json import from_json
from benchmarks.device.window import Stretch, Worker, timed_of
from targets.base import CompiledModel
from targets.errors import MeasurementError

MS = 1_000_000


class Machine:
    """A query that takes `ms` each time, on a clock of its own, and counters that move with it."""

    def __init__(self, ms: Sequence[float]) -> None:
        self.durations, self.now, self.calls = list(ms), 10**12, 0
        self.looks: list[int] = []

    def query(self) -> None:
        self.now += round(self.durations[self.calls % len(self.durations)] * MS)
        self.calls += 1

    def now_ns(self) -> int:
        return self.now

    def look(self, flags: list[str]) -> Snapshot:
        self.looks.append(self.calls)
        return _snapshot(self.now / 1e9)


def _snapshot(now_s: float, **changed: Any) -> Snapshot:
    plain = Snapshot(
        monotonic_s=now_s,
        cpu_s=now_s,
        nivcsw=0,
        majflt=0,
        psi_us=0,
        throttled=0,
        temp_c=None,
        clk_mhz=None,
        waited_s=0.0,
        boottime_s=now_s,
    )
    return replace(plain, **changed)


def _conductor(*orders: dict[str, Any]) -> tuple[Conductor, io.StringIO]:
    answers = io.StringIO()
    return Conductor(io.StringIO("".join(json.dumps(order) + "\n" for order in orders)), answers), answers


def _slice(slice_s: float, timed: bool = True) -> dict[str, Any]:
    return {"slice_s": slice_s, "timed": timed}


def test_the_first_calls_of_a_slice_are_dropped_and_counted() -> None:
    machine = Machine([3.0, 2.0] + [1.0] * 20)  # 22 calls a slice: two with cold caches
    conductor, answers = _conductor(_slice(0.02), _slice(0.02), {"end": True})

    slices = serve(machine.query, conductor, [], clock_ns=machine.now_ns, look=machine.look, rest=lambda: None)

    assert [one.stretch.samples_ns.tolist() for one in slices] == [[MS] * 20] * 2
    assert [one.dropped for one in slices] == [DROPPED] * 2
    assert machine.looks == [2, 22, 24, 44]  # the counters are of what is timed, not of what is dropped
    told = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert told == [{"n": 20, "own_ns": 20 * MS, "p25_us": 1000.0}] * 2


def test_a_slice_that_is_not_timed_is_answered_and_forgotten() -> None:
    machine = Machine([1.0])
    conductor, answers = _conductor(_slice(0.005, timed=False), _slice(0.01), {"end": True})

    slices = serve(machine.query, conductor, [], clock_ns=machine.now_ns, look=machine.look, rest=lambda: None)

    assert [len(one.stretch.samples_ns) for one in slices] == [10]
    assert [json.loads(line)["n"] for line in answers.getvalue().splitlines()] == [5, 10]


def test_a_slow_model_drops_one_call_and_is_timed_once_at_least() -> None:
    machine = Machine([300.0])
    conductor, _ = _conductor(_slice(0.05), {"end": True})

    (one,) = serve(machine.query, conductor, [], clock_ns=machine.now_ns, look=machine.look, rest=lambda: None)

    assert (one.dropped, one.stretch.samples_ns.tolist()) == (1, [300 * MS])


def test_an_answer_comes_when_the_process_is_at_rest() -> None:
    machine, told = Machine([1.0]), list[str]()
    conductor, answers = _conductor(_slice(0.01), {"end": True})

    serve(
        machine.query,
        conductor,
        [],
        clock_ns=machine.now_ns,
        look=machine.look,
        rest=lambda: told.append(answers.getvalue()),
    )

    assert told == [""]


def _cpu(*steps_s: float) -> Iterator[float]:
    now = 0.0
    yield now
    for step in steps_s:
        now += step
        yield now


def test_rest_is_when_no_thread_uses_a_cpu_and_is_not_waited_for_without_end() -> None:
    polling = _cpu(0.002, 0.0, 0.002, 0.0, 0.00005)  # two looks at a thread that polls, then a quiet one
    slept, for_ever = list[float](), list[float]()

    come_to_rest(polling.__next__, slept.append)
    come_to_rest(iter(np.arange(0.0, 100.0, 0.002)).__next__, for_ever.append)

    assert slept == [0.002] * 3
    assert for_ever == [0.002] * 100


def test_when_nobody_is_there_to_tell_whose_turn_it_is_the_process_ends() -> None:
    with pytest.raises(SystemExit):
        serve(lambda: None, _conductor()[0], [])


def test_a_clock_that_stands_still_in_a_turn_is_refused() -> None:
    conductor, _ = _conductor(_slice(0.01), {"end": True})

    with pytest.raises(MeasurementError, match="in all calls of a turn"):
        serve(lambda: None, conductor, [], clock_ns=lambda: 5, look=lambda flags: _snapshot(1.0))


@given(
    st.lists(
        st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 5.0), st.integers(0, 5), st.integers(0, 10**5)),
        min_size=1,
        max_size=12,
    )
)
def test_what_happens_between_the_turns_counts_for_nothing(turns: list[tuple[float, float, int, int]]) -> None:
    """Each turn: its length, the wait after it, and the switches and microseconds of waiting that both of these bring."""
    now_s, switches, psi_us = 1000.0, 0, 0
    stretches = []
    for own_s, waits_s, nivcsw, waited_us in turns:
        before = _snapshot(now_s, nivcsw=switches, psi_us=psi_us, cpu_s=0.0)
        now_s, switches, psi_us = now_s + own_s, switches + nivcsw, psi_us + waited_us
        after = _snapshot(now_s, nivcsw=switches, psi_us=psi_us, cpu_s=own_s)
        stretches.append(Stretch(samples_ns=array("q", [1000]), wall_ns=round(own_s * 1e9), before=before, after=after))
        now_s, switches, psi_us = now_s + waits_s, switches + 100 * nivcsw, psi_us + round(waits_s * 1e6)

    timed = timed_of(stretches, Worker(), [], lambda *_: ())

    own_s = sum(turn[0] for turn in turns)
    assert timed.counters.wall_s == pytest.approx(own_s)
    assert timed.counters.cpu_s == pytest.approx(own_s)
    assert timed.counters.nivcsw == sum(turn[2] for turn in turns)
    assert timed.telemetry.psi_cpu == pytest.approx(
        100.0 * sum(min(turn[3] / 1e6 / turn[0], 1.0) * turn[0] for turn in turns) / own_s
    )


def test_a_counter_that_cannot_be_read_in_one_turn_is_not_known() -> None:
    before, after = _snapshot(1.0), _snapshot(2.0)
    whole = Stretch(samples_ns=array("q", [MS]), wall_ns=MS, before=before, after=after)
    blind = replace(whole, after=replace(after, psi_us=None, waited_s=None))

    timed = timed_of([whole, blind, whole], Worker(), [], lambda *_: ())

    assert (timed.telemetry.psi_cpu, timed.counters.waited_s) == (None, None)
    assert timed.counters.wall_s == 3.0


def test_its_own_drift_is_no_disturbance_of_a_process_that_takes_turns() -> None:
    samples_ns = array("q", [100_000] * 500 + [110_000] * 500)
    window = Window(wall_s=0.105, cpu_s=0.105, nivcsw=0, majflt=0)
    quiet = Telemetry(temp_c=None, clk_mhz=None, throttle_delta=0, psi_cpu=0.0)

    assert disturbances_in_turns(samples_ns, window, quiet) == ()
    assert disturbances_of(samples_ns, window, quiet) == ("the last quarter differs from the first by +10.0%",)
    noisy = replace(quiet, psi_cpu=20.0)
    assert disturbances_in_turns(samples_ns, window, noisy) == ("other work waited for a CPU in 20.0 % of the time",)


def test_a_real_model_answers_what_a_launch_holds(compiled: CompiledModel, tmp_path: Path) -> None:
    conductor, answers = _conductor(_slice(0.001, timed=False), *[_slice(0.002)] * 3, {"end": True})
    quick = replace(in_turns("smoke"), warmup_s=0.01)

    answer = take_turns(compiled.directory, quick, conductor, samples_path=tmp_path / "s", injected_us=5.0)

    assert json.loads(answers.getvalue().splitlines()[0]) == {"ready": True}
    launch = from_json(Launch, {**answer, "i": 0, "arm": "A", "order": 0, "samples_file": "s"}, "launch")
    samples_ns = np.load(tmp_path / "s")
    assert launch.turns is not None
    assert (len(samples_ns), launch.n) == (sum(launch.turns.queries), sum(launch.turns.queries))
    ends = np.cumsum(launch.turns.queries)
    parts = [np.percentile(part, 25) / 1e3 for part in np.split(samples_ns, ends[:-1])]
    assert launch.turns.p25_us == pytest.approx(parts)
    assert (launch.turns.dropped, launch.turns.slice_s, launch.turns.cpus) == (6, 0.002, None)
    assert (launch.device, launch.energy.gross_mj) == (None, None)
    assert [flag.partition(":")[0] for flag in launch.flags if flag.startswith(("injected", "device", "energy"))] == [
        "injected",
        "device",
        "energy",
    ]
    assert None not in (launch.memory.vmhwm_mib, launch.load_ms, launch.overhead)


def _cpus(root: Path, siblings: Sequence[str], capacity: Sequence[int] = ()) -> Path:
    for cpu, text in enumerate(siblings):
        (root / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{text}\n")
        if capacity:
            (root / f"cpu{cpu}" / "cpu_capacity").write_text(f"{capacity[cpu]}\n")
    return root


class Chance:
    """Turns a list round in place of shuffling it."""

    def shuffle(self, values: list[int]) -> None:
        values.reverse()


def _chosen(num_threads: int, allowed: Sequence[int], root: Path) -> tuple[int, ...] | None:
    return choose_cpus(num_threads, allowed, Chance(), root)  # type: ignore[arg-type]


def test_a_thread_gets_a_core_of_its_own_and_equal_ones_go_by_chance(tmp_path: Path) -> None:
    root = _cpus(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)

    assert _chosen(1, range(8), root) == (3,)
    assert _chosen(2, range(8), root) == (2, 3)
    assert _chosen(2, [0, 4, 5, 6], root) == (5, 6)
    assert _chosen(4, range(8), root) is None  # all cores: there is nothing to choose


def test_the_quickest_cores_come_first(tmp_path: Path) -> None:
    root = _cpus(tmp_path, [str(i) for i in range(6)], [1024, 1024, 250, 250, 250, 800])

    assert _chosen(1, range(6), root) == (1,)
    assert _chosen(3, range(6), root) == (0, 1, 5)


def test_where_nothing_is_told_of_the_cpus_all_are_alike(tmp_path: Path) -> None:
    assert _chosen(1, [0, 1], tmp_path) == (1,)
    assert _chosen(1, [], tmp_path) is None
    assert _chosen(2, [0, 1], tmp_path) is None


def test_cpus_that_are_not_there_leave_a_flag_and_the_process_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, cpus: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    flags: list[str] = []

    assert hold_to((999,), flags) is None
    assert flags[0].startswith("cpus: not held to [999]")
    assert hold_to(None, []) is None
