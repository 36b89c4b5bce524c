"""The first run of a kit: once through the packed program as a board runs it, and its decisions on answers that are made up."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.device.first_run import first_run
from benchmarks.pack import pack_device_program
from targets import make_target
from targets.base import Exported, write_json
from targets.errors import (
    EdgestillError,
    GateError,
    IntegrityError,
    MeasurementError,
    RecipeError,
    TargetError,
)

NUM_SAMPLES, NUM_CLASSES = 7, 3
MakeKit = Callable[..., Path]


def quantized_linear(directory: Path, exported: Exported) -> Exported:
    """The linear model of the fixtures with quantized pixels and weights; a ReLU and its quantizer make ORT run it in INT8."""
    floats = onnx.load(exported.model_path)
    (weights,) = (numpy_helper.to_array(one) for one in floats.graph.initializer)
    step = np.float32(np.abs(weights).max() / 127)
    constants = {
        "weights_q": np.round(weights / step).astype(np.int8),
        "w_step": step,
        "x_step": np.float32(1.0),
        "y_step": np.float32(16.0),
        "u8": np.uint8(0),
        "y_zero": np.uint8(128),
        "i8": np.int8(0),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["flat"]),
        node("QuantizeLinear", ["flat", "x_step", "u8"], ["flat_q"]),
        node("DequantizeLinear", ["flat_q", "x_step", "u8"], ["x"]),
        node("DequantizeLinear", ["weights_q", "w_step", "i8"], ["w"]),
        node("MatMul", ["x", "w"], ["y"], name="head"),
        node("QuantizeLinear", ["y", "y_step", "y_zero"], ["y_q"]),
        node("DequantizeLinear", ["y_q", "y_step", "y_zero"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        list(floats.graph.input),
        list(floats.graph.output),
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    directory.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), directory / "model.onnx"
    )
    described = dataclasses.replace(exported, scheme="cpu-int8", dialect="onnxruntime", directory=directory)
    described.save()
    return described


@pytest.fixture
def make_kit(exported: Exported, evaluation_dir: Path, tmp_path: Path) -> MakeKit:
    """Write a kit; keywords replace keys of kit.json, `expected` and `evaluation` leave parts away or change them."""

    def make(*, expected: Any = None, evaluation: bool = True, **changed: Any) -> Path:
        kit = tmp_path / "kit"
        kit.mkdir()
        quantized_linear(kit / "int8", exported)
        (kit / "float").mkdir()
        (kit / "float" / "model.onnx").write_bytes(exported.model_path.read_bytes())
        dataclasses.replace(exported, directory=kit / "float").save()
        if evaluation:
            (kit / "evaluation").symlink_to(evaluation_dir)
        if expected is not None:
            write_json(kit / "expected.json", expected)
        values = {"schema_version": 1, "name": "linear", "target": "onnxruntime-cpu", "options": {}, **changed}
        write_json(kit / "kit.json", values)
        return kit

    return make


def launch(p25_us: float, disturbances: Sequence[str] = ()) -> dict[str, Any]:
    """What a launch of the program answers."""
    latency = {"min": p25_us, "p25": p25_us, "p50": p25_us * 1.1, "p90": None, "p99": None, "p999": None}
    return {
        "n": 100,
        "load_ms": 5.0,
        "first_ms": 1.0,
        "lat_us": {**latency, "mean": p25_us, "sd": 0.0},
        "warmup_s": 0.5,
        "wall_s": 1.0,
        "cpu_s": 1.0,
        "nivcsw": 0,
        "majflt": 0,
        "overhead_us": 0.1,
        "memory": dict.fromkeys(("vmhwm_mib", "baseline_mib", "pss_mib", "cgroup_peak_mib")),
        "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
        "telemetry": dict.fromkeys(("temp_c", "clk_mhz", "throttle_delta", "psi_cpu")),
        "disturbances": list(disturbances),
        "flags": [],
    }


class Board:
    """A device whose compiles are real and whose other answers are told; `wrong` maps (command, precision) to an error."""

    def __init__(self, **told: Any) -> None:
        self.told = told
        self.wrong: dict[tuple[str, str], EdgestillError] = {}
        self.asked: list[list[str]] = []
        self.int8_share = 1.0
        self.p25_us = {"int8": 100.0, "fp32": 250.0}
        self.disturbed: tuple[str, ...] = ()
        self.right = {"int8": 6, "fp32": 7}  # of NUM_SAMPLES

    def __call__(self, argv: Sequence[str]) -> dict[str, Any]:
        self.asked.append(list(argv))
        command, rest = argv[0], dict(zip(argv[1::2], argv[2::2], strict=True))
        precision = rest.get("--precision") or Path(rest.get("--compiled", "none")).name
        if error := self.wrong.get((command, precision)):
            raise error
        answer: dict[str, Any] = getattr(self, command)(rest, precision)
        return answer

    def environment(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        return {"hard": {"arch": "aarch64", "soc": "a board"}, "soft": {"temp_c": 40.0}, "hard_sha256": "", "flags": []}

    def probe(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        return {"missing": self.told.get("missing"), "float_precisions": ["fp32"], "scheme": "s", "dialect": "d"}

    def compile(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        target = make_target(rest["--target"], json.loads(rest["--options"]))
        target.compile(Exported.load(Path(rest["--exported"])), Path(rest["--out"]), precision)
        return {}

    def placement(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        return {"source": "told", "int8_share": self.int8_share if precision == "int8" else 0.0, "layers": []}

    def evaluate(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        # Answers 0, and 1 for the samples that shall be wrong: the labels of the fixture are all 0.
        classes = (np.arange(NUM_SAMPLES) >= self.right[precision]).astype(int)
        Path(rest["--out"]).mkdir(parents=True)
        np.save(Path(rest["--out"]) / "logits.npy", np.eye(NUM_CLASSES)[classes])
        return {"outputs": {"logits": "logits.npy"}, "num_samples": NUM_SAMPLES, "batch": 1}

    def measure(self, rest: dict[str, str], precision: str) -> dict[str, Any]:
        return launch(self.p25_us[precision], self.disturbed)


@pytest.fixture
def lines() -> list[str]:
    return []


def result_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def check(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in result["checks"] if one["check"] == name)


@pytest.mark.system
def test_the_packed_program_tries_a_kit_with_one_command(make_kit: MakeKit, tmp_path: Path) -> None:
    program, out = pack_device_program(tmp_path / "edgestill-device.pyz"), tmp_path / "result.json"
    kit = make_kit(expected={"metric": "agreement", "value": 1.0, "n": 7, "tolerance": 0.3}, min_int8_share=0.5)

    done = subprocess.run(
        [sys.executable, "-I", program, "first-run", kit, "--out", out, "--launches", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"] == str(out)
    result = result_of(out)
    assert [arm["precision"] for arm in result["arms"]] == ["int8", "fp32"]
    assert [len(arm["launches"]) for arm in result["arms"]] == [1, 1]
    assert {arm["compiled"]["toolchain"].split()[0] for arm in result["arms"]} == {"onnxruntime"}
    assert result["arms"][0]["placement"]["int8_share"] == 1.0
    assert result["accuracy"]["agreement_with"] == "fp32"
    assert [one["check"] for one in result["checks"]] == ["compile", "placement", "accuracy", "measurement", "speed"]
    assert "linear with onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edgestill-device.pyz", "kit", "result.json"]


def test_a_good_run_says_so_and_how_much_faster_int8_is(make_kit: MakeKit, tmp_path: Path, lines: list[str]) -> None:
    kit = make_kit(expected={"metric": "top1", "value": 6 / 7, "n": 7, "tolerance": 0.01})

    answer = first_run(kit, tmp_path / "result.json", ask=Board(), say=lines.append)

    result = result_of(tmp_path / "result.json")
    assert answer["checks"] == result["checks"]
    assert result["exit_code"] == 0
    assert [one["passed"] for one in result["checks"]] == [True] * 5
    assert result["speed"]["ratio"] == 2.5
    assert result["accuracy"]["top1"] == {"int8": 6 / 7, "fp32": 1.0}
    assert result["accuracy"]["agreement"] == 6 / 7
    assert "  int8  p50 0.110 ms, INT8 share 100.0%, top-1 85.71%" in "\n".join(lines)
    assert "INT8 is 2.50x as fast as fp32 (ratio of median p25 over 3 interleaved launches, no test)" in lines[-2]
    assert lines[-1].startswith("result: ")


def test_launches_are_interleaved_and_know_the_temperature_at_the_start(make_kit: MakeKit, tmp_path: Path) -> None:
    board = Board()

    first_run(make_kit(), tmp_path / "result.json", ask=board, say=lambda line: None)

    measured = [argv for argv in board.asked if argv[0] == "measure"]
    arms = [Path(argv[argv.index("--compiled") + 1]).name for argv in measured]
    assert [sorted(arms[i : i + 2]) for i in (0, 2, 4)] == [["fp32", "int8"]] * 3
    assert all(argv[argv.index("--start-temp-c") + 1] == "40.0" for argv in measured)
    launches = [one for arm in result_of(tmp_path / "result.json")["arms"] for one in arm["launches"]]
    assert sorted(one["order"] for one in launches) == list(range(6))


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("placement", {"int8_share": 0.4}, TargetError, "40.0% of the multiply-accumulates run in INT8, 95% are asked"),
        ("accuracy", {"right": {"int8": 3, "fp32": 7}}, GateError, "top1 0.4286, expected 0.8571 within 0.01, n=7"),
    ],
)
def test_a_check_that_fails_decides_the_exit_code_after_the_result_is_written(
    name: str, change: dict[str, Any], error: type[EdgestillError], said: str, make_kit: MakeKit, tmp_path: Path
) -> None:
    kit = make_kit(expected={"metric": "top1", "value": 6 / 7, "n": 7, "tolerance": 0.01})
    board = Board()
    vars(board).update(change)

    with pytest.raises(error, match="was written all the same") as failure:
        first_run(kit, tmp_path / "result.json", ask=board, say=lambda line: None)

    result = result_of(tmp_path / "result.json")
    assert said in str(failure.value)
    assert check(result, name)["passed"] is False
    assert result["exit_code"] == error.exit_code


def test_a_slower_int8_is_told_and_is_no_failure(make_kit: MakeKit, tmp_path: Path, lines: list[str]) -> None:
    board = Board()
    board.p25_us = {"int8": 500.0, "fp32": 250.0}

    first_run(make_kit(), tmp_path / "result.json", ask=board, say=lines.append)

    assert check(result_of(tmp_path / "result.json"), "speed")["passed"] is False
    assert "speed: slower: INT8 is 0.50x as fast as fp32" in "\n".join(lines)


def test_a_higher_accuracy_passes_but_is_questioned(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(expected={"metric": "top1", "value": 0.5, "n": 7, "tolerance": 0.01})

    first_run(kit, tmp_path / "result.json", ask=Board(), say=lambda line: None)

    accuracy = check(result_of(tmp_path / "result.json"), "accuracy")
    assert accuracy["passed"] is True
    assert "are these the same samples?" in accuracy["detail"]


def test_another_number_of_samples_than_expected_is_a_failure(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(expected={"metric": "top1", "value": 6 / 7, "n": 1000, "tolerance": 0.01})

    with pytest.raises(GateError, match="n=7, but for n=1000"):
        first_run(kit, tmp_path / "result.json", ask=Board(), say=lambda line: None)


def test_agreement_is_with_the_float_engine_on_the_same_device(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(expected={"metric": "agreement", "value": 1.0, "n": 7, "tolerance": 0.0})
    board = Board()
    board.right = {"int8": 3, "fp32": 3}

    first_run(kit, tmp_path / "result.json", ask=board, say=lambda line: None)

    assert check(result_of(tmp_path / "result.json"), "accuracy")["passed"] is True


def test_without_samples_accuracy_is_not_asked(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(evaluation=False, expected={"metric": "top1", "value": 1.0, "n": 7, "tolerance": 0.0})
    board = Board()

    first_run(kit, tmp_path / "result.json", ask=board, say=lambda line: None)

    assert check(result_of(tmp_path / "result.json"), "accuracy")["passed"] is None
    assert not any("--evaluation" in argv or argv[0] == "evaluate" for argv in board.asked)


def test_what_int8_cannot_build_is_reported_and_the_float_is_still_measured(make_kit: MakeKit, tmp_path: Path) -> None:
    board = Board()
    board.wrong = {("compile", "int8"): TargetError("node 3 'q' (QuantizeLinear): not symmetric")}

    with pytest.raises(TargetError, match="not built int8: node 3 'q'"):
        first_run(make_kit(), tmp_path / "result.json", ask=board, say=lambda line: None)

    int8, float_ = result_of(tmp_path / "result.json")["arms"]
    assert int8["errors"] == [
        {"step": "compile", "message": "node 3 'q' (QuantizeLinear): not symmetric", "exit_code": 5}
    ]
    assert int8["latency"] is None
    assert float_["latency"]["p25_us"] == 250.0


def test_the_devices_own_sentence_ends_once(make_kit: MakeKit, tmp_path: Path) -> None:
    board = Board()
    board.wrong = {("compile", "int8"): TargetError("it is a float graph. Take that.")}

    with pytest.raises(TargetError, match=r"Take that\. \S*result\.json was written all the same"):
        first_run(make_kit(), tmp_path / "result.json", ask=board, say=lambda line: None)


def test_a_placement_that_cannot_be_told_keeps_the_runtimes_own_words(make_kit: MakeKit, tmp_path: Path) -> None:
    board = Board()
    board.wrong = {("placement", "int8"): TargetError("'conv' is named by no layer")}

    with pytest.raises(TargetError, match="placement: 'conv' is named by no layer"):
        first_run(make_kit(), tmp_path / "result.json", ask=board, say=lambda line: None)

    int8 = result_of(tmp_path / "result.json")["arms"][0]
    assert "details" in int8
    assert int8["latency"] is not None


def test_a_launch_that_fails_ends_its_arm_with_exit_7(make_kit: MakeKit, tmp_path: Path) -> None:
    board = Board()
    board.wrong = {("measure", "int8"): TargetError("cudaGraphLaunch failed: out of memory")}

    with pytest.raises(MeasurementError, match="int8: cudaGraphLaunch failed"):
        first_run(make_kit(), tmp_path / "result.json", ask=board, say=lambda line: None)

    measured = [Path(argv[2]).name for argv in board.asked if argv[0] == "measure"]
    assert sorted(measured) == ["fp32", "fp32", "fp32", "int8"]


def test_disturbance_fails_a_preset_that_claims_trust_and_not_smoke(make_kit: MakeKit, tmp_path: Path) -> None:
    kit, board = make_kit(), Board()
    board.disturbed = ("other work waited for a CPU in 40.0 % of the time",)

    first_run(kit, tmp_path / "smoke.json", ask=board, say=lambda line: None)
    with pytest.raises(MeasurementError, match="disturbed: int8, fp32"):
        first_run(kit, tmp_path / "ci.json", preset="ci", launches=2, ask=board, say=lambda line: None)

    assert "claims nothing" in check(result_of(tmp_path / "smoke.json"), "measurement")["detail"]


def test_the_kit_may_name_its_floats_and_a_failing_one_is_no_failure(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit(float=["fp32", "fp16"])

    first_run(kit, tmp_path / "result.json", ask=Board(), say=lambda line: None)

    result = result_of(tmp_path / "result.json")
    assert [arm["precision"] for arm in result["arms"]] == ["int8", "fp32", "fp16"]
    assert "precision 'fp16' was asked for" in check(result, "compile")["detail"]


def test_an_absent_runtime_is_told_and_nothing_is_written(make_kit: MakeKit, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Run: pip install tensorrt-cu13"):
        first_run(
            make_kit(), tmp_path / "result.json", ask=Board(missing="pip install tensorrt-cu13"), say=lambda line: None
        )

    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit"]


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"schema_version": 2}, IntegrityError, "no kit of schema 1"),
        ({"target": "tensort"}, RecipeError, "Did you mean 'tensorrt'"),
        ({"options": {"fast": True}}, RecipeError, "option 'fast'"),
        ({"options": 3}, IntegrityError, "cannot be used"),
        ({"min_int8_share": "all"}, IntegrityError, "cannot be used"),
        ({"expected": {"metric": "mAP", "value": 1, "n": 1, "tolerance": 0}}, IntegrityError, "needs metric"),
        ({"expected": {"metric": "top1", "value": 1}}, IntegrityError, "needs metric"),
        ({"expected": []}, IntegrityError, "needs metric"),
    ],
)
def test_a_kit_that_cannot_be_tried_is_refused_before_anything_runs(
    changed: dict[str, Any], error: type[EdgestillError], said: str, make_kit: MakeKit, tmp_path: Path
) -> None:
    board = Board()

    with pytest.raises(error, match=said):
        first_run(make_kit(**changed), tmp_path / "result.json", ask=board, say=lambda line: None)

    assert board.asked == []


def test_a_damaged_part_is_named(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit()
    (kit / "int8" / "exported.json").write_text("{")

    with pytest.raises(IntegrityError, match=r"int8/exported\.json"):
        first_run(kit, tmp_path / "result.json", ask=Board(), say=lambda line: None)


def test_a_place_that_is_not_there_or_not_empty_is_refused(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = make_kit()

    with pytest.raises(RecipeError, match="Make it first"):
        first_run(kit, tmp_path / "absent" / "result.json", ask=Board())
    with pytest.raises(RecipeError, match="is not empty"):
        first_run(kit, tmp_path / "result.json", work_dir=kit, ask=Board())


def test_work_is_kept_where_a_directory_is_named(make_kit: MakeKit, tmp_path: Path) -> None:
    first_run(make_kit(), tmp_path / "result.json", work_dir=tmp_path / "work", ask=Board(), say=lambda line: None)

    assert (tmp_path / "work" / "compiled" / "int8" / "compiled.json").is_file()
    assert (tmp_path / "work" / "answers" / "fp32" / "logits.npy").is_file()
