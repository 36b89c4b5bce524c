import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench import Arm, compare_speed, measure_arms, schedule, untrustworthy
from benchmarks.device import measure
from benchmarks.device.record import Record, validate
from benchmarks.devices import Completed, Local
from benchmarks.recording import HOST_E2E, LATENCY, THROUGHPUT
from targets.base import CompiledModel, LayerPlacement, Placement
from targets.errors import DeviceError, RecipeError


class FakeDevice:
    """Answers as the device program would, without one: each arm's launches take the nanoseconds it is given.

    `noisy`: by arm, what disturbs its launches in the order in which they are tried; quiet afterwards.
    """

    name, python = "fake", "python3"
    held = False

    def __init__(
        self, latency_ns: Mapping[str, Sequence[int]], noisy: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.latency_ns, self.asked = latency_ns, list[list[str]]()
        self.noisy = {arm: list(reasons) for arm, reasons in (noisy or {}).items()}

    def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Completed:
        command, *rest = argv[3:]
        self.asked.append([command, *rest])
        if command == "environment":
            return _completed({"hard": {"cpu": "fake"}, "soft": {"temp_c": 40.0}, "hard_sha256": "0", "flags": []})
        assert self.held, "whatever is timed keeps other measurements away"
        if command == "throughput":
            return _completed({"fps": 1000.0, "batch": 32, "n": 320, "disturbances": self.disturb("throughput")})
        if command == "memory":
            return _completed({"memory": {**MEMORY, "vmhwm_mib": 80.0, "arena": False}, "flags": []})
        arm = Path(rest[rest.index("--compiled") + 1]).name
        disturbances, num_tries = self.disturb(arm), len(self.measured(arm))
        samples_ns = [ns + num_tries for ns in self.latency_ns[arm]]
        np.save(rest[rest.index("--out") + 1], np.asarray(samples_ns, dtype=np.int64))
        answer = {**_launch(samples_ns), "disturbances": disturbances}
        if "--device-out" in rest and self.own_clock:
            np.save(rest[rest.index("--device-out") + 1], np.asarray([900] * 200, dtype=np.int64))
            answer["device"] = DEVICE
        return _completed(answer)

    own_clock = False

    def disturb(self, arm: str) -> list[str]:
        reasons = self.noisy.get(arm)
        return [reasons.pop(0)] if reasons else []

    def measured(self, arm: str) -> list[list[str]]:
        """What was asked of an arm, the try that goes on left out."""
        tries = [argv for argv in self.asked if argv[0] == "measure" and Path(argv[2]).name == arm]
        return tries[:-1]

    def put(self, path: Path) -> str:
        return str(path)

    def get(self, remote: str, path: Path) -> None:
        assert Path(remote) == path

    def scratch(self, directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        return str(directory)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        self.held = True
        yield
        self.held = False

    def facts(self) -> Mapping[str, Any]:
        return {"device": self.name}


def _completed(document: dict[str, Any]) -> Completed:
    return Completed(0, json.dumps(document), "")


MEMORY = {"vmhwm_mib": 64.0, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None, "arena": True}
DEVICE = {
    "clock": "a fake's",
    "slowed": True,
    "n": 200,
    "lat_us": {"min": 0.9, "p25": 0.9, "p50": 0.9, "p90": 0.9, "p99": None, "p999": None, "mean": 0.9, "sd": 0.0},
    "outer_p50_us": 1.5,
    "gap_us": 0.6,
}


def _launch(samples_ns: Sequence[int]) -> dict[str, Any]:
    us = np.asarray(samples_ns) / 1e3
    p25, p50 = (float(np.percentile(us, q)) for q in (25, 50))
    latency = {"min": float(us.min()), "p25": p25, "p50": p50, "p90": None, "p99": None, "p999": None}
    return {
        "load_ms": 50.0,
        "first_ms": 1.0,
        "warmup_s": 0.5,
        "overhead_us": 0.05,
        "n": len(samples_ns),
        "lat_us": {**latency, "mean": float(us.mean()), "sd": 0.0},
        "wall_s": sum(samples_ns) / 1e9,
        "cpu_s": sum(samples_ns) / 1e9,
        "nivcsw": 0,
        "majflt": 0,
        "memory": MEMORY,
        "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
        "telemetry": {"temp_c": 41.0, "clk_mhz": None, "throttle_delta": None, "psi_cpu": 0.5},
        "disturbances": [],
        "flags": ["clk_mhz: unreadable"],
    }


def _arm_dirs(compiled: CompiledModel, root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).mkdir()
        for file in ("compiled.json", *compiled.files):
            (root / name / file).write_bytes((compiled.directory / file).read_bytes())
    return [root / name for name in names]


def test_records_hold_what_the_launches_say(
    compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_dir, slow_dir = _arm_dirs(compiled, tmp_path, "fast", "slow")
    device = FakeDevice({"fast": [1000] * 200, "slow": [3000] * 200})
    monkeypatch.setattr(device, "measured", lambda arm: [])
    arms = [Arm("student int8", fast_dir, evaluation_dir), Arm("teacher", slow_dir)]

    fast, slow = measure_arms(device, arms, preset="smoke", launches=6, out_dir=tmp_path / "out")

    assert (fast.summary.p50_us, fast.summary.ci95, fast.summary.fps) == (1.0, (1.0, 1.0), pytest.approx(1e6))
    assert (slow.summary.p50_us, slow.summary.es_p90_us) == (3.0, 3.0)
    assert (fast.throughput.fps if fast.throughput else None, fast.memory.vmhwm_mib) == (1000.0, 64.0)
    assert fast.host_e2e is not None
    assert slow.host_e2e is None
    assert [launch.i for launch in fast.launches] == list(range(6))
    assert np.load(tmp_path / "out" / fast.launches[0].samples_file).tolist() == [1000] * 200
    assert validate(json.loads(json.dumps(fast.to_json()))) == fast


def test_few_launches_have_no_interval_and_say_so(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64})
    (record,) = measure_arms(
        device, [Arm("one", *_arm_dirs(compiled, tmp_path, "one"))], preset="smoke", out_dir=tmp_path
    )

    assert (len(record.launches), record.summary.ci95) == (3, None)
    assert "ci95: 3 launches, 6 are needed" in record.validity.flags


def test_placement_tells_what_fell_back(compiled: CompiledModel, tmp_path: Path) -> None:
    layers = [
        LayerPlacement(name="a", op="Conv", precision="fp32", macs=90),
        LayerPlacement(name="b", op="MatMul", precision="int8", macs=10),
    ]
    arm = Arm("one", *_arm_dirs(compiled, tmp_path, "one"), placement=Placement(layers=tuple(layers), source="test"))

    (record,) = measure_arms(FakeDevice({"one": [1000] * 64}), [arm], preset="smoke", launches=1, out_dir=tmp_path)

    assert record.runtime.fallback_ops == ("b",)  # the model is fp32
    assert record.runtime.ops_per_unit == {"fp32": 90, "int8": 10}


def test_every_launch_is_announced_before_it_begins(compiled: CompiledModel, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    arms = [Arm("one", *_arm_dirs(compiled, tmp_path, "one"))]
    device = FakeDevice({"one": [1000] * 64})

    measure_arms(
        device,
        arms,
        preset="smoke",
        launches=2,
        out_dir=tmp_path,
        on_progress=lambda done, total, what: told.append((done, total)),
    )

    assert told == [(i, 4) for i in range(5)]


def test_the_first_temperature_goes_to_every_launch(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64})
    measure_arms(device, [Arm("one", *_arm_dirs(compiled, tmp_path, "one"))], preset="ci", launches=2, out_dir=tmp_path)

    launches = [asked for asked in device.asked if asked[0] == "measure"]
    assert [asked[asked.index("--start-temp-c") + 1] for asked in launches] == ["40.0", "40.0"]


def _measure(compiled: CompiledModel, tmp_path: Path, device: FakeDevice, **changed: Any) -> list[Record]:
    names = list(device.latency_ns)
    arms = [Arm(name, path) for name, path in zip(names, _arm_dirs(compiled, tmp_path, *names), strict=True)]
    asked = {"preset": "smoke", "launches": 3, "throughput": False, "out_dir": tmp_path / "out", **changed}
    return measure_arms(device, arms, **asked)


def test_a_disturbed_launch_is_repeated_and_both_tries_are_kept(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64}, noisy={"one": ["a train", "a bell"]})

    (record,) = _measure(compiled, tmp_path, device, retries=2)

    first, second, _ = record.launches
    assert [one.disturbances for one in first.repeated] == [("a train",), ("a bell",)]
    assert (first.disturbances, second.repeated, record.validity.ok) == ((), (), True)
    assert (first.lat_us.p50, [one.p50_us for one in first.repeated]) == (1.002, [1.0, 1.001])
    files = [first.samples_file, *(one.samples_file for one in first.repeated)]
    assert [np.load(tmp_path / "out" / name)[0] for name in files] == [1002, 1000, 1001]
    assert "launch 0: repeated 2 times (a train)" in record.validity.flags
    assert validate(json.loads(json.dumps(record.to_json()))) == record


def test_repeating_is_bounded_and_the_last_try_is_kept_and_marked(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64}, noisy={"one": ["noise"] * 99})

    (record,) = _measure(compiled, tmp_path, device, retries=2)

    assert len(device.measured("one")) + 1 == 9
    assert [len(launch.repeated) for launch in record.launches] == [2, 2, 2]
    assert [launch.disturbances for launch in record.launches] == [("noise",)] * 3
    assert not record.validity.ok
    assert untrustworthy([record]) == (
        "one: 3 of 3 launches were disturbed (noise). Measure again on a quiet machine; what was measured is kept and marked."
    )


@pytest.mark.parametrize(("preset", "tries"), [("smoke", 1), ("ci", 3), ("release", 3)])
def test_how_often_follows_from_the_preset(preset: str, tries: int, compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64}, noisy={"one": ["noise"] * 99})

    _measure(compiled, tmp_path, device, preset=preset, launches=1)

    assert len(device.measured("one")) + 1 == tries


def test_a_repeated_launch_stays_in_its_round(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"a": [1000] * 64, "b": [1000] * 64}, noisy={"a": ["noise"] * 4})
    told: list[tuple[int, int]] = []

    a, b = _measure(
        compiled, tmp_path, device, retries=2, on_progress=lambda done, total, what: told.append((done, total))
    )

    for launch_a, launch_b in zip(a.launches, b.launches, strict=True):
        assert launch_a.i == launch_b.i
        assert {launch_a.order, launch_b.order} == {2 * launch_a.i, 2 * launch_a.i + 1}
    asked = [Path(argv[2]).name for argv in device.asked if argv[0] == "measure"]
    assert [name for i, name in enumerate(asked) if i == 0 or asked[i - 1] != name].count("a") <= 3
    assert told == [(i, 6) for i in range(7)]  # a repeated launch is announced once


def test_noise_beside_the_latency_is_repeated_and_told_but_decides_nothing(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    device = FakeDevice({"one": [1000] * 64}, noisy={"throughput": ["noise"] * 3})

    (record,) = _measure(compiled, tmp_path, device, retries=1, throughput=True)

    assert record.validity.ok
    assert "throughput: 1 of 3 launches were disturbed (noise)" in record.validity.flags
    assert "throughput: over 960 samples, MLPerf's offline takes 24576" in record.validity.flags


def test_an_arm_that_is_slowed_on_purpose_says_so_and_is_never_valid(compiled: CompiledModel, tmp_path: Path) -> None:
    plain_dir, slow_dir = _arm_dirs(compiled, tmp_path, "plain", "slow")
    device = FakeDevice({"plain": [1000] * 64, "slow": [1000] * 64})
    arms = [Arm("plain", plain_dir), Arm("slow", slow_dir, injected_us=30.0)]

    plain, slow = measure_arms(device, arms, preset="smoke", launches=1, out_dir=tmp_path, throughput=False)

    asked = {Path(argv[2]).name: argv for argv in device.asked if argv[0] == "measure"}
    assert asked["slow"][asked["slow"].index("--inject-us") + 1] == "30.0"
    assert "--inject-us" not in asked["plain"]
    assert (plain.scenario.injected_us, slow.scenario.injected_us) == (None, 30.0)
    assert (plain.validity.ok, slow.validity.ok) == (True, False)
    assert slow.validity.flags[0] == "not valid: slowed by 30 us a call on purpose"
    assert plain.env.hard == slow.env.hard  # so that the two can be compared
    assert untrustworthy([plain]) is None
    assert str(untrustworthy([plain, slow])).startswith("slow: slowed by 30 us a call on purpose. ")


def test_the_runtimes_own_clock_stands_beside_ours(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice({"one": [1000] * 64})
    device.own_clock = True

    (record,) = _measure(compiled, tmp_path, device, launches=6)

    assert record.device is not None
    assert (record.device.p50_us, record.device.ci95, record.device.load_ms) == (0.9, (0.9, 0.9), None)
    assert record.launches[0].device is not None
    own_file = record.launches[0].device.samples_file
    assert own_file is not None
    assert np.load(tmp_path / "out" / own_file).tolist() == [900] * 200
    slowed = [flag for flag in record.validity.flags if flag.startswith("device: its clock slows the run down")]
    assert slowed == ["device: its clock slows the run down, 1.5 us around it and 1.0 us without"]
    assert validate(json.loads(json.dumps(record.to_json()))) == record


def test_without_such_a_clock_in_every_launch_there_is_no_such_boundary(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    (record,) = _measure(compiled, tmp_path, FakeDevice({"one": [1000] * 64}))

    assert record.device is None


def test_the_arena_is_told_and_the_other_way_measured_where_it_is_asked_for(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    device = FakeDevice({"one": [1000] * 64})

    (record,) = _measure(compiled, tmp_path, device, both_arenas=True)

    (asked,) = [argv for argv in device.asked if argv[0] == "memory"]
    assert json.loads(asked[asked.index("--options") + 1]) == {"arena": False}
    assert record.other_arena is not None
    assert (record.memory.arena, record.memory.vmhwm_mib) == (True, 64.0)
    assert (record.other_arena.arena, record.other_arena.vmhwm_mib) == (False, 80.0)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 1000))
def test_each_round_launches_every_arm_once(num_arms: int, launches: int, seed: int) -> None:
    arms = [Arm(str(i), Path()) for i in range(num_arms)]

    tasks = schedule(arms, launches, seed)

    size = 2 * num_arms
    assert [task.order for task in tasks] == list(range(launches * size))
    for index in range(launches):
        in_round = tasks[index * size : (index + 1) * size]
        assert Counter((task.arm.name, task.kind) for task in in_round) == Counter(
            (arm.name, kind) for arm in arms for kind in (LATENCY, THROUGHPUT)
        )
        assert {task.index for task in in_round} == {index}


def test_the_order_changes_between_rounds_and_follows_from_the_seed() -> None:
    arms = [Arm(str(i), Path()) for i in range(4)]
    tasks = schedule(arms, 10, seed=1)

    rounds = {tuple((task.arm.name, task.kind) for task in tasks[i : i + 8]) for i in range(0, 80, 8)}
    assert len(rounds) > 5
    assert tasks == schedule(arms, 10, seed=1) != schedule(arms, 10, seed=2)


def test_encoded_samples_add_the_whole_way(compiled: CompiledModel, evaluation_dir: Path) -> None:
    tasks = schedule([Arm("one", compiled.directory, evaluation_dir)], 1, seed=0)

    assert sorted(task.kind for task in tasks) == sorted([LATENCY, THROUGHPUT, HOST_E2E])


def test_two_arms_of_one_name_are_refused(compiled: CompiledModel, tmp_path: Path) -> None:
    arms = [Arm("a b", compiled.directory), Arm("a/b", compiled.directory)]

    with pytest.raises(RecipeError, match="both called 'a-b'"):
        measure_arms(FakeDevice({}), arms, preset="smoke", out_dir=tmp_path)


def test_a_launch_that_fails_is_a_device_error_with_the_devices_words(compiled: CompiledModel, tmp_path: Path) -> None:
    class Failing(FakeDevice):
        def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Completed:
            if argv[3] == "environment":
                return super().run(argv)
            return Completed(1, '{"error": "MemoryError: no room", "exit_code": 1}', "")

    with pytest.raises(DeviceError, match="fake: MemoryError: no room"):
        measure_arms(Failing({}), [Arm("one", compiled.directory)], preset="smoke", out_dir=tmp_path)


@pytest.fixture
def measured(compiled: CompiledModel, tmp_path: Path) -> Record:
    arm = Arm("one", *_arm_dirs(compiled, tmp_path, "one"))
    (record,) = measure_arms(FakeDevice({"one": [1000] * 64}), [arm], preset="smoke", launches=1, out_dir=tmp_path)
    return record


def _with_p25(record: Record, values_us: Sequence[float]) -> Record:
    first = record.launches[0]
    launches = (replace(first, i=i, lat_us=replace(first.lat_us, p25=us)) for i, us in enumerate(values_us))
    return replace(record, launches=tuple(launches))


def test_few_launches_are_compared_by_their_ratio_and_called_smoke(measured: Record) -> None:
    verdict = compare_speed(_with_p25(measured, [10.0, 11.0, 12.0]), _with_p25(measured, [20.0, 22.0, 24.0]))

    assert (verdict.faster, verdict.ratio, verdict.p) == (True, pytest.approx(2.0), None)
    assert verdict.basis.startswith("smoke")


def test_ten_pairs_are_compared_by_the_exact_test(measured: Record) -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.01, (2, 10))

    faster = compare_speed(_with_p25(measured, 10 * noise[0]), _with_p25(measured, 11 * noise[1]))
    same = compare_speed(_with_p25(measured, 10 * noise[0]), _with_p25(measured, 10 * noise[1]))
    slower = compare_speed(_with_p25(measured, 11 * noise[0]), _with_p25(measured, 10 * noise[1]))

    assert (faster.faster, same.faster, slower.faster) == (True, False, False)
    assert faster.p == pytest.approx(1 / 1024)
    assert faster.ratio == pytest.approx(1.1, rel=0.02)


def test_identical_latencies_are_not_faster(measured: Record) -> None:
    assert not compare_speed(_with_p25(measured, [10.0] * 3), _with_p25(measured, [10.0] * 3)).faster
    assert not compare_speed(_with_p25(measured, [10.0] * 10), _with_p25(measured, [10.0] * 10)).faster


def test_a_real_launch_on_this_machine_makes_a_whole_record(
    compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path
) -> None:
    arm = Arm("linear fp32", compiled.directory, evaluation_dir)

    (record,) = measure_arms(Local(), [arm], preset="smoke", launches=1, out_dir=tmp_path)

    (launch,) = record.launches
    samples_ns = np.load(tmp_path / launch.samples_file)
    assert validate(json.loads(json.dumps(record.to_json()))) == record
    assert len(samples_ns) == launch.n >= measure.PRESETS["smoke"].min_queries
    assert launch.lat_us.p50 == pytest.approx(np.median(samples_ns) / 1e3)
    assert samples_ns.sum() / 1e9 <= launch.wall_s
    assert record.host_e2e is not None
    assert record.throughput is not None
    assert record.throughput.batch == 32
    assert None not in (record.memory.vmhwm_mib, launch.overhead_us, record.env.hard["ram_mib"])
