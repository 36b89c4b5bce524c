from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.matrix.recipe import parse_matrix_recipe
from pipeline.matrix.steps import Steps
from pipeline.matrix.students import find_student
from pipeline.progress import Quiet
from pipeline.scheme_choice import own_scheme
from pipeline.workspace import Workspace
from targets import make_target
from targets.base import CompiledModel, read_json
from targets.errors import ModelError

pytestmark = pytest.mark.usefixtures("near")


def test_the_student_of_a_finished_run_is_found_with_its_graphs_and_its_accuracy(built: Any) -> None:
    student = find_student(built.dir)

    (row,) = [row for row in _rows(built.dir) if (row["role"], row["precision"]) == ("student", "int8")]
    assert student.model == "resnet8"
    assert student.image == (1, 8, 8)
    assert student.floats.dir == built.stage("export-student")
    assert list(student.int8) == ["onnxruntime-cpu"]
    assert student.int8["onnxruntime-cpu"].exported.scheme == own_scheme(make_target("onnxruntime-cpu", {}), here=True)
    accuracy = student.accuracies["onnxruntime-cpu"]["int8"]
    assert (accuracy["metric"], accuracy["value"], accuracy["dataset"]) == ("top-1", row["top1"], "digits, test split")
    assert accuracy["ci95"][0] <= accuracy["value"] <= accuracy["ci95"][1]
    assert set(student.accuracies["onnxruntime-cpu"]) == {"int8", "fp32"}


def test_a_later_unfinished_export_is_not_taken(finished: Any) -> None:
    original = finished.stage("export-student")
    later = original.with_name("export-student-ffffffff")
    shutil.copytree(original, later)
    stage = {**read_json(later / "stage.json"), "digest": "another", "utc": "2999-01-01T00:00:00+00:00"}
    (later / "stage.json").write_text(json.dumps(stage))

    assert find_student(finished.dir).floats.dir == original


def test_a_run_that_is_not_there_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no finished run is there\. Run its recipe first: edgestill run RECIPE"):
        find_student(tmp_path / "runs" / "gone")


def test_a_run_whose_stages_were_deleted_is_no_whole_run(finished: Any) -> None:
    shutil.rmtree(finished.stage("compile-onnxruntime-cpu"))

    with pytest.raises(ModelError, match="is no whole run: a stage that the report was made from is gone"):
        find_student(finished.dir)


def test_a_student_is_compiled_as_it_is_and_brings_its_accuracy(built: Any, tmp_path: Path) -> None:
    entry = {"name": "digits", "run": str(built.dir)}
    targets = [{"name": "onnxruntime-cpu"}, {"name": "openvino-cpu"}]
    raw = {"name": "m", "models": [entry], "targets": targets, "precisions": ["fp32", "int8"]}
    recipe = parse_matrix_recipe(raw, "m.yaml")
    workspace = Workspace(tmp_path, "work", Quiet())
    steps = Steps(recipe=recipe, workspace=workspace, progress=Quiet(), offline=True)

    prepared = steps.prepare(recipe.models[0])

    accuracies = find_student(built.dir).accuracies["onnxruntime-cpu"]
    compiled = {cell.arm: (cell, CompiledModel.load(path)) for cell, path in prepared.compiled}
    assert prepared.image == "1x8x8"
    assert list(compiled) == [
        "onnxruntime-cpu fp32 1 thread",
        "onnxruntime-cpu int8 1 thread",
        "openvino-cpu fp32 1 thread",
    ]
    assert {model.name for _, model in compiled.values()} == {"digits"}
    int8, _ = compiled["onnxruntime-cpu int8 1 thread"]
    assert int8.placement is not None
    assert int8.placement.int8_share == 1.0
    assert int8.accuracy == accuracies["int8"]
    fp32, _ = compiled["openvino-cpu fp32 1 thread"]
    assert (fp32.accuracy, fp32.flags) == (None, ("accuracy: the run did not ask it on openvino-cpu",))
    assert [cell.error for cell in prepared.missing] == [f"{built.dir} made no INT8 student for openvino-cpu"]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(run_dir / "report" / "summary.json")["targets"][0]["rows"]
    return rows
