"""How long work shows that it lives: bars on a terminal, plain lines in a pipe, silence never.

Lines go to stderr, so that stdout stays free for results (`--json`). In a pipe a running task prints a line every two
seconds at first and every ten once a minute has passed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

HEARTBEAT_S = 1.8
PATIENT_HEARTBEAT_S = 10.0
IMPATIENT_FOR_S = 60.0


class Task(Protocol):
    """A piece of work with a known or unknown number of steps."""

    def advance(self, steps: int = 1, detail: str = "") -> None: ...


class Progress(Protocol):
    """What the stages are given to speak through."""

    def say(self, line: str) -> None: ...

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]: ...


def open_progress(stream: TextIO | None = None) -> Progress:
    """Bars where `stream` (stderr) is a terminal, plain lines where it is not."""
    stream = stream or sys.stderr
    return TerminalProgress() if stream.isatty() else PlainProgress(stream)


class Quiet:
    """Says nothing: for use from Python."""

    def say(self, line: str) -> None: ...

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        yield _QuietTask()


class _QuietTask:
    def advance(self, steps: int = 1, detail: str = "") -> None: ...


class PlainProgress:
    """Plain lines; one heartbeat thread speaks for the innermost running task, of each thread, when nothing else does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._last_line_s = time.monotonic()
        self._tasks: list[_PlainTask] = []
        self._wake = threading.Event()

    def say(self, line: str) -> None:
        with self._lock:
            print(line, file=self._stream, flush=True)
            self._last_line_s = time.monotonic()

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        task = _PlainTask(label, total)
        with self._lock:
            self._tasks.append(task)
            if len(self._tasks) == 1:
                self._wake = threading.Event()
                threading.Thread(target=self._beat, args=(self._wake,), daemon=True).start()
        try:
            yield task
        finally:
            with self._lock:  # else another thread's first task, begun just now, would be left without a heartbeat
                self._tasks.remove(task)
                if not self._tasks:
                    self._wake.set()

    def _beat(self, ended: threading.Event) -> None:
        begun_s = time.monotonic()
        while not ended.wait(0.1):
            now_s = time.monotonic()
            pause_s = HEARTBEAT_S if now_s - begun_s < IMPATIENT_FOR_S else PATIENT_HEARTBEAT_S
            if now_s - self._last_line_s >= pause_s:
                for task in {task.thread: task for task in list(self._tasks)}.values():
                    self.say(task.line(now_s))


class _PlainTask:
    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done, self.detail = label, total, 0, ""
        self.begun_s = time.monotonic()
        self.thread = threading.get_ident()

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.done += steps
        self.detail = detail or self.detail

    def line(self, now_s: float) -> str:
        elapsed_s = now_s - self.begun_s
        steps = f" {self.done}/{self.total}" if self.total else ""
        left = f", {elapsed_s * (self.total / self.done - 1):.0f} s left" if self.total and self.done else ""
        return f"  {self.label}{steps}: {elapsed_s:.0f} s{left}{'  ' + self.detail if self.detail else ''}"


class TerminalProgress:
    """Rich bars with time left; one display for the whole command, so that nested tasks stack."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._open_tasks = 0
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        self._count(1)
        task_id = self._bars.add_task(label, total=total, detail="")
        try:
            yield _BarTask(self._bars, task_id)
        finally:
            self._bars.remove_task(task_id)
            self._count(-1)

    def _count(self, more: int) -> None:
        """Show the display while any task of any thread is open."""
        with self._lock:
            before, self._open_tasks = self._open_tasks, self._open_tasks + more
            if before == 0:
                self._bars.start()
            elif self._open_tasks == 0:
                self._bars.stop()


class _BarTask:
    def __init__(self, bars: RichProgress, task_id: TaskID) -> None:
        self._bars, self._task_id = bars, task_id

    def advance(self, steps: int = 1, detail: str = "") -> None:
        if detail:
            self._bars.update(self._task_id, advance=steps, detail=detail)
        else:
            self._bars.update(self._task_id, advance=steps)
