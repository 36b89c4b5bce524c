"""ARM64 programs on an x86 machine, by QEMU in user mode: what `tests/arm` does for a board, for containers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from targets.errors import TargetError

BINFMT = Path("/proc/sys/fs/binfmt_misc")
HANDLER = "edgestill-images-aarch64"
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
ENVIRONMENT = {"QEMU_CPU": "neoverse-n1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# In a mount namespace of its own, because a container gets this machine's /proc and buildah mounts nothing into it.
OVER_CPUINFO = 'mount --bind "$0" /proc/cpuinfo; exec "$@"'


@dataclass(frozen=True)
class Emulation:
    """How a command must be started so that what it runs takes this machine for an ARM64 one."""

    wrapper: tuple[str, ...]
    environment: Mapping[str, str]


@contextmanager
def arm64_programs(cpuinfo_path: Path) -> Iterator[Emulation]:
    """ARM64 programs can be executed; a handler that was registered before is left as it is. Needs root."""
    cpuinfo_path.write_text("".join(CPUINFO.format(number=number) for number in range(os.cpu_count() or 1)))
    emulation = Emulation(("unshare", "--mount", "sh", "-ec", OVER_CPUINFO, str(cpuinfo_path)), ENVIRONMENT)
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    if any(_handles_arm64(path) for path in BINFMT.iterdir()):
        yield emulation
        return
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise TargetError("ARM64 images cannot run here: no emulator. On Debian: apt-get install qemu-user-static.")
    (BINFMT / "register").write_text(f":{HANDLER}:M::{MAGIC}:{MASK}:{qemu}:F")
    try:
        yield emulation
    finally:
        (BINFMT / HANDLER).write_text("-1")


def _handles_arm64(path: Path) -> bool:
    if path.name in ("register", "status"):
        return False
    text = path.read_text()
    return "0200b700" in text and "F" in text.partition("flags:")[2].partition("\n")[0]
