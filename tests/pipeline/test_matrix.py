"""The matrix on a tiny net: the device program runs in this process, and its stop watch is a fake."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.device.__main__ import main
from benchmarks.devices import Completed, Local
from benchmarks.matrix_notes import text as notes
from benchmarks.records import load_records
from pipeline.matrix import MatrixReport, export_results, run_matrix
from pipeline.matrix.recipe import parse_matrix_recipe
from targets.base import read_json
from targets.errors import DataError, RecipeError

pytestmark = pytest.mark.integration

SAMPLES_NS = [1000] * 80
LAUNCHES = 6


@dataclass(frozen=True)
class Fake(Local):
    """Runs the device program here; launches are answered without running anything. `fails` says which command ends badly."""

    asked: list[list[str]] = field(default_factory=list)
    fails: Callable[[list[str]], Completed | None] = lambda argv: None
    disturbed: bool = False

    def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Completed:
        command = list(argv[3:])
        self.asked.append(command)
        if (failure := self.fails(command)) is not None:
            return failure
        if command[0] == "measure":
            np.save(command[command.index("--out") + 1], np.asarray(SAMPLES_NS, dtype=np.int64))
            told = ["other work waited for a CPU"] if self.disturbed else []
            return Completed(0, json.dumps({**LAUNCH, "disturbances": told}), "")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(command)
        return Completed(code, out.getvalue(), "")

    def count(self, command: str) -> int:
        return sum(argv[0] == command for argv in self.asked)


LAUNCH: dict[str, Any] = {
    "load_ms": 50.0,
    "first_ms": 1.0,
    "warmup_s": 0.5,
    "overhead_us": 0.05,
    "n": len(SAMPLES_NS),
    "lat_us": {"min": 1.0, "p25": 1.0, "p50": 1.0, "p90": 1.0, "p99": None, "p999": None, "mean": 1.0, "sd": 0.0},
    "wall_s": 1.0,
    "cpu_s": 1.0,
    "nivcsw": 0,
    "majflt": 0,
    "memory": {"vmhwm_mib": 64.123456789, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None},
    "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
    "telemetry": {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": 0.5},
    "disturbances": [],
    "flags": [],
}


def write_net(path: Path) -> Path:
    """Conv, Relu, Conv, pooling, five classes, on 8 pixels."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "head": (8, 5)}
    weights = [
        numpy_helper.from_array(rng.normal(scale=0.3, size=shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "head"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def recipe_of(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "models": [
            {"name": "one", "model": str(folder / "net.onnx")},
            {"name": "two", "model": str(folder / "net.onnx"), "weights": "random"},
            {"name": "gone", "run": str(folder / "runs" / "gone"), "optional": True},
        ],
        "targets": [{"name": "onnxruntime-cpu"}],
        "precisions": ["fp32", "bf16", "int8"],
        "input": {"resize": 8, "mean": [127.5], "std": [127.5]},
        "calibration": {"images": str(folder / "images"), "samples": 12},
        "bench": {"launches": LAUNCHES},
        **changed,
    }


@dataclass(frozen=True)
class Matrix:
    """A matrix and where it lies; `run` runs it again, on a device of its own."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(
        self, device: Fake | None = None, progress: Any = None, again: bool = False, **changed: Any
    ) -> MatrixReport:
        device = device or Fake()
        self.monkeypatch.setattr("pipeline.workbench.Local", lambda: device)
        self.monkeypatch.setattr("pipeline.matrix.run.Local", lambda: device)
        recipe = parse_matrix_recipe(recipe_of(self.folder, **changed), "tiny")
        return run_matrix(recipe, out_dir=self.out, progress=progress, again=again)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net, twenty images, and the whole matrix of both, run once. Look, do not touch."""
    folder = tmp_path_factory.mktemp("matrix")
    write_net(folder / "net.onnx")
    (folder / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    with pytest.MonkeyPatch.context() as monkeypatch:
        Matrix(folder, monkeypatch).run()
    return folder


@pytest.fixture
def finished(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """A copy to go on with. What was built hangs on contents, not on paths."""
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    return Matrix(tmp_path / "copy", monkeypatch)


def names(rows: Sequence[Any]) -> list[tuple[str, str, int | None]]:
    return [(row.model, row.precision, row.num_threads) for row in rows]


def crash_on(command: str, where: str, completed: Completed) -> Callable[[list[str]], Completed | None]:
    return lambda argv: completed if argv[0] == command and any(re.search(where, word) for word in argv) else None


def test_every_cell_is_a_row_or_has_a_reason(finished: Matrix) -> None:
    report = finished.run()

    assert names(report.rows) == [("one", "fp32", 1), ("one", "int8", 1), ("two", "fp32", 1), ("two", "int8", 1)]
    assert report.failure is None
    assert {(one.model, one.precision): one.reason for one in report.missing if one.model != "gone"} == {
        (model, "bf16"): "onnxruntime-cpu does not offer bf16 here, but fp32" for model in ("one", "two")
    }
    gone = [one for one in report.missing if one.model == "gone"]
    assert [one.precision for one in gone] == ["fp32", "bf16", "int8"]
    assert all("no finished run is there" in one.reason for one in gone)
    assert json.loads((finished.out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))


def test_int8_is_placed_and_asked_on_held_out_images(finished: Matrix) -> None:
    stored = {one.arm: one for one in load_records(finished.out / "models" / "one")}
    int8 = stored["onnxruntime-cpu int8 1 thread"]

    assert list(stored) == ["onnxruntime-cpu fp32 1 thread", "onnxruntime-cpu int8 1 thread"]
    assert int8.placement is not None
    assert int8.placement.int8_share == 1.0
    assert int8.record.accuracy is not None
    assert int8.record.accuracy["metric"] == "agreement"
    assert (int8.record.accuracy["dataset"], int8.record.accuracy["n"]) == ("images, held out", 8)
    assert {one.record.model.name for one in stored.values()} == {"one"}
    assert int8.record.summary.ci95 == (1.0, 1.0)
    assert (int8.directory / int8.record.launches[0].samples_file).is_file()


def test_random_weights_claim_no_accuracy(finished: Matrix) -> None:
    for stored in load_records(finished.out / "models" / "two"):
        assert stored.record.accuracy is None
        assert "accuracy: the weights are random, so it would mean nothing" in stored.record.validity.flags


def test_a_finished_matrix_is_not_measured_again(finished: Matrix) -> None:
    device = Fake()

    report = finished.run(device)

    assert device.asked == []
    assert [note.kept for note in report.models] == [True, True]


@pytest.mark.system
def test_a_finished_matrix_imports_no_torch(finished: Matrix) -> None:
    recipe = finished.folder / "tiny.yaml"
    recipe.write_text(json.dumps(recipe_of(finished.folder)))
    code = (
        "import sys; from pathlib import Path; from pipeline.matrix import run_matrix; "
        "report = run_matrix(Path(sys.argv[1]), out_dir=Path(sys.argv[2])); "
        "sys.exit('torch' in sys.modules or [note.kept for note in report.models] != [True, True])"
    )

    done = subprocess.run([sys.executable, "-c", code, str(recipe), str(finished.out)], check=False)

    assert done.returncode == 0


def test_killed_in_the_middle_it_goes_on_with_the_model_that_was_not_done(finished: Matrix) -> None:
    before = {name: read_json(finished.out / "models" / name / "records.json") for name in ("one", "two")}
    more = {"launches": LAUNCHES + 1}

    def kill(argv: list[str]) -> Completed | None:
        if argv[0] == "measure" and "/work/cells-two" in argv[argv.index("--compiled") + 1]:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        finished.run(Fake(fails=kill), bench=more)
    between = {name: read_json(finished.out / "models" / name / "records.json") for name in ("one", "two")}
    device = Fake()
    report = finished.run(device, bench=more)

    assert between["one"] != before["one"]
    assert between["two"] == before["two"]
    assert sorted(path.name for path in (finished.out / "models").iterdir()) == ["one", "two"]
    assert (device.count("measure"), device.count("compile")) == (2 * (LAUNCHES + 1), 0)
    assert [note.kept for note in report.models] == [True, False]
    assert read_json(finished.out / "models" / "one" / "records.json") == between["one"]


def test_a_longer_measurement_says_what_changed_and_compiles_nothing(finished: Matrix, listening: Any) -> None:
    device = Fake()

    finished.run(device, listening, bench={"launches": LAUNCHES + 1})

    assert f"one: measured again, changed: launches {LAUNCHES} -> {LAUNCHES + 1}" in listening.lines
    assert (device.count("measure"), device.count("compile")) == (4 * (LAUNCHES + 1), 0)
    assert any(line.startswith("4 cells to measure, about ") for line in listening.lines)
    assert any(line.startswith("one: measured; 2 cells remain, about ") for line in listening.lines)
    assert any(line.startswith("two: measured; 0 cells remain, about ") for line in listening.lines)


def test_disturbed_models_are_measured_again_where_asked_and_the_less_disturbed_stay(finished: Matrix) -> None:
    longer = {"launches": LAUNCHES + 1}
    noisy = finished.run(Fake(disturbed=True), bench=longer)
    assert {row.valid for row in noisy.rows} == {False}
    assert "4 of 4 cells: measure these models again with --again" in noisy.text()

    unasked, quiet, later = Fake(), Fake(), Fake(disturbed=True)
    finished.run(unasked, bench=longer)
    report = finished.run(quiet, bench=longer, again=True)
    finished.run(later, bench=longer, again=True)

    assert (unasked.count("measure"), later.count("measure")) == (0, 0)
    assert quiet.count("measure") == 4 * (LAUNCHES + 1)
    assert {row.valid for row in report.rows} == {True}


def test_a_measurement_that_is_no_less_disturbed_replaces_nothing(finished: Matrix) -> None:
    longer = {"launches": LAUNCHES + 1}
    finished.run(Fake(disturbed=True), bench=longer)
    before = read_json(finished.out / "models" / "one" / "records.json")

    finished.run(Fake(disturbed=True), bench=longer, again=True)

    assert read_json(finished.out / "models" / "one" / "records.json") == before


def test_damaged_records_are_measured_again(finished: Matrix) -> None:
    (finished.out / "models" / "one" / "records.json").write_text("{")
    (finished.out / "models" / ".one.partial" / "samples").mkdir(parents=True)  # left by a run that was killed
    device = Fake()

    report = finished.run(device)

    assert device.count("measure") == 2 * LAUNCHES
    assert [note.kept for note in report.models] == [False, True]
    assert sorted(path.name for path in (finished.out / "models").iterdir()) == ["one", "two"]


def test_int8_that_a_runtime_refuses_is_told_and_float_is_measured(finished: Matrix) -> None:
    refused = Completed(5, json.dumps({"error": "QLinearConv is not known", "exit_code": 5}), "")
    quantize = {"method": "ptq"}

    report = finished.run(Fake(fails=crash_on("compile", "^int8$", refused)), quantize=quantize)

    assert names(report.rows) == [("one", "fp32", 1), ("two", "fp32", 1)]
    reasons = [one.reason for one in report.missing if one.precision == "int8" and one.model == "one"]
    assert reasons == ["local: QLinearConv is not known"]
    assert report.failure is None


def test_int8_that_misses_the_placement_gate_is_measured_and_says_so(finished: Matrix) -> None:
    fp32 = {"name": "conv", "op": "Conv", "precision": "fp32", "macs": 10}
    placed = Completed(0, json.dumps({"source": "fake", "layers": [fp32]}), "")

    report = finished.run(Fake(fails=crash_on("placement", "/int8(-1t)?$", placed)), quantize={"method": "ptq"})

    row = next(row for row in report.rows if (row.model, row.precision) == ("one", "int8"))
    assert row.int8_share == 0.0
    assert any(flag.startswith("int8: would not ship, placement: 0 against 0.95") for flag in row.flags)


def test_a_model_that_a_runtime_does_not_survive_leaves_the_others(finished: Matrix) -> None:
    dies = crash_on("measure", r"/models/\.one\.", Completed(-11, "", ""))

    report = finished.run(Fake(fails=dies), bench={"launches": LAUNCHES + 1})

    assert names(report.rows) == [("two", "fp32", 1), ("two", "int8", 1)]
    reasons = [one.reason for one in report.missing if one.model == "one" and one.precision != "bf16"]
    assert len(reasons) == 2
    assert all("killed by signal 11" in reason for reason in reasons)
    assert (report.failure.exit_code if report.failure else 0) == 2


def test_a_runtime_that_is_not_installed_costs_its_own_cells(finished: Matrix) -> None:
    absent = Completed(0, json.dumps({"missing": "pip install openvino", "float_precisions": []}), "")
    targets = [{"name": "openvino-cpu"}, {"name": "onnxruntime-cpu"}]
    device = Fake(fails=crash_on("probe", "openvino-cpu", absent))

    report = finished.run(device, targets=targets)

    assert {row.target for row in report.rows} == {"onnxruntime-cpu"}
    assert [one.reason for one in report.missing if one.target == "openvino-cpu" and one.model == "one"] == [
        "openvino-cpu is not installed on local. Run there: pip install openvino."
    ] * 3
    assert report.failure is None


def test_more_threads_than_cpus_are_told(finished: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})

    report = finished.run(threads=[1, 2], precisions=["fp32"])

    assert {row.num_threads for row in report.rows} == {1}
    assert {one.reason for one in report.missing if one.num_threads == 2 and one.model == "one"} == {
        "2 threads were asked for, this machine gives 1 CPU"
    }


def test_without_images_synthetic_ones_calibrate_and_agreement_is_not_told(finished: Matrix) -> None:
    report = finished.run(calibration={"samples": 8})

    assert names(report.rows) == [("one", "fp32", 1), ("one", "int8", 1), ("two", "fp32", 1), ("two", "int8", 1)]
    assert {row.accuracy is None for row in report.rows} == {True}
    assert "accuracy: synthetic images stand for no data" in report.rows[0].flags


def test_a_model_that_cannot_be_had_is_a_failure_unless_it_is_optional(finished: Matrix) -> None:
    models = recipe_of(finished.folder)["models"]

    report = finished.run(models=[*models, {"name": "lost", "model": "nowhere/lost.onnx"}])

    assert report.failure is not None
    assert report.failure.exit_code == 2
    assert str(report.failure).startswith("lost: no cell was measured. lost: lost: there is no file nowhere/lost.onnx.")
    assert len(report.rows) == 4


def test_the_text_has_a_line_a_row_and_a_line_a_reason(finished: Matrix) -> None:
    lines = finished.run().text().splitlines()

    assert lines[0].split()[:6] == ["model", "runtime", "precision", "threads", "p50", "ms"]
    assert sum(line.startswith(("one  ", "two  ")) for line in lines) == 4
    assert any(
        line.startswith("not measured (2 cells): one onnxruntime-cpu bf16, two onnxruntime-cpu bf16: ")
        for line in lines
    )
    assert any(line.startswith("two: ") and "random weights" in line for line in lines)


def test_exported_results_are_read_back_as_records(finished: Matrix, tmp_path: Path) -> None:
    finished.run()
    told = export_results(finished.out, tmp_path / "hardware.json")

    stored = {one.arm: one.record for one in load_records(tmp_path / "hardware.json")}
    originals = {
        f"{name}, {one.arm}": one.record
        for name in ("one", "two")
        for one in load_records(finished.out / "models" / name)
    }
    assert list(stored) == list(originals)
    for arm, record in stored.items():
        assert record.summary == originals[arm].summary
        assert record.env == originals[arm].env
        assert record.runtime == originals[arm].runtime
        assert (record.accuracy is None) == (originals[arm].accuracy is None)
    assert stored["one, onnxruntime-cpu int8 1 thread"].memory.vmhwm_mib == 64.1235
    assert told == tmp_path / "hardware_models.json"
    assert [one["name"] for one in read_json(told)["models"]] == ["one", "two"]
    assert {one["model"] for one in read_json(told)["missing"]} == {"one", "two", "gone"}


def test_the_notes_of_an_export_name_weights_and_what_is_missing(finished: Matrix, tmp_path: Path) -> None:
    finished.run()
    told = notes(read_json(export_results(finished.out, tmp_path / "hardware.json")))

    assert "| two | " in told
    assert "| 3x8x8 | random weights, BatchNorm statistics from images: no accuracy of it means anything |" in told
    assert (
        "- not measured (3 cells): gone onnxruntime-cpu fp32, gone onnxruntime-cpu bf16, gone onnxruntime-cpu int8: "
        in told
    )


def test_export_refuses_a_directory_without_a_finished_matrix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished matrix is there"):
        export_results(tmp_path, tmp_path / "hardware.json")


def test_what_is_given_beside_the_recipe_is_checked_like_it(finished: Matrix) -> None:
    recipe = parse_matrix_recipe(recipe_of(finished.folder), "tiny")

    with pytest.raises(RecipeError, match=r"bench\.preset='long'"):
        run_matrix(recipe, out_dir=finished.out, preset="long")
