"""An ARM64 board with a login of its own: Debian's arm64 programs under QEMU in user mode, sshd included, on loopback.

sshd, shell and python3 are all arm64, so that nothing between the host's SSH client and the runtime's kernels is of the host.
Mounts, processes and the emulator's registration are gone when the fixture ends.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address

ROOT = Path(__file__).parents[2] / "build/arm/root"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
HANDLER = "edgestill-aarch64"
# 64-bit little-endian executables for machine 183; F: the kernel opens the emulator now, before there is a chroot.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# A Neoverse N1's. QEMU shows the host's own, and ONNX Runtime crashes over an ARM64 machine with an x86 cpuinfo.
CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
# With more than one thread the runtimes' spinning workers hang under emulation.
ENVIRONMENT = "QEMU_CPU=neoverse-n1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 XDG_CACHE_HOME=/tmp/cache"
SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey /tmp/host_key
AuthorizedKeysFile /tmp/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv {environment}
"""
BOOT = """\
mount --make-rprivate /
mount -t proc proc {root}/proc
mount --bind {files}/cpuinfo {root}/proc/cpuinfo
mount -t sysfs -o ro sysfs {root}/sys
mount --rbind /dev {root}/dev
mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
cp {files}/host_key {files}/authorized_keys {files}/sshd_config {root}/tmp
exec chroot {root} /usr/sbin/sshd -D -e -f /tmp/sshd_config
"""


@pytest.fixture(scope="session")
def emulator() -> Iterator[None]:
    """Arm64 programs can be executed; what was registered before is left as it is."""
    if not ROOT.is_dir() or os.geteuid() != 0:
        pytest.skip("there is no board: make test-arm builds it, and root boots it")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    handlers = [path.read_text() for path in BINFMT.iterdir() if path.name not in ("register", "status")]
    if any("0200b700" in text and "F" in text.partition("flags:")[2].partition("\n")[0] for text in handlers):
        yield
        return
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    assert qemu, "install qemu-user-static"
    (BINFMT / "register").write_text(f":{HANDLER}:M::{MAGIC}:{MASK}:{qemu}:F")
    yield
    (BINFMT / HANDLER).write_text("-1")


@pytest.fixture(scope="session")
def board_url(emulator: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The board's address; HOME has the key and known_hosts to log in with."""
    files, home = tmp_path_factory.mktemp("board"), tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    for key in (files / "host_key", home / ".ssh" / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    kind, key, *_ = (files / "host_key.pub").read_text().split()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    shutil.copy(home / ".ssh" / "id_ed25519.pub", files / "authorized_keys")
    (files / "cpuinfo").write_text("".join(CPUINFO.format(number=number) for number in range(os.cpu_count() or 1)))
    (files / "sshd_config").write_text(SSHD_CONFIG.format(port=port, environment=ENVIRONMENT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        with booted(files):
            yield f"ssh://root@127.0.0.1:{port}"


@contextmanager
def booted(files: Path) -> Iterator[None]:
    """Process 1 of a machine of its own, by its mounts and its processes; killing it ends all of them."""
    script = BOOT.format(root=shlex.quote(str(ROOT)), files=shlex.quote(str(files)))
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if "Server listening" in line:
                    break
            else:
                raise RuntimeError(f"the board does not boot: {''.join(said)}")
            yield
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def board(board_url: str) -> Iterator[Ssh]:
    with Ssh(name="arm", address=Address.parse(board_url), patience_s=120.0) as device:
        yield device
