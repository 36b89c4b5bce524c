"""The whole way on real digits: what a run leaves, what a rerun does, what changes and what breaks it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.device.record import validate
from pipeline.artifacts import Artifact
from pipeline.progress import Quiet
from pipeline.recipe import TargetConfig, load_recipe
from pipeline.run import STAGES, RunResult, run_recipe, wanted_of
from pipeline.scheme_choice import own_scheme
from pipeline.workspace import Stopped, Workspace
from targets import make_target
from targets.base import CompiledModel, read_json

TARGET = "onnxruntime-cpu"
SCHEME = own_scheme(make_target(TARGET, {}), here=True)  # this CPU may want weights of 7 bits
HOPS = ("teacher", "student", "preprocessing", "quantized", "onnx", "compiled", "raw bytes")
LABELS = (
    *("bundle-onnxruntime-cpu", "compile-onnxruntime-cpu", "data", "distill", f"export-{SCHEME}-onnxruntime"),
    *("export-student", "export-teacher", "measure-onnxruntime-cpu", f"quantize-{SCHEME}", "report", f"score-{SCHEME}"),
    *(f"score-onnx-{SCHEME}-onnxruntime", "teacher", "verdict-onnxruntime-cpu"),
)


def verdict_of(run: Any) -> dict[str, Any]:
    """The verdict that was written last."""
    newest = max(run.dir.glob("verdict-*/stage.json"), key=lambda path: read_json(path)["utc"])
    verdict: dict[str, Any] = read_json(newest.parent / "verdict.json")
    return verdict


# --- what a run leaves -------------------------------------------------------------------------------------------------


def test_every_stage_is_built_once_and_the_command_ends_well(built: Any) -> None:
    result = json.loads(built.ended.out)

    assert (built.ended.code, result["exit_code"], result["error"], result["stopped"]) == (0, 0, None, None)
    assert sorted(result["built"]) == sorted(LABELS)
    assert "INT8" in result["shipped"][TARGET] or "float" in result["shipped"][TARGET]


def test_the_ledger_has_every_hop_on_the_same_samples(built: Any) -> None:
    rows = {row["hop"]: row for row in verdict_of(built)["ledger"]}
    info = read_json(built.stage("data") / "data.json")

    assert set(HOPS) <= rows.keys()
    assert {row["n"] for name, row in rows.items() if not name.startswith("raw bytes")} == {info["num_test"]}
    assert rows["raw bytes"]["n"] == 64


def test_the_ledgers_accuracies_are_those_of_the_logits_on_disk(built: Any) -> None:
    labels_N = np.load(built.stage("data") / "evaluation" / "y.npy")
    rows = {row["hop"]: row for row in verdict_of(built)["ledger"]}
    logits = {
        "teacher": built.stage(f"score-{SCHEME}") / "teacher.npy",
        "student": built.stage(f"score-{SCHEME}") / "student.npy",
        "quantized": built.stage(f"score-{SCHEME}") / "quantized.npy",
        "onnx": built.stage(f"score-onnx-{SCHEME}-onnxruntime") / "onnx.npy",
        "compiled": built.stage("measure-onnxruntime-cpu") / "logits" / "student-int8" / "logits.npy",
    }

    for hop, path in logits.items():
        assert rows[hop]["top1"] == pytest.approx((np.load(path).argmax(1) == labels_N).mean()), hop
    assert rows["teacher"]["top1"] > 0.5  # it has learned something: the hops below are about a model that works


def test_the_exported_graph_and_the_compiled_one_answer_as_the_quantized_student(built: Any) -> None:
    rows = {row["hop"]: row for row in verdict_of(built)["ledger"]}

    assert rows["onnx"]["agreement_previous"] > 0.97
    assert rows["compiled"]["agreement_previous"] > 0.97
    assert rows["preprocessing"]["max_abs_delta"] < 1e-4  # digits need no geometry: the device's pixels are training's
    assert rows["raw bytes"]["max_abs_delta"] == 0


def test_what_ships_runs_where_the_runtime_says_it_does(built: Any) -> None:
    verdict = verdict_of(built)
    gates = {gate["name"]: gate for gate in verdict["gates"]}

    assert gates["placement"]["value"] == verdict["int8_placement"]["int8_share"] >= 0.95
    assert verdict["shipped"] == ("int8" if all(gate["passed"] for gate in verdict["gates"]) else "fp32")
    assert (verdict["float_reason"] is None) is (verdict["shipped"] == "int8")


def test_every_arm_has_a_valid_record_of_its_own_launches(built: Any) -> None:
    records = read_json(built.stage("measure-onnxruntime-cpu") / "records.json")

    assert set(records) == {"student int8", "student fp32", "teacher fp32"}
    for values in records.values():
        record = validate(values)
        (launch,) = record.launches
        samples_ns = np.load(built.stage("measure-onnxruntime-cpu") / launch.samples_file)
        assert record.summary.p50_us == pytest.approx(np.median(samples_ns) / 1e3)
        assert record.memory.vmhwm_mib is not None


def test_quantization_says_its_rungs_its_controls_and_its_kernels(built: Any) -> None:
    facts = read_json(built.stage(f"quantize-{SCHEME}") / "quantize.json")

    assert [rung["rung"] for rung in facts["rungs"]] == ["ptq", "equalized", "qat"]  # forced, however good PTQ is
    names = ["PTQ only", "FP32 fine-tune of the same length", "QAT without distillation"]
    assert [control["name"] for control in facts["controls"]] == names
    assert facts["controls"][0]["top1_validation"] == facts["rungs"][0]["top1_validation"]
    assert len(facts["controls"][1]["training"]["epochs"]) == len(facts["training"]["epochs"]) == 1
    assert facts["kernels"] == "torch"


def test_the_report_and_the_bundle_stand_where_the_run_says(built: Any) -> None:
    result = json.loads(built.ended.out)
    verdict = verdict_of(built)

    assert Path(result["report"]).read_text().lower().startswith("<!doctype html>")
    assert read_json(built.dir / "report" / "summary.json")["targets"][0]["shipped"] == verdict["shipped"]
    manifest = read_json(Path(result["bundles"][TARGET]) / "manifest.json")
    assert manifest["precision"] == verdict["shipped"]
    assert manifest["golden"]["contains_samples"] is False
    assert CompiledModel.load(Path(result["bundles"][TARGET]) / "model").precision == verdict["shipped"]


def test_the_report_counts_the_time_of_every_stage_before_it(built: Any) -> None:
    stages = [path for path in built.dir.glob("*/stage.json") if not path.parent.is_symlink()]
    before = [read_json(path)["seconds"] for path in stages if not path.parent.name.startswith("report-")]

    assert read_json(built.dir / "report" / "summary.json")["seconds"] == pytest.approx(sum(before))


def test_the_resolved_recipe_is_written_into_the_run(built: Any) -> None:
    assert read_json(built.dir / "recipe.json") == load_recipe(built.recipe).model_dump(mode="json")


def test_no_checkpoint_is_left_of_a_finished_training(built: Any) -> None:
    assert list(built.dir.glob("*/.checkpoint")) == []


# --- verify ------------------------------------------------------------------------------------------------------------


def test_the_bundle_verifies_and_a_flipped_byte_in_any_file_is_found(
    finished: Any, edgestill: Callable[..., Any]
) -> None:
    bundle = finished.stage("bundle-onnxruntime-cpu") / "bundle"
    assert edgestill("verify", bundle).code == 0
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    assert len(files) >= 8

    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x01
        path.write_bytes(content)
        ended = edgestill("verify", bundle)
        content[len(content) // 2] ^= 0x01
        path.write_bytes(content)

        assert ended.code == 5, path
        assert path.name in ended.err or path.name == "manifest.sha256", ended.err
        assert len(ended.err.splitlines()) <= 3

    assert edgestill("verify", bundle).code == 0


# --- again -------------------------------------------------------------------------------------------------------------


def test_a_rerun_builds_nothing_says_so_and_imports_no_torch(finished: Any) -> None:
    code = (
        "import sys; from pipeline import cli\n"
        f"sys.argv = ['edgestill', 'run', {str(finished.recipe)!r}, '--runs', {str(finished.runs)!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print('exit', end.code or 0)\n"
        "print('heavy:', {'torch', 'onnx', 'onnxruntime', 'nncf', 'openvino', 'scipy'} & sys.modules.keys())"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "nothing to do" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["exit 0", "heavy: set()"]
    assert done.stderr == ""


def test_a_changed_key_says_in_one_line_what_changed(finished: Any, edgestill: Callable[..., Any]) -> None:
    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--set", "gate.max_drop=0.5", "--json")

    assert ended.err.splitlines() == [
        "verdict-onnxruntime-cpu: building again, changed: gate.max_drop 0.01 -> 0.5",
        *[line for line in ended.err.splitlines() if line.startswith("bundle-")],
        "report: building again, changed: recipe.gate.max_drop 0.01 -> 0.5; its input",
    ]
    assert (
        {"verdict-onnxruntime-cpu", "report"}
        <= set(json.loads(ended.out)["built"])
        <= {*("verdict-onnxruntime-cpu", "bundle-onnxruntime-cpu", "report")}
    )


@pytest.mark.parametrize("stage", ["verdict", "report"])
def test_force_builds_that_stage_though_nothing_changed(
    finished: Any, edgestill: Callable[..., Any], stage: str
) -> None:
    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--force", stage, "--json")

    assert ended.code == 0
    built = json.loads(ended.out)["built"]
    assert [label for label in built if label.startswith(stage)]
    assert set(built) <= {"verdict-onnxruntime-cpu", "bundle-onnxruntime-cpu", "report"}


def test_dry_run_builds_and_removes_nothing(finished: Any, edgestill: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.dir.rglob("*") if path.name != "recipe.json"}

    for change in (["--force", "teacher"], ["--set", "distill.train.epochs=7"], []):
        ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--dry-run", "--json", *change)
        result = json.loads(ended.out)

        assert (ended.code, result["built"]) == (0, [])
        assert ("would be built" in (result["stopped"] or "")) is bool(change)

    after = {path: path.stat().st_mtime_ns for path in finished.dir.rglob("*") if path.name != "recipe.json"}
    assert {path.name for path in before.keys() ^ after.keys()} == set()


@pytest.mark.parametrize(
    ("stage", "built"),
    [("data", {"data"}), ("teacher", {"data", "teacher"}), ("distill", {"data", "teacher", "distill"})],
)
def test_until_stops_after_its_stage(
    tiny_recipe: Callable[..., Path], edgestill: Callable[..., Any], tmp_path: Path, stage: str, built: set[str]
) -> None:
    ended = edgestill("run", tiny_recipe(), "--runs", tmp_path / "r", "--until", stage, "--json")
    result = json.loads(ended.out)

    assert (ended.code, set(result["built"])) == (0, built)
    assert result["stopped"] == f"stopped after {stage}, as --until says"
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "r" / "tiny").glob("*/")} == built


@pytest.fixture
def in_order(built: Any, tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The labels that a run of two schemes, two targets and a kit comes to, each answered by a finished stage of its kind."""
    portable = {"name": "openvino-cpu", "scheme": "portable"}
    recipe = tiny_recipe(targets=[{"name": TARGET}, portable, {"name": "openvino-cpu", "device": "kit"}])
    asked: list[str] = []

    def build(self: Workspace, kind: Callable[..., Artifact], label: str, *args: Any, **kwargs: Any) -> Artifact:
        stage = label.partition("-")[0]
        if stage in self._beyond:
            raise Stopped("as it was told")
        asked.append(label)
        return kind(
            dir=built.stage(label if stage in ("export", "score") and label in LABELS else found[stage]), digest=""
        )

    found = {label.partition("-")[0]: label for label in LABELS} | {"kit": "data"}
    monkeypatch.setattr(Workspace, "build", build)
    monkeypatch.setattr(Workspace, "publish_all", lambda self, folder, targets: {})

    def labels(until: str | None) -> list[str]:
        asked.clear()
        run_recipe(recipe, runs_dir=built.runs, until=until)
        return sorted(set(asked))

    return labels


@pytest.mark.parametrize("until", [one for one in STAGES if one not in ("assistant", "soft_labels")])
def test_until_finishes_the_stages_up_to_it_of_every_scheme_and_target_and_nothing_behind(
    in_order: Callable[..., list[str]], until: str
) -> None:
    whole = in_order(None)

    found = in_order(until)

    assert {"kit-openvino-cpu-2", "quantize-portable", "measure-openvino-cpu", f"measure-{TARGET}"} <= set(whole)
    wanted = STAGES[: STAGES.index(until) + 1]
    assert found == [label for label in whole if label.partition("-")[0] in wanted]


def test_a_second_run_waits_for_the_first_and_then_finds_everything_done(finished: Any, listening: Any) -> None:
    spoken = threading.Event()

    def say(line: str) -> None:
        listening.lines.append(line)
        spoken.set()

    listening.say = say
    results: list[RunResult] = []
    second = threading.Thread(
        target=lambda: results.append(run_recipe(finished.recipe, runs_dir=finished.runs, progress=listening))
    )

    with (finished.dir / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        assert spoken.wait(20)
        assert results == []
    second.join(20)

    assert listening.lines == [f"another run is at work in {finished.dir}: waiting for it to end"]
    assert results[0].built == ()


@pytest.mark.parametrize("label", ["data", "verdict-onnxruntime-cpu", "report"])
def test_a_flipped_byte_in_a_finished_stage_is_named_and_the_stage_built_again(
    finished: Any, edgestill: Callable[..., Any], label: str
) -> None:
    path = max(
        (p for p in finished.stage(label).rglob("*.*") if p.is_file() and p.name != "stage.json"), key=os.path.getsize
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

    assert ended.code == 0
    assert f"{label}: {path} has changed since it was written. Built again." in ended.err
    assert label in json.loads(ended.out)["built"]
    assert edgestill("run", finished.recipe, "--runs", finished.runs, "--json").err == ""
    if label == "data":  # the same bytes come out: nothing that follows was built again
        assert path.read_bytes() == whole
        assert json.loads(ended.out)["built"] == ["data"]


def test_a_half_written_stage_is_built_again(finished: Any, edgestill: Callable[..., Any]) -> None:
    stage = finished.stage("report")
    (stage / "stage.json").unlink()
    (stage / "index.html").write_text("<!doctype html><half")
    (stage / "foreign.txt").write_text("left by a killed process")

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

    assert json.loads(ended.out)["built"] == ["report"]
    assert not (stage / "foreign.txt").exists()
    assert "</html>" in (stage / "index.html").read_text()


def built_in(directory: Path) -> tuple[str, list[str]]:
    """A stage of one file: its digest, and what had to be built."""
    workspace = Workspace(directory, "r", Quiet())
    config: dict[str, object] = {"epochs": 3}
    artifact = workspace.build(
        Artifact, "teacher", config, ["a"], lambda out: (out / "w").write_text("x"), module="pipeline.gates"
    )
    return artifact.digest, workspace.built


@pytest.mark.parametrize("key", ["key", "digest", "files", "seconds"])
def test_a_stages_description_without_a_part_that_is_read_is_built_again(tmp_path: Path, key: str) -> None:
    digest, _ = built_in(tmp_path)
    (path,) = tmp_path.glob("r/teacher-*/stage.json")
    path.write_text(path.read_text().replace(f'"{key}"', f'"{key}_"', 1))

    assert built_in(tmp_path) == (digest, ["teacher"])


@given(position=st.floats(0, 0.9999), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_a_stages_description_changes_nothing_or_builds_it_again(
    tmp_path: Path, position: float, bit: int
) -> None:
    digest, _ = built_in(tmp_path)
    (path,) = tmp_path.glob("r/teacher-*/stage.json")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)

    again, _ = built_in(tmp_path)

    assert again == digest
    assert built_in(tmp_path) == (digest, [])


def test_targets_that_share_a_scheme_share_one_quantized_student_and_keep_names_of_their_own() -> None:
    targets = [
        TargetConfig(name="openvino-cpu"),
        TargetConfig(name="onnxruntime-cpu"),
        TargetConfig(name="onnxruntime-cpu", options={"num_threads": 2}),
    ]

    wanted = wanted_of(targets)

    assert {one.scheme for one in wanted} == {SCHEME}
    assert [one.name for one in wanted] == ["openvino-cpu", "onnxruntime-cpu", "onnxruntime-cpu-2"]
