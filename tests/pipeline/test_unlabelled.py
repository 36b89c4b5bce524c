"""Learning where some samples have no label: the losses by hand, and that nobody sees a label that is hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor, nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation
from pipeline.learning.label_cache import LabelCache
from pipeline.learning.labels import UNLABELLED
from pipeline.learning.losses import cross_entropy, kd_loss
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.sample_weights import sample_weights
from pipeline.learning.soft_labels import cache_soft_labels, labels_of
from pipeline.learning.training import Trained, train
from pipeline.learning.views import view_seeds
from pipeline.progress import Quiet
from pipeline.recipe import DataConfig, DistillConfig, QuantizeConfig, TeacherConfig, TrainConfig
from pipeline.stages.data import prepare_data
from pipeline.stages.distill import distill
from pipeline.stages.quantize import quantize
from pipeline.stages.teacher import train_teacher
from targets.base import read_json
from targets.errors import DataError, RecipeError

pytestmark = pytest.mark.integration

SEED = 5
SHARE = 0.2
NET: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 100, "precision": "fp32", "lr": 0.05}
LOGITS = hnp.arrays(np.float64, (5, 4), elements=st.floats(-8, 8))
LABELS = st.lists(st.integers(-1, 3), min_size=5, max_size=5)
SMOOTHING = st.floats(0, 0.5)


# --- the losses, by hand -----------------------------------------------------------------------------------------------


def targets_by_hand(labels: list[int], smoothing: float) -> Any:
    """(N, K): the smoothed distribution of a label, zeros without one."""
    one_hot_NK = np.array([np.eye(4)[label] if label >= 0 else np.zeros(4) for label in labels])
    has_label_N1 = np.array([[label >= 0] for label in labels])
    return ((1 - smoothing) * one_hot_NK + smoothing / 4) * has_label_N1


@given(LOGITS, LABELS, SMOOTHING)
def test_cross_entropy_is_a_sum_over_labelled_samples_divided_by_all(
    logits_NK: Any, labels: list[int], smoothing: float
) -> None:
    leaf_NK = torch.tensor(logits_NK, requires_grad=True)
    loss = cross_entropy(leaf_NK, torch.tensor(labels), label_smoothing=smoothing)
    loss.backward()
    loss_N = cross_entropy(leaf_NK, torch.tensor(labels), label_smoothing=smoothing, reduction="none")

    target_NK = targets_by_hand(labels, smoothing)
    expected_N = -(target_NK * log_softmax(logits_NK, axis=1)).sum(1)
    np.testing.assert_allclose(loss_N.detach(), expected_N, atol=1e-12)
    assert loss.item() == pytest.approx(expected_N.sum() / 5, abs=1e-12)
    gradient_NK = (softmax(logits_NK, axis=1) * target_NK.sum(1, keepdims=True) - target_NK) / 5
    assert leaf_NK.grad is not None
    np.testing.assert_allclose(leaf_NK.grad, gradient_NK, atol=1e-12)


def test_a_batch_without_labels_has_a_loss_of_zero_and_no_gradient() -> None:
    leaf_NK = torch.randn(3, 4, requires_grad=True)

    loss = cross_entropy(leaf_NK, torch.full((3,), UNLABELLED), label_smoothing=0.1)
    loss.backward()

    assert loss.item() == 0
    assert leaf_NK.grad is not None
    assert not leaf_NK.grad.any()


@given(LOGITS, LOGITS, LABELS, st.floats(0.5, 8), st.floats(0, 1))
def test_the_soft_part_is_over_all_samples_and_the_hard_part_over_those_with_a_label(
    student_NK: Any, teacher_NK: Any, labels: list[int], temperature: float, weight: float
) -> None:
    loss = kd_loss(
        *(torch.tensor(one) for one in (student_NK, teacher_NK, labels)), temperature=temperature, weight=weight
    )

    soft = rel_entr(softmax(teacher_NK / temperature, axis=1), softmax(student_NK / temperature, axis=1)).sum(1).mean()
    hard = -(targets_by_hand(labels, 0.0) * log_softmax(student_NK, axis=1)).sum() / 5
    assert float(loss) == pytest.approx(weight * temperature**2 * soft + (1 - weight) * hard, rel=1e-9, abs=1e-11)


# Classes that the teacher gives, and labels: right, wrong, and two without one.
TEACHER_NK = torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 4], [0, 0, 1]], dtype=torch.float64)
LABELS_N = torch.tensor([0, 2, UNLABELLED, UNLABELLED])


@pytest.mark.parametrize(
    ("choice", "soft", "hard"),
    [
        ("keep", None, None),
        ("drop", [4 / 3, 0, 4 / 3, 4 / 3], [4 / 3, 0, 4 / 3, 4 / 3]),
        ("label_only", [1, 0, 1, 1], None),
        ("down_weight", [1, np.exp(1 - 2), 1, 1], None),
    ],
)
def test_a_teacher_is_not_wrong_where_there_is_no_label(
    choice: str, soft: list[float] | None, hard: list[float] | None
) -> None:
    weights = sample_weights(DistillConfig(model="m", teacher_wrong=choice), TEACHER_NK, TEACHER_NK, LABELS_N)

    for found, expected in ((weights.soft_N, soft), (weights.hard_N, hard)):
        if expected is None:
            assert found is None
        else:
            assert found is not None
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("labels", "share"), [([0, 2, -1, -1], 0.5), ([0, 1, 2, 2], 0.0), ([-1] * 4, None)])
def test_the_share_that_the_teacher_has_wrong_is_of_the_labelled(labels: list[int], share: float | None) -> None:
    config = DistillConfig(model="m")
    assert config.train is not None
    objective = Distillation(config, config.train)

    objective(TEACHER_NK, TEACHER_NK, torch.tensor(labels))

    assert objective.facts()["teacher_wrong"] == share


# --- trainings ---------------------------------------------------------------------------------------------------------


def prepared_with(directory: Path, **changes: Any) -> PreparedData:
    config = {"source": "digits", "test": 0.5, "calibration": 32, "augment": {"crop": 1}, **changes}
    prepare_data(DataConfig(**config), SEED, directory)
    return PreparedData(directory, "digest")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A fifth of the labels; look, do not touch."""
    return prepared_with(tmp_path_factory.mktemp("few"), labelled_share=SHARE)


@pytest.fixture(scope="module")
def data(prepared: PreparedData) -> Data:
    return Data.load(prepared)


@pytest.fixture(scope="module")
def taught(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    directory = tmp_path_factory.mktemp("teacher")
    config = TeacherConfig(**NET, train={**TRAIN, "batch_size": 16, "epochs": 6, "lr": 0.1})
    train_teacher(config, prepared, directory, How(seed=SEED))
    return TrainedModel(directory, "", "teacher")


def small_net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, 2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, 10))


@dataclass
class Heard:
    student_NK: list[Tensor] = field(default_factory=list)
    labels_N: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Hears(Distillation):
    heard: Heard

    def forward(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        loss = super().forward(student_NK, teacher_NK, labels_N)
        self.heard.student_NK.append(student_NK.detach())
        self.heard.labels_N.append(labels_N)
        self.heard.losses.append(float(loss.detach()))
        return loss


class Said(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def run(
    data: Data, directory: Path, *, labels: LabelCache | None = None, progress: Quiet | None = None, **config: Any
) -> tuple[Trained, Heard]:
    whole = DistillConfig(model="m", train=TRAIN, **config)
    assert whole.train is not None
    student, teacher = small_net(4, seed=0), small_net(8, seed=1)
    example_NCHW = torch.zeros(2, 1, *data.image_size)
    layers = {"student_layer": "2", "teacher_layer": "2"}
    wanted = [one for one in whole.losses or () if one.name == "features"]
    features = [FeatureLoss(student, teacher, **layers, example_NCHW=example_NCHW) for _ in wanted]
    objective = Hears(whole, whole.train, features=features)
    objective.heard = Heard()
    trained = train(
        student,
        data,
        objective,
        whole.train,
        seed=SEED,
        checkpoint_dir=directory,
        progress=progress or Quiet(),
        label="net",
        teacher=teacher if labels is None and whole.asks_teacher else None,
        labels=labels,
        view_seeds=view_seeds(SEED, 2),
    )
    return trained, objective.heard


def with_labels(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    """`data` with other labels where it has none in train."""
    labels = data.train_labels.clone()
    train = data.splits["train"]
    hidden = train[labels[train] == UNLABELLED]
    labels[hidden] = change(hidden)
    return replace(data, train_labels=labels)


OF_THE_TEACHER: dict[str, dict[str, Any]] = {
    "kd": {"kd_weight": 1.0},
    "the others": {
        "losses": [
            {"name": "kd", "standardize": True},
            {"name": "dist"},
            {"name": "features", "weight": 0.1, "student_layer": "2", "teacher_layer": "2"},
            {"name": "cross_entropy", "weight": 0},
        ]
    },
}


@pytest.mark.parametrize("config", OF_THE_TEACHER.values(), ids=OF_THE_TEACHER)
def test_a_student_of_the_teacher_alone_is_the_same_whatever_the_labels_are(
    data: Data, tmp_path: Path, config: dict[str, Any]
) -> None:
    drawn = with_labels(data, lambda hidden: torch.randint(0, 10, hidden.shape))
    without = replace(data, train_labels=torch.full_like(data.train_labels, UNLABELLED))

    ends = [run(one, tmp_path / str(number), **config)[0].last for number, one in enumerate((data, drawn, without))]

    for name, expected in ends[0].items():
        assert torch.equal(ends[1][name], expected), name
        assert torch.equal(ends[2][name], expected), name


def test_a_loss_on_the_labels_moves_the_student_and_hidden_ones_do_not_reach_it(data: Data, tmp_path: Path) -> None:
    drawn = with_labels(data, lambda hidden: torch.randint(0, 10, hidden.shape))

    hidden, heard = run(data, tmp_path / "hidden", kd_weight=0.5)
    shown, _ = run(drawn, tmp_path / "shown", kd_weight=0.5)

    assert any(not torch.equal(hidden.last[name], value) for name, value in shown.last.items())
    seen_N = torch.cat(heard.labels_N)
    assert int((seen_N != UNLABELLED).sum()) == 2 * data.num_labelled
    assert len(seen_N) == 2 * data.num_train


def test_top1_in_training_is_of_the_labelled(data: Data, tmp_path: Path) -> None:
    trained, heard = run(data, tmp_path, kd_weight=0.5)

    half = len(heard.labels_N) // 2
    for epoch, steps in zip(trained.epochs, (slice(0, half), slice(half, None)), strict=True):
        student_N, labels_N = torch.cat(heard.student_NK[steps]).argmax(1), torch.cat(heard.labels_N[steps])
        known = labels_N >= 0
        assert epoch.train_top1 == pytest.approx(float((student_N == labels_N)[known].float().mean()))
        assert (epoch.num_images, epoch.shown_fraction) == (data.num_train, 1.0)


def test_an_epoch_without_any_label_has_no_top1_and_a_loss_all_the_same(data: Data, tmp_path: Path) -> None:
    said = Said()
    labels = data.train_labels.clone()
    labels[data.splits["train"]] = UNLABELLED

    trained, heard = run(replace(data, train_labels=labels), tmp_path, progress=said, kd_weight=0.5)

    assert [epoch.train_top1 for epoch in trained.epochs] == [None, None]
    assert [epoch.teacher_wrong for epoch in trained.epochs] == [None, None]
    assert all(np.isfinite(loss) and loss > 0 for loss in heard.losses)
    assert all(epoch.validation_top1 is not None for epoch in trained.epochs)
    assert "train without labels, validation" in said.lines[0]


def test_cached_soft_labels_cover_the_unlabelled_and_give_the_losses_of_a_teacher_that_is_asked(
    data: Data, tmp_path: Path
) -> None:
    teacher = small_net(8, seed=1)
    of = labels_of(teacher, data, "digest", view_seeds(SEED, 2), dtype="fp32", top_k=None)
    config = TrainConfig(precision="fp32")
    cache = cache_soft_labels(teacher, data, of, tmp_path / "cache", config, Quiet())
    losses = {"losses": [{"name": "kd"}, {"name": "dist"}], "teacher_wrong": "drop"}

    _, asked = run(data, tmp_path / "online", **losses)
    _, read = run(data, tmp_path / "cached", labels=cache, **losses)

    assert of.num_samples == data.num_train > data.num_labelled
    assert read.losses == pytest.approx(asked.losses, rel=1e-4)


# --- stages ------------------------------------------------------------------------------------------------------------


def curve_of(directory: Path, stage: str) -> list[dict[str, Any]]:
    told = read_json(directory / f"{stage}.json")
    curve: list[dict[str, Any]] = told["training"]["epochs"] if stage == "teacher" else told["rounds"][0]["epochs"]
    return curve


def test_a_teacher_is_shown_the_labelled_samples_alone(data: Data, taught: TrainedModel) -> None:
    assert {epoch["num_images"] for epoch in curve_of(taught.dir, "teacher")} == {data.num_labelled}


def test_without_a_validation_split_a_teacher_is_judged_by_the_labelled(tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path / "data", labelled_share=SHARE, validation=0)
    (tmp_path / "teacher").mkdir()

    train_teacher(
        TeacherConfig(**NET, train={**TRAIN, "batch_size": 16, "epochs": 6, "lr": 0.1}),
        prepared,
        tmp_path / "teacher",
        How(seed=SEED),
    )

    assert read_json(tmp_path / "teacher" / "teacher.json")["top1_train"] > 0.3


@pytest.mark.parametrize(
    ("config", "with_a_teacher"), [({"kd_weight": 0}, False), ({}, True), ({"views": 1}, True)], ids=str
)
def test_a_student_is_shown_all_samples_where_a_teacher_helps_and_the_labelled_where_none_does(
    data: Data,
    prepared: PreparedData,
    taught: TrainedModel,
    tmp_path: Path,
    config: dict[str, Any],
    with_a_teacher: bool,
) -> None:
    distill(DistillConfig(**NET, train=TRAIN, **config), prepared, taught, tmp_path, How(seed=SEED))

    shown = {epoch["num_images"] for epoch in curve_of(tmp_path, "distill")}
    assert shown == {data.num_train if with_a_teacher else data.num_labelled}


def test_a_student_of_labels_alone_is_that_of_data_that_have_no_others(
    prepared: PreparedData, taught: TrainedModel, tmp_path: Path
) -> None:
    alone = prepared_with(tmp_path / "data", train_share=SHARE)
    alone.__dict__["info"] = {**alone.info, "mean": prepared.info["mean"], "std": prepared.info["std"]}

    for name, one in (("hidden", prepared), ("absent", alone)):
        (tmp_path / name).mkdir()
        distill(DistillConfig(**NET, train=TRAIN, kd_weight=0), one, taught, tmp_path / name, How(seed=SEED))

    first, second = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("hidden", "absent"))
    assert first == second


def test_foreign_images_with_other_labels_give_the_same_student(taught: TrainedModel, tmp_path: Path) -> None:
    weights = []
    for name, labels in (("a", np.arange(300) % 3), ("b", np.full(300, 7))):
        images = np.random.default_rng(1).integers(0, 256, (300, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "more.npz", x_train=images, y_train=labels)
        found = prepared_with(tmp_path / f"data-{name}", unlabelled=[f"npz:{tmp_path / 'more.npz'}"])
        (tmp_path / name).mkdir()
        distill(DistillConfig(**NET, train=TRAIN), found, taught, tmp_path / name, How(seed=SEED))
        weights.append((tmp_path / name / "last.safetensors").read_bytes())
        assert curve_of(tmp_path / name, "distill")[0]["num_images"] == found.info["num_train"]

    assert weights[0] == weights[1]


def test_what_needs_labels_is_refused_by_the_stage_too(
    prepared: PreparedData, taught: TrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"distill\.curriculum\.difficulty: teacher_loss is told by the label"):
        distill(DistillConfig(**NET, train=TRAIN, curriculum={}), prepared, taught, tmp_path, How())


@pytest.mark.parametrize(
    "config",
    [
        {"curriculum": {"difficulty": "teacher_entropy"}, "teacher_wrong": "down_weight"},
        {"curriculum": {"difficulty": "disagreement", "rescore_every": 1}, "weight_curriculum": {"per_sample": "confidence"}},
        {"train": {**TRAIN, "label_smoothing": 0.1}, "temperature_curriculum": {"schedule": "learned"}},
        {"kd_weight": 0, "curriculum": {"difficulty": "margin"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_no_label_trains(
    prepared: PreparedData, taught: TrainedModel, tmp_path: Path, config: dict[str, Any]
) -> None:
    distill(DistillConfig(**{**NET, "train": TRAIN, **config}), prepared, taught, tmp_path, How(seed=SEED))

    assert all(
        np.isfinite(epoch["loss"]) and epoch["train_top1"] is not None for epoch in curve_of(tmp_path, "distill")
    )


def test_qat_learns_from_all_samples_and_without_soft_labels_from_the_labelled(
    data: Data, prepared: PreparedData, taught: TrainedModel, tmp_path: Path
) -> None:
    distill(DistillConfig(**NET, train=TRAIN), prepared, taught, tmp_path, How(seed=SEED))
    student = TrainedModel(tmp_path, "", "distill")
    (tmp_path / "int8").mkdir()
    one_epoch = {"epochs": 1, "batch_size": 200}

    quantize(QuantizeConfig(method="qat", train=one_epoch), "cpu-int8", prepared, student, tmp_path / "int8", How())

    told = read_json(tmp_path / "int8" / "quantize.json")
    controls = {one["name"]: one["training"]["epochs"][0] for one in told["controls"] if "training" in one}
    assert told["training"]["epochs"][0]["num_images"] == data.num_train
    assert controls["FP32 fine-tune of the same length"]["num_images"] == data.num_train
    assert controls["QAT without distillation"]["num_images"] == data.num_labelled
    assert np.isfinite(told["training"]["epochs"][0]["loss"])


# --- whole commands ----------------------------------------------------------------------------------------------------


def test_a_teacher_from_elsewhere_teaches_on_a_flat_folder_of_images_without_a_label(
    edgestill: Any, tiny_recipe: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(100 * number, 100 * number + 100, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / part / name / f"{index}.png")
    (tmp_path / "flat").mkdir()
    for index in range(9):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{index}.png")
    data = {"source": f"image_folder:{tmp_path / 'own'}", "image_size": 8, "validation": 0.2, "workers": 0}
    training = {"epochs": 4, "batch_size": 12, "lr": 0.05, "precision": "fp32"}
    first = tiny_recipe(data=data, teacher={**NET, "train": training}, distill={**NET, "train": training})
    ended = edgestill("run", first, "--runs", tmp_path / "first", "--until", "teacher")
    assert ended.code == 0, ended.err
    (weights,) = (tmp_path / "first" / "tiny").glob("teacher-*/model.safetensors")
    (first_json,) = (tmp_path / "first" / "tiny").glob("data-*/data.json")
    own = {key: [255 * value for value in read_json(first_json)[key]] for key in ("mean", "std")}

    without = {**data, "labelled_share": 0, "unlabelled": [f"image_folder:{tmp_path / 'flat'}"]}
    elsewhere = {**NET, "train": None, "checkpoint": str(weights), "normalization": own}
    recipe = tiny_recipe(data=without, teacher=elsewhere, distill={**NET, "train": training})
    ended = edgestill("run", recipe, "--runs", tmp_path / "second", "--until", "quantize")

    assert ended.code == 0, ended.err
    (told,) = (tmp_path / "second" / "tiny").glob("distill-*/distill.json")
    (data_json,) = (tmp_path / "second" / "tiny").glob("data-*/data.json")
    assert read_json(data_json)["labels"]["num_labelled"] == 0
    assert [epoch["num_images"] for epoch in read_json(told)["rounds"][0]["epochs"]] == [48 + 9] * 4
    assert {epoch["train_top1"] for epoch in read_json(told)["rounds"][0]["epochs"]} == {None}


def test_an_ablation_counts_what_each_arm_was_shown_and_scores_train_on_the_labelled(
    edgestill: Any, tiny_recipe: Any, tmp_path: Path
) -> None:
    data = {"source": "digits", "test": 0.5, "calibration": 32, "augment": {"crop": 0}, "labelled_share": SHARE}
    recipe = tiny_recipe(
        data=data,
        teacher={**NET, "train": {**TRAIN, "batch_size": 16, "epochs": 6, "lr": 0.1}},
        distill={**NET, "train": TRAIN},
        ablation={"temperatures": [4.0], "kd_weights": [0.9], "shift": []},
    )
    export = tmp_path / "found.json"
    options = ["--runs", tmp_path / "runs", "--arms", "alone", "--seeds", 2, "--export", export]
    ended = edgestill("ablate", recipe, *options)

    assert ended.code == 0, ended.err
    found = read_json(export)
    num_train, labels = found["data"]["num_train"], found["data"]["labels"]
    shown = {arm["name"]: {one["images_seen"] for one in arm["seeds"]} for arm in found["arms"]}
    assert shown == {"alone": {2 * labels["num_labelled"]}, "kd": {2 * num_train}}
    assert labels["num_labelled"] == round(SHARE * num_train)
    for arm in found["arms"]:
        for one in arm["seeds"]:
            assert round(one["last"]["train_top1"] * labels["num_labelled"], 6) % 1 == 0
    assert f"{labels['num_labelled']} with a label" in ended.out


def test_a_student_without_teacher_and_labels_is_refused(taught: TrainedModel, tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path / "data", labelled_share=0)

    with pytest.raises(DataError, match="there is nothing to learn from"):
        distill(DistillConfig(**NET, train=TRAIN, kd_weight=0), prepared, taught, tmp_path, How())
