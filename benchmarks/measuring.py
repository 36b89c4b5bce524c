"""One measurement at a time on this machine: the lock that a board keeps for those that come over SSH, taken from here.

It is the kernel's, on one file for all users, so it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from benchmarks.device.supervise import LOCK_FILE, locked, open_for_all
from targets.errors import DeviceError

# A measurement may be part of another one: the thread that has the lock takes it again.
_OURS = threading.RLock()
_depth = 0


@contextmanager
def this_machine(say: Callable[[str], None]) -> Iterator[None]:
    """Hold this machine for a measurement. Another one is waited for, however long it takes; `say` is told for whom.

    The waiting is the kernel's, so that who measures again and again does not always come first. Raises DeviceError where
    the lock cannot be had at all.
    """
    global _depth
    with _OURS:
        _depth += 1
        try:
            if _depth > 1:
                yield
                return
            with _lock_file() as file:
                if not locked(file):
                    holder = file.read().decode(errors="replace") or "somebody"
                    say(f"local: waiting for {holder}, who is measuring here")
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(0)
                file.seek(0)
                file.write(whoami().encode())
                file.flush()
                yield
        finally:
            _depth -= 1


def _lock_file() -> BinaryIO:
    try:
        path = Path(tempfile.gettempdir()) / LOCK_FILE
        return open_for_all(path)
    except OSError as error:
        raise DeviceError(
            f"local: the lock that keeps measurements apart, {error.filename or LOCK_FILE}, cannot be opened: "
            f"{error.strerror}. Remove it, or set TMPDIR to a folder of yours."
        ) from None


def whoami() -> str:
    """What the holder of a lock is called by those who wait."""
    try:
        user = getpass.getuser()
    except (
        KeyError,
        OSError,
    ):  # a number that the system has no name for, as in a container; KeyError until Python 3.12
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}"
