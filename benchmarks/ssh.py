"""A board over SSH as a device: nothing but python3 and what measures is needed there.

One connection is one session (`benchmarks/board.py`): a transfer that breaks off is taken
up again, a command that breaks off is reported, and in either case the board kills what ran and removes what was lent.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.board import BOOT, SUPERVISOR, Board, Link, LostError, Tree
from benchmarks.devices import COMMAND_TIMEOUT_S, Completed, answer_of
from benchmarks.measuring import whoami
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.ssh_login import Address, open_link
from targets.errors import DeviceError, MeasurementError

CONNECT_TRIES = 3  # of a transfer that broke off; the first connection is tried once
LOCK_POLL_S = 2.0
IDLE_S = 20.0  # after which the board is asked whether it is still there, before anything is begun
MAX_CLOCK_SKEW_S = 300.0
OLDEST_PYTHON = (3, 10)
# What says by one of these files that it is a program or a model stays on the board; everything else may be test data and goes.
MODELS = ("exported.json", "compiled.json")


@dataclass(kw_only=True)
class Ssh:
    """A board. Connects at the first use; `close` (or the end of a `with`) ends the session there, also from another thread.

    `power_mode`: the one that results must come from. `lock_wait_s`: how long another measurement on the board is waited for;
    `say` is told that it waits, and for whom.
    `connect`: makes the stream to the supervisor; another one stands in for a network.
    """

    name: str
    address: Address
    python: str = "python3"
    power_mode: str | None = None
    lock_wait_s: float = 600.0
    patience_s: float = 60.0
    say: Callable[[str], None] | None = None
    connect: Callable[[], Link] | None = None
    _session: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _board: Board | None = None
    _locked: bool = False
    _closed: bool = False
    _boot_id: str | None = None
    _facts: Mapping[str, Any] | None = None
    _sent: dict[Path, _Sent] = field(default_factory=dict)
    _scratches: list[str] = field(default_factory=list)

    def __enter__(self) -> Ssh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Completed:
        """Run a command while nobody else measures there."""
        board = self._connected()
        self._take_lock(board)
        return self._run(board, argv, timeout_s)

    def put(self, path: Path) -> str:
        path = path.resolve()
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        stamp = tuple((one, stat.st_size, stat.st_mtime_ns) for one in files if (stat := one.stat()))
        sent = self._sent.get(path)
        if sent is None or sent.stamp != stamp:
            keep = path.name == PROGRAM or any((path / name).is_file() for name in MODELS)
            sent = _Sent(stamp, Tree.of(path, files), keep, is_file=path.is_file())
        if self._board is None or sent.remote is None:
            sent.remote = self._through_breaks(lambda board: board.put(sent.tree, keep=sent.keep))
            self._sent[path] = sent
        return f"{sent.remote}/{path.name}" if sent.is_file else sent.remote

    def get(self, remote: str, path: Path) -> None:
        with self._closed_if_interrupted():
            self._connected().get(remote, path)

    def scratch(self, directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{len(self._scratches)}-{directory.name}"
        remote = self._through_breaks(lambda board: board.scratch(name))
        self._scratches.append(name)
        return remote

    def facts(self) -> Mapping[str, Any]:
        """What a measurement there holds for, as its device program says: board, kernel, python, numpy ...

        Raises MeasurementError in another power mode than the inventory expects.
        """
        if self._facts is None:
            facts = self.ask("environment")["hard"]
            check_power_mode(self.name, self.power_mode, facts)
            self._facts = facts
        return self._facts

    def ask(self, *argv: str) -> dict[str, Any]:
        """What a command of the device program answers that disturbs nobody's measurement."""
        with tempfile.TemporaryDirectory() as folder:
            program = self.put(pack_device_program(Path(folder) / PROGRAM))
            return answer_of(self.name, argv[0], self.peek([self.python, "-I", program, *argv]))

    def peek(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Completed:
        """Run a command that disturbs nobody's measurement, so without the board's lock."""
        return self._run(self._connected(), argv, timeout_s)

    def measuring(self) -> AbstractContextManager[None]:
        """Nothing more to do: whatever is run there holds the board's lock, from the first command to the end of the session."""
        return nullcontext()

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        """End the session there; the next use begins it again."""
        board, self._board, self._locked = self._board, None, False
        if board is not None:
            board.close()
        for sent in self._sent.values():
            sent.remote = None

    def _run(self, board: Board, argv: Sequence[str], timeout_s: float) -> Completed:
        with self._closed_if_interrupted():
            try:
                done = board.run(argv, timeout_s)
            except LostError as error:
                self._drop()
                raise self._explained(error) from None
        if done["returncode"] is None:
            raise DeviceError(
                f"{self.name}: {' '.join(argv[:5])} ... did not end within {timeout_s:g} s and was stopped. "
                "Run it there by hand to see where it stands; a smaller model takes less."
            )
        return Completed(done["returncode"], done["stdout"], done["stderr"])

    def _connected(self) -> Board:
        """The session; opened where there is none (any more), with everything there that it had."""
        if self._board is not None and self._board.idle_s() > IDLE_S:
            try:
                self._board.beat()
            except LostError:
                self._drop()
        if self._board is None:
            with self._closed_if_interrupted():
                self._board = self._opened()
                for name in self._scratches:
                    self._board.scratch(name)
                self._sent = {path: sent for path, sent in self._sent.items() if path.exists()}
                for sent in self._sent.values():
                    sent.remote = self._board.put(sent.tree, keep=sent.keep)
        return self._board

    def _opened(self) -> Board:
        argv = [self.python, *BOOT, str(len(SUPERVISOR.read_bytes()))]
        if self._closed:
            raise DeviceError(f"{self.name}: the work there was stopped.")
        link = self.connect() if self.connect else open_link(self.name, self.address, argv, self.patience_s)
        try:
            board = Board.greet(self.name, link, session=self._session, who=whoami(), patience_s=self.patience_s)
            check_hello(self.name, self.python, board.hello)
        except LostError as error:
            raise self._no_python(link, error) from None
        except BaseException:
            link.close()
            raise
        self._boot_id = self._boot_id or board.hello["boot_id"]
        return board

    def _no_python(self, link: Link, error: LostError) -> DeviceError:
        """What it means that the supervisor ended before it said a word; `error` where it was the connection that ended."""
        if link.exit_status is None:
            return error
        return DeviceError(
            f"{self.name}: '{self.python}' does not run there ({error.why}). Install Python "
            "3.10 or newer and numpy there (Debian, Ubuntu: sudo apt-get install python3 python3-numpy),\n"
            "or name another interpreter in devices.yaml (python: /path/to/python3)."
        )

    def _take_lock(self, board: Board) -> None:
        """Raises DeviceError that tells who holds the board, once `lock_wait_s` is over."""
        give_up_s, told = time.monotonic() + self.lock_wait_s, False
        with self._closed_if_interrupted():
            while not self._locked:
                holder = board.holder()
                self._locked = holder is None
                if holder is not None and time.monotonic() >= give_up_s:
                    raise DeviceError(
                        f"{self.name}: {holder}, is measuring there, and has not ended within {self.lock_wait_s:g} s. "
                        "Two measurements at once would disturb each other: run this again later."
                    )
                if holder is not None and not told and self.say is not None:
                    self.say(f"{self.name}: waiting for {holder}, who is measuring there")
                    told = True
                if holder is not None:
                    time.sleep(min(LOCK_POLL_S, self.lock_wait_s))

    def _through_breaks(self, transfer: Callable[[Board], str]) -> str:
        """Do a transfer; where the connection breaks off, connect again and go on with what is not there yet."""
        for attempt in range(CONNECT_TRIES):
            try:
                with self._closed_if_interrupted():
                    return transfer(self._connected())
            except LostError as error:
                if attempt == CONNECT_TRIES - 1:
                    raise
                if self.say is not None:
                    self.say(f"{error} Connecting again.")
                time.sleep(attempt)
        raise AssertionError

    def _explained(self, error: LostError) -> DeviceError:
        """Why a command broke off: connects once more, to ask whether the board was started anew meanwhile."""
        before = self._boot_id
        try:
            board = self._opened()
        except DeviceError:
            return DeviceError(f"{error} It does not answer now: it may be starting anew, or have lost its power.")
        board.close()
        if board.hello["boot_id"] == before:
            return error
        self._boot_id = board.hello["boot_id"]
        return DeviceError(
            f"{self.name}: the board was started anew while the command ran, so what it measured is lost. "
            "Look into its power supply and its log; then run the same command again: what is finished is kept."
        )

    @contextmanager
    def _closed_if_interrupted(self) -> Iterator[None]:
        """A conversation that was left in the middle cannot go on."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, LostError) or not isinstance(error, DeviceError):
                self._drop()
            raise


@dataclass
class _Sent:
    """What was put: how the files stood then, and where they lie in the present session."""

    stamp: tuple[tuple[Path, int, int], ...]
    tree: Tree
    keep: bool
    is_file: bool
    remote: str | None = None


def check_power_mode(name: str, expected: str | None, facts: Mapping[str, Any]) -> None:
    """Raise MeasurementError where the board is in another mode than is expected, or tells none."""
    found = facts.get("power_mode")
    if expected is not None and found != expected:
        raise MeasurementError(
            f"{name}: its power mode is {found or 'not readable'}, devices.yaml expects {expected}. Set it there "
            "(sudo nvpmodel -m ID; its IDs stand in /etc/nvpmodel.conf), or mend devices.yaml."
        )


def check_hello(name: str, python: str, hello: Mapping[str, Any]) -> None:
    """Raise DeviceError for a Python that is too old, and for a clock with which nothing there can be dated or trusted."""
    version = tuple(hello["python"])
    if version < OLDEST_PYTHON:
        raise DeviceError(
            f"{name}: {python} is Python {'.'.join(map(str, version))} there, and the device program needs 3.10 or newer. "
            "Install one, and name it in devices.yaml (python: /path/to/python3)."
        )
    ahead_s = hello["time"] - time.time()
    if abs(ahead_s) > MAX_CLOCK_SKEW_S:
        raise DeviceError(
            f"{name}: its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's. "
            "Set it there: sudo timedatectl set-ntp true; or, without a network: "
            f"sudo date -u -s '{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}'."
        )
