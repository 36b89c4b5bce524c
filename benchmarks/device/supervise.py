"""The board's end of a session over SSH: takes files and commands from the host, and leaves nothing behind when it ends.

The board's own python3 (3.8 or newer, stdlib only) reads this text from standard input and runs it, one process a session.
It is sent as one text, so it stays one file. Requests are lines of JSON, some followed by raw bytes; each gets one answer. When
standard input ends, or the host is silent for too long, the running command and all its children are killed, and the session's
directory goes with the data lent to it.

    ~/.cache/edgestill/objects/<sha256>    programs and models, kept for later sessions
    ~/.cache/edgestill/sessions/<id>/      objects/ what is lent, trees/ what was put, scratch/ what commands write
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 1 << 18
MAX_OUTPUT = 1 << 22  # bytes of what a command says that are sent back: the last ones
DISMISS_S = 10.0
IDLE_S = 600.0  # a host that has asked for nothing may be busy with itself for so long
KEEP_S = 30 * 86400.0  # an object that no session asked for goes after so long
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # all of them end the session
LOCK_FILE = "edgestill.lock"  # in the folder for temporary files: one lock for all users of the board


class HostIsGone(Exception):  # noqa: N818 - the ordinary end of a session
    """Standard input ended, nothing came for too long, or nobody reads the answers."""


class Host:
    """The other end. `next` gives requests, chunks of bytes, and what a thread here puts into `inbox`."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.inbox: queue.Queue[Any] = queue.Queue(maxsize=16)
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self, timeout_s: float = float("inf"), patience_s: float | None = None) -> Any:
        """Raises HostIsGone, or TimeoutError where `timeout_s` is over before the patience with the host is."""
        patience_s = self.patience_s if patience_s is None else patience_s
        try:
            item = self.inbox.get(timeout=max(min(timeout_s, patience_s), 0.0))
        except queue.Empty:
            raise (TimeoutError if timeout_s < patience_s else HostIsGone) from None
        if item is None:
            raise HostIsGone
        return item

    def answer(self, reply: dict[str, Any]) -> None:
        self.send(json.dumps(reply).encode() + b"\n")

    def send(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError:
            raise HostIsGone from None

    def _listen(self) -> None:
        """The only reader of standard input, whose buffer may hold more than was asked for."""
        stdin = sys.stdin.buffer
        while (line := stdin.readline()).endswith(b"\n"):
            request = json.loads(line)
            self.inbox.put(request)
            left = request.get("bytes", 0)
            while left and (chunk := stdin.read(min(left, CHUNK))):
                self.inbox.put(chunk)
                left -= len(chunk)
            if left:
                break
        self.inbox.put(None)


class Session:
    """What one host may do here; every public method but `serve` and `close` answers the request of its name."""

    def __init__(self, host: Host, session: str, who: str) -> None:
        self.host, self.who = host, who
        self.cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "edgestill"
        self.kept, self.dir = self.cache / "objects", self.cache / "sessions" / session
        self.lent = self.dir / "objects"
        self.known: dict[str, Path] = {}  # sha256 -> where its bytes lie, checked in this session
        self.lock_file: BinaryIO | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.kept.mkdir(parents=True, exist_ok=True)
        self.cache.chmod(0o700)
        with _held(self.cache / "guard"):
            _dismiss(self.dir)
            _sweep_sessions(self.dir.parent)
            self.lent.mkdir(parents=True)
            self.alive = (self.dir / "alive").open("wb", buffering=0)
            fcntl.flock(self.alive, fcntl.LOCK_EX)
            self.alive.write(str(os.getpid()).encode())
            _sweep_objects(self.kept, KEEP_S)

    def serve(self) -> None:
        """Answer until the host is gone. A request that the system refuses is answered with its reason."""
        requests = {
            "beat": self.beat,
            "missing": self.missing,
            "file": self.file,
            "tree": self.tree,
            "scratch": self.scratch,
            "get": self.get,
            "lock": self.lock,
            "run": self.run,
        }
        while True:
            request = self.host.next(patience_s=max(self.host.patience_s, IDLE_S))
            if not isinstance(request, dict):
                continue  # the rest of a file that could not be taken, the end of a command that was stopped
            try:
                requests[request["do"]](request)
            except OSError as error:
                self.host.answer({"error": error.strerror or str(error), "errno": error.errno, "path": error.filename})

    def close(self) -> None:
        """Nothing runs and nothing that was lent is here afterwards."""
        if self.process is not None:
            _kill(self.process)
        shutil.rmtree(self.dir, ignore_errors=True)

    def beat(self, request: dict[str, Any]) -> None:
        """A sign of life; one that is waited for is told from those that go by the way."""
        self.host.answer({"here": True} if request.get("answer") else {"beat": True})

    def missing(self, request: dict[str, Any]) -> None:
        """Which of these digests are not here, or no longer whole; and how many bytes are free."""
        absent = [digest for digest in request["digests"] if not self._whole(digest)]
        free = shutil.disk_usage(self.dir).free
        if request.get("need", 0) > free:
            _sweep_objects(self.kept, 0.0, spare=self.known)
            free = shutil.disk_usage(self.dir).free
        self.host.answer({"missing": absent, "free": free})

    def file(self, request: dict[str, Any]) -> None:
        """Take one file: it is there whole and with the right digest, or not at all."""
        digest, left, hashed = request["sha256"], request["bytes"], hashlib.sha256()
        folder = self.kept if request["keep"] else self.lent
        descriptor, name = tempfile.mkstemp(dir=self.dir)  # of this session: an interrupted one goes with it
        try:
            with os.fdopen(descriptor, "wb") as file:
                while left:
                    chunk = self.host.next()
                    file.write(chunk)
                    hashed.update(chunk)
                    left -= len(chunk)
            if hashed.hexdigest() != digest:
                raise OSError(errno.EIO, "what arrived is not what was sent", digest)
            Path(name).replace(folder / digest)
        except OSError:
            Path(name).unlink()
            raise
        self.known[digest] = folder / digest
        self.host.answer({"ok": True})

    def tree(self, request: dict[str, Any]) -> None:
        """Lay files out under their names; answers with the path of the directory."""
        root = self.dir / "trees" / request["digest"]
        root.mkdir(parents=True, exist_ok=True)
        for name, digest in request["files"].items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _link(self.known[digest], path)
        self.host.answer({"path": str(root)})

    def scratch(self, request: dict[str, Any]) -> None:
        path = self.dir / "scratch" / request["name"]
        path.mkdir(parents=True, exist_ok=True)
        self.host.answer({"path": str(path)})

    def get(self, request: dict[str, Any]) -> None:
        """A file, or all files of a directory: an answer with names, sizes and digests, then their bytes."""
        root = Path(request["path"])
        paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        files = [(str(path.relative_to(root)), path.stat().st_size, _sha256(path)) for path in paths]
        self.host.answer({"files": files})
        for path, (_, size, _) in zip(paths, files):  # noqa: B905 - strict is newer than Python 3.8
            with path.open("rb") as file:
                for chunk in _chunks(file, size):
                    self.host.send(chunk)

    def lock(self, request: dict[str, Any]) -> None:
        """Hold the board for measurements, to the end of the session; answers with who holds it where that is not us."""
        if self.lock_file is None:
            file = open_for_all(Path(tempfile.gettempdir()) / LOCK_FILE)
            if not locked(file):
                self.host.answer({"holder": file.read().decode(errors="replace") or "somebody"})
                file.close()
                return
            file.truncate(0)
            file.write(self.who.encode())
            file.flush()
            self.lock_file = file
        self.host.answer({"holder": None})

    def run(self, request: dict[str, Any]) -> None:
        """Run one command to its end in a process group of its own; kill it when the host goes or the time is over."""
        with tempfile.TemporaryFile(dir=self.dir) as out, tempfile.TemporaryFile(dir=self.dir) as err:
            process = self.process = subprocess.Popen(
                request["argv"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.dir,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
            threading.Thread(target=self._wait_for, args=(process,), daemon=True).start()
            timed_out = self._outlast(process, time.monotonic() + request["timeout_s"])
            _kill(process)
            self.process = None
            said = {"stdout": _tail(out), "stderr": _tail(err)}
        self.host.answer({"returncode": None if timed_out else process.returncode, **said})

    def _outlast(self, process: subprocess.Popen[bytes], deadline_s: float) -> bool:
        """Answer beats until the command ends; True where its time is over first."""
        while True:
            try:
                item = self.host.next(deadline_s - time.monotonic())
            except TimeoutError:
                return True
            if item is process:
                return False
            if isinstance(item, dict):
                self.host.answer({"beat": True})  # nothing else is asked while a command runs

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.host.inbox.put(process)

    def _whole(self, digest: str) -> bool:
        if digest in self.known and not self.known[digest].is_file():
            del self.known[digest]  # another session made room
        for path in (self.lent / digest, self.kept / digest):
            if digest not in self.known and path.is_file():
                if _sha256(path) == digest:
                    self.known[digest] = path
                    os.utime(path)
                else:
                    path.unlink()
        return digest in self.known


def _link(source: Path, path: Path) -> None:
    """A second name for an object, a copy where the file system has no such thing."""
    if path.exists():
        return
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(source, path)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes of a file. Raises OSError where it has become shorter."""
    while size:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        size -= len(chunk)
        yield chunk


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _tail(file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - MAX_OUTPUT, 0))
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _dismiss(folder: Path) -> None:
    """End an earlier process of the same session: its connection broke off, and it may not have noticed yet."""
    with contextlib.suppress(OSError, ValueError), (folder / "alive").open("r+b") as alive:
        give_up_s = time.monotonic() + DISMISS_S
        while not locked(alive) and time.monotonic() < give_up_s:
            alive.seek(0)
            os.kill(int(alive.read()), signal.SIGTERM)
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def locked(file: BinaryIO) -> bool:
    """Whether it is ours now: nobody else holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep_sessions(sessions: Path) -> None:
    """Remove what sessions left that were killed, or ended with the board's power: nobody holds their `alive`."""
    for folder in sessions.glob("*"):
        with contextlib.suppress(OSError), (folder / "alive").open("ab") as alive:
            if locked(alive):
                shutil.rmtree(folder, ignore_errors=True)


def _sweep_objects(kept: Path, older_than_s: float, spare: Any = ()) -> None:
    """Remove objects that nobody asked for since, except those of `spare`."""
    before_s = time.time() - older_than_s
    for path in kept.iterdir():
        with contextlib.suppress(OSError):
            if path.name not in spare and path.stat().st_mtime <= before_s:
                path.unlink()


def open_for_all(path: Path) -> BinaryIO:
    """A file that every user may lock and write; never through a link, which somebody else may have laid there."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        os.fchmod(descriptor, 0o666)
        return os.fdopen(descriptor, "r+b")
    return os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b")


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere a process may outlive its parent."""
    with contextlib.suppress(OSError, AttributeError):
        _LIBC.prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_LIBC: Any = ctypes.CDLL(None)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command, its process group, and its children that left the group: they have become ours."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while strays := _children():
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    """Process ids of our own children; the fourth field of stat is the parent, behind a name that may hold anything."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found


def _end(signum: int, frame: object) -> None:
    _ignore_signals()
    raise HostIsGone


def _ignore_signals() -> None:
    """From here on only the end is left to be done, and a signal must not leave it half done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _boot_id() -> str | None:
    """Another one after every start of the board."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def main() -> None:
    """Greet, then serve. The host's first line: {"session", "who", "patience_s"}."""
    for number in SIGNALS:
        signal.signal(number, _end)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    host = Host(60.0)
    session = None
    with contextlib.suppress(HostIsGone):
        try:
            greeting = host.next()
            host.patience_s = greeting["patience_s"]
            try:
                session = Session(host, greeting["session"], greeting["who"])
            except OSError as error:
                host.answer({"error": error.strerror, "errno": error.errno, "path": error.filename})
                return
            host.answer({"python": sys.version_info[:3], "time": time.time(), "boot_id": _boot_id()})
            session.serve()
        finally:
            _ignore_signals()
            if session is not None:
                session.close()


if __name__ == "__main__":
    exit_code = 0
    try:
        main()
    except Exception:
        traceback.print_exc()
        exit_code = 1
    os._exit(exit_code)  # not by the interpreter's own end, which the thread that reads standard input is in the way of
