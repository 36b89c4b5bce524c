"""Where a command runs: a device takes files, runs a command line, gives files back.

`Local` is this machine, a board over SSH is `benchmarks/ssh.py`. What runs there is always the packed device program in a
fresh process (`benchmarks/pack.py`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.measuring import this_machine
from targets.errors import DeviceError, EdgestillError, MeasurementError, TargetError

COMMAND_TIMEOUT_S = 600.0
LONG_TIMEOUT_S = 7200.0
LONG = ("compile", "evaluate", "answer")  # which take as long as the model and the data make them


@dataclass(frozen=True)
class Completed:
    """How a command on a device ended."""

    returncode: int  # negative: killed by that signal
    stdout: str
    stderr: str


class Device(Protocol):
    """A machine that measures. Paths on it are strings: they need not exist here."""

    @property
    def name(self) -> str: ...

    @property
    def python(self) -> str:
        """The interpreter there that has numpy and the runtime."""
        ...

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Completed:
        """Run one command to its end; raises DeviceError where it cannot be started or takes longer than `timeout_s`."""
        ...

    def put(self, path: Path) -> str:
        """Bring a file or directory there; returns its path there."""
        ...

    def get(self, remote: str, path: Path) -> None:
        """Fetch a file, or all files of a directory."""
        ...

    def scratch(self, directory: Path) -> str:
        """A directory there that holds what a command writes and that `directory` stands for here."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What a result from there holds for: two devices, or one before and after a change, differ in it."""
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Around commands that are timed: no other measurement of edgestill runs there meanwhile; one that does is waited for."""
        ...

    def close(self) -> None:
        """The end of its use: nothing that was lent to it is there afterwards. It may be used again."""
        ...


@dataclass(frozen=True, kw_only=True)
class Local:
    """This machine: nothing is copied, every command is a process of its own. `say` is told that it waits, and for whom."""

    name: str = "local"
    python: str = sys.executable
    say: Callable[[str], None] | None = None

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Completed:
        try:
            done = subprocess.run(
                list(argv),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(
                f"{self.name}: {' '.join(argv[:5])} ... did not end within {timeout_s:g} s and was stopped. "
                "Run it there by hand to see where it stands; a smaller model takes less."
            ) from None
        except OSError as error:
            raise DeviceError(
                f"{self.name}: {argv[0]} cannot be started: {error.strerror}. Name another python."
            ) from None
        return Completed(done.returncode, done.stdout, done.stderr)

    def put(self, path: Path) -> str:
        return str(path.resolve())

    def get(self, remote: str, path: Path) -> None:
        if Path(remote).resolve() == path.resolve():
            return
        if Path(remote).is_dir():
            shutil.copytree(remote, path, dirs_exist_ok=True)
        else:
            shutil.copyfile(remote, path)

    def scratch(self, directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        return str(directory.resolve())

    def facts(self) -> Mapping[str, Any]:
        from benchmarks.device.environment import environment

        return environment().hard

    def measuring(self) -> AbstractContextManager[None]:
        return this_machine(self.say or _say)

    def close(self) -> None: ...


def run_program(device: Device, program: str, argv: Sequence[str], *, timeout_s: float | None = None) -> dict[str, Any]:
    """Run one command of the device program there; returns its JSON.

    Its refusals are raised here with the device's own words: TargetError (exit 5) and MeasurementError (exit 7) as such,
    everything else as DeviceError. `-I`: neither the caller's PYTHONPATH nor its folder decides what is imported.
    """
    if timeout_s is None:
        timeout_s = LONG_TIMEOUT_S if argv[0] in LONG else COMMAND_TIMEOUT_S
    return answer_of(device.name, argv[0], device.run([device.python, "-I", program, *argv], timeout_s=timeout_s))


def answer_of(name: str, command: str, done: Completed) -> dict[str, Any]:
    """The JSON with which the device program ended a command on device `name`; raises its refusals as `run_program` says."""
    document = _last_json(done.stdout)
    if done.returncode == 0 and document is not None:
        return document
    if document is not None and "error" in document:
        raise _error_class(done.returncode)(f"{name}: {document['error']}")
    raise DeviceError(
        f"{name}: '{command}' {_how_it_ended(done.returncode)} without an answer: {_tail(done.stderr)}. "
        "Run it there by hand to see more."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _error_class(exit_code: int) -> type[EdgestillError]:
    return {5: TargetError, 7: MeasurementError}.get(exit_code, DeviceError)


def _last_json(stdout: str) -> dict[str, Any] | None:
    lines = stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _how_it_ended(returncode: int) -> str:
    return f"was killed by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"


def _tail(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
