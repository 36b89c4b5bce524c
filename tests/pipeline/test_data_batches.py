"""Batches: the same on every run, augmented as told, and labelled with the right image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.artifacts import PreparedData
from pipeline.learning.data import Batch, Data, batch_slices
from pipeline.recipe import AugmentConfig, DataConfig
from pipeline.stages.data import prepare_data
from targets.errors import DataError


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Noise whose first pixel is the sample's number and whose label is its remainder by 4."""
    directory = tmp_path_factory.mktemp("arrays")
    x = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    x[:, 0, 0] = np.arange(120)
    np.savez(
        directory / "a.npz", x_train=x[:90], y_train=np.arange(90) % 4, x_test=x[90:], y_test=np.arange(90, 120) % 4
    )
    config = DataConfig(source=f"npz:{directory / 'a.npz'}", calibration=10, augment=AugmentConfig(crop=2, flip=True))
    prepare_data(config, seed=0, out_dir=directory / "out")
    return Data.load(PreparedData(directory / "out", "digest"))


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for number in range(48):
        folder = directory / "images" / ("test" if number % 3 == 0 else "train") / "abcd"[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + number, 36)).save(folder / f"{number:02d}.jpg")
    config = DataConfig(source=f"image_folder:{directory / 'images'}", image_size=16, workers=2)
    prepare_data(config, seed=0, out_dir=directory / "out")
    return directory


def loaded(directory: Path, workers: int) -> Data:
    prepared = PreparedData(directory / "out", "digest")
    prepared.__dict__["info"] = {**prepared.info, "workers": workers}
    return Data.load(prepared)


def pixels_of(data: Data, batch: Batch) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((batch.x_NCHW * std + mean) * 255).round().to(torch.uint8)


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x_NCHW", "labels_N", "index_N"))
    )


@given(num_samples=st.integers(0, 300), batch_size=st.integers(2, 40))
def test_slices_cover_all_samples_once_and_none_holds_a_single_one(num_samples: int, batch_size: int) -> None:
    slices = batch_slices(num_samples, batch_size)

    covered = [index for part in slices for index in range(part.start, part.stop)]
    assert covered == list(range(num_samples))
    assert num_samples == 1 or all(part.stop - part.start > 1 for part in slices)


def test_an_epoch_visits_each_training_sample_once_with_its_own_label(arrays: Data) -> None:
    epoch = joined(list(arrays.train_batches(epoch=0, seed=0, batch_size=16)))
    plain = joined(list(arrays.plain_batches("train", batch_size=7)))

    assert sorted(epoch.index_N.tolist()) == list(range(arrays.num_train))
    assert torch.equal(epoch.labels_N, plain.labels_N[epoch.index_N])
    assert torch.equal(plain.index_N, torch.arange(arrays.num_train))
    assert torch.equal(pixels_of(arrays, plain)[:, 0, 0, 0] % 4, plain.labels_N)


def test_batches_are_a_function_of_seed_and_epoch_alone(arrays: Data) -> None:
    first = joined(list(arrays.train_batches(epoch=3, seed=1, batch_size=16)))
    torch.manual_seed(99)
    again = joined(list(arrays.train_batches(epoch=3, seed=1, batch_size=16)))
    others = [joined(list(arrays.train_batches(epoch=e, seed=s, batch_size=16))) for e, s in ((4, 1), (3, 2), (1, 3))]

    assert torch.equal(first.x_NCHW, again.x_NCHW)
    assert torch.equal(first.index_N, again.index_N)
    assert not any(torch.equal(first.index_N, other.index_N) for other in others)


def test_batches_leave_the_global_random_state_alone(arrays: Data, image_files: Path) -> None:
    for data in (arrays, loaded(image_files, workers=0), loaded(image_files, workers=1)):
        before = torch.get_rng_state()
        list(data.train_batches(epoch=0, seed=0, batch_size=16))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_curriculum_is_shown_just_the_samples_it_names(arrays: Data) -> None:
    shown = torch.tensor([5, 1, 40, 7, 9])

    epoch = joined(list(arrays.train_batches(epoch=0, seed=0, batch_size=2, shown=shown)))

    assert sorted(epoch.index_N.tolist()) == [1, 5, 7, 9, 40]
    assert arrays.num_train_batches(2, len(shown)) == 2


def test_the_training_pixels_are_normalised_to_mean_0_and_std_1(arrays: Data) -> None:
    x_NCHW = joined(list(arrays.plain_batches("train"))).x_NCHW.double()

    assert x_NCHW.mean().item() == pytest.approx(0, abs=1e-6)
    assert x_NCHW.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_calibration_samples_are_training_samples_and_validation_samples_are_not(arrays: Data) -> None:
    first_pixels = {
        split: set(pixels_of(arrays, joined(list(arrays.plain_batches(split))))[:, 0, 0, 0].tolist())
        for split in ("train", "validation", "calibration", "test")
    }

    assert len(first_pixels["calibration"]) == 10
    assert first_pixels["calibration"] <= first_pixels["train"]
    assert not first_pixels["validation"] & first_pixels["train"]
    assert first_pixels["test"] == set(range(90, 120))


def test_a_split_that_does_not_exist_is_refused(arrays: Data) -> None:
    with pytest.raises(DataError, match="calibration"):
        list(arrays.plain_batches("holdout"))


def test_files_come_within_one_level_of_the_pixels_that_the_device_gets(image_files: Path) -> None:
    data = loaded(image_files, workers=0)

    test, evaluation = joined(list(data.plain_batches("test"))), joined(list(data.evaluation_batches(batch_size=5)))

    levels = (pixels_of(data, test).int() - pixels_of(data, evaluation).int()).abs()
    assert torch.equal(test.labels_N, evaluation.labels_N)
    assert levels.max() <= 1


def test_views_of_files_do_not_depend_on_the_number_of_workers(image_files: Path) -> None:
    epochs = [
        joined(list(loaded(image_files, workers).train_batches(epoch=1, seed=0, batch_size=9))) for workers in (0, 2)
    ]

    assert torch.equal(epochs[0].x_NCHW, epochs[1].x_NCHW)
    assert torch.equal(epochs[0].index_N, epochs[1].index_N)


def test_a_file_is_seen_otherwise_in_each_epoch(image_files: Path) -> None:
    data = loaded(image_files, workers=0)
    views = [joined(list(data.train_batches(epoch=epoch, seed=0, batch_size=9))) for epoch in (0, 1)]

    in_order = [view.x_NCHW[view.index_N.argsort()] for view in views]

    assert not any(torch.equal(first, second) for first, second in zip(*in_order, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_is_named_in_three_lines(image_files: Path, tmp_path: Path, workers: int) -> None:
    data = loaded(image_files, workers)
    gone = image_files / "images" / "test" / "a" / "00.jpg"
    gone.rename(tmp_path / "00.jpg")

    try:
        with pytest.raises(DataError, match=r"00\.jpg cannot be read") as caught:
            list(data.plain_batches("test"))
    finally:
        (tmp_path / "00.jpg").rename(gone)
    assert len(str(caught.value).splitlines()) <= 3
