"""The peak of a machine: dense layers that must really run in the precision they are built for, and where it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import benchmarks.peak
from benchmarks.dense import LEVELS, Convolution, Level, MatMul, write_dense
from benchmarks.devices import Completed
from benchmarks.peak import Machine, Peak, best_of, default_cache_dir, measure_peak, peak_of
from targets import make_target

pytestmark = pytest.mark.integration

TINY: Level = (Convolution(16, 8), MatMul(64))
ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(
    hard_sha256="a" * 64, target="onnxruntime-cpu", options={"num_threads": 1}, toolchain="onnxruntime 1.32.0"
)


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnxruntime-cpu", "fp32"), ("onnxruntime-cpu", "int8"), ("openvino-cpu", "fp32"), ("openvino-cpu", "int8")],
)
def test_each_dense_layer_runs_in_the_precision_it_is_built_for(target: str, precision: str, tmp_path: Path) -> None:
    made = make_target(target, {})
    exported = write_dense(tmp_path / "e", TINY, precision=precision, dialect=made.dialect)
    made.compile(exported, tmp_path / "c", precision)

    # In a process of its own, as on a device: after OpenVINO's profiler a fork in this one, of a later test, ends in SIGSEGV.
    argv = [sys.executable, "-m", "benchmarks.device", "profile", "--compiled", str(tmp_path / "c")]
    answer = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)

    products = {layer["macs"]: layer["precision"] for layer in answer["layers"] if layer["macs"]}
    assert products == {16 * 16 * 9 * 64: precision, 64**3: precision}


def test_the_graph_for_tensorrt_has_signed_activations_and_zero_point_0(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    exported = write_dense(tmp_path, TINY, precision="int8", dialect="tensorrt")

    constants = {one.name: numpy_helper.to_array(one) for one in onnx.load(exported.model_path).graph.initializer}
    zeros = [value for name, value in constants.items() if name.endswith("_zero")]
    assert {str(value.dtype) for value in zeros} == {"int8"}
    assert {int(value) for value in zeros} == {0}


def test_float16_has_a_twin_whose_inputs_and_outputs_stay_float32(tmp_path: Path) -> None:
    import onnx

    exported = write_dense(tmp_path, TINY, precision="fp16", dialect="tensorrt")

    assert exported.half_model_path is not None
    model = onnx.load(exported.half_model_path)
    onnx.checker.check_model(model, full_check=True)
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}
    weights = [one.data_type for one in model.graph.initializer]
    assert set(weights) == {onnx.TensorProto.FLOAT16}


def timed(name: str, precision: str, min_us: float, macs: int = 1_000_000) -> dict[str, Any]:
    return {"name": name, "op": "Conv", "precision": precision, "macs": macs, "time_us": min_us * 2, "min_us": min_us}


def test_the_peak_is_the_best_layer_by_its_least_time() -> None:
    found = best_of(
        "int8", [timed("slow", "int8", 20.0), timed("fast", "int8", 5.0), timed("move", "int8", 1.0, macs=0)]
    )

    assert (found.gops, found.layer) == (400.0, "fast")
    assert len(found.tried) == 2


def test_the_peak_carries_the_name_that_we_gave_the_layer() -> None:
    assert best_of("int8", [timed("Conv_conv_3x3_16_at_8_y_token_3", "int8", 5.0)]).layer == "conv_3x3_16_at_8"


def test_a_layer_that_ran_in_another_precision_is_no_peak_however_fast() -> None:
    mixed = best_of("int8", [timed("a", "fp32", 1.0), timed("b", "int8", 10.0)])
    refused = best_of("int8", [timed("a", "fp32", 1.0), timed("b", "bf16", 1.0)])

    assert (mixed.layer, mixed.gops) == ("b", 200.0)
    assert refused.gops is None
    assert "built for int8 ran in bf16, fp32" in refused.why


def test_a_layer_without_a_time_is_no_division_by_zero() -> None:
    assert best_of("int8", [timed("a", "int8", 0.0)]).gops is None


@dataclass
class FakeDevice:
    """Answers `compile` and `profile` with what the test says; keeps what it was asked."""

    answers: list[Mapping[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    name: str = "fake"
    python: str = "python3"

    def run(self, argv: Sequence[str], *, timeout_s: float = 1.0) -> Completed:
        self.asked.append(argv[3])
        answer: Mapping[str, Any] = {} if argv[3] == "compile" else self.answers.pop(0)
        return Completed(int(answer.get("exit_code", 0)), json.dumps(answer), "")

    def put(self, path: Path) -> str:
        return str(path)

    def get(self, remote: str, path: Path) -> None: ...

    def scratch(self, directory: Path) -> str:
        return str(directory)

    def measuring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def facts(self) -> Mapping[str, Any]:
        return {}


def answer(min_us: float, *, precision: str = "int8", psi_cpu: float | None = 0.0) -> dict[str, Any]:
    return {"layers": [timed("conv", precision, min_us)], "psi_cpu": psi_cpu}


def found(
    device: FakeDevice, cache_dir: Path, *, precision: str = "int8", fresh: bool = False, machine: Machine = MACHINE
) -> Peak:
    return peak_of(machine, precision, device=device, program="p", fresh=fresh, cache_dir=cache_dir)


@pytest.fixture(autouse=True)
def tiny_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peak, "LEVELS", (TINY, TINY, TINY))


def test_larger_layers_are_taken_while_the_largest_is_over_too_soon() -> None:
    device = FakeDevice([answer(2000.0), answer(20_000.0)])

    peak = measure_peak(MACHINE, "int8", device=device, program="p")

    assert device.asked == ["compile", "profile"] * 2
    assert peak.gops == 1.0


def test_the_levels_grow() -> None:
    work = [max(1 if isinstance(one, MatMul) else one.channels**2 * one.side**2 for one in level) for level in LEVELS]
    sizes = [max(one.size for one in level if isinstance(one, MatMul)) for level in LEVELS]

    assert work == sorted(set(work))
    assert sizes == sorted(set(sizes))


def test_larger_layers_that_do_not_fit_leave_the_peak_of_the_smaller_ones() -> None:
    failing = {"error": "out of memory", "exit_code": 5}

    peak = measure_peak(MACHINE, "int8", device=FakeDevice([answer(2000.0), failing]), program="p")

    assert peak.gops == 1.0


def test_a_precision_that_the_target_does_not_offer_is_refused_in_its_own_words(tmp_path: Path) -> None:
    device = FakeDevice([{"error": "precision 'bf16' was asked for", "exit_code": 5}])

    peak = found(device, tmp_path, precision="bf16")

    assert peak.gops is None
    assert "precision 'bf16' was asked for" in peak.why
    assert not list(tmp_path.rglob("*.json"))


def test_a_peak_is_measured_once_and_then_kept_with_when_it_was_measured(tmp_path: Path) -> None:
    device = FakeDevice([answer(20_000.0)])

    first, second = found(device, tmp_path), found(device, tmp_path)

    assert device.asked == ["compile", "profile"]
    assert (first.cached, second.cached) == (False, True)
    assert second == replace(first, cached=True)
    assert second.utc


def test_fresh_measures_anew_and_what_is_kept_is_the_new_one(tmp_path: Path) -> None:
    device = FakeDevice([answer(20_000.0), answer(40_000.0)])
    found(device, tmp_path)

    fresh = found(device, tmp_path, fresh=True)

    assert fresh.gops == 0.05
    assert found(device, tmp_path).gops == 0.05


@pytest.mark.parametrize(
    "changed",
    [
        {"hard_sha256": "b" * 64},
        {"target": "openvino-cpu"},
        {"options": {"num_threads": 2}},
        {"toolchain": "onnxruntime 1.33.0"},
    ],
)
def test_another_machine_target_version_or_thread_count_has_a_peak_of_its_own(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    device = FakeDevice([answer(20_000.0), answer(40_000.0)])
    first = found(device, tmp_path)

    other = found(device, tmp_path, machine=replace(MACHINE, **changed))

    assert other.gops != first.gops


def test_each_precision_has_a_peak_of_its_own(tmp_path: Path) -> None:
    device = FakeDevice([answer(20_000.0), answer(40_000.0, precision="fp32")])

    assert found(device, tmp_path).gops != found(device, tmp_path, precision="fp32").gops


@pytest.mark.parametrize(("second_us", "kept_gops"), [(40_000.0, 0.1), (10_000.0, 0.2)])
def test_of_a_peak_that_was_disturbed_and_its_second_measurement_the_higher_one_stands(
    second_us: float, kept_gops: float, tmp_path: Path
) -> None:
    device = FakeDevice([answer(20_000.0, psi_cpu=60.0), answer(second_us)])
    found(device, tmp_path)

    assert found(device, tmp_path).gops == pytest.approx(kept_gops)
    assert device.answers == []


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"peak": {}}', b'{"peak": {"precision": "int8", "gops": "x", "tried": []}}']
)
def test_a_kept_file_that_is_no_peak_is_measured_over(content: bytes, tmp_path: Path) -> None:
    device = FakeDevice([answer(20_000.0), answer(20_000.0)])
    found(device, tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(content)

    assert found(device, tmp_path).gops == 0.1
    assert json.loads(path.read_text())["peak"]["gops"] == 0.1


def test_a_folder_that_cannot_be_written_costs_no_answer_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    peak = found(FakeDevice([answer(20_000.0)]), tmp_path / "file")

    assert peak.gops == 0.1
    assert "not kept" in peak.note


@pytest.mark.parametrize(
    ("given", "under"),
    [("/somewhere", "/somewhere/edgestill"), ("", "~/.cache/edgestill"), ("relative", "~/.cache/edgestill")],
)
def test_the_cache_is_where_xdg_says(given: str, under: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)

    assert default_cache_dir() == Path(os.path.expanduser(under))  # noqa: PTH111
