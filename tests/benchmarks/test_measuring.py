"""Two measurements on this machine follow each other; whoever waits is told for whom; a lock dies with its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.device.supervise import LOCK_FILE, locked, open_for_all
from benchmarks.measuring import this_machine, whoami
from targets.errors import DeviceError

HOLDER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from benchmarks.measuring import this_machine
with this_machine(print):
    print("held", flush=True)
    sys.stdin.readline()
    print("ends", flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that measures until it is given a line."""
    argv = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_measurement_waits_for_the_first_and_says_for_whom(holder: subprocess.Popen[str]) -> None:
    said: list[str] = []
    waits, measures = threading.Event(), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    def second() -> None:
        with this_machine(say):
            measures.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waits.wait(20)
    assert not measures.wait(0.2)
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    thread.join(20)
    assert measures.is_set()
    (line,) = said
    assert f"process {holder.pid}" in line
    assert "measuring here" in line


def test_the_lock_of_a_process_that_was_killed_is_free(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    said: list[str] = []
    with this_machine(said.append):
        assert said == []


def test_a_measurement_may_be_part_of_another(folder: Path) -> None:
    with this_machine(pytest.fail), this_machine(pytest.fail):
        pass
    with open_for_all(folder / LOCK_FILE) as file:
        assert locked(file)


def test_who_comes_over_ssh_finds_this_machine_held(folder: Path) -> None:
    with this_machine(pytest.fail), open_for_all(folder / LOCK_FILE) as file:  # as the supervisor of a session does
        assert not locked(file)
        assert b"process" in file.read()


def test_a_user_without_a_name_measures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user, by number: no USER, and no line in /etc/passwd."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)

    assert whoami().startswith(f"user 54321@{socket.gethostname()}, process {os.getpid()}")


def test_a_lock_that_somebody_laid_elsewhere_is_refused(folder: Path) -> None:
    (folder / LOCK_FILE).symlink_to(folder / "precious")
    with pytest.raises(DeviceError, match=r"edgestill\.lock.*Remove it"), this_machine(pytest.fail):
        pass
    assert not (folder / "precious").exists()
