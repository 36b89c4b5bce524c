from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.calibration import NUM_HELD_OUT, Calibration, divide, image_input, read_calibration, split_batches
from pipeline.progress import Quiet
from targets.base import TensorSpec
from targets.errors import DataError, EdgestillError, ModelError, RecipeError


def spec(*shape: int | None, dtype: str = "float32", name: str = "image") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


NCHW = spec(None, 3, 8, 8)


def read(path: Path, *inputs: TensorSpec, **options: Any) -> Calibration:
    defaults: dict[str, Any] = {"num_samples": 8, "mean": None, "std": None, "resize": None, "progress": Quiet()}
    return read_calibration(path, inputs, **(defaults | options))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty images of one colour each: image i is (i, 2 i, 3 i) all over."""
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (12, 10), (i, 2 * i, 3 * i)).save(folder / f"{i:02}.png")
    return tmp_path / "images"


def test_images_are_normalised_in_pixel_units(images: Path) -> None:
    calibration = read(images, NCHW, mean=[10.0, 20.0, 30.0], std=[2.0])

    assert (len(calibration.samples), len(calibration.held_out)) == (8, 12)
    for sample in calibration.samples:
        (x,) = sample.values()
        i = x[0, 0, 0, 0] * 2 + 10
        expected = (np.array([i, 2 * i, 3 * i]) - [10, 20, 30]) / 2
        np.testing.assert_allclose(x, np.broadcast_to(expected[:, None, None], (1, 3, 8, 8)), atol=1e-5)
        assert x.dtype == np.float32


def test_a_uint8_input_takes_the_pixels_in_its_own_layout(images: Path) -> None:
    calibration = read(images, spec(None, 8, 8, 3, dtype="uint8"))

    (x,) = calibration.samples[0].values()
    assert (x.shape, x.dtype) == ((1, 8, 8, 3), np.uint8)
    assert x[0, 3, 4].tolist() == [x[0, 0, 0, 0], 2 * x[0, 0, 0, 0], 3 * x[0, 0, 0, 0]]


def test_the_same_folder_gives_the_same_samples_and_no_image_is_both_used_and_held_out(images: Path) -> None:
    first, second = (read(images, NCHW, mean=[0.0], std=[1.0]) for _ in range(2))

    def colours(samples: tuple[Any, ...]) -> list[float]:
        return [float(sample["image"][0, 0, 0, 0]) for sample in samples]

    assert colours(first.samples) == colours(second.samples)
    assert sorted(colours(first.samples) + colours(first.held_out)) == list(range(20))


@given(num_rows=st.integers(1, 300), num_samples=st.integers(1, 200))
def test_dividing_loses_and_repeats_nothing(num_rows: int, num_samples: int) -> None:
    rows = [{"x": np.array([i])} for i in range(num_rows)]

    calibration = divide(rows, num_samples, how="")

    used = [int(sample["x"][0]) for sample in (*calibration.samples, *calibration.held_out)]
    assert used == list(range(len(used)))
    assert 1 <= len(calibration.samples) <= num_samples
    assert len(calibration.held_out) <= NUM_HELD_OUT
    assert calibration.held_out or num_rows < 5


@given(num_rows=st.integers(1, 40), batch=st.integers(1, 5))
def test_batches_are_whole_and_rows_of_all_inputs_stay_together(num_rows: int, batch: int) -> None:
    arrays = {"a": np.arange(num_rows), "b": 10 * np.arange(num_rows)}
    if num_rows < batch:
        with pytest.raises(DataError, match="at once"):
            split_batches(arrays, batch, 100)
        return

    batches = split_batches(arrays, batch, 100)

    assert [len(one["a"]) for one in batches] == [batch] * (num_rows // batch)
    assert all((one["b"] == 10 * one["a"]).all() for one in batches)


def test_unreadable_images_are_named_and_counted_and_refused_above_the_limit(images: Path) -> None:
    (images / "broken.jpg").write_bytes(b"no image")
    calibration = read(images, NCHW, mean=[0.0], std=[1.0])
    for i in range(5):
        (images / f"broken-{i}.jpg").write_bytes(b"")

    assert len(calibration.notes) == 1
    assert "1 of 21 images" in calibration.notes[0]
    assert "broken.jpg" in calibration.notes[0]
    refuse(lambda: read(images, NCHW, mean=[0.0], std=[1.0]), DataError, r"6 of 26 images cannot be read")


def refuse(act: Callable[[], object], kind: type[EdgestillError], message: str) -> None:
    with pytest.raises(kind, match=message) as refusal:
        act()
    assert len(str(refusal.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "message"),
    [
        ((NCHW,), {}, RecipeError, "--mean 0 --std 255"),
        ((NCHW,), {"mean": [1.0]}, RecipeError, "--std"),
        ((NCHW,), {"mean": [1.0, 2.0], "std": [1.0]}, RecipeError, "3 channels"),
        ((NCHW,), {"mean": [float("nan")], "std": [1.0]}, RecipeError, "finite"),
        ((NCHW,), {"mean": [0.0], "std": [0.0]}, RecipeError, "above 0"),
        ((NCHW,), {"mean": [0.0], "std": [1.0], "resize": 7}, RecipeError, "does not fit in"),
        ((spec(None, 3, 8, 8, dtype="uint8"),), {"mean": [0.0], "std": [1.0]}, RecipeError, "as they are"),
        ((spec(None, 3, None, None),), {"mean": [0.0], "std": [1.0]}, ModelError, "--resize"),
        ((spec(None, 12),), {}, ModelError, "NPZ"),
        ((NCHW, spec(None, 4, name="extra")), {}, ModelError, "'extra'"),
    ],
)
def test_what_images_cannot_feed_is_refused(
    inputs: tuple[TensorSpec, ...],
    options: dict[str, Any],
    kind: type[EdgestillError],
    message: str,
) -> None:
    given = {"mean": None, "std": None, "resize": None} | options

    refuse(lambda: image_input(inputs, **given), kind, message)


def test_a_free_size_is_what_resize_says() -> None:
    _, preprocessing = image_input([spec(None, None, None, 1)], mean=[0.0], std=[1.0], resize=32)

    assert (preprocessing.mode, preprocessing.resize, preprocessing.crop) == ("L", 32, (32, 32))


def test_npz_rows_become_samples_of_every_input(tmp_path: Path) -> None:
    arrays = {"b": np.arange(10.0), "a": np.arange(20.0).reshape(10, 2)}
    np.savez(tmp_path / "c.npz", **arrays)

    calibration = read(tmp_path / "c.npz", spec(None, 2, name="a"), spec(None, name="b"))

    assert (len(calibration.samples), len(calibration.held_out)) == (8, 2)
    assert all(sample["a"].tolist() == [[2 * i, 2 * i + 1] for i in sample["b"]] for sample in calibration.samples)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((4, 1))}, "holds y; the graph's inputs are x"),
        ({"x": np.zeros((4, 1)), "z": np.zeros(4)}, "one array an input"),
        ({"x": np.zeros((0, 1))}, "x 0"),
        ({"x": np.array(1.0)}, "x 0"),
        ({"x": np.array([{}], dtype=object)}, "cannot be read as NPZ"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", **arrays)

    refuse(lambda: read(tmp_path / "c.npz", spec(None, 1, name="x")), DataError, message)


def test_damaged_absent_and_empty_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 3)))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:200] + bytes(8) + whole[208:]):
        path.write_bytes(damaged)
        refuse(lambda: read(path, spec(None, 3, name="x")), DataError, "cannot be read as NPZ")
    (tmp_path / "empty").mkdir()

    refuse(lambda: read(tmp_path / "absent", NCHW), DataError, "no such folder")
    refuse(lambda: read(tmp_path / "empty", NCHW, mean=[0.0], std=[1.0]), DataError, "no image in it")
    refuse(lambda: read(path, NCHW, mean=[0.0]), RecipeError, "are for images")
