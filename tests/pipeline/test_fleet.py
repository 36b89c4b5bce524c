"""Several devices at once: who runs beside whom, what a failure stops, and what is known of a board that is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.devices import Local
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address
from pipeline import fleet
from pipeline.fleet import Job, Named, facts_of, look_at_boards, on_devices, runtime_of
from pipeline.progress import PlainProgress, Quiet
from pipeline.recipe import TargetConfig
from pipeline.workspace import Stopped
from targets.errors import DeviceError, TargetError

WAIT_S = 30.0


class Board(Ssh):
    """A board without a network: it answers what it is given."""

    def __init__(self, name: str, *, away: bool = False, missing: str | None = None) -> None:
        super().__init__(name=name, address=Address(name))
        self.away, self.missing, self.is_closed = away, missing, False
        self.version = "1.0"

    def ask(self, *argv: str) -> dict[str, Any]:
        if self.away:
            raise DeviceError(f"{self.name}: cannot be reached.")
        return {"missing": self.missing, "hard": {"soc": self.name}, "runtime": {"version": self.version}}

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Board]:
    """What `open_device` finds; this machine besides."""
    boards = {name: Board(name) for name in ("orin", "pi")}

    def open_device(name: str, *, say: Callable[[str], None] | None = None) -> Any:
        return Local() if name == "local" else boards[name]

    monkeypatch.setattr(fleet, "open_device", open_device)
    return boards


def jobs_of(work: Callable[[str], Any], *places: tuple[str, str]) -> Sequence[Job[Any]]:
    def job(name: str, device: str) -> Job[Any]:
        return Job(name, device, lambda device, progress: work(name))

    return [job(*place) for place in places]


def test_boards_work_at_the_same_time(boards: dict[str, Board]) -> None:
    both = threading.Barrier(2, timeout=WAIT_S)

    def meet(name: str) -> int:
        return both.wait()  # BrokenBarrierError where one comes after the other

    done, failed = on_devices(jobs_of(meet, ("a", "orin"), ("b", "pi")), Quiet())

    assert sorted(done) == ["a", "b"]
    assert failed == {}
    assert all(board.is_closed for board in boards.values())


def test_one_device_has_one_target_at_a_time_and_this_machine_is_alone(boards: dict[str, Board]) -> None:
    events: list[str] = []

    def work(name: str) -> str:
        events.extend((f"begin {name}", f"end {name}"))
        return threading.current_thread().name

    done, _ = on_devices(jobs_of(work, ("a", "orin"), ("b", "orin"), ("c", "local")), Quiet())

    assert events == ["begin c", "end c", "begin a", "end a", "begin b", "end b"]
    assert list(done) == ["a", "b", "c"]
    assert done["c"] == threading.current_thread().name != done["a"] == done["b"]


def test_what_fails_on_one_device_does_not_stop_the_others(boards: dict[str, Board]) -> None:
    def work(name: str) -> str:
        if name in ("a", "c"):
            raise DeviceError(f"{name} is lost")
        return name

    done, failed = on_devices(jobs_of(work, ("a", "orin"), ("b", "orin"), ("c", "local"), ("d", "pi")), Quiet())

    assert done == {"b": "b", "d": "d"}
    assert {name: str(error) for name, error in failed.items()} == {"a": "a is lost", "c": "c is lost"}


def test_a_fault_of_ours_is_raised_when_all_have_ended(boards: dict[str, Board]) -> None:
    ended: list[str] = []

    def work(name: str) -> None:
        if name == "a":
            raise ZeroDivisionError
        ended.append(name)

    with pytest.raises(ZeroDivisionError):
        on_devices(jobs_of(work, ("a", "orin"), ("b", "orin"), ("c", "pi")), Quiet())

    assert sorted(ended) == ["b", "c"]


def test_that_a_run_stops_where_it_was_told_to_hides_no_failure(boards: dict[str, Board]) -> None:
    def work(name: str) -> None:
        raise DeviceError("b is lost") if name == "b" else Stopped("stopped after measure")

    with pytest.raises(DeviceError, match="b is lost"):
        on_devices(jobs_of(work, ("a", "orin"), ("b", "pi")), Quiet())
    with pytest.raises(Stopped):
        on_devices(jobs_of(work, ("a", "orin"), ("c", "pi")), Quiet())


def test_an_interrupt_closes_the_boards_before_it_ends_the_run(
    boards: dict[str, Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()
    monkeypatch.setattr(Board, "close", lambda board: closed.set())

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if timeout is None:
            raise KeyboardInterrupt
        original(thread, timeout)

    original = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", join)

    with pytest.raises(KeyboardInterrupt):
        on_devices(jobs_of(lambda name: closed.wait(WAIT_S), ("a", "orin")), Quiet())

    assert closed.is_set()


def test_each_device_has_lines_of_its_own() -> None:
    lines: list[str] = []

    class Listening(Quiet):
        def say(self, line: str) -> None:
            lines.append(line)

        @contextmanager
        def task(self, label: str, total: int | None = None) -> Any:
            lines.append(label)
            yield None

    orin = Named(Listening(), "orin")
    orin.say("waiting")
    orin.say("orin: the connection broke off")
    with orin.task("measure tensorrt"):
        pass

    assert lines == ["orin: waiting", "orin: the connection broke off", "orin: measure tensorrt"]


def test_a_pipe_hears_of_every_thread_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    said, both = set[str](), threading.Event()

    class Stream:
        def write(self, text: str) -> None:
            said.update(word for word in ("orin", "pi") if word in text)
            if said == {"orin", "pi"}:
                both.set()

        def flush(self) -> None: ...

    monkeypatch.setattr("pipeline.progress.HEARTBEAT_S", 0.0)
    progress = PlainProgress(Stream())  # type: ignore[arg-type]

    def work(name: str) -> None:
        with progress.task(name), progress.task(f"{name}: inner"):
            both.wait(WAIT_S)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("orin", "pi")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert both.is_set()


def target(device: str) -> TargetConfig:
    return TargetConfig(name="onnxruntime-cpu", device=device)


def test_a_board_that_is_away_is_told_and_the_run_goes_on(boards: dict[str, Board], tmp_path: Path) -> None:
    boards["pi"].away = True
    said: list[str] = []

    look_at_boards([target("orin"), target("pi"), target("local")], tmp_path, said.append)

    assert len(said) == 1
    assert said[0].startswith("pi: cannot be reached.\nThe run goes on without it")


def test_nothing_is_trained_for_boards_that_are_all_away(boards: dict[str, Board], tmp_path: Path) -> None:
    boards["pi"].away = True

    with pytest.raises(DeviceError, match="pi: cannot be reached"):
        look_at_boards([target("pi")], tmp_path, lambda line: None)


def test_a_board_that_an_earlier_run_knew_may_be_away(boards: dict[str, Board], tmp_path: Path) -> None:
    facts: Mapping[str, Any] = facts_of(boards["pi"], tmp_path)
    away = boards["pi"] = Board("pi", away=True)
    said: list[str] = []

    look_at_boards([target("pi")], tmp_path, said.append)

    assert len(said) == 1
    assert facts_of(away, tmp_path) == facts == {"soc": "pi"}


def test_another_release_of_the_runtime_is_another_key_and_the_last_one_known_is_that_of_a_board_away(
    boards: dict[str, Board], tmp_path: Path
) -> None:
    pi = boards["pi"]

    first = runtime_of(pi, target("pi"), tmp_path)
    pi.version = "1.1"
    upgraded = runtime_of(pi, target("pi"), tmp_path)
    pi.away = True

    assert first == {"version": "1.0"}
    assert runtime_of(pi, target("pi"), tmp_path) == upgraded == {"version": "1.1"}
    with pytest.raises(DeviceError, match="cannot be reached"):
        runtime_of(pi, target("pi"), tmp_path / "another run")


def test_the_runtime_here_is_the_installed_one(tmp_path: Path) -> None:
    assert runtime_of(Local(), target("local"), tmp_path) == {"version": metadata.version("onnxruntime")}


def test_a_board_that_nobody_knew_must_be_there_to_be_asked(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be reached"):
        facts_of(Board("pi", away=True), tmp_path)


def test_a_runtime_that_a_board_lacks_ends_the_run_before_it_begins(boards: dict[str, Board], tmp_path: Path) -> None:
    boards["pi"].missing = "pip install onnxruntime"

    with pytest.raises(TargetError, match=r"not installed on pi. Install it there: pip install onnxruntime"):
        look_at_boards([target("pi"), target("local")], tmp_path, lambda line: None)
