"""Memory, energy and environment, read from files that lie where the kernel's would."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import energy, environment, memory


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_peak_memory_is_read_in_mib(tmp_path: Path) -> None:
    _write(tmp_path / "proc/status", "VmPeak:\t 9999999 kB\nVmHWM:\t  204800 kB\nVmRSS:\t  102400 kB\n")
    _write(tmp_path / "proc/smaps_rollup", "00-ff ---p\nRss: 100 kB\nPss:   51200 kB\n")
    _write(tmp_path / "proc/cgroup", "1:cpu:/\n0::/app\n")
    _write(tmp_path / "cgroup/app/memory.peak", str(300 * 2**20))
    flags: list[str] = []

    read = memory.read_memory(32.0, flags, tmp_path / "proc", tmp_path / "cgroup")

    assert (read.vmhwm_mib, read.pss_mib, read.cgroup_peak_mib, read.baseline_mib) == (200.0, 50.0, 300.0, 32.0)
    assert flags == []
    assert memory.resident_mib(flags, tmp_path / "proc") == 100.0


def test_unreadable_memory_is_null_with_a_reason_each(tmp_path: Path) -> None:
    flags: list[str] = []

    read = memory.read_memory(None, flags, tmp_path, tmp_path)

    assert (read.vmhwm_mib, read.pss_mib, read.cgroup_peak_mib) == (None, None, None)
    assert [flag.partition(":")[0] for flag in flags] == ["vmhwm_mib", "pss_mib", "cgroup_peak_mib"]


def test_the_peak_is_reset_and_sees_what_is_allocated_after_it() -> None:
    flags: list[str] = []
    block = bytearray(b"x") * (128 * 2**20)
    del block
    memory.reset_peak(flags)
    before = memory.read_memory(None, []).vmhwm_mib
    resident = memory.resident_mib(flags)
    block = bytearray(b"x") * (64 * 2**20)
    after = memory.read_memory(None, []).vmhwm_mib
    del block

    assert flags == []
    assert before is not None
    assert after is not None
    assert resident is not None
    assert before - resident < 32
    assert 60 < after - before < 80


def test_a_refused_reset_is_flagged(tmp_path: Path) -> None:
    flags: list[str] = []

    memory.reset_peak(flags, tmp_path / "absent")

    assert "not reset" in flags[0]


def _rail(root: Path, zone: str, name: str, uj: int) -> None:
    _write(root / zone / "name", f"{name}\n")
    _write(root / zone / "energy_uj", f"{uj}\n")
    _write(root / zone / "max_energy_range_uj", "999999\n")


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        _rail(tmp_path, zone, name, 1000)

    reading = energy.read_rails([], tmp_path)

    assert reading is not None
    assert reading.uj == {"package-0": 1000}


@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_energy_survives_one_wrap_of_the_counter(start: int, used: int) -> None:
    before = energy.Reading({"package-0": start}, {"package-0": 999_999})
    after = energy.Reading({"package-0": (start + used) % 1_000_000}, {"package-0": 999_999})

    assert after.since(before) == {"package-0": used}


def test_energy_an_inference_is_gross_and_net_of_idle() -> None:
    before, after = (energy.Reading({"package-0": uj}, {"package-0": 10**9}) for uj in (0, 20_000_000))

    used = energy.energy_of(before, after, num_queries=100, wall_s=2.0, idle_w=4.0)

    assert used.gross_mj == pytest.approx(200.0)
    assert used.net_mj == pytest.approx((20.0 - 4.0 * 2.0) * 1e3 / 100)


def test_energy_without_a_counter_is_null_with_a_reason(tmp_path: Path) -> None:
    flags: list[str] = []

    used = energy.energy_of(energy.read_rails(flags, tmp_path), None, num_queries=1, wall_s=1.0, idle_w=None)

    assert (used.source, used.gross_mj, used.net_mj) == (None, None, None)
    assert flags == ["energy: this machine shows no RAPL package counter"]


def test_an_unknown_machine_has_nulls_and_a_flag_for_each(tmp_path: Path) -> None:
    found = environment.environment(tmp_path)

    nulls = {key for key, value in (found.hard | found.soft).items() if value is None}
    assert nulls >= {"cpu", "governor", "max_khz", "cpus_online", "temp_c", "uptime_s"}
    assert nulls - {"ram_mib"} <= {flag.partition(":")[0] for flag in found.flags}


def test_the_fingerprint_is_over_the_hard_keys_only(tmp_path: Path) -> None:
    _write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast 3000\n")
    cold = environment.environment(tmp_path)
    _write(tmp_path / "sys/class/thermal/thermal_zone0/temp", "61500\n")
    warm = environment.environment(tmp_path)
    _write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: Slow 10\n")
    other = environment.environment(tmp_path)

    assert (cold.hard["cpu"], warm.soft["temp_c"]) == ("Fast 3000", 61.5)
    assert cold.hard_sha256 == warm.hard_sha256 != other.hard_sha256


def test_an_arm_processor_without_a_name_is_named_by_its_part(tmp_path: Path) -> None:
    _write(tmp_path / "proc/cpuinfo", "CPU implementer\t: 0x41\nCPU part\t: 0xd42\n")

    assert environment.environment(tmp_path).hard["cpu"] == "ARM implementer 0x41 part 0xd42"


def test_pressure_is_the_share_of_the_window(tmp_path: Path) -> None:
    _write(tmp_path / "proc/pressure/cpu", "some avg10=9.00 avg60=0 avg300=0 total=1000\nfull avg10=0 total=7\n")
    before = environment.snapshot([], tmp_path)
    _write(tmp_path / "proc/pressure/cpu", "some avg10=9.00 avg60=0 avg300=0 total=1000\nfull avg10=0 total=9\n")
    after = environment.snapshot([], tmp_path)

    assert before.psi_us == 1000
    assert after.telemetry_since(before).psi_cpu == 0.0


def test_this_machine_is_recognised() -> None:
    found = environment.environment()

    assert found.hard["ram_mib"] > 0
    assert found.hard["cpus_allowed"]
