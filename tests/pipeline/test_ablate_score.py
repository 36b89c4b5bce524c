"""What an arm is scored by: calibration against computations of others, corruptions against what they are defined as."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.metrics import log_loss
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.generalization import expected_calibration_error, negative_log_likelihood
from pipeline.how import How
from pipeline.learning.corruptions import BLUR_SIGMA, CORRUPTIONS, MOVED_BY, NOISE_STD, corrupted
from pipeline.learning.data import Data
from pipeline.learning.models import save_weights
from pipeline.learning.shift import shifted_batches
from pipeline.learning.trained import load_trained
from pipeline.recipe import DataConfig, ShiftConfig
from pipeline.stages.ablation_score import score_arm, score_teacher
from pipeline.stages.data import prepare_data
from targets.base import read_json
from targets.errors import DataError

SIDE = 32


# --- calibration -------------------------------------------------------------------------------------------------------


def guo_2017(logits_NK: Any, labels_N: Any, num_bins: int) -> float:
    """Equations 2, 3 and 5 of the paper, sample by sample."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for logits_K, label in zip(logits_NK.tolist(), labels_N.tolist(), strict=True):
        weights = [math.exp(logit - max(logits_K)) for logit in logits_K]
        confidence = max(weights) / sum(weights)
        (place,) = (m for m in range(num_bins) if m / num_bins < confidence <= (m + 1) / num_bins)
        bins[place].append((confidence, logits_K.index(max(logits_K)) == label))
    total = 0.0
    for members in filter(None, bins):
        accuracy = sum(right for _, right in members) / len(members)
        confidence = sum(sure for sure, _ in members) / len(members)
        total += len(members) / len(labels_N) * abs(accuracy - confidence)
    return total


@given(
    seed=st.integers(0, 2**31 - 1), num_classes=st.integers(2, 12), scale=st.floats(0.01, 30), bins=st.integers(1, 20)
)
@settings(deadline=None, max_examples=50)
def test_the_calibration_error_is_the_papers(seed: int, num_classes: int, scale: float, bins: int) -> None:
    rng = np.random.default_rng(seed)
    logits_NK = scale * rng.normal(size=(60, num_classes))
    labels_N = rng.integers(0, num_classes, 60)

    assert expected_calibration_error(logits_NK, labels_N, bins) == pytest.approx(
        guo_2017(logits_NK, labels_N, bins), abs=1e-9
    )


def test_a_model_that_is_as_often_right_as_it_says_has_no_error_and_a_sure_one_that_errs_has() -> None:
    logits_NK = np.tile([math.log(3.0), 0.0], (400, 1))  # 0.75 for class 0
    labels_N = np.repeat([0, 1], [300, 100])

    assert expected_calibration_error(logits_NK, labels_N) == pytest.approx(0)
    assert expected_calibration_error(1000 * logits_NK, labels_N) == pytest.approx(0.25)


@given(seed=st.integers(0, 2**31 - 1), num_classes=st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_the_likelihood_is_scikit_learns(seed: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits_NK, labels_N = 4 * rng.normal(size=(50, num_classes)), rng.integers(0, num_classes, 50)

    p_NK = torch.tensor(logits_NK).softmax(1).numpy()
    expected = log_loss(labels_N, p_NK, labels=np.arange(num_classes))

    assert negative_log_likelihood(logits_NK, labels_N) == pytest.approx(expected)


# --- corruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> torch.Tensor:
    """Not near black or white, so that hardly a pixel is clipped."""
    return 0.3 + 0.2 * torch.rand(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_same_each_time_worse_with_each_severity_and_an_image(
    name: str, images: torch.Tensor
) -> None:
    by_severity = [corrupted(name, severity, images, 0) for severity in range(1, 6)]

    assert torch.equal(corrupted(name, 3, images, 0), by_severity[2])
    moved = [float((worse - images).square().mean()) for worse in by_severity]
    assert moved[0] > 0
    assert name == "translate" or moved == sorted(moved)
    for worse in by_severity:
        assert worse.shape == images.shape
        assert torch.equal((worse * 255).round() / 255, worse)
        assert 0 <= float(worse.min()) <= float(worse.max()) <= 1


def test_noise_has_the_strength_that_it_says_and_is_another_in_another_batch(images: torch.Tensor) -> None:
    noise = corrupted("gaussian_noise", 2, images, 0) - images

    assert float(noise.std()) == pytest.approx(NOISE_STD[1], rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=2e-3)
    assert not torch.equal(corrupted("gaussian_noise", 2, images, 500) - images, noise)


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_blur_is_scipys(level: int, side: int) -> None:
    x_NCHW = torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = BLUR_SIGMA[level] * side / SIDE

    ours = CORRUPTIONS["gaussian_blur"](x_NCHW, level, torch.Generator())

    theirs = ndimage.gaussian_filter(
        x_NCHW.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
    )
    assert np.allclose(ours.numpy(), theirs, atol=1e-12)


def test_translation_moves_every_image_and_lets_zeros_in(images: torch.Tensor) -> None:
    pixels = MOVED_BY[2]
    moved_NCHW = CORRUPTIONS["translate"](images, 2, torch.Generator().manual_seed(0))

    ways = set()
    for before_CHW, after_CHW in zip(images.numpy(), moved_NCHW.numpy(), strict=True):
        fits = [
            (down, right)
            for down in (-pixels, pixels)
            for right in (-pixels, pixels)
            if np.array_equal(after_CHW, ndimage.shift(before_CHW, (0, down, right), order=0))
        ]
        assert len(fits) == 1
        ways.add(fits[0])
    assert len(ways) == 4


def test_contrast_keeps_an_images_mean_and_brightness_its_differences(images: torch.Tensor) -> None:
    generator = torch.Generator()
    flat, bright = (CORRUPTIONS[name](images, 2, generator) for name in ("contrast", "brightness"))

    assert torch.allclose(flat.mean((2, 3)), images.mean((2, 3)))
    assert torch.allclose(flat.std((2, 3)), 0.45 * images.std((2, 3)))
    assert torch.allclose(bright - images, torch.tensor(0.3))


# --- test sets from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    directory = tmp_path_factory.mktemp("digits")
    prepare_data(DataConfig(source="digits", test=0.5, calibration=32), 0, directory)
    return PreparedData(directory, "")


def save_npz(path: Path, side: int = 8, num_classes: int = 10, **more: Any) -> str:
    rng = np.random.default_rng(5)
    x_NHW, y_N = rng.integers(0, 256, (60, side, side), dtype=np.uint8), np.arange(60) % num_classes
    np.savez(path, x_train=x_NHW, y_train=y_N, **more)
    return f"npz:{path}"


def batches_of(shift: ShiftConfig, prepared: PreparedData) -> list[Any]:
    return list(shifted_batches(shift, Data.load(prepared), DataConfig(source="digits"), prepared, allow_code=False))


def test_another_source_is_normalised_as_the_data_and_read_whole_where_it_has_no_test_part(
    digits: PreparedData, tmp_path: Path
) -> None:
    x_NHW, y_N = np.full((3, 8, 8), 255, np.uint8), np.array([0, 1, 9])
    whole, divided = save_npz(tmp_path / "a.npz"), save_npz(tmp_path / "b.npz", x_test=x_NHW, y_test=y_N)

    (all_of_it,), (its_test,) = (batches_of(ShiftConfig(source=source), digits) for source in (whole, divided))

    assert (len(all_of_it.labels_N), its_test.labels_N.tolist()) == (60, [0, 1, 9])
    white = (1 - digits.info["mean"][0]) / digits.info["std"][0]
    assert torch.allclose(its_test.x_NCHW, torch.full((3, 1, 8, 8), white))


@pytest.mark.parametrize(
    ("changes", "words"), [({"side": 9}, "images of shape"), ({"num_classes": 7}, "Give the same classes")]
)
def test_a_source_that_does_not_fit_is_refused(
    digits: PreparedData, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    shift = ShiftConfig(source=save_npz(tmp_path / "a.npz", **changes))

    with pytest.raises(DataError, match=words) as refused:
        batches_of(shift, digits)

    assert len(str(refused.value).splitlines()) <= 3


def test_image_files_for_data_in_arrays_are_refused(digits: PreparedData, tmp_path: Path) -> None:
    for name in map(str, range(10)):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")

    with pytest.raises(DataError, match="image files, but the data are arrays"):
        batches_of(ShiftConfig(source=f"image_folder:{tmp_path}"), digits)


# --- the stage ---------------------------------------------------------------------------------------------------------


def test_last_and_best_weights_are_scored_apart_and_agree_with_the_teacher_as_often_as_they_do(
    built: Any, tmp_path: Path
) -> None:
    prepared = PreparedData(built.stage("data"), "")
    teacher, student = (TrainedModel(built.stage(name), "", name) for name in ("teacher", "distill"))
    data, how, shifts = Data.load(prepared), How(), (ShiftConfig(corruption="contrast", severity=5),)
    for name in ("t", "s", "same"):
        (tmp_path / name).mkdir()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "distill.json").write_text((student.dir / "distill.json").read_text())
    (tmp_path / "student" / "model.safetensors").write_bytes(student.weights_path.read_bytes())
    worse = load_trained(student, data, allow_code=False)
    nn.init.zeros_(next(module for module in worse.modules() if isinstance(module, nn.Linear)).weight)
    save_weights(worse, tmp_path / "student" / "last.safetensors")
    changed = TrainedModel(tmp_path / "student", "", "distill")

    score_teacher(shifts, DataConfig(source="digits"), prepared, teacher, tmp_path / "t", how)
    as_teacher = TrainedModel(tmp_path / "t", "", "teacher")
    score_arm(shifts, DataConfig(source="digits"), prepared, as_teacher, changed, tmp_path / "s", how)

    told, scores = read_json(tmp_path / "t" / "scores.json"), read_json(tmp_path / "s" / "scores.json")
    logits_NK = np.load(tmp_path / "t" / "test.npy")
    labels_N = data.test_labels.numpy()
    assert told["test_top1"] == pytest.approx((logits_NK.argmax(1) == labels_N).mean())
    assert scores["best"]["test_top1"] > scores["last"]["test_top1"] + 0.2  # one class for all
    assert scores["last"]["test_top1"] == pytest.approx(
        np.bincount(labels_N, minlength=10).max() / len(labels_N), abs=0.1
    )
    assert scores["best"]["agreement"] > scores["last"]["agreement"]
    for one in scores.values():
        assert one["gap"] == pytest.approx(one["train_top1"] - one["test_top1"])
        assert set(one["shift"]) == {"contrast 5"}
    assert scores["best"]["shift"]["contrast 5"] < scores["best"]["test_top1"]
