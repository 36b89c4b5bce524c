"""A program that another architecture translates must not pass for the machine that it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.device import environment
from benchmarks.device.environment import emulated_on

X86_64, AARCH64 = 62, 183


def elf(path: Path, machine: int, *, big_endian: bool = False) -> Path:
    order = "big" if big_endian else "little"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x7fELF\x02" + (b"\x02" if big_endian else b"\x01") + b"\x01" + bytes(11) + machine.to_bytes(2, order)
    )
    return path


def test_this_machine_is_not_emulated() -> None:
    assert emulated_on() is None
    assert "emulated_on" not in environment.environment().hard  # no key: older records go on being comparable


def test_a_program_that_runs_in_an_emulator_of_another_architecture_is_told(tmp_path: Path) -> None:
    python = elf(tmp_path / "usr/bin/python3", AARCH64)
    elf(tmp_path / "proc/thread-self/exe", X86_64)

    assert emulated_on(tmp_path, executable=str(python)) == "x86_64"


@pytest.mark.parametrize("machine", [X86_64, AARCH64, 4711])
def test_a_program_of_the_kernels_own_architecture_is_not(machine: int, tmp_path: Path) -> None:
    python = elf(tmp_path / "usr/bin/python3", machine)
    elf(tmp_path / "proc/thread-self/exe", machine)

    assert emulated_on(tmp_path, executable=str(python)) is None


def test_an_arm_machine_with_an_x86_kernel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\n")
    assert emulated_on(tmp_path, executable="/nothing") == "x86_64"

    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n")
    assert emulated_on(tmp_path, executable="/nothing") is None


def test_what_is_emulated_is_a_hard_key_and_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "emulated_on", lambda root: "x86_64")

    found = environment.environment(tmp_path)

    assert found.hard["emulated_on"] == "x86_64"
    assert any(flag.startswith("emulated: ") and "on x86_64" in flag for flag in found.flags)
