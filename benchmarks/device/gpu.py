"""How much GPU memory this process holds: NVML's figure of a discrete GPU, the kernel's of a Jetson.

Asks only where the process has loaded CUDA: NVML starts a driver client, which a CPU target's figures need not carry. A Jetson
shares its memory with the CPU and counts it for the whole machine: there the figure is what was added since the load.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

PROC = Path("/proc")
NVML = "libnvidia-ml.so.1"
MAX_PROCESSES = 1024
NOT_AVAILABLE = 2**64 - 1


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t as nvmlDeviceGetComputeRunningProcesses_v3 fills it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def shared_mib(proc: Path = PROC) -> float | None:
    """NvMapMemUsed of a Jetson: what all processes hold together; None elsewhere."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("NvMapMemUsed:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def gpu_memory(shared_before_mib: float | None, flags: list[str], proc: Path = PROC) -> tuple[float | None, str | None]:
    """(MiB, where that was read); (None, None) with the reason in `flags`."""
    if shared_before_mib is not None and (now_mib := shared_mib(proc)) is not None:
        return max(now_mib - shared_before_mib, 0.0), "NvMapMemUsed of the machine, above before the load"
    if not _loaded_cuda(proc):
        flags.append("gpu_mib: this process has not loaded CUDA")
        return None, None
    try:
        return nvml_mib(ctypes.CDLL(NVML), os.getpid()), "NVML, this process"
    except (OSError, AttributeError, LookupError) as error:
        flags.append(f"gpu_mib: {error}")
        return None, None


def nvml_mib(library: Any, pid: int) -> float:
    """Over all GPUs. Raises LookupError where NVML fails or does not know the process: in a container it has other numbers."""
    _call(library, "nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = [used for index in range(count.value) for used in _used_bytes(library, index, pid)]
    finally:
        library.nvmlShutdown()
    if not found:
        raise LookupError(f"NVML lists no process {pid} (inside a container it may have another number)")
    if NOT_AVAILABLE in found:
        raise LookupError("NVML does not tell the memory of single processes here")
    return sum(found) / 2**20


def _used_bytes(library: Any, index: int, pid: int) -> list[int]:
    device, count = ctypes.c_void_p(), ctypes.c_uint(MAX_PROCESSES)
    infos = (ProcessInfo * MAX_PROCESSES)()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
    _call(library, "nvmlDeviceGetComputeRunningProcesses_v3", device, ctypes.byref(count), infos)
    return [info.used_bytes for info in infos[: count.value] if info.pid == pid]


def _call(library: Any, name: str, *arguments: object) -> None:
    if code := getattr(library, name)(*arguments):
        raise LookupError(f"{name} failed with NVML error {code}")


def _loaded_cuda(proc: Path) -> bool:
    try:
        return "libcuda.so" in (proc / "self/maps").read_text()
    except OSError:
        return False
