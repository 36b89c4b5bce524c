"""Soft labels through the stages: when they are kept, who shares them, whose are refused, and what the student's files say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import PreparedData, SoftLabels, TrainedModel
from pipeline.how import How
from pipeline.learning import soft_labels as asking
from pipeline.learning.label_cache import LabelCache, LabelsOf
from pipeline.learning.models import load_weights
from pipeline.learning.soft_labels import validation_top1, weights_digest
from pipeline.learning.trained import load_trained, open_data
from pipeline.learning.views import view_seeds
from pipeline.recipe import DistillConfig, TeacherConfig, TrainConfig, load_recipe
from pipeline.run import run_recipe, stages_of
from pipeline.stages import distill as distill_stage
from pipeline.stages.distill import distill
from pipeline.stages.soft_labels import cache_teacher
from pipeline.stages.teacher import train_teacher
from pipeline.workspace import CHECKPOINT_DIR
from targets.base import read_json
from targets.errors import IntegrityError, RecipeError

pytestmark = pytest.mark.integration

NET: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
TRAIN: dict[str, Any] = {"epochs": 3, "precision": "fp32", "batch_size": 256}
CACHED: dict[str, Any] = {"views": 2, "cache": {"dtype": "fp32"}}
AGAIN: dict[str, Any] = {"start_fraction": 0.65, "epoch_length": "all"}
RECIPE: dict[str, Any] = {
    "name": "r",
    "data": {"source": "digits", "test": 0.5, "calibration": 32, "augment": {"crop": 1}},
    "teacher": {**NET, "train": {**TRAIN, "batch_size": 32, "lr": 0.1}},
    "distill": {**NET, "train": TRAIN, **CACHED},
    "targets": [{"name": "onnxruntime-cpu"}],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe run until its student is trained; look, do not touch."""
    directory = tmp_path_factory.mktemp("cached")
    (directory / "r.yaml").write_text(json.dumps(RECIPE))  # YAML too, without the aliases of what stands there twice
    run_recipe(directory / "r.yaml", runs_dir=directory / "runs", until="distill")
    return directory


def stage(finished: Path, label: str) -> Path:
    (found,) = finished.glob(f"runs/r/{label}-????????")
    return found


def digest(directory: Path) -> str:
    return str(read_json(directory / "stage.json")["digest"])


@pytest.fixture
def data(finished: Path) -> PreparedData:
    directory = stage(finished, "data")
    return PreparedData(directory, digest(directory))


@pytest.fixture
def teacher(finished: Path) -> TrainedModel:
    return TrainedModel(stage(finished, "teacher"), "", "teacher")


@pytest.fixture
def labels(finished: Path) -> SoftLabels:
    return SoftLabels(stage(finished, "soft_labels"), "")


def distilled(
    config: DistillConfig,
    data: PreparedData,
    teacher: TrainedModel,
    directory: Path,
    labels: SoftLabels | None = None,
    how: How | None = None,
    **options: Any,
) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    distill(config, data, teacher, directory, how or How(), labels, **options)
    document: dict[str, Any] = read_json(directory / "distill.json")
    return document


# --- when they are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "used", "why"),
    [
        ({}, "online", "views: null"),
        ({"views": 2}, "cached", "2 views for 10 epochs"),
        ({"views": 10}, "online", "a cache would save no pass"),
        ({"views": 10, "rounds": 2}, "cached", "10 views for 2 rounds of 10 epochs"),
        ({"views": 2, "teacher_forward": "online"}, "online", "the recipe says so"),
        ({"teacher_forward": "cached"}, "cached", "the recipe says so"),
        ({"views": 2, "kd_weight": 0}, "online", "no loss asks the teacher"),
        ({"views": 2, "kd_weight": 0, "teacher_wrong": "drop"}, "cached", "2 views"),
        ({"views": 2, "loss": "python:a:b"}, "cached", "2 views"),
        ({"views": 2, "teacher_curriculum": {}}, "online", "teacher_curriculum changes the teacher"),
        (
            {"views": 2, "losses": [{"name": "features", "student_layer": "a", "teacher_layer": "b"}]},
            "online",
            "the loss features reads the teacher's layers",
        ),
        (
            {"views": 2, "losses": [{"name": "kd"}, {"name": "features", "weight": 0, "student_layer": "a", "teacher_layer": "b"}]},
            "cached",
            "2 views",
        ),
        ({"train": None, "checkpoint": "s.pt"}, "online", "nothing is trained"),
    ],
)  # fmt: skip
def test_auto_keeps_soft_labels_where_views_repeat_and_a_cache_can_serve(
    change: dict[str, Any], used: str, why: str
) -> None:
    config = DistillConfig(model="m", **change)

    assert config.decided_teacher_forward[0] == used
    assert why in config.decided_teacher_forward[1]
    assert config.uses_cache is (used == "cached")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"views": 3}, 3),
        ({"teacher_forward": "cached"}, 10),
        ({"teacher_forward": "cached", "views": 4}, 4),
    ],
)
def test_a_cache_without_a_number_of_views_has_one_an_epoch(change: dict[str, Any], expected: int | None) -> None:
    assert DistillConfig(model="m", **change).num_views == expected


def test_a_run_keeps_them_between_teacher_and_student_and_the_student_says_so(finished: Path) -> None:
    told = read_json(stage(finished, "distill") / "distill.json")
    kept = read_json(stage(finished, "soft_labels") / "soft_labels.json")
    (only,) = told["rounds"]

    assert told["teacher_forward"] == {
        "asked": "auto",
        "used": "cached",
        "why": "2 views for 3 epochs: each is seen again",
    }
    assert (only["soft_labels"]["num_views"], only["soft_labels"]["dtype"], only["soft_labels"]["top_k"]) == (
        2, "fp32", None,
    )  # fmt: skip
    assert (
        "2 views for 3 epochs: each is shown 1.5 times, which saves the teacher 1 pass over the data" in only["warning"]
    )
    assert kept["view_seeds"] == list(view_seeds(0, 2))
    assert not list(finished.glob(f"runs/r/*/{CHECKPOINT_DIR}"))


@pytest.mark.parametrize(
    ("first", "overrides"),
    [
        ("distill", ["distill.temperature=2"]),  # another student, of the same soft labels
        ("distill", ["distill.args.widths=[4,4,4,8]"]),
        ("distill", ["distill.train.epochs=4"]),
        ("distill", ["distill.teacher_forward=online", "distill.cache.dtype=fp16"]),
        ("soft_labels", ["distill.cache.dtype=fp16"]),
        ("soft_labels", ["distill.cache.top_k=4"]),
        ("soft_labels", ["distill.views=1"]),
        ("soft_labels", ["distill.train.precision=bf16"]),
        ("soft_labels", ["distill.train.channels_last=false"]),
    ],
    ids=str,
)
def test_students_whose_teacher_is_asked_the_same_share_its_answers(
    finished: Path, first: str, overrides: list[str]
) -> None:
    result = run_recipe(finished / "r.yaml", runs_dir=finished / "runs", overrides=overrides, dry_run=True)

    assert (result.stopped or "").startswith(f"{first} and what follows")


def test_a_run_again_builds_nothing_and_one_without_repeated_views_has_no_such_stage(finished: Path) -> None:
    recipe, runs_dir = finished / "r.yaml", finished / "runs"

    assert run_recipe(recipe, runs_dir=runs_dir, until="soft_labels").built == ()
    assert run_recipe(recipe, runs_dir=runs_dir, until="distill").built == ()
    assert "soft_labels" in stages_of(load_recipe(recipe))
    with pytest.raises(
        RecipeError, match=r"--until soft_labels: this recipe has no such stage\. Stages: data, teacher, d"
    ):
        run_recipe(recipe, runs_dir=runs_dir, overrides=["distill.views=null"], until="soft_labels")
    with pytest.raises(RecipeError, match=r"--force assistant: this recipe has no such stage"):
        run_recipe(recipe, runs_dir=runs_dir, force="assistant")


# --- whose they are ----------------------------------------------------------------------------------------------------


def test_soft_labels_of_another_teacher_are_refused(data: PreparedData, labels: SoftLabels, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    train_teacher(
        TeacherConfig(**NET, train={**TRAIN, "batch_size": 32, "lr": 0.1}), data, tmp_path / "other", How(seed=1)
    )
    other = TrainedModel(tmp_path / "other", "", "teacher")

    with pytest.raises(IntegrityError, match=r"the answers of another teacher.*\n.*--force soft_labels") as refused:
        distilled(DistillConfig(**NET, train=TRAIN, **CACHED), data, other, tmp_path / "s", labels)

    assert refused.value.exit_code == 5
    assert not (tmp_path / "s" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        (How(seed=1), {}, "they are of other views"),
        (How(), {"views": 1}, r"of other views \(2 from seed \d+, not 1"),
        (How(), {"cache": {"dtype": "fp16"}}, "stored in another type"),
    ],
)
def test_soft_labels_of_another_recipe_are_refused(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path, how: How, change: Any, message: str
) -> None:
    config = DistillConfig(**{**NET, "train": TRAIN, **CACHED, **change})

    with pytest.raises(IntegrityError, match=message):
        distilled(config, data, teacher, tmp_path / "s", labels, how)


def test_soft_labels_of_other_data_are_refused(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path
) -> None:
    other = PreparedData(data.dir, "another digest")

    with pytest.raises(IntegrityError, match="made from other data"):
        distilled(DistillConfig(**NET, train=TRAIN, **CACHED), other, teacher, tmp_path / "s", labels)


def test_a_stage_that_would_keep_nothing_is_refused(data: PreparedData, teacher: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher_forward is online"):
        cache_teacher(DistillConfig(**NET, train=TRAIN), data, teacher, tmp_path, How())


# --- what comes of them ------------------------------------------------------------------------------------------------


def test_a_student_has_the_losses_that_it_has_under_a_teacher_that_is_asked(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path
) -> None:
    curves = []
    for name, config in (("cached", CACHED), ("online", {"views": 2, "teacher_forward": "online"})):
        told = distilled(
            DistillConfig(**NET, train=TRAIN, curriculum={}, **config),
            data,
            teacher,
            tmp_path / name,
            labels if name == "cached" else None,
        )
        curves.append([epoch["loss"] for epoch in told["rounds"][0]["epochs"]])
        assert told["teacher_forward"]["used"] == name

    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_students_of_several_seeds_share_the_views_of_their_recipe(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path
) -> None:
    config = DistillConfig(**NET, train=TRAIN, **CACHED)

    for seed in (None, 0, 7):
        distilled(config, data, teacher, tmp_path / str(seed), labels, seed=seed)

    weights = [(tmp_path / str(seed) / "last.safetensors").read_bytes() for seed in (None, 0, 7)]
    assert weights[0] == weights[1] != weights[2]


def test_without_soft_labels_given_a_cached_recipe_makes_its_own(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path
) -> None:
    config = DistillConfig(**NET, train=TRAIN, **CACHED)

    distilled(config, data, teacher, tmp_path / "given", labels)
    distilled(config, data, teacher, tmp_path / "own")

    given, own = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("given", "own"))
    assert given == own


# --- rounds ------------------------------------------------------------------------------------------------------------


def test_a_later_rounds_teacher_is_asked_once_a_view_and_a_killed_stage_asks_nobody_again(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whom: set[str] = set()
    ask = asking.view_logits

    def noted(model: nn.Module, data: Any, view_seed: int, *, bf16: bool) -> Iterator[Tensor]:
        asked.append(view_seed)
        whom.add(weights_digest(model))
        return ask(model, data, view_seed, bf16=bf16)

    def scored(logits_NK: Tensor, labels_N: Tensor) -> float:
        return next(scores)

    monkeypatch.setattr(asking, "view_logits", noted)
    monkeypatch.setattr(distill_stage, "top1", scored)
    config = DistillConfig(**NET, train=TRAIN, **CACHED, rounds=3)

    scores = iter([0.1, 0.2, 0.1, 0.1])  # the teacher, then three rounds: the student of the first teaches the others
    told = distilled(config, data, teacher, tmp_path / "s", labels)
    first = (tmp_path / "s" / "last.safetensors").read_bytes()
    scores = iter([0.1, 0.2, 0.1, 0.1])
    distilled(config, data, teacher, tmp_path / "s", labels)  # as after a kill: the checkpoints are there

    assert [one["soft_labels_from"] for one in told["rounds"]] == [
        "teacher",
        "student of round 1",
        "student of round 1",
    ]
    assert asked == list(view_seeds(0, 2))
    (kept,) = (tmp_path / "s" / CHECKPOINT_DIR).glob("soft-labels-*/soft_labels.json")
    assert {read_json(kept)["teacher"]} == whom != {labels.info["teacher"]}
    assert (tmp_path / "s" / "last.safetensors").read_bytes() == first


@pytest.mark.parametrize(("top1", "best"), [((0.5, 0.2, 0.3), 1), ((0.2, 0.5, 0.3), 2), ((0.2, 0.3, 0.5), 3)])
def test_the_best_round_ships_and_a_later_one_goes_on_from_it(
    data: PreparedData,
    teacher: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    top1: tuple[float, ...],
    best: int,
) -> None:
    begun: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    learn = vars(distill_stage)["train"]

    def noted(student: nn.Module, *args: Any, **kwargs: Any) -> Any:
        begun.append({name: value.clone() for name, value in student.state_dict().items()})
        trained = learn(student, *args, **kwargs)
        ended.append(trained.best)
        return trained

    scores = iter([0.9, *top1])
    monkeypatch.setattr(distill_stage, "train", noted)
    monkeypatch.setattr(distill_stage, "top1", lambda logits_NK, labels_N: next(scores))

    told = distilled(DistillConfig(**NET, train=TRAIN, rounds=3), data, teacher, tmp_path)

    best_so_far = [max(range(number), key=top1.__getitem__) for number in (1, 2)]
    for start, source in zip(begun[1:], best_so_far, strict=True):
        assert_same(start, ended[source])
    assert_same(load_file(tmp_path / "model.safetensors"), ended[best - 1])
    assert told["top1_validation"] == max(top1)
    assert {name: one["round"] for name, one in told["weights"].items()} == {
        "model.safetensors": best,
        "last.safetensors": 3,
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


# --- best and last -----------------------------------------------------------------------------------------------------


def test_the_last_epochs_weights_stand_beside_the_best_and_the_file_says_which_is_which(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    unsteady = {"epochs": 4, "precision": "fp32", "batch_size": 256, "lr": 0.3, "schedule": "constant", "momentum": 0.0}
    distilled(DistillConfig(**NET, train=unsteady), data, teacher, tmp_path / "s")
    student = TrainedModel(tmp_path / "s", "", "distill")
    told, (only,) = student.info["weights"], student.info["rounds"]

    opened = open_data(data)
    net = load_trained(student, opened, allow_code=False)
    assert validation_top1(net, opened) == pytest.approx(only["validation_top1_best"])
    assert student.info["top1_validation"] == pytest.approx(only["validation_top1_best"])
    load_weights(net, student.last_weights_path)
    assert validation_top1(net, opened) == pytest.approx(only["validation_top1_last"])
    assert student.weights_path.read_bytes() != student.last_weights_path.read_bytes()
    assert told == {
        "model.safetensors": {"round": 1, "epoch": only["best_epoch"], "chosen_by": "validation top-1"},
        "last.safetensors": {"round": 1, "epoch": 4, "chosen_by": "the last epoch"},
    }


def test_a_student_that_was_not_trained_here_has_no_last_epoch(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    distilled(DistillConfig(**NET, train=None, checkpoint=teacher.weights_path), data, teacher, tmp_path / "s")

    assert not (tmp_path / "s" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "is_warned_of"),
    [
        ({"temperature": 1.0}, False),
        ({}, True),
        ({"losses": [{"name": "kd", "temperature": 1.0}]}, False),
        ({"losses": [{"name": "kd", "temperature": 1.0, "standardize": True}]}, True),
        ({"losses": [{"name": "dist", "temperature": 1.0}]}, True),
        ({"temperature": 1.0, "temperature_curriculum": {"end": 2.0}}, True),
        ({"loss": "python:a:b"}, True),
        ({"temperature": 1.0, "teacher_wrong": "down_weight"}, True),
        ({"temperature": 1.0, "weight_curriculum": {"per_sample": "correctness"}}, True),
    ],
)
def test_a_loss_that_looks_at_logits_that_are_not_kept_is_warned_of(change: dict[str, Any], is_warned_of: bool) -> None:
    of: dict[str, Any] = {"teacher": "t", "data": "d", "transform": "x", "view_seeds": (0,)}
    of |= {"num_samples": 5, "num_classes": 10}
    few, all_of_them = (LabelCache(Path(), LabelsOf(**of, top_k=top_k), {}, torch.device("cpu")) for top_k in (2, None))
    config = DistillConfig(model="m", **change)

    warning = distill_stage.few_logits(config, few)

    assert (warning is not None) is is_warned_of
    assert (warning or "The 2 largest of 10 logits are kept").startswith("The 2 largest of 10 logits are kept")
    assert distill_stage.few_logits(config, all_of_them) is None


# --- few views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "epochs", "more", "expected"),
    [
        (None, 3, {}, None),
        (3, 3, {}, None),
        (1, 3, {}, "1 view for 3 epochs: each is shown 3 times, and no time is saved by it, as no cache is read"),
        (4, 10, {}, "4 views for 10 epochs: each is shown 2.5 times"),
        (4, 4, {"rounds": 3}, "4 views for 3 rounds of 4 epochs: each is shown 3 times"),
        (12, 4, {"rounds": 3}, "4 views for 3 rounds of 4 epochs: each is shown 3 times"),
        (
            4,
            4,
            {"curriculum": AGAIN},
            "4 views for 4 epochs that show a sample up to 2 times: each is shown up to 2 times",
        ),
        (8, 4, {"curriculum": AGAIN}, None),
    ],
)
def test_few_views_are_warned_of_by_their_number(
    views: int | None, epochs: int, more: dict[str, Any], expected: str | None
) -> None:
    config = DistillConfig(model="m", train=TrainConfig(epochs=epochs), views=views, teacher_forward="online", **more)
    shown = None if config.num_views is None else view_seeds(0, config.num_views)

    warning = distill_stage.few_views(config, shown, None)

    assert (warning is None) is (expected is None)
    assert (expected or "") in (warning or "")


def test_what_few_views_cost_is_what_was_measured() -> None:
    arms = {arm["name"]: arm for arm in read_json(Path("docs/results/ablation_fashion_mnist_views.json"))["arms"]}
    kd, one_view = (np.mean([seed["last"]["test_top1"] for seed in arms[name]["seeds"]]) for name in ("kd", "one-view"))

    assert distill_stage.VIEWS_COST.endswith(f" {(kd - one_view) * 100:.2f} points")


def test_few_views_are_warned_of_in_the_log_and_in_the_students_file(
    data: PreparedData, teacher: TrainedModel, labels: SoftLabels, tmp_path: Path, listening: Any
) -> None:
    told = distilled(
        DistillConfig(**NET, train=TRAIN, **CACHED), data, teacher, tmp_path / "s", labels, How(progress=listening)
    )

    (warning,) = (line for line in listening.lines if "views for 3 epochs" in line)
    assert warning == f"distill: {told['rounds'][0]['warning']}"
    assert "may cost accuracy" in warning
