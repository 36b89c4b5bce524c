"""How much memory this process took at most, as the kernel counts it.

Reads /proc/self/status, smaps_rollup and the cgroup's memory.peak; writes 5 to /proc/self/clear_refs, which resets the
peak. All values are MiB; what cannot be read is None, and its reason is appended to the caller's `flags`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.device.record import Memory

PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def reset_peak(flags: list[str], proc: Path = PROC) -> None:
    """Begin a new peak; where that is refused, the peak is the process's since its start, and a flag says so."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError as error:
        flags.append(f"vmhwm_mib: since the start of the process, not reset ({_reason(error)})")


def resident_mib(flags: list[str], proc: Path = PROC) -> float | None:
    return _field_mib(proc / "status", "VmRSS", "baseline_mib", flags)


def read_memory(baseline_mib: float | None, flags: list[str], proc: Path = PROC, cgroup: Path = CGROUP) -> Memory:
    """Read the peak since `reset_peak`. smaps_rollup costs half a millisecond: not while timing."""
    return Memory(
        vmhwm_mib=_field_mib(proc / "status", "VmHWM", "vmhwm_mib", flags),
        baseline_mib=baseline_mib,
        pss_mib=_field_mib(proc / "smaps_rollup", "Pss", "pss_mib", flags),
        cgroup_peak_mib=cgroup_peak_mib(flags, proc, cgroup),
    )


def cgroup_peak_mib(flags: list[str], proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """The peak of the whole container (cgroup v2), everything since its start."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), "/")
        return int((cgroup / group.lstrip("/") / "memory.peak").read_text()) / 2**20
    except (OSError, ValueError) as error:
        flags.append(f"cgroup_peak_mib: {_reason(error)}")
        return None


def _field_mib(path: Path, field: str, key: str, flags: list[str]) -> float | None:
    """A `Field:  123 kB` line of a /proc file."""
    try:
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == field:
                return int(rest.split()[0]) / 1024
        flags.append(f"{key}: {path} has no {field}")
    except (OSError, ValueError, IndexError) as error:
        flags.append(f"{key}: {_reason(error)}")
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"not a number: {error}"
