"""The sampler: what it reads, and that one which dies, hangs or never starts costs its readings and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device.sampler import CPU, GPU, TEMPERATURE, Probe, Sampler, probes
from benchmarks.pack import pack_device_program

DIES = [sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"]
SILENT = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
STUBBORN = [
    sys.executable, "-I", "-S", "-c",
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()",
]  # fmt: skip


def _machine(root: Path) -> list[Probe]:
    cpu = min(os.sched_getaffinity(0))
    for path, text in (
        (f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", "2000000"),
        ("sys/class/devfreq/17000000.gpu/cur_freq", "1300500000"),
        ("sys/class/thermal/thermal_zone0/temp", "41500"),
        ("sys/class/thermal/thermal_zone1/temp", "39000"),
        ("sys/class/thermal/thermal_zone2/temp", "no number"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return probes(root)


def _wait_for_a_line(sampler: Sampler) -> str:
    """Block until the sampler has written a whole line: its file grows, no clock is asked."""
    assert sampler.file is not None
    while b"\n" not in (text := os.pread(sampler.file.fileno(), 1 << 20, 0)):
        os.sched_yield()
    return text.decode().partition("\n")[0]


def test_what_cannot_be_read_is_not_sampled(tmp_path: Path) -> None:
    assert [probe.kind for probe in _machine(tmp_path)] == [CPU, GPU, TEMPERATURE, TEMPERATURE]
    assert probes(tmp_path / "nowhere") == []


def test_each_reading_holds_the_highest_of_each_kind(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags) as sampler:
        moment_s = float(_wait_for_a_line(sampler).split()[0])
        (reading,) = sampler.readings(moment_s, moment_s)

    assert reading.highest == {CPU: 2000.0, GPU: 1300.5, TEMPERATURE: 41.5}
    assert reading.monotonic_s == moment_s <= time.monotonic()
    assert flags == []


def test_readings_outside_of_the_window_do_not_count(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags) as sampler:
        _wait_for_a_line(sampler)
        assert sampler.readings(0.0, 0.1) == []

    assert flags == ["sampler: 0 readings where 0 were due, so they are not used"]


def test_it_runs_from_inside_the_packed_program(tmp_path: Path) -> None:
    program = pack_device_program(tmp_path / "edgestill-device.pyz")
    (tmp_path / "number").write_text("7")
    script = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.device.sampler import Probe, Sampler\n"
        "with Sampler([Probe('cpu', Path(sys.argv[2]), 0.5)], []) as sampler:\n"
        "    while not os.fstat(sampler.file.fileno()).st_size and sampler.process.poll() is None: os.sched_yield()\n"
        "    moment_s = float(os.pread(sampler.file.fileno(), 99, 0).split()[0])\n"
        "    print(sampler.process.poll(), [one.highest for one in sampler.readings(moment_s, moment_s)])\n"
    )

    argv = [sys.executable, "-I", "-c", script, program, tmp_path / "number"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)

    assert done.stdout == "None [{'cpu': 3.5}]\n"


def test_a_machine_that_shows_nothing_starts_no_sampler_and_says_so() -> None:
    flags: list[str] = []
    with Sampler([], flags) as sampler:
        assert (sampler.process, sampler.readings(0.0, 1.0)) == (None, [])

    assert flags == ["sampler: this machine shows neither a clock nor a temperature to sample"]


def test_a_sampler_that_dies_leaves_no_reading_and_a_flag(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags, DIES) as sampler:
        assert sampler.process is not None
        sampler.process.wait(30)
        assert sampler.readings(0.0, 1.0) == []

    assert flags == ["sampler: ended by itself with 3, so clocks and temperatures are not known"]


def test_a_sampler_that_falls_silent_leaves_no_reading_and_a_flag(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags, SILENT) as sampler:
        _wait_for_a_line(sampler)
        assert sampler.readings(0.0, 10.0) == []

    assert flags == ["sampler: 0 readings where 50 were due, so they are not used"]


def test_a_sampler_that_does_not_want_to_end_is_ended(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags, STUBBORN) as sampler:
        _wait_for_a_line(sampler)

    assert sampler.process is not None
    assert sampler.process.returncode == -9
    assert flags == []


def test_a_sampler_that_cannot_start_leaves_a_flag(tmp_path: Path) -> None:
    flags: list[str] = []
    with Sampler(_machine(tmp_path), flags, [str(tmp_path / "no-python")]) as sampler:
        assert sampler.readings(0.0, 1.0) == []

    assert flags == ["sampler: cannot be started (No such file or directory), so nothing was sampled"]


def test_the_sampler_ends_when_what_is_measured_fails(tmp_path: Path) -> None:
    sampler = Sampler(_machine(tmp_path), [])
    with pytest.raises(ZeroDivisionError), sampler:
        raise ZeroDivisionError

    assert sampler.process is not None
    assert sampler.process.returncode is not None


def test_the_sampler_ends_with_its_parents_end_of_the_pipe(tmp_path: Path) -> None:
    with Sampler(_machine(tmp_path), []) as sampler:
        assert sampler.process is not None
        assert sampler.process.stdin is not None
        sampler.process.stdin.close()

        assert sampler.process.wait(30) == 0
