"""The conductor of two processes that take turns, with processes that only speak the protocol."""

from __future__ import annotations

import json
import math
import os
import random
import select
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device.duet import MIN_ROUNDS, SLICE_S, in_turns, log_ratios, measure_duet, play
from benchmarks.device.measure import PRESETS
from benchmarks.device.window import Length
from targets.base import CompiledModel
from targets.errors import DeviceError, EdgestillError, MeasurementError, TargetError

# A player whose clock is its own: a call takes p25_us, a slice as many calls as fit. It writes down when it begins and ends.
PLAYER = """
import json, os, signal, sys
name, p25_us, ending, log = sys.argv[1], float(sys.argv[2]), sys.argv[3], open(sys.argv[4], "a", buffering=1)
def say(**document):
    print(json.dumps(document), flush=True)
print(name, "pid", os.getpid(), file=log)
say(ready=True)
for count, line in enumerate(sys.stdin):
    order = json.loads(line)
    if order.get("end"):
        say(name=name, flags=[], disturbances=[], turns={"p25_us": [p25_us] * (count - 1)})
        break
    print(name, "begins", order["slice_s"], order["timed"], file=log)
    if count == 3 and ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if count == 3 and ending == "silent":
        sys.stdin.read()
    if count == 3 and ending.isdecimal():
        say(error="it cannot be", exit_code=int(ending))
        sys.exit(int(ending))
    n = max(round(order["slice_s"] * 1e6 / p25_us), 1)
    print(name, "ends", file=log)
    say(n=n, own_ns=round(n * p25_us * 1e3), p25_us=p25_us)
"""
LENGTH = Length(min_s=1.0, min_queries=64, max_s=10.0)


class Hall:
    """Where two of them play, and what they wrote down."""

    def __init__(self, log: Path) -> None:
        self.log = log
        log.touch()

    def play(
        self,
        p25_us: tuple[float, float] = (4000.0, 4000.0),
        endings: tuple[str, str] = ("well", "well"),
        *,
        seed: int = 0,
        length: Length = LENGTH,
        patience_s: float = 60.0,
    ) -> tuple[list[dict[str, Any]], int]:
        commands = [
            [sys.executable, "-I", "-S", "-c", PLAYER, name, str(us), ending, str(self.log)]
            for name, us, ending in zip("AB", p25_us, endings, strict=True)
        ]
        return play(commands, length, random.Random(seed), patience_s=patience_s)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def begun(self) -> list[tuple[str, float]]:
        """Whose slices were timed, and how long each was to be."""
        return [(line[0], float(line[2])) for line in self.lines() if line[1] == "begins" and line[3] == "True"]

    def alive(self) -> list[int]:
        pids = [int(line[2]) for line in self.lines() if line[1] == "pid"]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path / "log")


def test_only_one_runs_at_a_time_and_each_once_a_round(hall: Hall) -> None:
    answers, first = hall.play()

    turns = [line for line in hall.lines() if line[1] in ("begins", "ends")]
    assert [line[1] for line in turns] == ["begins", "ends"] * (len(turns) // 2)
    assert all(begin[0] == end[0] for begin, end in zip(turns[::2], turns[1::2], strict=True))
    names = [name for name, _ in hall.begun()]
    assert all(set(names[i : i + 2]) == {"A", "B"} for i in range(0, len(names), 2))
    assert [answer["name"] for answer in answers] == ["A", "B"]
    assert [line[0] for line in hall.lines() if line[1] == "pid"] == (["B", "A"] if first else ["A", "B"])
    assert hall.alive() == []


def test_who_begins_is_thrown_for_every_round_and_follows_from_the_seed(tmp_path: Path) -> None:
    halls = [Hall(tmp_path / name) for name in ("one", "again", "other")]
    for hall, seed in zip(halls, (1, 1, 2), strict=True):
        hall.play(seed=seed)

    one, again, other = (["".join(name for name, _ in hall.begun())] for hall in halls)
    begins = set(one[0][::2])
    assert (begins, one == again, one == other) == ({"A", "B"}, True, False)


def test_a_round_before_them_is_not_timed(hall: Hall) -> None:
    answers, _ = hall.play()

    told = [line for line in hall.lines() if line[1] == "begins"]
    assert [line[3] for line in told[:3]] == ["False", "False", "True"]
    assert [len(answer["turns"]["p25_us"]) for answer in answers] == [len(hall.begun()) // 2] * 2


@pytest.mark.parametrize(
    ("p25_us", "slice_s", "rounds"),
    [
        ((100.0, 100.0), SLICE_S, 20),  # a second each
        ((1000.0, 10_000.0), 0.1, 10),  # ten calls of the slower one
        ((20_000.0, 40_000.0), 0.4, MIN_ROUNDS),  # 64 calls of it and a second, and never fewer rounds
        ((1000.0, 2e6), 10.0 / MIN_ROUNDS, MIN_ROUNDS),  # until the preset's limit
    ],
)
def test_slices_hold_enough_calls_of_the_slower_one_and_rounds_go_on_until_both_have_enough(
    p25_us: tuple[float, float], slice_s: float, rounds: int, hall: Hall
) -> None:
    hall.play(p25_us)

    assert [length for _, length in hall.begun()] == pytest.approx([slice_s] * 2 * rounds)


@pytest.mark.parametrize(
    ("ending", "kind", "message"),
    [
        ("killed", DeviceError, "B: its process was killed by signal 9 without an answer"),
        ("5", TargetError, "B: it cannot be"),
        ("7", MeasurementError, "B: it cannot be"),
        ("1", DeviceError, "B: it cannot be"),
    ],
)
def test_one_that_dies_ends_the_pair_in_its_own_words_and_none_is_left(
    ending: str, kind: type[EdgestillError], message: str, hall: Hall
) -> None:
    with pytest.raises(kind, match=message):
        hall.play(endings=("well", ending))

    assert hall.alive() == []
    assert {line[0] for line in hall.lines() if line[1] == "pid"} == {"A", "B"}


def test_one_that_falls_silent_is_stopped(hall: Hall) -> None:
    with pytest.raises(DeviceError, match=r"A: did not answer within 0\.3 s and was stopped"):
        hall.play(endings=("silent", "well"), patience_s=0.3)

    assert hall.alive() == []


def test_one_that_cannot_start_is_told(hall: Hall) -> None:
    broken = [sys.executable, "-I", "-S", "-c", "import sys; sys.exit(3)"]

    with pytest.raises(DeviceError, match="its process ended with exit code 3 without an answer"):
        play([broken, broken], LENGTH, random.Random(0), patience_s=60.0)


def test_a_process_that_takes_turns_ends_with_its_conductor() -> None:
    child = "from benchmarks.device.__main__ import _end_with_parent as end; end(); print(1, flush=True); input()"
    # The pipe that the child reads stays open here, so that only the signal can end it.
    conductor = (
        "import subprocess, sys;"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=0, stdout=subprocess.PIPE);"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", conductor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        handle = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        ended, _, _ = select.select([handle], [], [], 60.0)
        os.close(handle)

    assert ended


def _duet(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch, p25_us: Sequence[Sequence[float]], **changed: Any
) -> Any:
    """`measure_duet` with processes that answer with these p25 of their rounds; returns its answer and their commands."""
    seen: list[Sequence[Sequence[str]]] = []

    def fake(commands: Sequence[Sequence[str]], *_: object, **__: object) -> tuple[list[dict[str, Any]], int]:
        seen.append(commands)
        launches = [{"flags": [], "disturbances": [], "turns": {"p25_us": list(one)}} for one in p25_us]
        return launches, 1

    monkeypatch.setattr("benchmarks.device.duet.play", fake)
    monkeypatch.setattr("benchmarks.device.duet.allowed_cpus", lambda: [0, 1, 2, 3])
    dirs = [compiled.directory, compiled.directory]
    options = [["--out", "a"], ["--out", "b"]]
    asked = {"options": options, "chance": random.Random(0), **changed}
    return measure_duet(dirs, in_turns("smoke"), **asked), seen[0]


def test_both_are_held_to_the_same_cpus_unless_that_is_not_wanted(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (a, b) = _duet(compiled, monkeypatch, [[1.0] * 8] * 2)
    _, free = _duet(compiled, monkeypatch, [[1.0] * 8] * 2, same_cpus=False)

    (one,) = {command[command.index("--cpus") + 1] for command in (a, b)}
    assert one in {"0", "1", "2", "3"}  # the model runs in one thread
    assert [command[-2:] for command in (a, b)] == [["--out", "a"], ["--out", "b"]]
    assert not any("--cpus" in command for command in free)


def test_a_model_that_does_not_say_its_threads_is_held_to_no_cpus(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads((compiled.directory / "compiled.json").read_text())
    for name in ("compiled.json", *compiled.files):
        (tmp_path / name).write_bytes((compiled.directory / name).read_bytes())
    (tmp_path / "compiled.json").write_text(json.dumps({**document, "options": {"num_threads": 0}}))

    _, commands = _duet(CompiledModel.load(tmp_path), monkeypatch, [[1.0] * 8] * 2)

    assert not any("--cpus" in command for command in commands)


def test_a_pair_that_drifts_apart_disturbs_both_and_one_that_drifts_together_none(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, slower = [100.0] * 20, [100.0] * 10 + [110.0] * 10

    apart, _ = _duet(compiled, monkeypatch, [steady, slower])
    together, _ = _duet(compiled, monkeypatch, [slower, slower])

    told = [launch["disturbances"] for launch in apart["launches"]]
    assert told == [["B against A changed by +10.0% between the halves of the pair"]] * 2
    assert [launch["disturbances"] for launch in together["launches"]] == [[], []]


def test_log_ratios_are_of_the_rounds() -> None:
    found = log_ratios({"p25_us": [1.0, 2.0]}, {"p25_us": [1.0, 4.0]})

    assert found == [0.0, pytest.approx(math.log(2.0))]


def test_pairs_are_shorter_than_launches_and_more() -> None:
    found = {name: in_turns(name) for name in PRESETS}

    assert {name: (one.min_s, one.min_queries, one.launches) for name, one in found.items()} == {
        "smoke": (1.0, 64, 10),
        "ci": (2.0, 64, 20),
        "release": (5.0, 64, 40),
    }
    assert all(
        one.warmup_s == PRESETS[name].warmup_s and one.retries == PRESETS[name].retries for name, one in found.items()
    )
    assert all(a.launches < b.launches for a, b in pairwise(found.values()))
    assert json.dumps(found["ci"].name) == '"ci"'
