"""Data conditions: fewer training samples, and wrong labels, and that nothing else changes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from pipeline.artifacts import PreparedData
from pipeline.learning.data import Data
from pipeline.learning.label_noise import with_noise
from pipeline.recipe import DataConfig
from pipeline.stages.data import prepare_data
from targets.base import read_json
from targets.errors import DataError

SEED = 3


def prepared(directory: Path, **changes: Any) -> Path:
    prepare_data(DataConfig(**{"source": "digits", "calibration": 50, **changes}), SEED, directory)
    return directory


def split_of(directory: Path) -> dict[str, Any]:
    with np.load(directory / "split.npz") as split:
        return dict(split)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("whole"))


# --- wrong labels ------------------------------------------------------------------------------------------------------


@given(
    num_classes=st.integers(2, 12),
    num_samples=st.integers(1, 200),
    num_train=st.integers(1, 200),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
@settings(deadline=None)
def test_that_share_of_the_train_labels_is_another_class_and_no_other_label_changes(
    num_classes: int, num_samples: int, num_train: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, num_classes, num_samples)
    train = np.sort(rng.permutation(num_samples)[:num_train])

    noisy_N, num_replaced = with_noise(labels_N, train, share, num_classes, np.random.default_rng(seed))

    changed = np.flatnonzero(noisy_N != labels_N)
    assert len(changed) == num_replaced == round(share * len(train))
    assert set(changed) <= set(train)
    assert noisy_N.min() >= 0
    assert noisy_N.max() < num_classes


def test_each_of_the_other_classes_is_as_likely() -> None:
    labels_N = np.full(20_000, 2)

    noisy_N, _ = with_noise(labels_N, np.arange(20_000), 0.9, 5, np.random.default_rng(0))

    counts_K = np.bincount(noisy_N[noisy_N != 2], minlength=5)
    assert counts_K[2] == 0
    assert stats.chisquare(counts_K[[0, 1, 3, 4]]).pvalue > 1e-3


def test_noise_is_in_the_train_labels_that_training_reads_and_nowhere_else(whole: Path, tmp_path: Path) -> None:
    noisy = prepared(tmp_path, label_noise=0.4)

    clean_N, noisy_N = (np.load(directory / "train_y.npy") for directory in (whole, noisy))
    split = split_of(noisy)
    assert all(np.array_equal(split[name], indices) for name, indices in split_of(whole).items())
    changed = np.flatnonzero(clean_N != noisy_N)
    assert set(changed) <= set(split["train"])
    assert len(changed) == round(0.4 * len(split["train"]))
    told = read_json(noisy / "data.json")["condition"]
    assert told == {"train_share": 1.0, "label_noise": 0.4, "num_noisy_labels": len(changed), "seed": SEED}
    assert (whole / "evaluation" / "y.npy").read_bytes() == (noisy / "evaluation" / "y.npy").read_bytes()
    (batch,) = Data.load(PreparedData(noisy, "")).train_batches(epoch=0, seed=0, batch_size=10_000)
    assert np.array_equal(batch.labels_N.numpy(), noisy_N[split["train"]][batch.index_N.numpy()])


def test_labels_of_image_files_are_noisy_too(tmp_path: Path) -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
    for index, image_HWC in enumerate(pixels_NHWC):
        path = tmp_path / "images" / ("train", "test")[index % 2] / ("cat", "dog")[index // 20] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(path)
    files = {}
    for name, noise in (("clean", 0.0), ("noisy", 0.5)):
        config = DataConfig(source=f"image_folder:{tmp_path / 'images'}", image_size=16, workers=0, label_noise=noise)
        prepare_data(config, SEED, tmp_path / name)
        files[name] = read_json(tmp_path / name / "files.json")

    assert files["clean"]["test"] == files["noisy"]["test"]
    assert files["clean"]["train"]["paths"] == files["noisy"]["train"]["paths"]
    pairs = zip(files["clean"]["train"]["labels"], files["noisy"]["train"]["labels"], strict=True)
    assert sum(clean != noisy for clean, noisy in pairs) == 9  # half of the 18 that are not validation


# --- fewer samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_share_of_every_class_is_kept_and_the_others_are_in_no_split(
    whole: Path, tmp_path: Path, share: float
) -> None:
    kept, all_of_it = split_of(prepared(tmp_path, train_share=share)), split_of(whole)

    assert np.array_equal(kept["validation"], all_of_it["validation"])
    assert set(kept["train"]) < set(all_of_it["train"])
    assert set(kept["calibration"]) <= set(kept["train"])
    labels_N = np.load(whole / "train_y.npy")
    counts_K, before_K = (np.bincount(labels_N[split["train"]], minlength=10) for split in (kept, all_of_it))
    assert np.abs(counts_K - share * before_K).max() < 1.5
    assert read_json(tmp_path / "data.json")["num_train"] == round(share * len(all_of_it["train"]))


def test_what_is_left_out_decides_neither_mean_nor_std(tmp_path: Path) -> None:
    kept = prepared(tmp_path, train_share=0.2)

    pixels = np.load(kept / "train_x.npy")[split_of(kept)["train"]] / 255
    info = read_json(kept / "data.json")
    assert info["mean"] == pytest.approx(pixels.mean(axis=(0, 2, 3)))
    assert info["std"] == pytest.approx(pixels.std(axis=(0, 2, 3)))


def test_the_same_seed_keeps_the_same_samples_and_makes_the_same_labels_wrong(tmp_path: Path) -> None:
    one, two = (prepared(tmp_path / name, train_share=0.3, label_noise=0.2) for name in ("one", "two"))

    assert all(np.array_equal(split_of(one)[name], indices) for name, indices in split_of(two).items())
    assert (one / "train_y.npy").read_bytes() == (two / "train_y.npy").read_bytes()


def test_a_share_that_leaves_a_class_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training sample after the split.*data\.train_share"):
        prepared(tmp_path, train_share=0.005)


@pytest.mark.parametrize(
    "changes", [{"train_share": 0.0}, {"train_share": 1.1}, {"label_noise": 1.0}, {"label_noise": -0.1}]
)
def test_shares_that_cannot_be_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="should be"):
        DataConfig(source="digits", **changes)
