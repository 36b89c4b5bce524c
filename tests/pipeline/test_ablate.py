"""The verb: what it trains, that nothing is trained twice, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.ablation.run import ablate_recipe
from pipeline.ablation.steps import AblationSteps, Training
from pipeline.how import How
from pipeline.recipe import DistillConfig, load_recipe
from pipeline.workspace import Workspace
from targets.base import read_json

pytestmark = pytest.mark.integration

Cli = Callable[..., Any]
QUICK = (
    "distill.train.epochs=2",
    "distill.train.batch_size=64",
    "ablation.temperatures=[4]",
    "ablation.kd_weights=[0.9]",
    "ablation.shift=[{corruption: contrast}]",
)
ADAPTIVE = "distill.curriculum={order: easy_first, pacing: adaptive, start_fraction: 0.4, full_at: 1.0, plateau: 1.0}"


def set_of(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@dataclass(frozen=True)
class Ablated:
    """A finished ablation."""

    recipe: Path
    runs: Path
    export: Path
    ended: Any

    @property
    def argv(self) -> list[object]:
        return ["ablate", self.recipe, "--runs", self.runs, "--seeds", "2", *set_of(*QUICK, ADAPTIVE), "--json"]

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ended.out)
        return found

    def trained(self) -> dict[str, int]:
        """When each training ended."""
        return {path.parent.name: path.stat().st_mtime_ns for path in (self.runs / "tiny").glob("abl*/stage.json")}

    def told(self, arm: str, seed: int) -> dict[str, Any]:
        (path,) = (self.runs / "tiny").glob(f"ablate-{arm}-{seed}-????????/distill.json")
        found: dict[str, Any] = read_json(path)
        return found


@pytest.fixture(scope="module")
def ablated(built: Any, edgestill: Cli, tmp_path_factory: pytest.TempPathFactory) -> Ablated:
    """On top of a finished run, through the command line. Look, do not touch."""
    root = tmp_path_factory.mktemp("ablated")
    shutil.copytree(built.runs, root / "runs", symlinks=True)
    before = Ablated(built.recipe, root / "runs", root / "export.json", None)
    ended = edgestill(*before.argv, "--export", before.export)
    return Ablated(before.recipe, before.runs, before.export, ended)


@pytest.fixture
def again(ablated: Ablated, tmp_path: Path) -> Ablated:
    """A copy to change."""
    shutil.copytree(ablated.runs, tmp_path / "runs", symlinks=True)
    return Ablated(ablated.recipe, tmp_path / "runs", tmp_path / "export.json", ablated.ended)


def arms_of(document: dict[str, Any]) -> dict[str, Any]:
    return {arm["name"]: arm for arm in document["arms"]}


# --- what it leaves ----------------------------------------------------------------------------------------------------


def test_every_arm_is_trained_under_every_judged_seed_and_scored_once(ablated: Ablated) -> None:
    arms = arms_of(ablated.document)

    assert ablated.ended.code == 0, ablated.ended.err
    names = ["alone", "kd", "recipe", "random-order", "anti-curriculum", "blind-replay", "samples-off"]
    assert list(arms) == names
    assert arms["samples-off"]["same_as"] == "kd"
    for arm in arms.values():
        assert [one["seed"] for one in arm["seeds"]] == [1, 2]
    trained = [name for name in names if name != "samples-off"]
    labels = {f"ablate-{name}-{seed}" for name in trained for seed in (1, 2)} | {"ablate-recipe-0"}
    scored = {f"ablation-score-{name}-{seed}" for name in trained for seed in (1, 2)} | {"ablation-score-teacher"}
    assert {name[:-9] for name in ablated.trained()} == labels | scored


def test_data_and_teacher_are_those_of_the_run(ablated: Ablated, built: Any) -> None:
    for stage in ("data", "teacher"):
        found = [path.name for path in (ablated.runs / "tiny").glob(f"{stage}-????????")]
        assert found == [built.stage(stage).name]


def test_the_exported_file_holds_every_figure_and_what_was_asked(ablated: Ablated) -> None:
    exported, document = read_json(ablated.export), ablated.document

    assert all(document[key] == exported[key] for key in exported.keys() - {"schema_version"})
    assert read_json(ablated.runs / "tiny" / "ablation.json") == exported
    for arm in exported["arms"]:
        for one in arm["seeds"]:
            told = ablated.told(arm["same_as"] or arm["name"], one["seed"])["rounds"][-1]
            assert one["validation_top1_last"] == told["validation_top1_last"]
            assert {"test_top1", "train_top1", "gap", "ece", "nll", "shift", "agreement"} == one["last"].keys()
    assert exported["recipe"]["ablation"]["seeds"] == 2
    assert exported["tuning"]["tuned"] == {"temperature": 4.0, "kd_weight": 0.9}
    assert exported["data"]["condition"]["train_share"] == 1.0


def test_every_training_took_as_many_epochs_and_the_curricula_saw_fewer_images(ablated: Ablated) -> None:
    arms = arms_of(ablated.document)

    for name in ("alone", "kd", "recipe", "blind-replay"):
        assert len(ablated.told(name, 1)["rounds"][0]["epochs"]) == 2
    seen = {name: arm["seeds"][0]["images_seen"] for name, arm in arms.items()}
    assert seen["alone"] == seen["kd"] == 2 * ablated.document["data"]["num_train"]
    assert seen["recipe"] < seen["kd"]


def test_the_blind_replay_shows_what_the_tuning_seed_showed(ablated: Ablated) -> None:
    log = ablated.told("recipe", 0)["rounds"][-1]["pacing_log"]

    for seed in (1, 2):
        assert ablated.told("blind-replay", seed)["rounds"][-1]["pacing_log"] == pytest.approx(log, abs=1e-3)


def test_a_seed_that_replayed_its_own_schedule_would_be_itself(again: Ablated) -> None:
    recipe = load_recipe(again.recipe, [*QUICK, ADAPTIVE])
    log = again.told("recipe", 1)["rounds"][-1]["pacing_log"]
    assert recipe.distill.curriculum is not None
    replay = recipe.distill.curriculum.model_copy(update={"pacing": "replay", "fractions": tuple(log)})
    config = DistillConfig.model_validate({**dict(recipe.distill), "curriculum": replay})
    do = AblationSteps(recipe, Workspace(again.runs, "tiny", How().progress), How())

    replayed = do.outcome(Training(arm="own-log", seed=1, config=config, scored=False)).student

    (adaptive,) = (again.runs / "tiny").glob("ablate-recipe-1-????????/last.safetensors")
    assert replayed.last_weights_path.read_bytes() == adaptive.read_bytes()


# --- nothing twice -----------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_second_time_nothing_is_trained_and_no_torch_is_imported(again: Ablated) -> None:
    before = again.trained()
    code = (
        "import sys; from pipeline import cli\n"
        f"sys.argv = ['edgestill', *{list(map(str, again.argv))!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('heavy:', sorted({'torch', 'onnx', 'nncf'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert again.trained() == before


def test_more_seeds_and_another_arm_train_only_what_is_new(again: Ablated, edgestill: Cli) -> None:
    before = again.trained()
    argv = ["ablate", again.recipe, "--runs", again.runs, *set_of(*QUICK, ADAPTIVE), "--arms", "hot, random-order"]

    ended = edgestill(*argv, *set_of("ablation.arms={hot: {temperature: 8.0}}"), "--seeds", "3", "--json")

    assert ended.code == 0, ended.err
    new = {name[:-9] for name, when in again.trained().items() if before.get(name) != when}
    stages = {"hot": (1, 2, 3), "random-order": (3,), "kd": (3,)}
    assert new == {
        f"{kind}-{arm}-{seed}"
        for arm, seeds in stages.items()
        for seed in seeds
        for kind in ("ablate", "ablation-score")
    }
    assert list(arms_of(json.loads(ended.out))) == ["kd", "random-order", "hot"]


def test_an_interrupted_ablation_goes_on_where_it_was(
    built: Any, tmp_path: Path, edgestill: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import distill as stage

    shutil.copytree(built.runs, tmp_path / "runs", symlinks=True)
    whole, calls = stage.distill, []

    def interrupted(*args: Any, **more: Any) -> None:
        calls.append(more["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(*args, **more)

    monkeypatch.setattr(stage, "distill", interrupted)
    argv = ["ablate", built.recipe, "--runs", tmp_path / "runs", *set_of(*QUICK), "--seeds", "2", "--arms", "alone"]

    stopped = edgestill(*argv)
    resumed = edgestill(*argv, "--json")

    assert stopped.code == 130
    assert (resumed.code, calls) == (0, [1, 1, 2, 2, 2])
    assert "2 of 4 trainings are finished" in resumed.err


# --- tuning ------------------------------------------------------------------------------------------------------------


def test_plain_kd_is_the_best_of_the_grid_on_validation_and_the_grid_sees_no_test(
    built: Any, tmp_path: Path, edgestill: Cli
) -> None:
    shutil.copytree(built.runs, tmp_path / "runs", symlinks=True)
    grid = set_of("ablation.temperatures=[1, 20]", "ablation.kd_weights=[0.9, 0.05]")
    argv = ["ablate", built.recipe, "--runs", tmp_path / "runs", *set_of(*QUICK), *grid, "--seeds", "2", "--arms", "kd"]

    ended = edgestill(*argv, "--json")

    tuning, (kd,) = json.loads(ended.out)["tuning"], json.loads(ended.out)["arms"]
    best = max(tuning["grid"], key=lambda one: one["validation_top1"])
    assert tuning["tuned"] == {key: best[key] for key in ("temperature", "kd_weight")}
    assert len(tuning["grid"]) == 4
    assert (kd["config"]["temperature"], kd["config"]["kd_weight"]) == (best["temperature"], best["kd_weight"])
    for one in tuning["grid"]:
        (path,) = (tmp_path / "runs" / "tiny").glob(
            f"ablate-kd-t{one['temperature']:g}-w{one['kd_weight']:g}-0-*/distill.json"
        )
        assert read_json(path)["rounds"][-1]["validation_top1_last"] == one["validation_top1"]
    assert not list((tmp_path / "runs" / "tiny").glob("ablation-score-kd-t*"))


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_arm_that_fails_is_named_at_the_end_and_the_others_are_judged(again: Ablated, edgestill: Cli) -> None:
    wrong = "ablation.arms={wrong: {losses: [{name: features, student_layer: nowhere, teacher_layer: fc}], curriculum: null}}"

    ended = edgestill(*again.argv, *set_of(wrong))

    document = json.loads(ended.out)
    assert (ended.code, document["exit_code"]) == (2, 2)
    assert "2 trainings failed, the others are judged. The first, wrong, seed 1: " in ended.err
    assert [one["training"] for one in document["failed"]] == ["wrong, seed 1", "wrong, seed 2"]
    assert arms_of(document)["wrong"]["seeds"] == []
    judged = {one["arm"]: one["verdict"] for one in document["comparisons"]}
    assert judged["wrong"] is None
    assert judged["recipe"]["num_seeds"] == 2


def test_an_arm_that_names_what_is_not_there_fails_by_itself(again: Ablated, edgestill: Cli) -> None:
    wrong = "ablation.arms={wrong: {assistants: [{model: resnet20, checkpoint: nowhere.pt}], curriculum: null}}"

    ended = edgestill(*again.argv, *set_of(wrong))
    planned = edgestill(*again.argv, *set_of(wrong), "--dry-run")

    document = json.loads(ended.out)
    assert ended.code == document["exit_code"] == 2
    assert "nowhere.pt" in ended.err
    assert [one["training"] for one in document["failed"]] == ["wrong, seed 1", "wrong, seed 2"]
    assert arms_of(document)["recipe"]["seeds"]
    assert planned.code == 0


def test_a_dry_run_says_what_is_finished_and_trains_nothing(again: Ablated, edgestill: Cli) -> None:
    before = again.trained()

    whole = edgestill(*again.argv, "--dry-run")
    more = edgestill(*again.argv, "--dry-run", "--seeds", "4")
    untuned = edgestill(*again.argv, "--dry-run", *set_of("ablation.temperatures=[4, 8]"))

    plans = [{one["arm"]: one for one in json.loads(ended.out)["plan"]} for ended in (whole, more, untuned)]
    assert plans[0]["tuning"] == {"arm": "tuning", "num_trainings": 1, "num_finished": 1, "same_as": None}
    assert [plan["recipe"]["num_finished"] for plan in plans] == [2, 2, 2]
    assert [plan["recipe"]["num_trainings"] for plan in plans] == [2, 4, 2]
    assert plans[0]["samples-off"]["same_as"] == "kd"
    assert (plans[2]["tuning"]["num_trainings"], plans[2]["tuning"]["num_finished"]) == (3, 1)
    assert plans[2]["kd"]["num_finished"] == 0
    assert again.trained() == before


def test_nothing_is_finished_before_the_first_run(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    report = ablate_recipe(tiny_recipe(), runs_dir=tmp_path / "runs", dry_run=True)

    assert {one.num_finished for one in report.plan} == {0}
    assert next(one for one in report.plan if one.arm == "tuning").num_trainings == 6


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "1"], "--seeds 1: fewer than two seeds"),
        (["--set", "ablation.seeds=1"], "fewer than two seeds"),
        (["--arms", "random"], "Did you mean 'random-order'?"),
        (["--set", "data.validation=0", "--set", "quantize.method=qat"], "leaves nothing to tune plain KD by"),
        (["--set", "teacher.model='python:own:net'"], "--allow-code"),
        (["--set", "ablation.arms={x: {loss: 'python:own:loss'}}"], "ablation.arms.x.loss=python:own:loss"),
        (
            ["--set", "distill.train=null", "--set", "distill.curriculum=null", "--set", "distill.checkpoint=s"],
            "is null",
        ),
        (["--set", "ablation.shift=[{source: 'npz:none.npz'}]"], "there is no such file"),
        (["--set", "data.source='npz:none.npz'", "--dry-run"], "there is no such file"),
        (["--processes", "0"], "'--processes'"),
        (["--export", "nowhere/a.json"], "--export nowhere/a.json: there is no folder nowhere"),
    ],
)
def test_what_cannot_be_ablated_is_refused_with_what_to_do(
    edgestill: Cli,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    argv: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def net(): ...\ndef loss(): ...\n")

    ended = edgestill("ablate", tiny_recipe(), "--runs", tmp_path / "r", "--set", "teacher.train.epochs=1", *argv)

    assert ended.code == 2
    assert words in ended.err
    assert len(ended.err[ended.err.index("edgestill: ") :].splitlines()) <= 3
