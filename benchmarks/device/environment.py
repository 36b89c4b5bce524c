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
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.record import HARNESS_VERSION, Environment, Telemetry

ROOT = Path("/")


def environment(root: Path = ROOT) -> Environment:
    """The fingerprint of this machine; `root` is where /proc and /sys hang."""
    flags: list[str] = []
    hard, soft = hard_facts(root, flags), soft_facts(root, flags)
    return Environment(hard=hard, soft=soft, hard_sha256=fingerprint(hard), flags=tuple(flags))


def fingerprint(hard: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the hard keys."""
    return hashlib.sha256(json.dumps(hard, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hard_facts(root: Path, flags: list[str]) -> dict[str, Any]:
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "arch": platform.machine(),
        "cpu": _cpu_model(root, flags),
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
    }


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
class Snapshot:
    """Counters of the process and of the machine at one moment; two of them make a window."""

    monotonic_s: float
    cpu_s: float
    nivcsw: int
    majflt: int
    psi_us: int | None
    throttled: int | None
    temp_c: float | None
    clk_mhz: float | None

    def telemetry_since(self, before: Snapshot) -> Telemetry:
        wall_us = (self.monotonic_s - before.monotonic_s) * 1e6
        waited = None if self.psi_us is None or before.psi_us is None else self.psi_us - before.psi_us
        throttled = None if self.throttled is None or before.throttled is None else self.throttled - before.throttled
        return Telemetry(
            temp_c=self.temp_c,
            clk_mhz=self.clk_mhz,
            throttle_delta=throttled,
            psi_cpu=None if waited is None or wall_us <= 0 else min(100.0 * waited / wall_us, 100.0),
        )


def snapshot(flags: list[str], root: Path = ROOT) -> Snapshot:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Snapshot(
        monotonic_s=time.monotonic(),
        cpu_s=time.process_time(),
        nivcsw=usage.ru_nivcsw,
        majflt=usage.ru_majflt,
        psi_us=_psi_us(root, flags),
        throttled=_throttled(root, flags),
        temp_c=temperature_c(flags, root),
        clk_mhz=_clock_mhz(root, flags),
    )


def _psi_us(root: Path, flags: list[str]) -> int | None:
    """Microseconds since boot in which some task waited for a CPU. avg10 would also tell of the time before the window."""
    line = (_text(root / "proc/pressure/cpu", "psi_cpu", flags) or "").partition("\n")[0]
    return int(line.rpartition("total=")[2]) if "total=" in line else None


def _throttled(root: Path, flags: list[str]) -> int | None:
    counters = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    values = [value for path in counters if (value := _number(path, "throttle_delta", [])) is not None]
    if not values:
        flags.append("throttle_delta: this machine shows no throttle counter")
    return sum(values) if values else None


def _clock_mhz(root: Path, flags: list[str]) -> float | None:
    khz = _number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "clk_mhz", flags)
    return None if khz is None else khz / 1000


def _cpu_model(root: Path, flags: list[str]) -> str | None:
    """The name on x86; implementer and part on ARM, where the kernel gives no name."""
    text = _text(root / "proc/cpuinfo", "cpu", flags) or ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
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
