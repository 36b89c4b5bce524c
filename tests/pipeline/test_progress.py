"""How long work shows that it lives: never silent, never on stdout, never more than it knows."""

from __future__ import annotations

import io
import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.progress import PlainProgress, Quiet, TerminalProgress, open_progress


class Clock:
    """Time that passes only while somebody waits for `event` to be set; it is, when `until_s` is reached."""

    def __init__(self, until_s: float) -> None:
        self.now_s, self.until_s = 0.0, until_s

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.now_s >= self.until_s


class Lines(io.StringIO):
    """A pipe that remembers when each line came."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock, self.times_s, self.came = clock, [0.0], threading.Event()

    def write(self, text: str) -> int:
        if self.clock is not None and text.strip():
            self.times_s.append(self.clock.now_s)
        self.came.set()
        return super().write(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(until_s=200.0)
    monkeypatch.setattr("pipeline.progress.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def silent_task(progress: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, **task: Any) -> None:
    """A task that says nothing for as long as the clock lasts; the heart beats in this thread."""
    monkeypatch.setattr("pipeline.progress.threading.Thread", lambda **kwargs: SimpleNamespace(start=lambda: None))
    with progress.task("train", **task) as running:
        running.advance(25, "loss 0.5")
        progress._beat(clock)


def test_a_pipe_is_never_silent_for_two_seconds_at_first_nor_for_eleven_later(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(clock)

    silent_task(PlainProgress(lines), clock, monkeypatch, total=100)

    gaps_s = [(b, b - a) for a, b in pairwise(lines.times_s)]
    assert max(gap for at, gap in gaps_s if at < 60) < 2.0
    assert 9.9 < min(gap for at, gap in gaps_s if at > 71) <= max(gap for at, gap in gaps_s) < 11.0
    assert lines.times_s[-1] > 185


def test_a_line_says_what_is_done_how_long_it_takes_and_what_was_seen(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.until_s = 2.05
    lines = Lines(clock)

    silent_task(PlainProgress(lines), clock, monkeypatch, total=100)

    assert lines.getvalue() == "  train 25/100: 2 s, 5 s left  loss 0.5\n"  # 1.8 s for a quarter: 5.4 s to go


def test_a_task_of_unknown_length_promises_no_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.until_s = 2.05
    lines = Lines(clock)

    silent_task(PlainProgress(lines), clock, monkeypatch)

    assert lines.getvalue() == "  train: 2 s  loss 0.5\n"


def test_the_innermost_running_task_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.progress.HEARTBEAT_S", 0.0)
    lines = Lines()
    progress = PlainProgress(lines)

    with progress.task("teacher", 10), progress.task("epoch 3"):
        assert lines.came.wait(10)

    assert lines.getvalue().startswith("  epoch 3: ")


def test_no_thread_outlives_its_task_even_when_the_task_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    progress = PlainProgress(io.StringIO())

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), progress.task("a"), progress.task("b"):
            raise ZeroDivisionError
    for thread in set(threading.enumerate()) - before:
        thread.join(10)

    assert set(threading.enumerate()) <= before


def test_a_terminal_gets_bars_and_a_pipe_gets_lines() -> None:
    assert isinstance(open_progress(Terminal()), TerminalProgress)
    assert isinstance(open_progress(io.StringIO()), PlainProgress)


def test_bars_stack_and_what_is_said_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.stderr", terminal)
    progress: Any = open_progress()

    with progress.task("teacher [red]", 2) as outer, progress.task("epoch 1", 10) as inner:
        inner.advance(10, "loss 0.25 [0/3]")
        outer.advance()
        progress.say("model[0] is [bold]")
        progress._bars.refresh()  # what happens ten times a second

    assert "model[0] is [bold]" in terminal.getvalue()
    assert "teacher [red]" in terminal.getvalue()
    assert "loss 0.25 [0/3]" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_python_callers_hear_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Quiet().task("x", 3) as task:
        task.advance(2, "detail")
        Quiet().say("line")

    assert capsys.readouterr() == ("", "")


def test_the_last_task_of_one_thread_does_not_end_the_heartbeat_of_the_next_threads_first() -> None:
    """The other thread begins just where this one has seen that nothing runs any more."""
    progress = PlainProgress(io.StringIO())
    begun, ended = threading.Event(), threading.Event()

    def other() -> None:
        with progress.task("other"):
            begun.set()
            ended.wait()

    class Tasks(list[Any]):
        def __len__(self) -> int:
            seen = super().__len__()
            if seen == 0 and not thread.is_alive():
                thread.start()
                begun.wait(0.2)  # in vain where the other has to wait for its turn
            return seen

    thread = threading.Thread(target=other)
    with progress.task("one"):
        progress._tasks = Tasks(progress._tasks)

    assert begun.wait(30.0)
    assert not progress._wake.is_set()
    ended.set()
    thread.join()
