"""How much memory this process took at most, as the kernel counts it.

Reads /proc/self/status, smaps_rollup and the cgroup's peak; writes 5 to /proc/self/clear_refs, which resets the
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
    """The peak of the whole container, everything since its start: memory.peak, or what cgroup v1 calls it."""
    try:
        groups = [line.split(":", 2)[1:] for line in (proc / "cgroup").read_text().splitlines()]
        v1 = next((group for names, group in groups if "memory" in names.split(",")), None)
        if v1 is not None:
            folder = cgroup / "memory" / v1.lstrip("/")
            # Inside a container the kernel may tell the host's path, while the container's own folder is the root.
            path = (folder if folder.is_dir() else cgroup / "memory") / "memory.max_usage_in_bytes"
        else:
            group = next((group for names, group in groups if not names), "/")
            path = cgroup / group.lstrip("/") / "memory.peak"
        return int(path.read_text()) / 2**20
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
