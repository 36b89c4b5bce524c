"""Stage data: the division, the statistics and the files it leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.device.preprocess import decode, geometric, load_evaluation
from pipeline.learning.division import stratified
from pipeline.recipe import AugmentConfig, DataConfig
from pipeline.stages import data as stage
from pipeline.stages.data import prepare_data
from targets.base import Preprocessing
from targets.errors import DataError


def info_of(directory: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((directory / "data.json").read_text())
    return info


def split_of(directory: Path) -> dict[str, Any]:
    with np.load(directory / "split.npz") as split:
        return dict(split)


def save_npz(path: Path, **changes: Any) -> DataConfig:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (60, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (9, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(9) % 3,
    }
    np.savez(path, **{**arrays, **changes})
    return DataConfig(source=f"npz:{path}", calibration=7)


def save_folder(root: Path, count: int = 10, mode: str = "RGB") -> DataConfig:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{index:02d}.jpg")
    return DataConfig(source=f"image_folder:{root}", image_size=16, validation=0.2, workers=2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("digits")
    prepare_data(DataConfig(source="digits", calibration=50), seed=3, out_dir=out_dir)
    return out_dir


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None)
def test_a_stratified_choice_has_each_classs_share_up_to_one_sample(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels_N = np.repeat(np.arange(len(counts)), counts)
    num_chosen = round(fraction * len(labels_N))

    chosen = stratified(labels_N, num_chosen, np.random.default_rng(seed))

    assert len(set(chosen.tolist())) == num_chosen
    share_K = np.array(counts) * num_chosen / len(labels_N)
    assert np.abs(np.bincount(labels_N[chosen], minlength=len(counts)) - share_K).max() <= 1


def test_train_and_validation_divide_the_training_part_and_calibration_lies_in_train(digits: Path) -> None:
    split, info = split_of(digits), info_of(digits)

    together = np.sort(np.concatenate([split["train"], split["validation"]]))
    assert np.array_equal(together, np.arange(len(np.load(digits / "train_y.npy"))))
    assert set(split["calibration"]) < set(split["train"])
    assert (info["num_calibration"], info["num_test"]) == (50, 359)
    assert info["num_train"] + info["num_validation"] + info["num_test"] == 1797


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(digits: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        prepare_data(DataConfig(source="digits", calibration=50), seed=seed, out_dir=tmp_path / str(seed))

    for path in sorted(path for path in digits.rglob("*") if path.is_file() and path.suffix != ".npz"):
        assert (tmp_path / "3" / path.relative_to(digits)).read_bytes() == path.read_bytes()
    assert all(np.array_equal(split_of(tmp_path / "3")[name], indices) for name, indices in split_of(digits).items())
    assert not np.array_equal(split_of(tmp_path / "4")["train"], split_of(digits)["train"])


def test_mean_and_std_are_of_the_train_split_alone(tmp_path: Path) -> None:
    config = save_npz(tmp_path / "a.npz")

    prepare_data(config, seed=0, out_dir=tmp_path / "out")

    pixels = np.load(tmp_path / "out" / "train_x.npy")[split_of(tmp_path / "out")["train"]] / 255
    assert info_of(tmp_path / "out")["mean"] == pytest.approx(pixels.mean(axis=(0, 2, 3)))
    assert info_of(tmp_path / "out")["std"] == pytest.approx(pixels.std(axis=(0, 2, 3)))


def test_the_test_part_changes_nothing_but_the_evaluation_set(tmp_path: Path) -> None:
    prepare_data(save_npz(tmp_path / "a.npz"), seed=0, out_dir=tmp_path / "one")
    changed = save_npz(tmp_path / "a.npz", x_test=np.zeros((9, 6, 5, 3), np.uint8))
    prepare_data(changed, seed=0, out_dir=tmp_path / "two")

    assert info_of(tmp_path / "one") == info_of(tmp_path / "two")
    for name in ("train_x.npy", "train_y.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_validation_part_of_the_data_is_kept_and_trained_on_only_without_validation(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).integers(0, 256, (6, 6, 5, 3), dtype=np.uint8), np.arange(6) % 3
    config = save_npz(tmp_path / "a.npz", x_val=x, y_val=y)
    prepare_data(config, seed=0, out_dir=tmp_path / "kept")
    prepare_data(config.model_copy(update={"validation": 0.0}), seed=0, out_dir=tmp_path / "all")

    assert np.array_equal(
        np.load(tmp_path / "kept" / "train_x.npy")[split_of(tmp_path / "kept")["validation"]], x.transpose(0, 3, 1, 2)
    )
    assert (info_of(tmp_path / "all")["num_train"], info_of(tmp_path / "all")["num_validation"]) == (66, 0)


def test_the_encoded_samples_decode_to_the_evaluation_pixels(digits: Path) -> None:
    evaluation = load_evaluation(digits / "evaluation")

    pixels = np.stack([geometric(decode(data, "L"), evaluation.preprocessing) for data in evaluation.encoded()])

    assert len(pixels) == 64
    assert np.array_equal(pixels.transpose(0, 3, 1, 2), evaluation.shards[0][list(evaluation.encoded_index)])


def test_the_evaluation_set_is_sharded_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHARD_BYTES", 64 * 16 * 16 * 3)
    config = save_folder(tmp_path / "images", count=50)

    prepare_data(config, seed=0, out_dir=tmp_path / "out")

    evaluation = load_evaluation(tmp_path / "out" / "evaluation")
    assert [len(shard) for shard in evaluation.shards] == [64, 36]


def test_image_files_are_laid_out_as_the_device_sees_them(tmp_path: Path) -> None:
    config = save_folder(tmp_path / "images")

    prepare_data(config, seed=0, out_dir=tmp_path / "out")

    info, evaluation = info_of(tmp_path / "out"), load_evaluation(tmp_path / "out" / "evaluation")
    path = tmp_path / "images" / "test" / "cat" / "03.jpg"
    assert (info["storage"], info["channels"], info["height"]) == ("files", 3, 16)
    assert info["augment"] == {"crop": 0, "resized_crop": True, "flip": True, "erase": 0.0}
    assert evaluation.encoded()[3] == path.read_bytes()
    expected = geometric(decode(path.read_bytes(), "RGB"), Preprocessing(resize=18, crop=(16, 16)))
    assert np.array_equal(evaluation.shards[0][3], expected.transpose(2, 0, 1))


def test_grey_image_files_have_one_channel(tmp_path: Path) -> None:
    prepare_data(save_folder(tmp_path / "images", mode="L"), seed=0, out_dir=tmp_path / "out")

    assert (info_of(tmp_path / "out")["mode"], info_of(tmp_path / "out")["channels"]) == ("L", 1)


def test_unreadable_images_are_named_counted_and_left_out(tmp_path: Path) -> None:
    config = save_folder(tmp_path / "images")
    broken = tmp_path / "images" / "train" / "dog" / "04.jpg"
    broken.write_bytes(broken.read_bytes()[:200])

    prepare_data(config.model_copy(update={"max_unreadable": 0.1}), seed=0, out_dir=tmp_path / "out")

    info = info_of(tmp_path / "out")
    assert [skipped["path"] for skipped in info["skipped"]] == [str(broken)]
    assert info["num_train"] + info["num_validation"] == 19
    assert str(broken) not in json.loads((tmp_path / "out" / "files.json").read_text())["train"]["paths"]


def test_too_many_unreadable_images_are_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    config = save_folder(tmp_path / "images")
    broken = tmp_path / "images" / "test" / "cat" / "00.jpg"
    broken.write_bytes(b"")

    with pytest.raises(DataError, match=r"1 of 40 images are unreadable, first .*cat/00\.jpg") as caught:
        prepare_data(config, seed=0, out_dir=tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test": 0.0}, "Raise data.test"),
        ({"validation": 0.0001}, "set it to 0"),
        ({"validation": 0.9999}, "no training sample after the split"),
        ({"image_size": 32}, "Drop data.image_size"),
    ],
)
def test_a_division_that_leaves_a_part_empty_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    config = DataConfig(source="digits").model_copy(update=changes)

    with pytest.raises(DataError, match=reason):
        prepare_data(config, seed=0, out_dir=tmp_path / "out")


def test_image_files_need_a_size(tmp_path: Path) -> None:
    config = save_folder(tmp_path / "images").model_copy(update={"image_size": None})

    with pytest.raises(DataError, match=r"Set data\.image_size"):
        prepare_data(config, seed=0, out_dir=tmp_path / "out")


def test_constant_images_are_refused(tmp_path: Path) -> None:
    config = save_npz(tmp_path / "a.npz", x_train=np.full((60, 6, 5, 3), 7, np.uint8))

    with pytest.raises(DataError, match="are equal"):
        prepare_data(config, seed=0, out_dir=tmp_path / "out")


def test_the_recipes_augmentation_goes_before_the_data_sets_own(tmp_path: Path) -> None:
    config = save_npz(tmp_path / "a.npz").model_copy(update={"augment": AugmentConfig(crop=2, flip=True, erase=0.5)})

    prepare_data(config, seed=0, out_dir=tmp_path / "out")

    assert info_of(tmp_path / "out")["augment"] == {"crop": 2, "resized_crop": False, "flip": True, "erase": 0.5}


def test_absent_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = save_folder(tmp_path / "images")
    shutil.rmtree(tmp_path / "images")

    with pytest.raises(DataError, match="no such folder"):
        prepare_data(config, seed=0, out_dir=tmp_path / "out", offline=True)
    assert not (tmp_path / "out").exists()
