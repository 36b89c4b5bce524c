"""A teacher that was trained on other data: the pixels that it sees, wherever it is asked, and classes that are not the data's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.deployed import float_model
from pipeline.learning.models import Renormalized, predict
from pipeline.learning.models.cifar import build_cifar_model
from pipeline.learning.models.inference import as_named
from pipeline.learning.soft_labels import soft_labels, weights_digest
from pipeline.learning.trained import load_trained
from pipeline.recipe import DataConfig, DistillConfig, TeacherConfig
from pipeline.stages.data import prepare_data
from pipeline.stages.distill import distill
from pipeline.stages.teacher import train_teacher
from targets.base import read_json
from targets.errors import ModelError, RecipeError, TrainingError

pytestmark = pytest.mark.integration

SEED = 5
NET: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 100, "precision": "fp32", "lr": 0.05}
MEAN, STD = 20.0, 160.0  # pixels, 0 to 255


def prepared_with(directory: Path, **changes: Any) -> PreparedData:
    config = {"source": "digits", "test": 0.5, "calibration": 32, "augment": {"crop": 0}, **changes}
    prepare_data(DataConfig(**config), SEED, directory)
    return PreparedData(directory, "digest")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared_with(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(prepared: PreparedData) -> Data:
    return Data.load(prepared)


@pytest.fixture(scope="module")
def elsewhere(prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that were learned from the same pixels under other statistics."""
    directory = tmp_path_factory.mktemp("elsewhere")
    other = PreparedData(prepared.dir, "digest")
    other.__dict__["info"] = {**prepared.info, "mean": [MEAN / 255], "std": [STD / 255]}
    config = TeacherConfig(**NET, train={**TRAIN, "batch_size": 16, "epochs": 6, "lr": 0.1})
    train_teacher(config, other, directory, How(seed=SEED))
    return directory / "model.safetensors"


@pytest.fixture(scope="module")
def teacher(prepared: PreparedData, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return taken(prepared, elsewhere, tmp_path_factory.mktemp("teacher"), {"mean": MEAN, "std": [STD]})


def taken(prepared: PreparedData, weights: Path, directory: Path, normalization: Any, **more: Any) -> TrainedModel:
    """The stage `teacher` on a checkpoint."""
    directory.mkdir(exist_ok=True)
    config = {**NET, "train": None, "checkpoint": weights, "normalization": normalization, **more}
    train_teacher(TeacherConfig(**config), prepared, directory, How(seed=SEED))
    return TrainedModel(directory, "", "teacher")


def by_hand(weights: Path, pixels_NCHW: Tensor) -> Tensor:
    """Its logits for pixels, normalised as where it was trained."""
    net = build_cifar_model("resnet8", NET["args"], channels=1, num_classes=10)
    net.load_state_dict(load_file(weights))
    with torch.no_grad():
        logits_NK: Tensor = net.eval()((pixels_NCHW.float() - MEAN) / STD)
    return logits_NK


def test_the_wrapper_gives_the_net_what_it_would_have_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels_NCHW = torch.randint(0, 256, (4, 3, 5, 6), generator=generator).double()
    given_mean, given_std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    mean, std = [10.0, 120.0, 200.0], [30.0, 60.0, 90.0]

    x_NCHW = ((pixels_NCHW / 255 - given_mean.view(-1, 1, 1)) / given_std.view(-1, 1, 1)).float()
    net = Renormalized(nn.Identity(), mean=mean, std=std, given_mean=given_mean.tolist(), given_std=given_std.tolist())

    expected = (pixels_NCHW - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(net(x_NCHW), expected.float(), rtol=1e-5, atol=1e-5)


def test_the_datas_own_statistics_change_nothing(data: Data) -> None:
    own = {"mean": [255 * value for value in data.mean], "std": [255 * value for value in data.std]}

    net = Renormalized(nn.Identity(), **own, given_mean=data.mean, given_std=data.std)

    (batch,) = data.plain_batches("validation")
    torch.testing.assert_close(net(batch.x_NCHW), batch.x_NCHW, rtol=1e-5, atol=1e-6)


def test_a_teacher_answers_as_it_does_at_home_wherever_it_is_asked(
    data: Data, prepared: PreparedData, elsewhere: Path, teacher: TrainedModel
) -> None:
    pixels_NCHW = torch.tensor(np.concatenate(data.evaluation.shards))
    expected = by_hand(elsewhere, pixels_NCHW)

    asked_NK, _ = soft_labels(load_trained(teacher, data, allow_code=False), data, "test")
    exported = float_model(teacher, data, allow_code=False)  # folded, and on pixels

    torch.testing.assert_close(asked_NK, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(exported(pixels_NCHW), expected, rtol=1e-3, atol=1e-3)
    assert teacher.info["normalization"] == {"mean": [MEAN], "std": [STD]}


def test_without_its_normalization_a_teacher_answers_something_else(
    data: Data, prepared: PreparedData, elsewhere: Path, teacher: TrainedModel, tmp_path: Path
) -> None:
    try:
        plain = taken(prepared, elsewhere, tmp_path / "plain", None)
    except TrainingError:  # no better than a coin
        return
    found, expected = (
        soft_labels(load_trained(one, data, allow_code=False), data, "validation")[0] for one in (plain, teacher)
    )
    assert not torch.allclose(found, expected, atol=0.1)


def test_other_statistics_are_another_teacher_for_the_cache(
    data: Data, prepared: PreparedData, elsewhere: Path, teacher: TrainedModel, tmp_path: Path
) -> None:
    near = taken(prepared, elsewhere, tmp_path / "near", {"mean": MEAN + 1, "std": STD})

    digests = [weights_digest(load_trained(one, data, allow_code=False)) for one in (teacher, near)]

    assert digests[0] != digests[1]


def test_a_student_learns_the_same_from_stored_answers_and_from_a_teacher_that_is_asked(
    prepared: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    losses = []
    for name in ("cached", "online"):
        (tmp_path / name).mkdir()
        config = DistillConfig(
            **NET,
            train=TRAIN,
            views=2,
            teacher_forward=name,
            **({"cache": {"dtype": "fp32"}} if name == "cached" else {}),
        )
        distill(config, prepared, teacher, tmp_path / name, How(seed=SEED))
        told = read_json(tmp_path / name / "distill.json")["rounds"][0]
        losses.append([epoch["loss"] for epoch in told["epochs"]])

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_layers_of_such_a_teacher_keep_their_names(
    data: Data, prepared: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    losses = [{"name": "features", "student_layer": "layer2", "teacher_layer": "layer3"}]

    distill(DistillConfig(**NET, train=TRAIN, losses=losses), prepared, teacher, tmp_path, How(seed=SEED))

    assert np.isfinite(read_json(tmp_path / "distill.json")["rounds"][0]["epochs"][0]["loss"])
    net = load_trained(teacher, data, allow_code=False)
    assert isinstance(net, Renormalized)
    assert as_named(net) is net.net
    assert as_named(net.net) is net.net


def test_a_teacher_that_is_tuned_further_keeps_its_normalization_and_its_way(
    data: Data, prepared: PreparedData, elsewhere: Path, tmp_path: Path
) -> None:
    normalization = {"mean": MEAN, "std": STD}
    teacher = taken(
        prepared, elsewhere, tmp_path / "t", normalization, train={**TRAIN, "epochs": 3}, keep_checkpoints=1
    )
    (tmp_path / "s").mkdir()

    distill(DistillConfig(**NET, train=TRAIN, teacher_curriculum={}), prepared, teacher, tmp_path / "s", How(seed=SEED))

    net = load_trained(teacher, data, allow_code=False)
    assert isinstance(net, Renormalized)
    found = predict(net, data.plain_batches("validation"))
    plain = replace(data, mean=(MEAN / 255,), std=(STD / 255,))
    torch.testing.assert_close(found, predict(net.net, plain.plain_batches("validation")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("normalization", "told"),
    [
        ({"mean": [1, 2, 3], "std": 4}, "teacher.normalization.mean has 3 numbers, and the images have 1 channel."),
        ({"mean": 1, "std": [4, 5]}, "teacher.normalization.std has 2 numbers"),
    ],
)
def test_numbers_for_other_channels_are_refused(
    prepared: PreparedData, elsewhere: Path, tmp_path: Path, normalization: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told.replace(".", r"\.")):
        taken(prepared, elsewhere, tmp_path / "t", normalization)


def test_a_teacher_of_other_classes_is_refused_with_both_numbers(elsewhere: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "four.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    four = prepared_with(tmp_path / "data", source=f"npz:{tmp_path / 'four.npz'}")

    with pytest.raises(
        ModelError, match=r"does not fit.*\n.*answers 10 classes, not 4: give weights that answer the data's"
    ):
        taken(four, elsewhere, tmp_path / "t", None)


def test_a_checkpoint_of_another_width_is_not_told_of_classes(
    prepared: PreparedData, elsewhere: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"does not fit.*\nName the model, args and classes"):
        taken(prepared, elsewhere, tmp_path / "t", None, args={"widths": [4, 4, 8, 16]})
