"""Jetsons as their files describe them: trees in the formats of an Orin Nano Super, an AGX Orin and a Thor. None was at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import environment, gpu, jetson
from benchmarks.device.sampler import GPU, Probe, Reading, probes

CONF_ORIN_NANO = """\
# < POWER_MODEL ID=2 NAME=COMMENTED_OUT >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_1 /sys/devices/system/cpu/cpu1/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_1 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=7W >
< PM_CONFIG DEFAULT=1 >
"""
Tree = Callable[..., Path]


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def rail_files(hwmon: int, labels: Mapping[int, tuple[str, int, int]], chip: str = "ina3221") -> dict[str, object]:
    """label, millivolts and milliamperes of each channel, and the driver's seventh, the sum of the shunts."""
    folder = f"sys/class/hwmon/hwmon{hwmon}"
    files: dict[str, object] = {f"{folder}/name": chip, f"{folder}/in7_label": "sum of shunt voltages"}
    files[f"{folder}/in7_input"] = 4
    for channel, (label, millivolt, milliampere) in labels.items():
        files[f"{folder}/in{channel}_label"] = label
        files[f"{folder}/in{channel}_input"] = millivolt
        files[f"{folder}/curr{channel}_input"] = milliampere
    return files


def orin(root: Path, model: str, rails: Mapping[str, object], mode: str = "pmode:0002") -> Path:
    return write(
        root,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
            "proc/device-tree/model": f"{model}\x00",
            "proc/meminfo": "MemTotal:        7802016 kB\nNvMapMemFree:     102400 kB\nNvMapMemUsed:     204800 kB",
            "etc/nvpmodel.conf": CONF_ORIN_NANO,
            "var/lib/nvpmodel/status": mode,
            "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
            "sys/class/devfreq/17000000.gpu/max_freq": 1020000000,
            "sys/class/hwmon/hwmon0/name": "pwmfan",
            "sys/class/hwmon/hwmon3/name": "soctherm_oc",
            "sys/class/hwmon/hwmon3/oc1_event_cnt": 2,
            "sys/class/hwmon/hwmon3/oc2_event_cnt": 3,
            "sys/class/hwmon/hwmon3/oc3_event_cnt": 40,
            "sys/class/thermal/thermal_zone0/temp": 51500,
            **rails,
        },
    )


@pytest.fixture
def orin_nano(tmp_path: Path) -> Path:
    rails = rail_files(1, {1: ("VDD_IN", 4984, 1856), 2: ("VDD_CPU_GPU_CV", 4984, 500), 3: ("VDD_SOC", 4984, 400)})
    return orin(tmp_path, "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", rails)


@pytest.fixture
def agx_orin(tmp_path: Path) -> Path:
    rails = rail_files(4, {1: ("VDD_GPU_SOC", 19944, 160), 2: ("VDD_CPU_CV", 19944, 40), 3: ("VIN_SYS_5V0", 4968, 953)})
    rails |= rail_files(5, {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 80), 3: ("NC", 0, 0)})
    return orin(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit", rails, mode="pmode:0000")


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    rails = rail_files(
        2, {1: ("VDD_GPU", 11900, -33), 2: ("VDD_CPU_SOC_MSS", 11900, 547), 3: ("VIN_SYS_5V0", 4968, 1312)}
    )
    rails |= rail_files(3, {1: ("VIN", 19800, 1160)}, chip="ina238")
    return write(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64",
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\x00",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n< PM_CONFIG DEFAULT=1 >",
            "sys/class/devfreq/gpu-gpc-0/cur_freq": 1575000000,
            "sys/class/devfreq/gpu-gpc-0/min_freq": 1575000000,
            "sys/class/devfreq/gpu-gpc-0/max_freq": 1575000000,
            "sys/class/devfreq/gpu-nvd-0/cur_freq": 1692000000,
            "sys/class/devfreq/gpu-nvd-0/min_freq": 315000000,
            "sys/class/devfreq/gpu-nvd-0/max_freq": 1692000000,
            "sys/class/hwmon/hwmon5/name": "soctherm_oc",
            "sys/class/hwmon/hwmon5/oc1_event_cnt": 0,
            "sys/class/hwmon/hwmon5/oc3_event_cnt": 179,
            **rails,
        },
    )


def sampled(root: Path, times: int = 1) -> list[Reading]:
    """What the sampler would have read of the rails, `times` over."""
    values = {probe.kind: float(probe.path.read_text()) for probe in jetson.rail_probes(root)}
    return [Reading(float(i), values) for i in range(times)]


def test_the_power_mode_is_the_name_that_the_board_gives_it(orin_nano: Path) -> None:
    assert jetson.power_mode(orin_nano, []) == "MAXN_SUPER"
    write(orin_nano, {"var/lib/nvpmodel/status": "pmode:0003 fmode:quiet"})
    assert jetson.power_mode(orin_nano, []) == "7W"
    (orin_nano / "var/lib/nvpmodel/status").unlink()
    assert jetson.power_mode(orin_nano, []) == "25W"  # as it was delivered


def test_a_mode_without_a_name_is_null_with_its_reason(orin_nano: Path) -> None:
    flags: list[str] = []
    write(orin_nano, {"var/lib/nvpmodel/status": "pmode:0009"})

    assert jetson.power_mode(orin_nano, flags) is None
    assert flags[0].startswith("power_mode: ")


def test_mode_and_clock_decide_whether_two_records_are_comparable(orin_nano: Path) -> None:
    fast = environment.environment(orin_nano)
    write(orin_nano, {"var/lib/nvpmodel/status": "pmode:0003", "sys/class/devfreq/17000000.gpu/max_freq": 420000000})
    slow = environment.environment(orin_nano)

    assert (fast.hard["power_mode"], fast.hard["gpu_max_mhz"]) == ("MAXN_SUPER", 1020.0)
    assert (slow.hard["power_mode"], slow.hard["gpu_max_mhz"]) == ("7W", 420.0)
    assert fast.hard["soc"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert fast.hard["jetpack"].startswith("# R36")
    assert fast.hard_sha256 != slow.hard_sha256


def test_another_machine_has_no_keys_of_a_jetson(tmp_path: Path) -> None:
    assert jetson.hard_facts(tmp_path, []) == {}
    assert not jetson.is_jetson(tmp_path)
    assert jetson.rails(tmp_path) == []
    assert jetson.over_currents(tmp_path, jetson.SERIOUS) is None


def test_rails_are_those_that_are_connected_and_metered(orin_nano: Path) -> None:
    assert [rail.name for rail in jetson.rails(orin_nano)] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert jetson.rail_watts(sampled(orin_nano)[0])["VDD_IN"] == pytest.approx(4.984 * 1.856)


def test_the_rail_that_feeds_the_module_is_its_energy(orin_nano: Path) -> None:
    flags: list[str] = []

    used = jetson.sampled_energy(sampled(orin_nano, 200), num_queries=1000, wall_s=40.0, idle_w=5.0, flags=flags)

    assert used is not None
    watts = 4.984 * 1.856
    assert used.gross_mj == pytest.approx(watts * 40)  # 1000 queries in 40 s
    assert used.net_mj == pytest.approx((watts - 5.0) * 40)
    assert used.rails["VDD_IN"] == pytest.approx(watts * 40 * 1e6, abs=1)
    assert (used.source, used.hz) == ("INA3221, VDD_IN", 5.0)
    assert flags == []


def test_overlapping_rails_are_no_total(agx_orin: Path) -> None:
    flags: list[str] = []

    used = jetson.sampled_energy(sampled(agx_orin, 200), num_queries=10, wall_s=40.0, idle_w=None, flags=flags)

    assert used is not None
    assert sorted(used.rails) == ["VDDQ_VDD2_1V8AO", "VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0"]
    assert (used.gross_mj, used.net_mj) == (None, None)
    assert flags[0].startswith("energy: no rail of this board is the whole")
    assert jetson.idle_watts(0.2, agx_orin, sleep=lambda s: None) is None


def test_a_short_window_is_told_as_with_any_meter(orin_nano: Path) -> None:
    flags: list[str] = []

    jetson.sampled_energy(sampled(orin_nano), num_queries=1, wall_s=1.0, idle_w=None, flags=flags)

    assert flags == ["energy: over 1 s only, 30 s are needed. Take --preset release"]


def test_thor_is_metered_at_its_input_and_clocked_by_its_graphics_cores(thor: Path) -> None:
    used = jetson.sampled_energy(sampled(thor, 200), num_queries=1, wall_s=40.0, idle_w=None, flags=[])
    clocks = [probe for probe in probes(thor) if probe.kind == GPU]

    assert used is not None
    assert used.gross_mj == pytest.approx(19.8 * 1.16 * 40e3)
    assert used.rails["VDD_GPU"] < 0  # an idle rail's meter may stand below zero: kept as read
    assert [probe.path.parent.name for probe in clocks] == ["gpu-gpc-0"]
    assert environment.locked_gpu_mhz(thor) == 1575.0
    assert environment.environment(thor).hard["power_mode"] == "120W"


def test_an_unlocked_gpu_clock_is_not_judged(orin_nano: Path) -> None:
    assert jetson.gpu_limits_mhz(orin_nano) == (306.0, 1020.0)
    assert environment.locked_gpu_mhz(orin_nano) is None


def test_idle_power_is_that_of_the_whole_module(orin_nano: Path) -> None:
    pauses: list[float] = []

    assert jetson.idle_watts(1.0, orin_nano, sleep=pauses.append) == pytest.approx(4.984 * 1.856)
    assert sum(pauses) == pytest.approx(1.0)


def test_serious_over_currents_in_the_window_count_as_throttling_and_passing_ones_are_told(orin_nano: Path) -> None:
    before = environment.snapshot([], orin_nano)
    write(
        orin_nano,
        {"sys/class/hwmon/hwmon3/oc2_event_cnt": 5, "sys/class/hwmon/hwmon3/oc3_event_cnt": 47},
    )
    after = environment.snapshot([], orin_nano)

    assert (
        after.telemetry_since(before).throttle_delta == 2
    )  # two of OC2; what was counted since boot is not this window's
    assert after.over_currents_since(before) == 7


def test_a_counter_that_this_board_lacks_does_not_hide_the_others(thor: Path) -> None:
    assert jetson.over_currents(thor, jetson.SERIOUS) == 0
    assert jetson.over_currents(thor, jetson.PASSING) == 179


def test_memory_that_cpu_and_gpu_share_is_told_as_such(orin_nano: Path) -> None:
    flags: list[str] = []

    mib, source = gpu.gpu_memory(150.0, flags, orin_nano / "proc")

    assert mib == 50.0
    assert source is not None
    assert "of the machine" in source
    assert flags == []


def test_a_sensor_without_power_hides_none_of_the_others(orin_nano: Path) -> None:
    zone = orin_nano / "sys/class/thermal/thermal_zone1"
    zone.mkdir()
    (zone / "temp").symlink_to("/proc/self/mem")  # exists, and reading it fails, as cv0-thermal's does with "try again"
    (orin_nano / "sys/class/hwmon/hwmon1/curr3_input").unlink()

    assert environment.temperature_c([], orin_nano) == 51.5
    assert [rail.name for rail in jetson.rails(orin_nano)] == ["VDD_IN", "VDD_CPU_GPU_CV"]


@given(
    watts=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    num_queries=st.integers(1, 10**6),
    wall_s=st.floats(30.0, 3600.0),
)
def test_energy_is_mean_power_over_the_window_whatever_the_number_of_samples(
    watts: list[int], num_queries: int, wall_s: float
) -> None:
    readings = [Reading(0.0, {"mV VDD_IN": 5000.0, "mA VDD_IN": 200.0 * one}) for one in watts]

    used = jetson.sampled_energy(readings, num_queries=num_queries, wall_s=wall_s, idle_w=None, flags=[])

    assert used is not None
    assert used.gross_mj is not None
    assert used.gross_mj * num_queries == pytest.approx(1e3 * wall_s * sum(watts) / len(watts))
    assert used.rails["VDD_IN"] == pytest.approx(used.gross_mj * num_queries * 1e3, abs=1)


def test_the_sampler_reads_rails_as_it_reads_clocks(orin_nano: Path) -> None:
    probe = jetson.rail_probes(orin_nano)[0]

    assert probe == Probe("mV VDD_IN", orin_nano / "sys/class/hwmon/hwmon1/in1_input", 1.0)
