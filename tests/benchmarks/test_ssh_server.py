"""Boards over real SSH: an OpenSSH server on loopback with keys and a configuration of its own; the system's are not touched."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.devices import Local, run_program
from benchmarks.doctor import check_devices
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address
from targets.errors import DeviceError

pytestmark = pytest.mark.system

WAIT_S = 30.0

SSHD = "/usr/sbin/sshd"
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserRC no
PrintMotd no
SetEnv XDG_CACHE_HOME={folder}/board/cache TMPDIR={folder}/board
"""


class Server:
    """sshd in the foreground. `close` ends it and lets its connections end; `boot` begins again as the same machine."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        self.folder, self.extra = folder, extra
        (folder / "board").mkdir(parents=True, exist_ok=True)
        make_key(folder / "host_key")
        (folder / "authorized_keys").touch()
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port: int = found.getsockname()[1]
        self.boot()

    def boot(self) -> None:
        folder, extra = self.folder, self.extra
        (folder / "sshd_config").write_text(CONFIG.format(port=self.port, folder=folder) + extra)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd locks itself in
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "Server listening" in line:
                return
        raise RuntimeError("sshd did not begin to listen")

    def known_hosts_line(self) -> str:
        kind, key, *_ = (self.folder / "host_key.pub").read_text().split()
        return f"[127.0.0.1]:{self.port} {kind} {key}\n"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


def make_key(path: Path, passphrase: str = "") -> None:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "test", "-f", str(path)], check=True)


class Board:
    """A server, the person's home with keys and configuration, and the device as they see it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, extra: str = "") -> None:
        self.server, self.home = Server(folder / "server", extra), folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        make_key(self.home / ".ssh" / "id_ed25519")
        self.let_in(self.home / ".ssh" / "id_ed25519.pub")
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def let_in(self, key: Path) -> None:
        (self.server.folder / "authorized_keys").write_text(key.read_text() if key.exists() else "")

    def know(self, line: str | None = None) -> None:
        (self.home / ".ssh" / "known_hosts").write_text(line or self.server.known_hosts_line())

    def device(self, port: int | None = None, python: str = sys.executable) -> Ssh:
        return Ssh(name="orin", address=Address("127.0.0.1", "root", port or self.server.port), python=python)

    def left_there(self) -> list[str]:
        """Names of files; what is removed meanwhile may or may not be among them."""
        folders = os.walk(self.server.folder / "board" / "cache")
        return [name for _, _, names in folders for name in names if name != "guard"]

    def refusal(self, device: Ssh | None = None) -> str:
        with device or self.device() as board, pytest.raises(DeviceError) as refused:
            board.scratch(self.home / "any")
        assert len(str(refused.value).splitlines()) <= 3
        return str(refused.value)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    board = Board(tmp_path, monkeypatch)
    yield board
    board.server.close()


def said(device: Ssh, script: str, *argv: str) -> str:
    done = device.run([sys.executable, "-c", script, *argv], timeout_s=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_unknown_board_is_refused_and_the_command_in_the_message_accepts_it(board: Board, tmp_path: Path) -> None:
    refusal = board.refusal()
    known_hosts = board.home / ".ssh" / "known_hosts"
    assert not known_hosts.exists()

    command = shlex.split(refusal.rpartition("accepts it: ")[2])
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", board.server.folder / "host_key.pub"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    yes = tmp_path / "yes"
    yes.write_text("#!/bin/sh\necho yes\n")
    yes.chmod(0o755)
    # OpenSSH finds its home in the password database, not in HOME.
    options = ["-F", "none", "-o", f"UserKnownHostsFile={known_hosts}", "-i", board.home / ".ssh" / "id_ed25519"]
    asked = {"SSH_ASKPASS": str(yes), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(
        [command[0], *options, *command[1:]],
        env={**os.environ, **asked},
        check=True,
        capture_output=True,
        timeout=WAIT_S,
    )

    assert fingerprint in refusal
    with board.device() as device:
        assert said(device, "print(1)") == "1\n"


def test_a_board_with_another_key_than_before_is_refused(board: Board, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    kind, key, *_ = (tmp_path / "other.pub").read_text().split()
    board.know(f"[127.0.0.1]:{board.server.port} {kind} {key}\n")

    refusal = board.refusal()

    assert "shows another key than the one that was accepted" in refusal
    assert f"ssh-keygen -R '[127.0.0.1]:{board.server.port}'" in refusal


def test_a_key_that_the_board_does_not_accept_is_told(board: Board) -> None:
    board.know()
    board.let_in(board.home / "nobody")

    assert f"ssh-copy-id -p {board.server.port} root@127.0.0.1" in board.refusal()


def test_a_key_behind_a_passphrase_is_told(board: Board) -> None:
    board.know()
    make_key(board.home / ".ssh" / "id_ed25519", "secret")

    assert "ssh-add" in board.refusal()


def test_a_board_that_is_off_or_has_no_such_name_is_told(board: Board) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]

    assert f"ssh://root@127.0.0.1:{port} cannot be reached" in board.refusal(board.device(port))
    nameless = Ssh(name="orin", address=Address("no-such-board.invalid"))
    assert "there is no host 'no-such-board.invalid'" in board.refusal(nameless)


def test_something_that_does_not_speak_ssh_is_told(board: Board) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()

        assert "cannot be reached" in board.refusal(board.device(server.getsockname()[1]))


def test_a_board_without_python_is_told_what_to_install(board: Board) -> None:
    board.know()

    refusal = board.refusal(board.device(python="/opt/none/bin/python3"))

    assert "'/opt/none/bin/python3' does not run there" in refusal
    assert "No such file" in refusal
    assert "sudo apt-get install python3 python3-numpy" in refusal


def test_the_device_program_answers_as_it_does_here(board: Board, tmp_path: Path) -> None:
    board.know()
    program = pack_device_program(tmp_path / PROGRAM)

    with board.device() as device:
        there = run_program(device, device.put(program), ["environment"])
        assert there["hard"] == Local().facts() == device.facts()
        with pytest.raises(DeviceError, match="orin: "):
            run_program(device, device.put(program), ["no-such-command"])

    (kept,) = board.left_there()  # the program, for the next time
    assert (board.server.folder / "board/cache/edgestill/objects" / kept).read_bytes() == program.read_bytes()


def test_boards_are_looked_at_together_and_one_that_is_away_is_told_beside_the_others(board: Board) -> None:
    board.know()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        away: int = taken.getsockname()[1]
    inventory = board.home / "devices.yaml"
    inventory.write_text(
        f"here: {{address: 'ssh://root@127.0.0.1:{board.server.port}', python: {sys.executable}, target: onnxruntime-cpu}}\n"
        f"away: {{address: 'ssh://root@127.0.0.1:{away}'}}\n"
    )

    report = check_devices(inventory=inventory)

    here, gone = report.boards
    assert (here.error, here.faults) == (None, ())
    assert here.found is not None
    assert here.found["packages"]["numpy"] == Local().facts()["numpy"]
    assert gone.error is not None
    assert report.to_json()["exit_code"] == 6


def test_a_login_shell_that_greets_everybody_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greeting = 'ForceCommand echo "Welcome to {Orin}"; echo; exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    board = Board(tmp_path, monkeypatch, greeting)
    board.know()
    try:
        with board.device() as device:
            assert said(device, "print(1)") == "1\n"
    finally:
        board.server.close()


def test_the_persons_own_configuration_names_host_user_port_and_key(board: Board) -> None:
    board.know()
    ssh = board.home / ".ssh"
    (ssh / "id_ed25519").rename(ssh / "for_boards")
    (ssh / "config").write_text(
        f"Host kitchen\n  HostName 127.0.0.1\n  User root\n  Port {board.server.port}\n  IdentityFile ~/.ssh/for_boards\n"
    )

    with Ssh(name="kitchen", address=Address("kitchen"), python=sys.executable) as device:
        assert said(device, "print(1)") == "1\n"


def test_a_host_is_known_however_its_name_is_written(board: Board) -> None:
    board.know(board.server.known_hosts_line().replace("127.0.0.1", "localhost"))

    with Ssh(name="orin", address=Address("LocalHost", "root", board.server.port), python=sys.executable) as device:
        assert said(device, "print(1)") == "1\n"


def test_the_key_of_a_jump_host_is_checked_as_well(board: Board, tmp_path: Path) -> None:
    jump = Server(tmp_path / "jump")
    try:
        key = board.home / ".ssh" / "id_ed25519.pub"
        (jump.folder / "authorized_keys").write_text(key.read_text())
        (board.home / ".ssh" / "config").write_text(
            f"Host inner\n  HostName 127.0.0.1\n  User root\n  Port {board.server.port}\n"
            f"  ProxyJump root@localhost:{jump.port}\n"
        )
        board.know()
        inner = Ssh(name="inner", address=Address("inner"), python=sys.executable)
        assert f"nobody has accepted the key of [localhost]:{jump.port}" in board.refusal(inner)

        board.know(board.server.known_hosts_line() + jump.known_hosts_line().replace("127.0.0.1", "localhost"))
        with Ssh(name="inner", address=Address("inner"), python=sys.executable) as device:
            assert said(device, "print(1)") == "1\n"
    finally:
        jump.close()


def test_a_run_goes_on_from_its_finished_stages_when_the_board_is_back(
    board: Board, finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    board.know()
    monkeypatch.chdir(board.home)
    (board.home / "devices.yaml").write_text(
        f"orin: {{address: 'ssh://root@127.0.0.1:{board.server.port}', python: {sys.executable}}}\n"
    )
    on_orin = ("--set", "targets.0.device=orin", "--set", f"targets.0.scheme={finished.scheme}")
    run = ("run", finished.recipe, "--runs", finished.runs, *on_orin, "--json")

    compiled = edgestill(*run, "--until", "compile")
    board.server.close()
    away = edgestill(*run)
    board.server.boot()
    back = edgestill(*run)
    board.server.close()
    again = edgestill(*run)

    assert json.loads(compiled.out)["built"] == ["compile-onnxruntime-cpu"]
    assert away.code == 6
    assert "orin: ssh://root@127.0.0.1" in away.err
    assert (back.code, back.err.count("cannot be reached")) == (0, 0)
    assert [label.partition("-")[0] for label in json.loads(back.out)["built"]] == [
        "measure",
        "verdict",
        "bundle",
        "report",
    ]
    assert again.code == 0  # all is finished: what the board said of itself is remembered
    assert json.loads(again.out)["built"] == []
    kept = board.server.folder / "board/cache/edgestill"
    assert list((kept / "sessions").iterdir()) == []
    board.server.boot()


class Cable:
    """A forwarder to the server that can be cut, or go dead without a word."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.server_port = port
        self.ends: list[socket.socket] = []
        self.cut_after = sys.maxsize
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.server_port))
            self.ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.cut_after -= len(data)
                if self.cut_after < 0:
                    self.cut()
                    return
                sink.sendall(data)
        except OSError:
            pass
        shut(source, sink)

    def cut(self) -> None:
        self.cut_after = sys.maxsize
        shut(*self.ends)

    def close(self) -> None:
        self.listener.close()
        self.cut()
        for end in self.ends:
            end.close()


def shut(*ends: socket.socket) -> None:
    """Not `close`: another thread that still reads would keep the connection."""
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cable(board: Board) -> Iterator[Cable]:
    cable = Cable(board.server.port)
    board.know(board.server.known_hosts_line().replace(f":{board.server.port}", f":{cable.port}"))
    yield cable
    cable.close()


def test_a_transfer_through_a_cut_cable_arrives_whole(board: Board, cable: Cable, tmp_path: Path) -> None:
    data = tmp_path / "model"
    data.mkdir()
    (data / "compiled.json").write_text("{}")
    for i in range(8):
        (data / f"part{i}").write_bytes(os.urandom(500_000))
    lines: list[str] = []
    device = board.device(cable.port)
    device.say = lines.append
    cable.cut_after = 2_000_000

    with device:
        device.get(device.put(data), tmp_path / "back")

    assert len(lines) == 1
    assert "broke off" in lines[0]
    assert all((tmp_path / "back" / path.name).read_bytes() == path.read_bytes() for path in data.iterdir())


def test_a_board_that_is_lost_while_it_works_costs_its_own_target_and_the_other_board_ends_its_own(
    board: Board, finished: Any, edgestill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Server(tmp_path / "far")
    cable = Cable(far.port)
    (far.folder / "authorized_keys").write_text((board.home / ".ssh" / "id_ed25519.pub").read_text())
    known = far.known_hosts_line().replace(f":{far.port}", f":{cable.port}")
    board.know(board.server.known_hosts_line() + known)
    monkeypatch.chdir(board.home)
    boards = {"orin": board.server.port, "pi": cable.port}
    lines = [
        f"{name}: {{address: 'ssh://root@127.0.0.1:{port}', python: {sys.executable}}}\n"
        for name, port in boards.items()
    ]
    (board.home / "devices.yaml").write_text("".join(lines))
    targets = [{"name": "onnxruntime-cpu", "device": name} for name in boards]
    recipe = yaml.safe_load(finished.recipe.read_text())
    finished.recipe.write_text(yaml.safe_dump({**recipe, "targets": targets}))

    def cut_when_it_works() -> None:
        wait_until((far.folder / "board" / "edgestill.lock").exists)
        cable.close()

    threading.Thread(target=cut_when_it_works, daemon=True).start()
    try:
        ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

        result = json.loads(ended.out)
        assert (ended.code, list(result["failed"])) == (6, ["onnxruntime-cpu-2"])
        assert "pi: the connection broke off" in result["failed"]["onnxruntime-cpu-2"]
        assert list(result["bundles"]) == ["onnxruntime-cpu"]
        assert (finished.dir / "report" / "index.html").is_file()
        assert "pi: the connection broke off" in ended.err
        wait_until(lambda: not any((far.folder / "board" / "cache" / "edgestill" / "sessions").iterdir()))
    finally:
        cable.close()
        far.close()


# Writes its process id, whole, and goes on for ten minutes.
SLEEPER = """
import os, sys, time
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def test_nothing_runs_on_behind_a_cut_cable(board: Board, cable: Cable, tmp_path: Path) -> None:
    pid_file, data = tmp_path / "pid", tmp_path / "data"
    data.write_bytes(b"secret")
    device = board.device(cable.port)
    device.put(data)

    def cut_when_it_runs() -> None:
        wait_until(pid_file.exists)
        cable.cut()

    threading.Thread(target=cut_when_it_runs, daemon=True).start()
    with pytest.raises(DeviceError, match="broke off"):
        said(device, SLEEPER, str(pid_file))

    wait_until(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())
    wait_until(lambda: board.left_there() == [])


# A shell gives its background jobs a SIGINT that is ignored, and the suite may be one.
HOST = """
import signal, sys
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address
signal.signal(signal.SIGINT, signal.default_int_handler)
port, data, *command = sys.argv[1:]
with Ssh(name="orin", address=Address("127.0.0.1", "root", int(port)), python=sys.executable) as device:
    device.put(__import__("pathlib").Path(data))
    device.run(command)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_runs_on_and_nothing_is_left_when_the_host_ends(
    number: signal.Signals, board: Board, tmp_path: Path
) -> None:
    board.know()
    pid_file, data = tmp_path / "pid", tmp_path / "data"
    data.write_bytes(b"secret")
    command = [sys.executable, "-c", SLEEPER, str(pid_file)]
    with subprocess.Popen(
        [sys.executable, "-c", HOST, str(board.server.port), str(data), *command], stderr=subprocess.DEVNULL
    ) as host:
        wait_until(pid_file.exists)
        assert "data" in board.left_there()
        host.send_signal(number)

    wait_until(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())
    wait_until(lambda: board.left_there() == [])


def wait_until(holds: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < give_up_s


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_board_whose_disk_is_full_is_told(board: Board, tmp_path: Path) -> None:
    board.know()
    cache = board.server.folder / "board" / "cache"
    cache.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", cache], check=True)
    try:
        (tmp_path / "data").write_bytes(os.urandom(3 * 2**20))
        with board.device() as device, pytest.raises(DeviceError, match=r"orin: no space: 3\.0 MiB are to be sent"):
            device.put(tmp_path / "data")
    finally:
        subprocess.run(["umount", cache], check=True)
