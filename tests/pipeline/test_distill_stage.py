"""Teachers, assistants and losses of a recipe through the stages, and what is refused, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.recipe import AssistantConfig, DataConfig, DistillConfig, ModelConfig, TeacherConfig, parse_recipe
from pipeline.run import run_recipe
from pipeline.stages.data import prepare_data
from pipeline.stages.distill import distill, train_assistant
from pipeline.stages.teacher import train_teacher, trajectory_epochs
from targets.base import read_json
from targets.errors import DataError, RecipeError

pytestmark = pytest.mark.integration

TINY: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
LARGER: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 8, 8, 16]}}
SMALLER: dict[str, Any] = {"model": "resnet8", "args": {"widths": [2, 2, 4, 4]}}
ONE_EPOCH: dict[str, Any] = {"epochs": 1, "precision": "fp32", "batch_size": 256}
RECIPE: dict[str, Any] = {
    "name": "r",
    "data": {"source": "digits"},
    "teacher": {"model": "resnet20"},
    "distill": {"model": "resnet8"},
    "targets": [{"name": "onnxruntime-cpu"}],
}


@pytest.fixture
def data(built: Any) -> PreparedData:
    return PreparedData(built.stage("data"), "")


@pytest.fixture
def teacher(built: Any) -> TrainedModel:
    return TrainedModel(built.stage("teacher"), "", "teacher")


def distilled(config: DistillConfig, data: PreparedData, teacher: TrainedModel, directory: Path) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    distill(config, data, teacher, directory, How())
    document: dict[str, Any] = read_json(directory / "distill.json")
    return document


# --- the teacher's own way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "keep", "expected"), [(10, 0, []), (10, 1, [5]), (9, 2, [3, 6]), (4, 3, [1, 2, 3])])
def test_checkpoints_are_evenly_spaced_before_the_last_epoch(epochs: int, keep: int, expected: list[int]) -> None:
    config = TeacherConfig(model="m", train={"epochs": epochs}, keep_checkpoints=keep)

    assert trajectory_epochs(config) == expected


def test_the_teachers_way_is_kept_and_teaches_the_student(data: PreparedData, tmp_path: Path) -> None:
    training = {"epochs": 4, "lr": 0.1, "precision": "fp32", "batch_size": 32}
    (tmp_path / "teacher").mkdir()
    train_teacher(TeacherConfig(**TINY, train=training, keep_checkpoints=2), data, tmp_path / "teacher", How())
    teacher = TrainedModel(tmp_path / "teacher", "", "teacher")
    config = DistillConfig(**TINY, train={**ONE_EPOCH, "epochs": 4}, teacher_curriculum={"full_at": 1.0})

    (only,) = distilled(config, data, teacher, tmp_path / "student")["rounds"]

    assert [one["epoch"] for one in teacher.info["trajectory"]] == [1, 3]
    assert len({(tmp_path / "teacher" / one["file"]).read_bytes() for one in teacher.info["trajectory"]}) == 2
    assert [epoch["taught_by"] for epoch in only["epochs"]] == ["epoch-0001"] * 2 + ["epoch-0003"] * 2
    # Afterwards the teacher is the finished one again: its errors on validation are those of its own score.
    told = only["teacher_wrong"]
    errors = round((1 - teacher.info["top1_validation"]) * told["num_validation"])
    assert told["on_validation"]["num_wrong"] == errors


def test_a_teacher_without_checkpoints_of_its_way_is_refused(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"kept no checkpoints.*teacher\.keep_checkpoints"):
        distill(DistillConfig(**TINY, train=ONE_EPOCH, teacher_curriculum={}), data, teacher, tmp_path, How())


# --- assistants --------------------------------------------------------------------------------------------------------


def test_an_assistant_smaller_than_the_student_is_refused_before_it_is_trained(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    assistant = AssistantConfig(**SMALLER, train=ONE_EPOCH)

    with pytest.raises(
        RecipeError, match=r"resnet8 has [\d,]+ parameters, fewer than the [\d,]+ of the student"
    ) as refused:
        train_assistant(assistant, ModelConfig(**TINY), data, teacher, tmp_path, How())

    assert len(str(refused.value).splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_student_that_outgrew_its_assistant_is_refused(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    distilled(DistillConfig(**SMALLER, train=ONE_EPOCH), data, teacher, tmp_path / "assistant")
    assistant = TrainedModel(tmp_path / "assistant", "", "distill")

    with pytest.raises(RecipeError, match="fewer than"):
        distilled(DistillConfig(**TINY, train=ONE_EPOCH), data, assistant, tmp_path / "student")


def test_a_chain_of_assistants_runs_once_and_each_link_is_a_finished_stage(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    assistants = [{**LARGER, "train": ONE_EPOCH, "kd_weight": 0.5}, {**TINY, "train": ONE_EPOCH}]
    teacher = {"model": "resnet8", "args": {"widths": [4, 8, 16, 16]}, "train": {"epochs": 3, "batch_size": 32}}
    student = {**TINY, "train": ONE_EPOCH, "assistants": assistants}
    data = {"source": "digits", "augment": {"crop": 0}}
    path.write_text(yaml.safe_dump({**RECIPE, "data": data, "teacher": teacher, "distill": student}))

    first = run_recipe(path, runs_dir=tmp_path / "runs", until="distill")
    again = run_recipe(path, runs_dir=tmp_path / "runs", until="distill")
    fewer = run_recipe(
        path, runs_dir=tmp_path / "runs", until="distill", overrides=["distill.assistants.1.kd_weight=0.8"]
    )

    assert first.built == ("data", "teacher", "assistant-1", "assistant-2", "distill")
    assert again.built == ()
    assert fewer.built == ("assistant-2", "distill")


# --- losses ------------------------------------------------------------------------------------------------------------


def test_a_feature_loss_on_named_layers_trains_a_student(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    losses = [
        {"name": "dkd"},
        {"name": "features", "weight": 0.5, "student_layer": "layer2", "teacher_layer": "layer3"},
    ]

    (only,) = distilled(DistillConfig(**LARGER, train=ONE_EPOCH, losses=losses), data, teacher, tmp_path / "s")[
        "rounds"
    ]

    assert np.isfinite(only["epochs"][0]["loss"])


def test_a_layer_that_the_student_lacks_is_refused_with_those_it_has(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    losses = [{"name": "features", "student_layer": "layer9", "teacher_layer": "layer3"}]

    with pytest.raises(RecipeError, match=r"student_layer=layer9.*\n.*conv1, bn1, relu, layer1, layer1\.0"):
        distill(DistillConfig(**TINY, train=ONE_EPOCH, losses=losses), data, teacher, tmp_path, How())


def test_what_is_done_about_the_teachers_errors_is_counted(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    config = DistillConfig(**TINY, train=ONE_EPOCH, teacher_wrong="label_only", curriculum={"order": "random"})

    (only,) = distilled(config, data, teacher, tmp_path / "s")["rounds"]

    told, counts = only["teacher_wrong"], only["teacher_wrong"]["on_validation"]
    errors = round((1 - teacher.info["top1_validation"]) * told["num_validation"])
    assert (told["choice"], counts["num_wrong"]) == ("label_only", errors)
    assert 0 <= counts["num_right"] + counts["num_same"] <= errors
    assert 0 <= only["epochs"][0]["teacher_wrong"] < 1
    assert only["pacing_log"] == [only["epochs"][0]["shown_fraction"]]


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_one_label_for_all_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    images = np.zeros((40, 8, 8), np.uint8)
    labels = np.zeros(40, np.int64)
    np.savez(tmp_path / "one.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)

    with pytest.raises(DataError, match=r"the class '0' only.*two classes or more"):
        prepare_data(DataConfig(source=f"npz:{tmp_path / 'one.npz'}"), 0, tmp_path / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, r"distill\.temperature='0': logits are divided by the temperature"),
        ({"losses": [{"name": "kd", "temperature": -1}]}, r"temperature='-1': logits are divided"),
        ({"temperature_curriculum": {"end": 0}}, r"temperature_curriculum\.end='0': logits are divided"),
        ({"kd_weight": -0.1}, r"kd_weight='-0\.1': a weight below 0 teaches the opposite"),
        ({"losses": [{"name": "dist", "weight": -2}]}, r"weight='-2': a weight below 0"),
        ({"losses": [{"name": "ddk"}]}, r"no loss 'ddk'; did you mean 'dkd'\?.*Losses: cross_entropy, kd, dkd"),
        ({"losses": [{"name": "dkd", "bta": 8}]}, r"loss dkd has no key 'bta'; did you mean 'beta'\?"),
        ({"losses": [{"weight": 1}]}, r"no loss 'None'"),
        ({"losses": [{"name": "features", "student_layer": "a"}]}, r"teacher_layer' is missing"),
        ({"losses": [{"name": "cross_entropy", "weight": 0}]}, r"nothing to learn"),
        ({"losses": [], "kd_weight": 0.9}, r"kd_weight is the short form"),
        ({"losses": [{"name": "cross_entropy"}] * 2}, r"stands there twice"),
        ({"loss": "python:a:b", "teacher_wrong": "drop"}, r"loss is your own"),
        ({"loss": "python:a:b", "weight_curriculum": {}}, r"loss is your own, which weight_curriculum"),
        ({"loss": "python:a:b", "kd_weight": 0.9, "temperature": 2}, r"own, which temperature and kd_weight cannot"),
        ({"curriculum": {"difficulty": "el2n"}}, r"set rescore_every"),
        ({"curriculum": {"difficulty": "margin", "rescore_every": 2}}, r"told by the teacher, once"),
        ({"curriculum": {"pacing": "replay"}}, r"replay and fractions belong together"),
        ({"curriculum": {"pacing": "replay", "fractions": [0.5]}}, r"has 1 values for 10 epochs"),
        ({"temperature_curriculum": {"schedule": "replay", "values": [2.0] * 9}}, r"has 9 values for 10 epochs"),
        ({"temperature_curriculum": {}, "kd_weight": 0}, r"no loss has distill\.temperature"),
        (
            {"weight_curriculum": {"per_sample": "confidence"}, "losses": []},
            r"weighs what the teacher says, and no loss has it",
        ),
        ({"teacher_curriculum": {}}, r"set teacher\.keep_checkpoints"),
        ({"teacher_curriculum": {}, "assistants": [{"model": "resnet14"}]}, r"an assistant keeps no checkpoints"),
        ({"train": None, "checkpoint": "s.pt", "teacher_wrong": "drop"}, r"leaves nothing to teacher_wrong"),
        (
            {"rounds": 2, "losses": [{"name": "features", "student_layer": "a", "teacher_layer": "b"}]},
            r"has no teacher_layer",
        ),
        (
            {
                "teacher_forward": "cached",
                "losses": [{"name": "features", "student_layer": "a", "teacher_layer": "b"}],
            },
            r"teacher_forward: cached: the loss features reads the teacher's layers.*Set online or auto",
        ),
        (
            {"teacher_forward": "cached", "teacher_curriculum": {}},
            r"teacher_forward: cached: teacher_curriculum changes the teacher on the way",
        ),
        ({"teacher_forward": "cached", "kd_weight": 0}, r"teacher_forward: cached: no loss asks the teacher"),
        ({"teacher_forward": "online", "cache": {"top_k": 3}}, r"teacher_forward: online stores none"),
        ({"teacher_forward": "offline"}, r"distill\.teacher_forward='offline'"),
        ({"views": 0}, r"distill\.views='0'"),
        ({"cache": {"topk": 3}}, r"unknown key 'distill\.cache\.topk'; did you mean 'top_k'\?"),
        ({"train": None, "checkpoint": "s.pt", "views": 2}, r"leaves nothing to views"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        parse_recipe({**RECIPE, "distill": {"model": "resnet8", **change}}, "recipe")

    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"curriculum": {"pacing": "adaptive"}}, r"distill\.curriculum\.pacing"),
        ({"weight_curriculum": {"schedule": "gap"}}, r"distill\.weight_curriculum\.schedule"),
    ],
)
def test_what_validation_moves_needs_a_validation_split(change: dict[str, Any], key: str) -> None:
    recipe = {**RECIPE, "data": {"source": "digits", "validation": 0}, "quantize": {"method": "qat"}}

    with pytest.raises(RecipeError, match=f"nothing to choose by: drop {key}"):
        parse_recipe({**recipe, "distill": {"model": "resnet8", **change}}, "recipe")


def test_a_full_spec_reads_back_as_itself() -> None:
    losses = [{"name": "dkd", "beta": 8, "warmup_epochs": 20, "standardize": True}, {"name": "cross_entropy"}]
    axes = {
        "curriculum": {"difficulty": "aum", "rescore_every": 2, "pacing": "adaptive"},
        "temperature_curriculum": {"schedule": "learned"},
        "weight_curriculum": {"schedule": "gap", "per_sample": "confidence"},
        "teacher_curriculum": {"order": "random"},
    }
    raw = {**RECIPE, "teacher": {"model": "resnet20", "keep_checkpoints": 3}}
    recipe = parse_recipe({**raw, "distill": {"model": "resnet8", "losses": losses, **axes}}, "recipe")

    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe
