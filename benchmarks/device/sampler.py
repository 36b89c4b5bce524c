"""Clocks and temperatures while a model is timed, read by a process of its own, five times a second.

The process that is timed only starts it before the warm-up and reads what it wrote afterwards. A sampler that cannot start, dies
or falls silent costs its readings and a flag, nothing else. Stdlib only: the other process starts without site-packages.
"""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

INTERVAL_S = 0.2  # seldom enough: where every CPU is in use, each reading interrupts what is timed
KILL_TIMEOUT_S = 5.0
SCRIPT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from benchmarks.device.sampler import sample; sample(sys.argv[1:])"
CPU, GPU, TEMPERATURE = "cpu", "gpu", "temperature"


@dataclass(frozen=True)
class Probe:
    """A file that holds a number; `scale` turns it into MHz or degrees Celsius."""

    kind: str
    path: Path
    scale: float


@dataclass(frozen=True)
class Reading:
    """The highest of each kind at one moment: an idle core may rest, an idle zone is cold."""

    monotonic_s: float
    highest: dict[str, float]


def probes(root: Path) -> list[Probe]:
    """What this machine shows: the clocks of the CPUs that may be used and of a Jetson's GPU, and its thermal zones."""
    cpus = [root / f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq" for i in sorted(os.sched_getaffinity(0))]
    found = [Probe(CPU, path, 1e-3) for path in cpus]
    found += [Probe(GPU, folder / "cur_freq", 1e-6) for folder in gpu_clocks(root)]
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    found += [Probe(TEMPERATURE, path, 1e-3) for path in zones]
    return [probe for probe in found if _number(probe.path) is not None]


def gpu_clocks(root: Path) -> list[Path]:
    """Folders of a Jetson's GPU clock; of Thor's several the one of its graphics cores, not that of its video engines."""
    folders = sorted((root / "sys/class/devfreq").glob("*gpu*"))
    return [folder for folder in folders if "gpc" in folder.name] or folders


class Sampler:
    """Reads `probes` in another process from `with` to the end of its block; `command` replaces the one that does it."""

    def __init__(self, probes: Sequence[Probe], flags: list[str], command: Sequence[str] | None = None) -> None:
        self._probes, self._flags = probes, flags
        self._command = command or _command(probes)
        self.file: IO[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sampler:
        if not self._probes:
            self._flags.append("sampler: this machine shows neither a clock nor a temperature to sample")
            return self
        try:
            self.file = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=self.file, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            self._flags.append(f"sampler: cannot be started ({error.strerror}), so nothing was sampled")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        if self.process is None:
            return
        self.process.kill()
        try:
            self.process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._flags.append("sampler: did not end when it was killed")
        if self.process.stdin is not None:
            self.process.stdin.close()

    def readings(self, begin_s: float, end_s: float) -> list[Reading]:
        """Those between two moments of the monotonic clock; none, with a flag, where the sampler did not see it all."""
        if self.process is None or self.file is None:
            return []
        if (code := self.process.poll()) is not None:
            self._flags.append(f"sampler: ended by itself with {code}, so clocks and temperatures are not known")
            return []
        file = self.file.fileno()
        text = os.pread(file, os.fstat(file).st_size, 0).decode(
            "ascii", "replace"
        )  # its place in the file is the writer's
        found = [reading for line in text.splitlines(keepends=True) if (reading := self._reading(line)) is not None]
        inside = [reading for reading in found if begin_s <= reading.monotonic_s <= end_s]
        due = math.floor((end_s - begin_s) / INTERVAL_S)
        if not inside or len(inside) < due / 2:
            self._flags.append(f"sampler: {len(inside)} readings where {due} were due, so they are not used")
            return []
        return inside

    def _reading(self, line: str) -> Reading | None:
        """None for a line that is not whole."""
        words = line.split()
        if not line.endswith("\n") or len(words) != len(self._probes) + 1:
            return None
        highest: dict[str, float] = {}
        try:
            for probe, word in zip(self._probes, words[1:], strict=True):
                if word != "-":
                    value = int(word) * probe.scale
                    highest[probe.kind] = max(value, highest.get(probe.kind, value))
            return Reading(float(words[0]), highest)
        except ValueError:
            return None


def sample(arguments: Sequence[str]) -> None:
    """The other process: a line of the time and every number, again and again until standard input ends."""
    interval_s, paths = float(arguments[0]), [Path(path) for path in arguments[1:]]
    while True:
        values = [_number(path) for path in paths]
        print(time.monotonic(), *("-" if value is None else value for value in values), flush=True)
        if select.select([0], [], [], interval_s)[0]:
            return


def _command(probes: Sequence[Probe]) -> list[str]:
    root = str(Path(__file__).resolve().parents[2])  # a folder, or the packed program
    return [sys.executable, "-I", "-S", "-c", SCRIPT, root, str(INTERVAL_S), *(str(probe.path) for probe in probes)]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
