"""A session on a board: the real supervisor at the other end of a pipe, and what is left there when it ends."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import board, ssh
from benchmarks.board import BOOT, SUPERVISOR, Board, Tree
from benchmarks.devices import Local
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address, SshLink, _connection
from targets.errors import DeviceError, RecipeError

pytestmark = pytest.mark.integration

ADDRESS = Address("board", "ann")
PATIENCE_S = 20.0


class Pipe:
    """A link to a supervisor on this machine, in place of a network. `cut_after`: bytes sent until it breaks off."""

    def __init__(self, home: Path, python: str = sys.executable, *, cut_after: float = float("inf")) -> None:
        environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
        self.process = subprocess.Popen(
            [python, *BOOT, str(len(SUPERVISOR.read_bytes()))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        self.left = cut_after
        self.sent = bytearray()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        os.set_blocking(self.stdout.fileno(), False)

    def send(self, data: bytes) -> None:
        if len(data) > self.left:
            self.close()
            raise OSError("cut")
        self.left -= len(data)
        self.sent += data
        self.stdin.write(data)
        self.stdin.flush()

    def receive(self, timeout_s: float) -> bytes:
        if not select.select([self.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        return self.stdout.read1(1 << 16)

    def last_words(self) -> str:
        return self.stderr.read().decode().strip().rpartition("\n")[2] if not self.stderr.closed else ""

    @property
    def exit_status(self) -> int | None:
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "board").mkdir()
    return tmp_path / "board"


@pytest.fixture
def links() -> list[Pipe]:
    return []


@pytest.fixture
def device(home: Path, links: list[Pipe]) -> Any:
    with make_device(home, links) as device:
        yield device


def make_device(home: Path, links: list[Pipe], **changed: Any) -> Ssh:
    def connect() -> Pipe:
        links.append(Pipe(home))
        return links[-1]

    return Ssh(name="orin", address=ADDRESS, python=sys.executable, **{"connect": connect, **changed})


def lent(home: Path) -> list[str]:
    """Names of all files on the board that are not kept for later sessions."""
    cache = home / "cache" / "edgestill"
    files = [path for path in cache.rglob("*") if path.is_file() and cache / "objects" not in path.parents]
    return [path.name for path in files if path.name != "guard"]


def kept(home: Path) -> list[Path]:
    return sorted((home / "cache/edgestill/objects").iterdir())


def run_python(device: Ssh, script: str, *argv: str, timeout_s: float = PATIENCE_S) -> str:
    done = device.run([sys.executable, "-c", script, *argv], timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name.replace("_json", ".json")).write_bytes(data)
    return path


def patched_python(path: Path, patch: str) -> str:
    """A python3 that begins with `patch`: a board that is not as it should be."""
    lines = f"{patch}\nimport sys\nboot = sys.argv[3]; sys.argv = [sys.argv[0], *sys.argv[4:]]; exec(boot)"
    path.write_text(f"#!/bin/sh\nexec {sys.executable} -I -c '{lines}' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """One session for all examples."""
    with make_device(tmp_path_factory.mktemp("lasting"), []) as device:
        yield device


NAMES = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name not in (".", "..")
    ),
    min_size=1,
    max_size=3,
)
FILES = st.dictionaries(NAMES.map("/".join), st.binary(max_size=300), max_size=4)


@settings(max_examples=25, deadline=None)
@given(files=FILES)
def test_files_of_any_name_arrive_and_come_back_unchanged(
    files: dict[str, bytes], lasting: Ssh, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    here, back = folder / "here", folder / "back"
    here.mkdir()
    for name, data in files.items():
        with suppress(OSError):  # a name that is a folder already
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(data)

    lasting.get(lasting.put(here), back)

    def read(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert read(back) == read(here)


@settings(max_examples=5, deadline=None)
@given(words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
@example(words=["$(touch /tmp/x)", "'; reboot #", "a\nb", "~", ""])
def test_arguments_of_any_form_reach_the_command_as_they_are(words: list[str], lasting: Ssh) -> None:
    said = run_python(lasting, "import sys, json; print(json.dumps(sys.argv[1:]))", *words)

    assert json.loads(said) == words


def test_a_model_is_sent_once_and_data_are_removed_at_the_end(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    weights, pixels = b"w" * 9000, b"x" * 9000
    model = folder_of(tmp_path / "model", compiled_json=b"{}", weights=weights)
    data = folder_of(tmp_path / "data", x=pixels)
    for _ in range(2):
        with make_device(home, links) as device:
            there = [device.put(model), device.put(data)]
            assert there == [device.put(model), device.put(data)]
            run_python(device, "import sys, os; [os.stat(path) for path in sys.argv[1:]]", *there)
            assert "x" in lent(home)
        assert lent(home) == []

    first, second = (bytes(link.sent) for link in links)
    assert (first.count(weights), second.count(weights)) == (1, 0)
    assert (first.count(pixels), second.count(pixels)) == (1, 1)
    assert sorted(path.read_bytes() for path in kept(home)) == [weights, b"{}"]


def test_a_changed_file_is_sent_again(device: Ssh, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", x=b"old")
    device.put(folder)
    (folder / "x").write_bytes(b"newer")

    assert run_python(device, "import sys; print(open(sys.argv[1]).read())", device.put(folder) + "/x") == "newer\n"


def test_what_lies_there_damaged_is_sent_again(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model", compiled_json=b"{}")
    with make_device(home, links) as device:
        device.put(model)
    kept(home)[0].write_bytes(b"{]")

    with make_device(home, links) as device:
        device.get(device.put(model) + "/compiled.json", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == b"{}"


def test_a_transfer_that_breaks_off_goes_on_and_leaves_no_half_file(home: Path, tmp_path: Path) -> None:
    data = {f"part{i}": bytes([i]) * 200_000 for i in range(6)}
    model = folder_of(tmp_path / "model", compiled_json=b"{}", **data)
    program = folder_of(tmp_path / "before", x=b"before")
    links, said = list[Pipe](), list[str]()

    def connect() -> Pipe:
        links.append(Pipe(home, cut_after=700_000 if not links else float("inf")))
        return links[-1]

    with make_device(home, links, connect=connect, say=said.append) as device:
        before = device.put(program)
        device.get(device.put(model), tmp_path / "back")
        assert run_python(device, "import sys; print(open(sys.argv[1]).read())", f"{before}/x") == "before\n"

    assert len(links) == 2
    assert len(links[1].sent) < 1_200_000
    assert [line for line in said if "broke off" in line and "Connecting again" in line] == said
    assert all((tmp_path / "back" / name).read_bytes() == content for name, content in data.items())
    assert all(path.stat().st_size in (2, 200_000) for path in kept(home))


def test_a_transfer_that_breaks_off_again_and_again_is_reported(home: Path, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", x=b"x" * 100_000)
    links = list[Pipe]()

    def connect() -> Pipe:
        links.append(Pipe(home, cut_after=50_000))
        return links[-1]

    with (
        make_device(home, links, connect=connect) as device,
        pytest.raises(DeviceError, match=r"orin: the connection broke off"),
    ):
        device.put(data)

    assert len(links) == 3
    assert lent(home) == []


# A command, its child in the same group, and a grandchild that left for a session of its own.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
with open(sys.argv[1] + ".new", "w") as file:
    file.write(" ".join(str(pid) for pid in [os.getpid(), *(child.pid for child in children)]))
os.rename(sys.argv[1] + ".new", sys.argv[1])
if len(sys.argv) < 3:
    time.sleep(600)
"""


def family_of(path: Path) -> list[int]:
    """Waits until they are all there."""
    until_s = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < until_s
    return [int(word) for word in path.read_text().split()]


@pytest.fixture
def at_work(home: Path, links: list[Pipe], tmp_path: Path) -> Iterator[Callable[[Callable[[Pipe], object]], Exception]]:
    """Let something happen to the link while a family of processes runs there; returns how the command ended."""

    def happen(event: Callable[[Pipe], object], **changed: Any) -> Exception:
        device, pids = make_device(home, links, **changed), tmp_path / "pids"
        ended: list[Exception] = []

        def work() -> None:
            try:
                run_python(device, FAMILY, str(pids))
            except Exception as error:
                ended.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        family = family_of(pids)
        assert [pid for pid in family if is_running(pid)] == family
        event(links[0])
        links[0].process.wait(PATIENCE_S)
        worker.join(PATIENCE_S)
        device.close()
        until_s = time.monotonic() + PATIENCE_S
        while any(map(is_running, family)) and time.monotonic() < until_s:
            pass
        assert [pid for pid in family if is_running(pid)] == []
        return ended[0]

    return happen


def test_nothing_runs_on_when_the_connection_drops(at_work: Callable[..., Exception], home: Path) -> None:
    ended = at_work(lambda link: link.stdin.close())

    assert isinstance(ended, DeviceError)
    assert "broke off" in str(ended)
    assert lent(home) == []


def test_nothing_runs_on_when_the_supervisor_is_told_to_end(at_work: Callable[..., Exception], home: Path) -> None:
    at_work(lambda link: link.process.terminate())

    assert lent(home) == []


@pytest.mark.parametrize("event", ["drops", "told to end"])
def test_a_signal_while_a_session_ends_leaves_nothing_behind(
    event: str, at_work: Callable[..., Exception], home: Path, links: list[Pipe], tmp_path: Path
) -> None:
    patch = (
        "import os, signal; kill = os.killpg; "
        "os.killpg = lambda *args: (kill(*args), os.kill(os.getpid(), signal.SIGTERM))"
    )
    python = patched_python(tmp_path / "python3", patch)

    def connect() -> Pipe:
        links.append(Pipe(home, python if not links else sys.executable))
        return links[-1]

    at_work(lambda link: link.stdin.close() if event == "drops" else link.process.terminate(), connect=connect)

    assert lent(home) == []


def test_the_command_dies_with_a_supervisor_that_is_killed(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    device, pids = make_device(home, links), tmp_path / "pids"

    def work() -> None:
        with pytest.raises(DeviceError):
            run_python(device, FAMILY, str(pids))

    worker = threading.Thread(target=work)
    worker.start()
    command, *children = family_of(pids)
    links[0].process.kill()
    worker.join(PATIENCE_S)
    device.close()

    assert not is_running(command)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_children_that_a_command_leaves_are_ended_with_it(device: Ssh, tmp_path: Path) -> None:
    run_python(device, FAMILY, str(tmp_path / "pids"), "and leave them")

    assert [pid for pid in family_of(tmp_path / "pids") if is_running(pid)] == []


def test_a_host_that_falls_silent_while_a_command_runs_is_given_up(home: Path, tmp_path: Path) -> None:
    link = Pipe(home)
    session = Board.greet("orin", link, session="s", who="ann", patience_s=1.0)
    session.put(Tree.of(tmp_path, []), keep=False)
    argv = [sys.executable, "-c", FAMILY, str(tmp_path / "pids")]
    link.send(json.dumps({"do": "run", "argv": argv, "timeout_s": 600}).encode() + b"\n")
    family = family_of(tmp_path / "pids")

    assert link.process.wait(PATIENCE_S) == 0
    assert [pid for pid in family if is_running(pid)] == []
    assert lent(home) == []
    link.close()


def test_a_session_that_ended_while_nothing_was_asked_begins_again(
    home: Path, links: list[Pipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "IDLE_S", -1.0)
    with make_device(home, links) as device:
        folder = device.put(folder_of(tmp_path / "data", x=b"still there"))
        device.put(folder_of(tmp_path / "passing", x=b"of use for a moment"))
        shutil.rmtree(tmp_path / "passing")
        links[0].process.kill()
        links[0].process.wait()

        assert run_python(device, "import sys; print(open(sys.argv[1]).read())", f"{folder}/x") == "still there\n"


def test_a_board_that_falls_silent_is_lost(home: Path, links: list[Pipe]) -> None:
    device = make_device(home, links, patience_s=1.0)
    device.scratch(home / "any")
    os.kill(links[0].process.pid, signal.SIGSTOP)

    class Woken(Pipe):
        def close(self) -> None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
            super().close()

    links[0].__class__ = Woken
    with pytest.raises(DeviceError, match="answered nothing for 1 s"):
        device.get("/etc/hostname", home / "back")


def test_while_a_command_runs_host_and_board_hear_of_each_other(
    device: Ssh, links: list[Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "BEAT_S", 0.05)

    assert run_python(device, "import time; time.sleep(0.5); print('done')") == "done\n"

    assert links[0].sent.count(b'"beat"') > 1


def test_a_command_over_its_time_is_stopped(device: Ssh, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"did not end within 0\.3 s and was stopped"):
        run_python(device, "import time; time.sleep(600)", str(tmp_path), timeout_s=0.3)

    assert not any(str(tmp_path) in line for line in command_lines())
    assert run_python(device, "print(1)") == "1\n"


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")


def test_an_interrupt_ends_what_runs(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    device = make_device(home, links)
    device.put(folder_of(tmp_path / "data", x=b"x"))

    def interrupted(timeout_s: float) -> bytes:
        family_of(tmp_path / "pids")
        raise KeyboardInterrupt

    run_python(device, "")  # takes the lock
    links[0].receive = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_python(device, FAMILY, str(tmp_path / "pids"))

    assert [pid for pid in family_of(tmp_path / "pids") if is_running(pid)] == []
    assert lent(home) == []


def test_two_measurements_wait_for_each_other(home: Path, links: list[Pipe]) -> None:
    said: list[str] = []
    first, second = make_device(home, links), make_device(home, links, lock_wait_s=0.0, say=said.append)
    run_python(first, "")

    with pytest.raises(DeviceError, match=rf"orin: .*process {os.getpid()}, since .* is measuring there"):
        run_python(second, "")
    first.close()

    assert run_python(second, "print(1)") == "1\n"
    second.close()


def test_who_waits_is_told_for_whom(home: Path, links: list[Pipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "LOCK_POLL_S", 0.01)
    first = make_device(home, links)
    run_python(first, "")
    second = make_device(home, links, say=lambda line: (said.append(line), first.close()))
    said: list[str] = []

    assert run_python(second, "print(1)") == "1\n"

    second.close()
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]


def test_what_asks_only_waits_for_nobody(home: Path, links: list[Pipe]) -> None:
    with make_device(home, links) as measuring, make_device(home, links, lock_wait_s=0.0) as asking:
        run_python(measuring, "")

        assert asking.facts() == Local().facts()


def test_what_a_board_that_lost_its_power_holds_is_removed_the_next_time(
    home: Path, links: list[Pipe], tmp_path: Path
) -> None:
    device = make_device(home, links)
    device.put(folder_of(tmp_path / "data", x=b"secret"))
    links[0].process.kill()
    links[0].process.wait()
    assert "x" in lent(home)

    with make_device(home, links) as later:
        later.scratch(tmp_path / "any")
        assert "x" not in lent(home)
    device.close()


def with_python(home: Path, python: str) -> Ssh:
    return Ssh(name="orin", address=ADDRESS, python=python, connect=lambda: Pipe(home, python))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("import sys; sys.version_info = (3, 8, 10)", r"is Python 3\.8\.10 there, .* 3\.10 or newer"),
        (
            "import time; now = time.time; time.time = lambda: now() - 90000",
            r"clock is 90\d\d\d s behind .*timedatectl",
        ),
        ("import time; now = time.time; time.time = lambda: now() + 90000", r"clock is \d+ s ahead of"),
        ('raise SystemExit("python3: no module named site")', r"does not run there \(python3: no module named site\)"),
    ],
)
def test_a_board_that_cannot_measure_is_refused_with_what_to_do(
    patch: str, message: str, home: Path, tmp_path: Path
) -> None:
    with (
        with_python(home, patched_python(tmp_path / "python3", patch)) as device,
        pytest.raises(DeviceError, match=message),
    ):
        device.scratch(tmp_path / "any")

    assert lent(home) == []


def test_a_full_board_is_told_before_anything_is_sent(home: Path, tmp_path: Path) -> None:
    patch = 'import shutil, collections; free = collections.namedtuple("F", "free"); shutil.disk_usage = lambda path: free(1000)'
    with with_python(home, patched_python(tmp_path / "python3", patch)) as device:
        device.put(folder_of(tmp_path / "small", x=b"x"))
        with pytest.raises(DeviceError, match=r"orin: no space: 2\.0 MiB are to be sent and 0\.0 MiB are free"):
            device.put(folder_of(tmp_path / "large", x=b"x" * 2**21))


def test_space_is_made_of_what_no_session_needs(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    with make_device(home, links) as device:
        device.put(folder_of(tmp_path / "old", compiled_json=b"old"))
    patch = (
        'import shutil, collections, os; free = collections.namedtuple("F", "free"); '
        f'shutil.disk_usage = lambda path: free(10 if os.listdir("{kept(home)[0].parent}") else 10**9)'
    )
    with with_python(home, patched_python(tmp_path / "python3", patch)) as device:
        device.put(folder_of(tmp_path / "large", compiled_json=b"new " * 10))

    assert [path.read_bytes() for path in kept(home)] == [b"new " * 10]


def test_what_another_session_made_room_of_is_sent_again(home: Path, links: list[Pipe], tmp_path: Path) -> None:
    with make_device(home, links) as device:
        device.put(folder_of(tmp_path / "model", compiled_json=b"the same"))
        patch = (
            'import shutil, collections, os; free = collections.namedtuple("F", "free"); '
            f'shutil.disk_usage = lambda path: free(10 if os.listdir("{home / "cache/edgestill/objects"}") else 10**9)'
        )
        with with_python(home, patched_python(tmp_path / "python3", patch)) as other:
            other.put(folder_of(tmp_path / "large", compiled_json=b"new " * 10))

        again = folder_of(tmp_path / "again", compiled_json=b"the same", more=b"more")
        device.get(device.put(again), tmp_path / "back")

    assert (tmp_path / "back" / "compiled.json").read_bytes() == b"the same"


def test_a_board_that_was_started_anew_meanwhile_is_told_apart(home: Path, tmp_path: Path) -> None:
    patch = 'from pathlib import Path; Path.read_text = lambda path: "another boot"'
    pythons = [sys.executable, patched_python(tmp_path / "python3", patch)]
    device = Ssh(name="orin", address=ADDRESS, connect=lambda: Pipe(home, pythons.pop(0)))
    device.scratch(home / "any")
    dying = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"]

    with pytest.raises(DeviceError, match=r"orin: the board was started anew while the command ran"):
        device.run(dying)


def test_a_board_that_is_gone_afterwards_is_told(home: Path) -> None:
    links = [Pipe(home)]

    def connect() -> Pipe:
        if not links:
            raise DeviceError("orin: cannot be reached.")
        return links.pop()

    device = Ssh(name="orin", address=ADDRESS, connect=connect)

    with pytest.raises(DeviceError, match=r"broke off.*does not answer now"):
        device.run([sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"])


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside"])
def test_a_board_cannot_write_outside_what_is_fetched(name: str, tmp_path: Path) -> None:
    class Evil:
        exit_status = None

        def send(self, data: bytes) -> None: ...

        def receive(self, timeout_s: float) -> bytes:
            return json.dumps({"files": [[name, 3, "0" * 64]]}).encode() + b"\nabc"

        def last_words(self) -> str:
            return ""

        def close(self) -> None: ...

    with pytest.raises(DeviceError, match="is no name of a file to fetch"):
        Board("orin", Evil(), "s", "ann").get("/there", tmp_path / "into")

    assert list(tmp_path.rglob("*")) == []


@given(
    host=st.from_regex(r"[A-Za-z][A-Za-z0-9.-]{0,20}|[0-9A-Fa-f]{1,4}::[0-9A-Fa-f]{1,4}", fullmatch=True),
    user=st.none() | st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True),
    port=st.none() | st.integers(1, 65535),
)
def test_an_address_is_read_as_it_is_written(host: str, user: str | None, port: int | None) -> None:
    address = Address(host, user, port)

    assert Address.parse(str(address)) == address


def test_an_alias_with_capitals_is_found_and_its_host_is_looked_up_in_small_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host JetsonNano\n  HostName Nano.Local\n  User ann\n")

    named, unnamed = (_connection("orin", Address.parse(f"ssh://{name}")) for name in ("JetsonNano", "Other.Local"))

    assert (named.host, named.user) == ("nano.local", "ann")
    assert unnamed.host == "other.local"  # OpenSSH writes it so into known_hosts


def test_an_upload_may_stall_as_long_as_the_board_may_be_silent() -> None:
    class Channel:
        def __init__(self) -> None:
            self.timeout_s, self.sent = 0.0, list[float]()

        def settimeout(self, timeout_s: float) -> None:
            self.timeout_s = timeout_s

        def recv(self, size: int) -> bytes:
            raise TimeoutError

        def sendall(self, data: bytes) -> None:
            self.sent.append(self.timeout_s)

    channel: Any = Channel()
    link = SshLink(None, channel, 60.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        link.receive(5.0)

    link.send(b"x")

    assert channel.sent == [60.0]


@pytest.mark.parametrize(
    "text", ["orin", "http://orin", "ssh://", "ssh://orin/path", "ssh://orin:99999", "ssh://orin:x", "ssh://orin?a=b"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"Write ssh://user@host"):
        Address.parse(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError, match="ssh-copy-id ann@orin") as refused:
        Address.parse("ssh://ann:hunter2@orin")

    assert "hunter2" not in str(refused.value)
