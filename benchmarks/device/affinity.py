"""Which CPUs two processes that take turns are both held to.

The CPUs of one machine are not equally fast: cores differ, and on a shared host so do the neighbours of equal ones. Two
processes that the scheduler put on two CPUs differ by that, pair after pair.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def choose_cpus(
    num_threads: int, allowed: Sequence[int], chance: random.Random, root: Path = CPUS
) -> tuple[int, ...] | None:
    """As many of the `allowed` CPUs as the runtime has threads, a core of its own each: the quickest, equal ones by chance.

    None where there are no more cores than threads: then the processes share all CPUs anyway.
    """
    cores = {_siblings(cpu, root): cpu for cpu in sorted(allowed, reverse=True)}
    candidates = sorted(cores.values())
    if len(candidates) <= num_threads:
        return None
    chance.shuffle(candidates)
    return tuple(sorted(sorted(candidates, key=lambda cpu: -_speed(cpu, root))[:num_threads]))


def hold_to(cpus: Sequence[int] | None, flags: list[str]) -> tuple[int, ...] | None:
    """Run this process, and every thread that it will start, on these CPUs; None with a flag where that cannot be."""
    if cpus is None:
        return None
    try:
        os.sched_setaffinity(0, cpus)
    except (AttributeError, OSError) as error:
        flags.append(f"cpus: not held to {list(cpus)} ({error}), so that the partner may have run on faster ones")
        return None
    return tuple(cpus)


def allowed_cpus() -> list[int]:
    """Those that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _siblings(cpu: int, root: Path) -> str:
    """The name of a core: the list of its hardware threads; the CPU itself where that is not told."""
    return _text(root / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _speed(cpu: int, root: Path) -> int:
    """What the kernel says of a core's speed against the other cores of the machine; equal where it says nothing."""
    told = [_text(root / f"cpu{cpu}" / name) for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq")]
    return next((int(text) for text in told if text is not None and text.isdecimal()), 0)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
