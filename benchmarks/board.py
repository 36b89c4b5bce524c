"""The host's end of a session on a board: files by their digest, commands, and the board's lock, over any two-way stream.

The other end is `benchmarks/device/supervise.py`, sent along as text. Nothing is spoken through a shell: requests are lines of
JSON. While the board works the host sends a beat every BEAT_S; a board that answers nothing for `patience_s` is lost.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from targets.base import sha256_file
from targets.errors import DeviceError

SUPERVISOR = Path(__file__).parent / "device" / "supervise.py"
# All that the board's login shell ever reads, with the number behind it: no quotes, no names.
BOOT = ("-I", "-c", "import sys;exec(sys.stdin.buffer.read(int(sys.argv[1])))")
BEAT_S = 5.0
CHUNK = 1 << 18
UNANSWERED = 64  # files that may be on the way before an answer is awaited
MAX_WELCOME_LINES = 200
NO_SPACE = 28


class Link(Protocol):
    """A stream to a process on the board."""

    def send(self, data: bytes) -> None:
        """Raises OSError where the other side takes no more."""
        ...

    def receive(self, timeout_s: float) -> bytes:
        """What came, b"" at the end. Raises TimeoutError where nothing came, OSError where the stream broke."""
        ...

    def last_words(self) -> str:
        """The last line that the process said on stderr."""
        ...

    @property
    def exit_status(self) -> int | None:
        """None while the process runs, and where nobody knows."""
        ...

    def close(self) -> None: ...


class LostError(DeviceError):
    """The stream to the board broke off; `why` in the words of the one side or the other."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Tree:
    """Files on this machine by the names they are to have on the board."""

    files: Mapping[str, Path]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, paths: Sequence[Path]) -> Tree:
        """`paths`: the files at or below `path`."""
        files = {(one.relative_to(path) if one != path else Path(path.name)).as_posix(): one for one in paths}
        return cls(files, {name: sha256_file(one) for name, one in files.items()})


@dataclass
class Board:
    """One session. Every method raises LostError where the stream breaks, and DeviceError with the board's own words."""

    name: str
    link: Link
    session: str
    who: str
    patience_s: float = 60.0
    hello: Mapping[str, Any] = field(default_factory=dict)
    _rest: bytes = b""
    _heard_s: float = field(default_factory=time.monotonic)

    @classmethod
    def greet(cls, name: str, link: Link, *, session: str, who: str, patience_s: float) -> Board:
        """Send the supervisor and wait for its first words: `hello` holds its python, time and boot_id."""
        board = cls(name, link, session, who, patience_s)
        greeting = {"session": session, "who": who, "patience_s": patience_s}
        board._send(SUPERVISOR.read_bytes() + json.dumps(greeting).encode() + b"\n")
        board.hello = board._first_answer()
        return board

    def put(self, tree: Tree, *, keep: bool) -> str:
        """Bring files there, each content once; returns the directory that holds them under their names.

        keep: the contents stay there for later sessions, else they go with this one.
        """
        try:
            return self._put(tree, keep)
        except DeviceError:
            self.close()  # answers to what is on the way may still come
            raise

    def idle_s(self) -> float:
        """Seconds since the board was last heard."""
        return time.monotonic() - self._heard_s

    def beat(self) -> None:
        """Ask whether it is still there."""
        self._ask({"do": "beat", "answer": True})

    def scratch(self, name: str) -> str:
        return str(self._ask({"do": "scratch", "name": name})["path"])

    def get(self, remote: str, path: Path) -> None:
        """Fetch a file, or all files of a directory into `path`: each is written whole or not at all."""
        listed: list[tuple[str, int, str]] = self._ask({"do": "get", "path": remote})["files"]
        for name, size, digest in listed:
            to = path if name == "." else path / _inside(name, self.name)
            to.parent.mkdir(parents=True, exist_ok=True)
            partial = to.with_name(f".{to.name}.partial")
            try:
                with partial.open("wb") as file:
                    for chunk in self._payload(size):
                        file.write(chunk)
                if sha256_file(partial) != digest:
                    raise self._lost(f"{name} did not arrive as it was sent")
                partial.replace(to)
            finally:
                partial.unlink(missing_ok=True)

    def holder(self) -> str | None:
        """Take the board's lock; returns who has it where that is somebody else."""
        holder: str | None = self._ask({"do": "lock"})["holder"]
        return holder

    def run(self, argv: Sequence[str], timeout_s: float) -> Mapping[str, Any]:
        """`returncode` (None: the time was over and it was killed), `stdout`, `stderr`."""
        return self._ask({"do": "run", "argv": list(argv), "timeout_s": timeout_s})

    def close(self) -> None:
        """The board notices, kills what runs and removes what was lent."""
        self.link.close()

    def _put(self, tree: Tree, keep: bool) -> str:
        sources = {digest: tree.files[name] for name, digest in tree.digests.items()}
        absent = self._ask({"do": "missing", "digests": list(sources)})["missing"]
        self._make_room(sum(sources[digest].stat().st_size for digest in absent))
        for number, digest in enumerate(absent):
            self._send_file(digest, sources[digest], keep)
            if number >= UNANSWERED:
                self._answer()
        for _ in absent[:UNANSWERED]:
            self._answer()
        name = sha256_of(tree.digests)[:16]
        return str(self._ask({"do": "tree", "digest": name, "files": dict(tree.digests)})["path"])

    def _make_room(self, need: int) -> None:
        """Raise DeviceError where `need` bytes do not fit, also after what nobody uses has gone."""
        if need == 0:
            return
        free = self._ask({"do": "missing", "digests": [], "need": need})["free"]
        if need > free:
            raise DeviceError(
                f"{self.name}: no space: {need / 2**20:.1f} MiB are to be sent and {free / 2**20:.1f} MiB are free there. "
                "Make room on the board, in the home directory of the user who logs in."
            )

    def _send_file(self, digest: str, path: Path, keep: bool) -> None:
        size = path.stat().st_size
        self._send(json.dumps({"do": "file", "sha256": digest, "bytes": size, "keep": keep}).encode() + b"\n")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                self._send(chunk)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._send(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _first_answer(self) -> dict[str, Any]:
        """Behind whatever the board's login shell says to everybody."""
        for _ in range(MAX_WELCOME_LINES):
            line = self._line()
            if line.startswith(b"{"):
                self._rest = line + b"\n" + self._rest
                return self._answer()
        raise self._lost("the login shell there talks and talks; silence it for logins that are not interactive")

    def _answer(self) -> dict[str, Any]:
        """The next answer that is none to a beat. Raises DeviceError with the reason of a request that failed."""
        while True:
            reply: dict[str, Any] = json.loads(self._line())
            if "beat" in reply:
                continue
            if "error" in reply:
                raise _refused(self.name, reply)
            return reply

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            self._rest += self._received()
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _payload(self, size: int) -> Iterator[bytes]:
        while size:
            chunk, self._rest = self._rest[:size], self._rest[size:]
            size -= len(chunk)
            yield chunk
            if size and not self._rest:
                self._rest = self._received()

    def _received(self) -> bytes:
        """More of the stream; beats while the board says nothing."""
        beat_s = min(BEAT_S, self.patience_s / 3)
        for silent in count(1):
            try:
                data = self.link.receive(beat_s)
            except TimeoutError:
                if silent * beat_s >= self.patience_s:
                    raise self._lost(f"it answered nothing for {self.patience_s:g} s") from None
                self._send(b'{"do": "beat"}\n')
                continue
            except OSError as error:
                raise self._lost(str(error)) from None
            if not data:
                raise self._lost(self.link.last_words() or "it was closed")
            self._heard_s = time.monotonic()
            return data
        raise AssertionError

    def _send(self, data: bytes) -> None:
        try:
            self.link.send(data)
        except OSError as error:
            raise self._lost(self.link.last_words() or str(error) or "it was closed") from None

    def _lost(self, why: str) -> LostError:
        self.close()
        return LostError(
            f"{self.name}: the connection broke off: {why}. Nothing of ours goes on there. "
            "Run the same command again: what is finished is kept.",
            why,
        )


def sha256_of(digests: Mapping[str, str]) -> str:
    """Over names and contents of a tree."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _inside(name: str, board: str) -> Path:
    """A name as the board gives it, which must not lead out of the directory that is fetched."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DeviceError(f"{board}: '{name}' is no name of a file to fetch. Do not trust this board.")
    return path


def _refused(board: str, reply: Mapping[str, Any]) -> DeviceError:
    what = f"{reply['error']}{': ' + str(reply['path']) if reply.get('path') else ''}"
    if reply.get("errno") == NO_SPACE:
        return DeviceError(
            f"{board}: no space is left there ({what}). Make room on the board, then run the same again."
        )
    return DeviceError(f"{board}: {what}. Log in there to see what stands in the way.")
