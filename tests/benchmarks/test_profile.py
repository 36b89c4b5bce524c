"""The profile of one model on the device: blocks, medians, and what the program answers. Times are the fakes' own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import targets
from benchmarks.device.profile import DEPTHS, Block, layer_timer, measure_block, profile, summary
from targets import make_target
from targets.base import Array, Batch, CompiledModel, Exported, LayerTime, TensorSpec
from targets.errors import IntegrityError, TargetError
from targets.onnxruntime import OnnxRuntimeCpu

pytestmark = pytest.mark.integration


@dataclass
class FakeSession:
    """Counts its runs, and how many of them came before `start`."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    source: str = "fake"
    resolution_us: float = 0.0
    num_runs: int = 0
    num_warm: int | None = None
    said: list[str] = field(default_factory=list)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        self.num_runs += 1
        return {}

    def start(self) -> None:
        self.num_warm = self.num_runs

    def layer_times(self) -> tuple[LayerTime, ...]:
        return (layer("conv", self.num_runs),)


def layer(name: str, time_us: float, macs: int = 0) -> LayerTime:
    return LayerTime(name=name, op="Conv", precision="int8", macs=macs, time_us=time_us)


def block(*layers: LayerTime, plain_us: float = 1.0, profiled_us: float = 2.0, psi_cpu: float | None = None) -> Block:
    return Block(layers, array("q", [int(profiled_us * 1e3)]), array("q", [int(plain_us * 1e3)]), psi_cpu)


def test_each_way_is_warmed_before_its_runs_are_timed() -> None:
    plain, profiled = FakeSession(), FakeSession()

    found = measure_block(plain, profiled, {}, num_warm=3, num_runs=5)

    assert (profiled.num_warm, profiled.num_runs, plain.num_runs) == (3, 8, 8)
    assert (len(found.profiled_ns), len(found.plain_ns)) == (5, 5)


def test_layer_times_are_read_before_the_plain_session_runs_again() -> None:
    order: list[str] = []

    class Profiled(FakeSession):
        def layer_times(self) -> tuple[LayerTime, ...]:
            order.append("read")
            return super().layer_times()

    class Plain(FakeSession):
        def run(self, batch: Batch) -> Mapping[str, Array]:
            order.append("plain")
            return super().run(batch)

    measure_block(Plain(), Profiled(), {}, num_warm=1, num_runs=1)

    assert order == ["read", "plain", "plain"]


def test_a_disturbed_block_does_not_move_a_layers_time() -> None:
    found = summary([block(layer("a", 10.0)), block(layer("a", 900.0)), block(layer("a", 12.0))])

    (only,) = found["layers"]
    assert (only["time_us"], only["min_us"]) == (12.0, 10.0)
    assert found["total_us"] == 12.0


def test_layers_of_one_name_are_kept_apart_by_their_place() -> None:
    found = summary([block(layer("same", 1.0), layer("same", 5.0)), block(layer("same", 3.0), layer("same", 7.0))])

    assert [one["time_us"] for one in found["layers"]] == [2.0, 6.0]


def test_the_p50_with_and_without_the_profiler_are_told_apart() -> None:
    found = summary([block(layer("a", 1.0), plain_us=4.0, profiled_us=6.0)] * 3)

    assert (found["p50_us"], found["profiled_p50_us"]) == (4.0, 6.0)


@pytest.mark.parametrize(("waited", "told"), [([None, None], None), ([None, 8.0, 2.0], 5.0)])
def test_what_could_not_be_read_of_other_work_is_null(waited: list[float | None], told: float | None) -> None:
    found = summary([block(layer("a", 1.0), psi_cpu=one) for one in waited])

    assert found["psi_cpu"] == told


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_the_device_program_answers_with_the_layers_of_a_real_run(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    make_target(name, {}).compile(exported, tmp_path, "fp32")

    document = program("profile", "--compiled", tmp_path)

    (product,) = [one for one in document["layers"] if one["macs"]]
    assert (product["macs"], product["precision"]) == (16 * 3, "fp32")
    assert document["num_blocks"] == DEPTHS["smoke"].num_blocks
    assert document["num_runs"] >= 3 * document["num_blocks"]
    assert document["p50_us"] > 0
    assert document["isa"]["words"]
    assert document["total_us"] == pytest.approx(sum(one["time_us"] for one in document["layers"]))


def test_a_changed_file_is_refused_before_anything_runs(compiled: CompiledModel, tmp_path: Path) -> None:
    for name in ("compiled.json", *compiled.files):
        (tmp_path / name).write_bytes((compiled.directory / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"another")

    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        profile(tmp_path, DEPTHS["smoke"])


@dataclass(frozen=True, kw_only=True)
class Untimed:
    """A target whose runtime has no profiler."""

    name: ClassVar[str] = "untimed"
    scheme: ClassVar[str] = "cpu-int8"
    dialect: ClassVar[str] = "onnxruntime"

    num_threads: int = 1

    missing = OnnxRuntimeCpu.missing
    float_precisions = OnnxRuntimeCpu.float_precisions
    compile = OnnxRuntimeCpu.compile
    load = OnnxRuntimeCpu.load
    placement = OnnxRuntimeCpu.placement


def test_a_target_without_a_profiler_is_refused_with_what_to_do(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.TARGETS, "untimed", Untimed)
    for name in compiled.files:
        (tmp_path / name).write_bytes((compiled.directory / name).read_bytes())
    dataclasses.replace(compiled, target="untimed", options={}, directory=tmp_path).save()

    with pytest.raises(TargetError, match=r"'untimed' does not time single layers.*edgestill bench"):
        profile(tmp_path, DEPTHS["smoke"])


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu", "tensorrt"])
def test_these_targets_time_their_layers(name: str) -> None:
    assert layer_timer(make_target(name, {})).load_profiled


def program(*argv: object) -> dict[str, Any]:
    """In a process of its own, as on a device: after OpenVINO's profiler a fork in this one, of a later test, ends in SIGSEGV."""
    command = [sys.executable, "-m", "benchmarks.device", *(str(one) for one in argv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).resolve().parents[2])
    document: dict[str, Any] = json.loads(done.stdout)
    return document
