"""Pairs of processes that take turns as the host asks for them, records them and compares them; no process is started here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bench import Arm, untrustworthy
from benchmarks.compare import compare
from benchmarks.device.record import Record, validate
from benchmarks.devices import Completed
from benchmarks.turns import expected_s, measure_by_turns, pair_difference, pair_differences
from targets.base import CompiledModel
from targets.errors import DeviceError, MeasurementError, RecipeError

ROUNDS = 3
A_US, B_US = 100.0, 104.0


class FakeDevice:
    """Answers a pair as the device program would: A's calls take A_US, B's B_US. `noisy`: what disturbs B, try after try."""

    name, python = "fake", "python3"
    held = False

    def __init__(self, noisy: Sequence[str] = (), temp_c: float | None = None) -> None:
        self.noisy, self.temp_c = list(noisy), temp_c
        self.asked: list[list[str]] = []
        self.timeouts_s: list[float] = []

    def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Completed:
        command, *rest = argv[3:]
        if command == "environment":
            soft = {"temp_c": self.temp_c}
            return _completed({"hard": {"cpu": "fake"}, "soft": soft, "hard_sha256": "0", "flags": []})
        assert self.held, "whatever is timed keeps other measurements away"
        assert command == "turns"
        self.asked.append(rest)
        self.timeouts_s.append(timeout_s)
        num_tries, place = len(self.asked), rest.index("--out") + 1
        for path, us in zip(rest[place : place + 2], (A_US, B_US), strict=True):
            np.save(path, np.full(30, round(us * 1e3) + num_tries, dtype=np.int64))
        disturbances = [self.noisy.pop(0)] if self.noisy else []
        launches = [_launch(A_US, []), _launch(B_US, disturbances)]
        return _completed({"launches": launches, "first": num_tries % 2})

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
        return {}

    def close(self) -> None: ...


def _completed(document: dict[str, Any]) -> Completed:
    return Completed(0, json.dumps(document), "")


def _launch(us: float, disturbances: Sequence[str]) -> dict[str, Any]:
    latency = {"min": us, "p25": us, "p50": us, "p90": None, "p99": None, "p999": None, "mean": us, "sd": 0.0}
    return {
        "load_ms": 50.0,
        "first_ms": 1.0,
        "warmup_s": 0.5,
        "overhead_us": 0.05,
        "n": 30,
        "lat_us": latency,
        "wall_s": 0.1,
        "cpu_s": 0.1,
        "nivcsw": 0,
        "majflt": 0,
        "memory": {"vmhwm_mib": 64.0, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None},
        "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
        "telemetry": {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": 0.5},
        "disturbances": list(disturbances),
        "flags": [],
        "device": None,
        "turns": {"queries": [10] * ROUNDS, "p25_us": [us, 3 * us, us], "dropped": 6, "slice_s": 0.05, "cpus": [1]},
    }


def _arms(compiled: CompiledModel, root: Path) -> tuple[Arm, Arm]:
    for name in ("old", "new"):
        (root / name).mkdir()
        for file in ("compiled.json", *compiled.files):
            (root / name / file).write_bytes((compiled.directory / file).read_bytes())
    return Arm("old", root / "old"), Arm("new", root / "new")


def _measure(
    compiled: CompiledModel, tmp_path: Path, device: FakeDevice, *, b: dict[str, Any] | None = None, **changed: Any
) -> tuple[Record, Record]:
    old, new = _arms(compiled, tmp_path)
    asked = {"preset": "smoke", "pairs": 10, "out_dir": tmp_path / "out", **changed}
    return measure_by_turns(device, old, replace(new, **(b or {})), **asked)


def test_launch_i_of_both_records_was_one_pair_and_their_samples_are_kept(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    device = FakeDevice()

    a, b = _measure(compiled, tmp_path, device)

    assert [launch.i for launch in a.launches] == [launch.i for launch in b.launches] == list(range(10))
    places = [(one.order, other.order) for one, other in zip(a.launches, b.launches, strict=True)]
    assert places == [(2 * i + (i + 1) % 2, 2 * i + i % 2) for i in range(10)]  # in odd tries B was first
    files = [launch.samples_file for record in (a, b) for launch in record.launches]
    assert len(set(files)) == 20
    assert [np.load(tmp_path / "out" / name)[0] for name in files[::10]] == [100_001, 104_001]
    assert (a.utc, a.device, a.throughput) == (b.utc, None, None)
    assert (a.scenario.min_s, a.scenario.min_q) == (1.0, 64)
    assert validate(json.loads(json.dumps(a.to_json()))) == a


@pytest.mark.parametrize(("preset", "pairs", "tries"), [("smoke", 10, 1), ("ci", 20, 3), ("release", 40, 3)])
def test_how_many_pairs_and_tries_follows_from_the_preset(
    preset: str, pairs: int, tries: int, compiled: CompiledModel, tmp_path: Path
) -> None:
    device = FakeDevice(noisy=["noise"] * 1000)

    a, _ = _measure(compiled, tmp_path, device, preset=preset, pairs=None)

    assert (len(a.launches), len(device.asked)) == (pairs, pairs * tries)


def test_a_pair_is_repeated_as_a_pair_and_both_say_why(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice(noisy=["a train", "a bell"])

    a, b = _measure(compiled, tmp_path, device, pairs=2, retries=2)

    assert len(device.asked) == 4
    assert [one.disturbances for one in b.launches[0].repeated] == [("a train",), ("a bell",)]
    assert [one.disturbances for one in a.launches[0].repeated] == [("the partner: a train",), ("the partner: a bell",)]
    assert a.launches[1].repeated == b.launches[1].repeated == ()
    files = [b.launches[0].samples_file, *(one.samples_file for one in b.launches[0].repeated)]
    assert [np.load(tmp_path / "out" / name)[0] for name in files] == [104_003, 104_001, 104_002]
    chances = [argv[argv.index("--chance") + 1] for argv in device.asked]
    assert len(set(chances)) == 4  # another try is another throw


def test_chance_is_drawn_anew_in_each_session_unless_it_is_given(compiled: CompiledModel, tmp_path: Path) -> None:
    thrown = []
    for number, given in enumerate((None, None, "coins", "coins")):
        (tmp_path / str(number)).mkdir()
        _measure(compiled, tmp_path / str(number), device := FakeDevice(), pairs=3, chance=given)
        thrown.append([argv[argv.index("--chance") + 1] for argv in device.asked])

    assert len({*thrown[0], *thrown[1]}) == 6
    assert thrown[2] == thrown[3]


def test_repeating_is_bounded_and_the_one_that_was_disturbed_is_marked(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice(noisy=["noise"] * 99)

    a, b = _measure(compiled, tmp_path, device, pairs=3, retries=1)

    assert len(device.asked) == 6
    assert [launch.disturbances for launch in b.launches] == [("noise",)] * 3
    assert [launch.disturbances for launch in a.launches] == [()] * 3
    assert (a.validity.ok, b.validity.ok) == (True, False)
    assert str(untrustworthy([a, b])).startswith("new: 3 of 3 launches were disturbed (noise)")


def test_what_is_asked_of_the_device(compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path) -> None:
    device = FakeDevice(temp_c=41.0)
    _measure(compiled, tmp_path, device, pairs=1, seed=7, b={"injected_us": 30.0})
    (plain,) = device.asked

    assert plain[:3] == ["--compiled", str(tmp_path / "old"), str(tmp_path / "new")]
    assert plain[plain.index("--inject-us") + 1 :][:2] == ["0.0", "30.0"]
    assert plain[plain.index("--start-temp-c") + 1] == "41.0"
    assert plain[plain.index("--seed") + 1] == "7"
    assert "--any-cpus" not in plain
    assert device.timeouts_s[0] > 480


def test_an_arm_that_is_slowed_on_purpose_is_never_valid(compiled: CompiledModel, tmp_path: Path) -> None:
    a, b = _measure(compiled, tmp_path, FakeDevice(), pairs=1, b={"injected_us": 30.0})

    assert (a.validity.ok, b.validity.ok) == (True, False)
    assert (a.scenario.injected_us, b.scenario.injected_us) == (None, 30.0)


def test_on_whatever_cpus_only_where_that_is_asked_for(compiled: CompiledModel, tmp_path: Path) -> None:
    device = FakeDevice()

    _measure(compiled, tmp_path, device, pairs=1, same_cpus=False)

    assert device.asked[0][-1] == "--any-cpus"


def test_every_pair_is_announced_before_it_begins(compiled: CompiledModel, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    _measure(
        compiled, tmp_path, FakeDevice(), pairs=3, on_progress=lambda done, total, what: told.append((done, total))
    )

    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_the_device_refuses_is_told_in_its_own_words(compiled: CompiledModel, tmp_path: Path) -> None:
    class Failing(FakeDevice):
        def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Completed:
            if argv[3] == "environment":
                return super().run(argv)
            return Completed(6, '{"error": "B: its process was killed by signal 9", "exit_code": 6}', "")

    with pytest.raises(DeviceError, match="fake: B: its process was killed by signal 9"):
        _measure(compiled, tmp_path, Failing())


def test_what_cannot_take_turns_is_refused(compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path) -> None:
    one = Arm("one", compiled.directory)

    with pytest.raises(RecipeError, match="both called 'one'"):
        measure_by_turns(FakeDevice(), one, one, preset="smoke", out_dir=tmp_path)
    other = Arm("other", compiled.directory, evaluation_dir)
    with pytest.raises(RecipeError, match="only one of two"):
        measure_by_turns(FakeDevice(), one, other, preset="smoke", out_dir=tmp_path)
    with pytest.raises(RecipeError, match="--preset long"):
        expected_s("long")


def test_the_difference_of_a_pair_is_the_median_over_its_rounds(compiled: CompiledModel, tmp_path: Path) -> None:
    a, b = _measure(compiled, tmp_path, FakeDevice(), pairs=1)
    turns = b.launches[0].turns
    assert turns is not None
    rounds = replace(
        turns, p25_us=(A_US * 1.01, 3 * A_US * 7.0, A_US * 1.03)
    )  # one round in which B alone was disturbed

    found = pair_difference(a.launches[0], replace(b.launches[0], turns=rounds))

    assert found == pytest.approx(np.log(1.03))
    assert pair_difference(a.launches[0], replace(b.launches[0], turns=None)) is None


def test_a_comparison_judges_the_latency_by_rounds_and_the_rest_by_launches(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    a, b = _measure(compiled, tmp_path, FakeDevice())

    found = compare(a, b)

    latency = found.differences[0]
    assert (found.by_turns, found.verdict, found.num_pairs) == (True, "slower", 10)
    assert latency.ratio == pytest.approx(B_US / A_US)
    assert latency.p == pytest.approx(3 / 1024)  # Holm's of three
    assert {one.metric: one.verdict for one in found.differences[1:]} == dict.fromkeys(
        ("peak RSS", "load", "size"), "no difference"
    )
    assert "10 pairs of processes that took turns, preset smoke" in found.text()


def test_records_of_two_ways_of_measuring_are_not_comparable(compiled: CompiledModel, tmp_path: Path) -> None:
    a, b = _measure(compiled, tmp_path, FakeDevice(), pairs=1)
    alone = replace(b.env, hard={key: value for key, value in b.env.hard.items() if key != "turns"})

    assert a.env.hard["turns"] is True
    with pytest.raises(MeasurementError, match="turns: True and None"):
        compare(a, replace(b, env=alone))


def test_records_that_were_not_measured_by_turns_have_no_such_differences(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    a, b = _measure(compiled, tmp_path, FakeDevice(), pairs=2)
    alone = replace(b, launches=tuple(replace(launch, turns=None) for launch in b.launches))

    assert pair_differences(a, b) == [pytest.approx(np.log(B_US / A_US))] * 2
    assert pair_differences(a, alone) is None
    assert not compare(a, alone).by_turns


def test_a_longer_preset_and_more_pairs_take_longer() -> None:
    assert expected_s("smoke") < expected_s("ci") < expected_s("release")
    assert expected_s("ci", 40) == pytest.approx(2 * expected_s("ci", 20))
