"""Memory, energy and environment, read from files that lie where the kernel's would."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import energy, environment, gpu, memory
from benchmarks.device.record import Telemetry
from benchmarks.device.sampler import CPU, TEMPERATURE, Reading


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


@pytest.mark.parametrize("own_folder", ["memory/docker/abc", "memory"])
def test_the_containers_peak_is_read_from_the_older_cgroups_too(own_folder: str, tmp_path: Path) -> None:
    _write(tmp_path / "proc/cgroup", "4:memory:/docker/abc\n0::/\n")
    _write(tmp_path / "cgroup" / own_folder / "memory.max_usage_in_bytes", str(50 * 2**20))

    assert memory.cgroup_peak_mib([], tmp_path / "proc", tmp_path / "cgroup") == 50.0


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

    used = energy.energy_of(before, after, num_queries=100, wall_s=2.0, idle_w=4.0, flags=(flags := []))

    assert flags == ["energy: over 2 s only, 30 s are needed. Take --preset release"]
    assert used.gross_mj == pytest.approx(200.0)
    assert used.net_mj == pytest.approx((20.0 - 4.0 * 2.0) * 1e3 / 100)


def test_energy_over_a_window_in_which_the_counter_may_wrap_twice_is_null_and_told() -> None:
    before, after = (energy.Reading({"package-0": uj}, {"package-0": 65_532_610_987}) for uj in (0, 20_000_000))

    used = energy.energy_of(before, after, num_queries=1, wall_s=600.0, idle_w=None, flags=(flags := []))

    assert (used.source, used.gross_mj) == (None, None)
    assert flags == ["energy: the counter may wrap twice in 600 s, and below 131 s it cannot"]


def test_energy_without_a_counter_is_null_with_a_reason(tmp_path: Path) -> None:
    flags: list[str] = []

    used = energy.energy_of(
        energy.read_rails(flags, tmp_path), None, num_queries=1, wall_s=1.0, idle_w=None, flags=flags
    )

    assert (used.source, used.gross_mj, used.net_mj) == (None, None, None)
    assert flags == ["energy: this machine shows no RAPL package counter"]


def test_rails_that_are_not_the_same_any_more_give_no_energy() -> None:
    before, after = (energy.Reading({rail: 0}, {rail: 9}) for rail in ("package-0", "package-1"))

    assert energy.energy_of(before, after, num_queries=1, wall_s=60.0, idle_w=None, flags=[]).gross_mj is None


def test_an_unknown_machine_has_nulls_and_a_flag_for_each(tmp_path: Path) -> None:
    found = environment.environment(tmp_path)

    nulls = {key for key, value in (found.hard | found.soft).items() if value is None}
    assert nulls >= {"cpu", "cpu_id", "isa", "governor", "max_khz", "cpus_online", "temp_c", "uptime_s"}
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


GENERATIONS = {
    "Zen 3": "vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 1\nmodel name : AMD EPYC\nstepping : 1\nflags : fpu avx2\n",
    "Zen 4": "vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nstepping : 1\n"
    "flags : fpu avx2 avx512f avx512_vnni avx512_bf16\n",
    "Zen 4, masked": "vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nstepping : 1\nflags : fpu avx2\n",
}


def test_two_processors_that_a_hypervisor_gives_one_name_are_two_machines(tmp_path: Path) -> None:
    found = {}
    for name, cpuinfo in GENERATIONS.items():
        _write(tmp_path / "proc/cpuinfo", cpuinfo)
        found[name] = environment.environment(tmp_path)

    assert {one.hard["cpu"] for one in found.values()} == {"AMD EPYC"}
    assert len({one.hard_sha256 for one in found.values()}) == 3
    assert found["Zen 3"].hard["cpu_id"] == "AuthenticAMD family 25 model 1 stepping 1"
    assert found["Zen 4"].hard["isa"] == "AVX-512; INT8 by AVX-512 VNNI; BF16 by AVX-512 BF16"


def test_an_arm_processor_is_told_from_its_next_revision(tmp_path: Path) -> None:
    cpuinfo = "Features\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: 0xd42\nCPU revision\t: 1\n"
    _write(tmp_path / "proc/cpuinfo", cpuinfo)

    assert environment.environment(tmp_path).hard["cpu_id"] == "variant 0x1 revision 1"


def test_pressure_is_the_share_of_the_window(tmp_path: Path) -> None:
    _write(tmp_path / "proc/pressure/cpu", "some avg10=9.00 avg60=0 avg300=0 total=1000\nfull avg10=0 total=7\n")
    before = environment.snapshot([], tmp_path)
    _write(tmp_path / "proc/pressure/cpu", "some avg10=9.00 avg60=0 avg300=0 total=1000\nfull avg10=0 total=9\n")
    after = environment.snapshot([], tmp_path)

    assert before.psi_us == 1000
    assert after.telemetry_since(before).psi_cpu == 0.0


def test_waiting_for_a_cpu_is_summed_over_the_threads(tmp_path: Path) -> None:
    for thread, waited_ns in ((1, 2_000_000_000), (2, 500_000_000)):
        _write(tmp_path / f"proc/self/task/{thread}/schedstat", f"7 {waited_ns} 3\n")
    before = environment.snapshot([], tmp_path)
    _write(tmp_path / "proc/self/task/2/schedstat", "7 1500000000 3\n")
    after = environment.snapshot([], tmp_path)

    assert (before.waited_s, after.window_since(before).waited_s) == (2.5, 1.0)


def test_a_counter_that_falls_is_another_counter_and_no_difference(tmp_path: Path) -> None:
    _write(tmp_path / "proc/pressure/cpu", "some avg10=0 total=1000\n")
    _write(tmp_path / "proc/self/task/1/schedstat", "7 2000000000 3\n")
    before = environment.snapshot([], tmp_path)
    _write(tmp_path / "proc/pressure/cpu", "some avg10=0 total=10\n")
    _write(tmp_path / "proc/self/task/1/schedstat", "7 1000 3\n")
    after = environment.snapshot([], tmp_path)

    assert after.telemetry_since(before).psi_cpu is None
    assert after.window_since(before).waited_s is None


def test_time_in_which_the_machine_was_suspended_is_told() -> None:
    before = environment.snapshot([])
    after = replace(before, monotonic_s=before.monotonic_s + 1.0, boottime_s=(before.boottime_s or 0.0) + 61.0)

    assert after.window_since(before).slept_s == pytest.approx(60.0)


def _clock_limits(root: Path, low_khz: int, high_khz: int) -> None:
    for cpu in os.sched_getaffinity(0):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        _write(folder / "scaling_min_freq", str(low_khz))
        _write(folder / "scaling_max_freq", str(high_khz))


def test_a_clock_is_locked_where_the_least_allowed_is_the_most(tmp_path: Path) -> None:
    assert environment.locked_mhz(tmp_path) is None
    _clock_limits(tmp_path, 800_000, 2_000_000)
    free = environment.locked_mhz(tmp_path)
    _clock_limits(tmp_path, 2_000_000, 2_000_000)

    assert (free, environment.locked_mhz(tmp_path)) == (None, 2000.0)
    for end in ("min", "max"):
        _write(tmp_path / f"sys/class/devfreq/17000000.gpu/{end}_freq", "1300500000")
    assert environment.locked_gpu_mhz(tmp_path) == 1300.5


def test_what_the_sampler_saw_stands_in_the_telemetry(tmp_path: Path) -> None:
    _clock_limits(tmp_path, 2_000_000, 2_000_000)
    readings = [Reading(i, {CPU: mhz, TEMPERATURE: 50.0 + i}) for i, mhz in enumerate((2000.0, 1990.0, 1500.0))]
    quiet = Telemetry(temp_c=40.0, clk_mhz=1.0, throttle_delta=0, psi_cpu=0.0)

    seen = environment.with_readings(quiet, readings, tmp_path)

    assert (seen.clk_mhz, seen.clk_min_mhz, seen.clk_locked_mhz, seen.temp_max_c) == (1990.0, 1500.0, 2000.0, 52.0)
    assert (seen.num_sampled, seen.gpu_clk_mhz, seen.temp_c) == (3, None, 40.0)
    assert environment.with_readings(quiet, [], tmp_path) == quiet


def test_a_jetsons_memory_is_what_was_added_since_the_load(tmp_path: Path) -> None:
    _write(tmp_path / "meminfo", "MemTotal: 8 kB\nNvMapMemUsed:  204800 kB\n")
    before_mib = gpu.shared_mib(tmp_path)
    _write(tmp_path / "meminfo", "MemTotal: 8 kB\nNvMapMemUsed:  307200 kB\n")

    assert gpu.gpu_memory(before_mib, [], tmp_path) == (100.0, "NvMapMemUsed of the machine, above before the load")


def test_a_process_without_cuda_asks_no_gpu_and_says_why_there_is_no_figure(tmp_path: Path) -> None:
    flags: list[str] = []

    assert gpu.gpu_memory(gpu.shared_mib(tmp_path), flags, tmp_path) == (None, None)
    assert flags == ["gpu_mib: this process has not loaded CUDA"]


class FakeNvml:
    """Two GPUs; process 7 holds 96 MiB on each, process 8 what cannot be told. `fails` names the call that does."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "nvmlDeviceGetCount_v2":
                arguments[0]._obj.value = 2
            if name == "nvmlDeviceGetComputeRunningProcesses_v3":
                for info, (pid, used) in zip(arguments[2], ((7, 96 * 2**20), (8, gpu.NOT_AVAILABLE)), strict=False):
                    info.pid, info.used_bytes = pid, used
                arguments[1]._obj.value = 2
            return 3 if name == self.fails else 0

        return call


def test_gpu_memory_is_the_process_own_over_all_gpus() -> None:
    library = FakeNvml()

    assert gpu.nvml_mib(library, 7) == 192.0
    assert library.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize(("fails", "pid"), [("nvmlInit_v2", 7), ("nvmlDeviceGetCount_v2", 7), ("", 9), ("", 8)])
def test_what_nvml_does_not_tell_is_not_taken_for_nothing(fails: str, pid: int) -> None:
    with pytest.raises(LookupError, match=fails or "process"):
        gpu.nvml_mib(FakeNvml(fails), pid)


def test_this_machine_is_recognised() -> None:
    found = environment.environment()

    assert found.hard["ram_mib"] > 0
    assert found.hard["cpus_allowed"]


def test_reading_the_counters_is_in_no_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading takes 5 s of this clock, and one second lies between them."""
    moments = iter([0.0, 5.0, 6.0, 11.0])

    def now() -> environment.Clocks:
        now_s = next(moments)
        return environment.Clocks(now_s, 0.9 * now_s, int(now_s), 2 * int(now_s), now_s)

    monkeypatch.setattr(environment.Clocks, "now", now)
    before, after = environment.snapshot([], tmp_path), environment.snapshot([], tmp_path)

    window = after.window_since(before)
    assert (window.wall_s, window.nivcsw, window.majflt, window.slept_s) == (1.0, 1, 2, 0.0)
    assert window.cpu_s == pytest.approx(0.9)
