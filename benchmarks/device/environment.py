"""What this machine is and how it stands: the keys that two measurements must share before they are compared.

Reads /proc and /sys. `hard` keys decide whether two records are comparable at all, `soft` keys warn. What is not
readable is None and named in `flags`. Clocks, governors and power modes are read, never set.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device import jetson
from benchmarks.device.disturbances import Window
from benchmarks.device.isa import instruction_set
from benchmarks.device.record import HARNESS_VERSION, Environment, Telemetry
from benchmarks.device.sampler import CPU, GPU, TEMPERATURE, Reading, gpu_clocks

ROOT = Path("/")
ELF_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


def environment(root: Path = ROOT) -> Environment:
    """The fingerprint of this machine; `root` is where /proc and /sys hang."""
    flags: list[str] = []
    hard, soft = hard_facts(root, flags), soft_facts(root, flags)
    if (real := emulated_on(root)) is not None:
        hard["emulated_on"] = real
        flags.append(
            f"emulated: {hard['arch']} on {real}, so its times, memory and energy are those of no such machine"
        )
    return Environment(hard=hard, soft=soft, hard_sha256=fingerprint(hard), flags=tuple(flags))


def fingerprint(hard: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the hard keys."""
    return hashlib.sha256(json.dumps(hard, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hard_facts(root: Path, flags: list[str]) -> dict[str, Any]:
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "arch": platform.machine(),
        "cpu": _cpu_model(root, flags),
        "cpu_id": _cpu_id(root, flags),
        "isa": _isa(root, flags),
        "cpus_online": _text(root / "sys/devices/system/cpu/online", "cpus_online", flags),
        "cpus_allowed": sorted(os.sched_getaffinity(0)),
        "ram_mib": _ram_mib(root, flags),
        "kernel": platform.release(),
        "soc": _text(root / "proc/device-tree/model", "soc", flags),
        "jetpack": _text(root / "etc/nv_tegra_release", "jetpack", flags),
        "governor": _text(cpufreq / "scaling_governor", "governor", flags),
        "max_khz": _number(cpufreq / "scaling_max_freq", "max_khz", flags),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "harness": HARNESS_VERSION,
        **jetson.hard_facts(root, flags),
    }


def emulated_on(root: Path = ROOT, *, executable: str = sys.executable) -> str | None:
    """The architecture that really runs this program where another one only translates it (QEMU in user mode); else None.

    An emulator shows a process its own program as /proc/self/exe, and is itself what the kernel runs as thread-self. A kernel
    of another architecture also describes its CPU in other words.
    """
    seen, real = _elf_machine(Path(executable)), _elf_machine(root / "proc/thread-self/exe")
    if seen is not None and real is not None and seen != real:
        return real
    fields = {line.partition(":")[0].strip() for line in (_text(root / "proc/cpuinfo", "", []) or "").splitlines()}
    return "x86_64" if "vendor_id" in fields and platform.machine() in ("aarch64", "armv7l") else None


def _elf_machine(path: Path) -> str | None:
    """What an executable is for; None for what is no ELF file."""
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError:
        return None
    if not header.startswith(b"\x7fELF") or len(header) < 20:
        return None
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return ELF_MACHINES.get(machine, f"ELF machine {machine}")


def soft_facts(root: Path, flags: list[str]) -> dict[str, Any]:
    uptime = _text(root / "proc/uptime", "uptime_s", flags)
    return {
        "temp_c": temperature_c(flags, root),
        "aslr": _number(root / "proc/sys/kernel/randomize_va_space", "aslr", flags),
        "smt": _number(root / "sys/devices/system/cpu/smt/active", "smt", flags),
        "container": (root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        "hypervisor": "hypervisor" in (_text(root / "proc/cpuinfo", "hypervisor", flags) or ""),
        "load_1min": os.getloadavg()[0],
        "uptime_s": float(uptime.split()[0]) if uptime else None,
    }


def temperature_c(flags: list[str], root: Path = ROOT) -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    found = [
        _number(zone / "temp", "temp_c", []) for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    ]
    readable = [value / 1000 for value in found if value is not None]
    if not readable:
        flags.append("temp_c: no thermal zone is readable")
    return max(readable, default=None)


@dataclass(frozen=True)
class Clocks:
    """What the process has used, at one moment."""

    monotonic_s: float
    cpu_s: float
    nivcsw: int
    majflt: int
    boottime_s: float | None  # goes on while the machine is suspended, as monotonic_s does not

    @classmethod
    def now(cls) -> Clocks:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        boottime_s = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
        return cls(time.monotonic(), time.process_time(), usage.ru_nivcsw, usage.ru_majflt, boottime_s)


@dataclass(frozen=True)
class Snapshot:
    """Counters of the process and of the machine at one moment; two of them make a window.

    A machine of many CPUs has many files to read, which takes milliseconds: a window is from `left`, the clocks when a snapshot was
    taken, to the clocks when the next one was begun, so that no reading is in it.
    """

    monotonic_s: float
    cpu_s: float
    nivcsw: int
    majflt: int
    psi_us: int | None
    throttled: int | None
    temp_c: float | None
    clk_mhz: float | None
    waited_s: float | None
    boottime_s: float | None
    over_currents: int | None = None  # of a Jetson: those that its clocks recover from at once
    left: Clocks | None = None  # None: reading took no time

    @property
    def begins(self) -> Clocks:
        """The clocks at which a window behind this snapshot begins."""
        here = Clocks(self.monotonic_s, self.cpu_s, self.nivcsw, self.majflt, self.boottime_s)
        return here if self.left is None else self.left

    def telemetry_since(self, before: Snapshot) -> Telemetry:
        wall_us = (self.monotonic_s - before.begins.monotonic_s) * 1e6
        waited_us = _moved(before.psi_us, self.psi_us)
        throttled = _moved(before.throttled, self.throttled)
        return Telemetry(
            temp_c=self.temp_c,
            clk_mhz=self.clk_mhz,
            throttle_delta=None if throttled is None else round(throttled),
            psi_cpu=None if waited_us is None or wall_us <= 0 else min(100.0 * waited_us / wall_us, 100.0),
        )

    def over_currents_since(self, before: Snapshot) -> int:
        return int(_moved(before.over_currents, self.over_currents) or 0)

    def window_since(self, before: Snapshot, *, num_threads: int = 1, busy: bool = True) -> Window:
        """What the process used; `num_threads` and `busy` as in a Window."""
        begin, slept_s = before.begins, None
        if self.boottime_s is not None and begin.boottime_s is not None:
            slept_s = max((self.boottime_s - begin.boottime_s) - (self.monotonic_s - begin.monotonic_s), 0.0)
        return Window(
            wall_s=self.monotonic_s - begin.monotonic_s,
            cpu_s=self.cpu_s - begin.cpu_s,
            nivcsw=self.nivcsw - begin.nivcsw,
            majflt=self.majflt - begin.majflt,
            waited_s=_moved(before.waited_s, self.waited_s),
            slept_s=slept_s,
            num_threads=num_threads,
            busy=busy,
        )


def snapshot(flags: list[str], root: Path = ROOT) -> Snapshot:
    begun = Clocks.now()
    return Snapshot(
        monotonic_s=begun.monotonic_s,
        cpu_s=begun.cpu_s,
        nivcsw=begun.nivcsw,
        majflt=begun.majflt,
        psi_us=_psi_us(root, flags),
        throttled=_throttled(root, flags),
        temp_c=temperature_c(flags, root),
        clk_mhz=_clock_mhz(root, flags),
        waited_s=_waited_s(root / "proc/self/task", flags),
        boottime_s=begun.boottime_s,
        over_currents=jetson.over_currents(root, jetson.PASSING),
        left=Clocks.now(),
    )


def with_readings(telemetry: Telemetry, readings: Sequence[Reading], root: Path = ROOT) -> Telemetry:
    """What a sampler saw over the window takes the place of the one look at its end."""
    if not readings:
        return telemetry
    of_kind = {kind: [one.highest[kind] for one in readings if kind in one.highest] for kind in (CPU, GPU, TEMPERATURE)}
    return replace(
        telemetry,
        clk_mhz=float(np.median(of_kind[CPU])) if of_kind[CPU] else telemetry.clk_mhz,
        clk_min_mhz=min(of_kind[CPU], default=None),
        clk_locked_mhz=locked_mhz(root),
        gpu_clk_mhz=float(np.median(of_kind[GPU])) if of_kind[GPU] else None,
        temp_max_c=max(of_kind[TEMPERATURE], default=None),
        num_sampled=len(readings),
    )


def locked_mhz(root: Path = ROOT) -> float | None:
    """The clock of the CPUs that may be used, if all are held to one: the least that is allowed is the most."""
    limits = set()
    for cpu in os.sched_getaffinity(0):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        limits |= {_number(folder / f"scaling_{end}_freq", "clk_locked_mhz", []) for end in ("min", "max")}
    (khz,) = limits if len(limits) == 1 else (None,)
    return None if khz is None else khz / 1000


def locked_gpu_mhz(root: Path = ROOT) -> float | None:
    """The same of a Jetson's GPU."""
    limits = {
        _number(folder / f"{end}_freq", "gpu_clk_mhz", []) for folder in gpu_clocks(root) for end in ("min", "max")
    }
    (hz,) = limits if len(limits) == 1 else (None,)
    return None if hz is None else hz / 1e6


def _moved(before: float | None, after: float | None) -> float | None:
    """By how much a counter grew; None where it could not be read, or fell: then it is another counter."""
    return None if before is None or after is None or after < before else after - before


def _waited_s(tasks: Path, flags: list[str]) -> float | None:
    """Seconds in which this process's threads were ready to run and had no CPU: the second number of each schedstat."""
    try:
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks.iterdir()) / 1e9
    except (OSError, ValueError, IndexError) as error:
        flags.append(f"waited_s: {tasks}: {getattr(error, 'strerror', None) or error}")
        return None


def _psi_us(root: Path, flags: list[str]) -> int | None:
    """Microseconds since boot in which some task waited for a CPU. avg10 would also tell of the time before the window."""
    line = (_text(root / "proc/pressure/cpu", "psi_cpu", flags) or "").partition("\n")[0]
    return int(line.rpartition("total=")[2]) if "total=" in line else None


def _throttled(root: Path, flags: list[str]) -> int | None:
    counters = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    values = [value for path in counters if (value := _number(path, "throttle_delta", [])) is not None]
    if (serious := jetson.over_currents(root, jetson.SERIOUS)) is not None:
        values.append(serious)
    if not values:
        flags.append("throttle_delta: this machine shows no throttle counter")
    return sum(values) if values else None


def _clock_mhz(root: Path, flags: list[str]) -> float | None:
    khz = _number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "clk_mhz", flags)
    return None if khz is None else khz / 1000


def _cpu_fields(root: Path, key: str, flags: list[str]) -> dict[str, str]:
    text = _text(root / "proc/cpuinfo", key, flags) or ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _cpu_id(root: Path, flags: list[str]) -> str | None:
    """Generation and stepping: a hypervisor gives processors of several generations one name."""
    fields = _cpu_fields(root, "cpu_id", flags)
    if "cpu family" in fields:
        keys = ("model", "stepping")
        return " ".join(
            [fields.get("vendor_id", ""), "family", fields["cpu family"], *(f"{key} {fields.get(key)}" for key in keys)]
        )
    if "CPU variant" in fields:
        return f"variant {fields['CPU variant']} revision {fields.get('CPU revision')}"
    flags.append("cpu_id: /proc/cpuinfo names no family and no variant")
    return None


def _isa(root: Path, flags: list[str]) -> str | None:
    """What it multiplies with, which a hypervisor can mask."""
    found = instruction_set(_text(root / "proc/cpuinfo", "isa", flags) or "")
    if found.int8 is None:
        flags.append("isa: /proc/cpuinfo names no instructions")
        return None
    return found.words


def _cpu_model(root: Path, flags: list[str]) -> str | None:
    """The name on x86; implementer and part on ARM, where the kernel gives no name."""
    fields = _cpu_fields(root, "cpu", flags)
    if name := fields.get("model name"):
        return name
    if "CPU part" in fields:
        return f"ARM implementer {fields.get('CPU implementer')} part {fields['CPU part']}"
    flags.append("cpu: /proc/cpuinfo names no model")
    return None


def _ram_mib(root: Path, flags: list[str]) -> int | None:
    text = _text(root / "proc/meminfo", "ram_mib", flags) or ""
    for line in text.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return None


def _text(path: Path, key: str, flags: list[str]) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\x00\n ") or None
    except OSError as error:
        flags.append(f"{key}: {path}: {error.strerror}")
        return None


def _number(path: Path, key: str, flags: list[str]) -> int | None:
    text = _text(path, key, flags)
    try:
        return None if text is None else int(text)
    except ValueError:
        flags.append(f"{key}: {path} holds no number")
        return None
