"""The readers: what they accept, and what they refuse in three lines."""

import io
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.learning.sources import Arrays, Files, Source, locate, read_source, vision
from pipeline.learning.sources.npz import source_from_arrays
from pipeline.recipe import DataConfig
from targets.errors import DataError, RecipeError


def read(source: str, root: Path = Path("data"), *, allow_code: bool = False) -> Source:
    return read_source(DataConfig(source=source, root=root), allow_code=allow_code)


def keras_arrays(num_train: int = 12, num_test: int = 6, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (num_train, 5, 4), dtype=np.uint8),
        "y_train": np.arange(num_train) % 3,
        "x_test": rng.integers(0, 256, (num_test, 5, 4), dtype=np.uint8),
        "y_test": np.arange(num_test) % 3,
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def save_npz(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path, **arrays)
    return f"npz:{path}"


def save_images(directory: Path, classes: list[str], count: int = 2) -> None:
    for number, name in enumerate(classes):
        (directory / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (6, 5), (number * 20, index, 0)).save(directory / name / f"{index}.png")


def refusal(source: str, root: Path = Path("data")) -> str:
    with pytest.raises(DataError) as caught:
        read(source, root)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


# embedded


def test_mnist_5k_is_five_hundred_images_of_each_digit() -> None:
    source = read("mnist_5k")

    assert isinstance(source.train, Arrays)
    assert source.train.x_NCHW.shape == (5000, 1, 28, 28)
    assert np.bincount(source.train.labels_N).tolist() == [500] * 10
    assert source.test is None


def test_digits_are_scikit_learns_stretched_to_the_full_range() -> None:
    source = read("digits")
    reference = load_digits()

    assert isinstance(source.train, Arrays)
    assert np.abs(source.train.x_NCHW[:, 0] * (16 / 255) - reference.images).max() < 0.05
    assert np.array_equal(source.train.labels_N, reference.target)


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    assert "image_folder:PATH" in refusal("mnist5k")


# npz


@pytest.mark.parametrize("shape", [(12, 5, 4), (12, 5, 4, 1), (12, 1, 5, 4)])
def test_one_channel_arrays_are_read_whatever_their_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.arange(12 * 20, dtype=np.uint8).reshape(12, 5, 4)

    source = read(save_npz(tmp_path / "a.npz", **keras_arrays(x_train=pixels.reshape(shape))))

    assert isinstance(source.train, Arrays)
    assert np.array_equal(source.train.x_NCHW, pixels[:, np.newaxis])
    assert source.classes == ("0", "1", "2")


def test_colour_images_with_channels_last_become_channels_first(tmp_path: Path) -> None:
    x_NHWC = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)

    source = read(save_npz(tmp_path / "a.npz", **keras_arrays(x_train=x_NHWC, x_test=x_NHWC[:6])))

    assert isinstance(source.train, Arrays)
    assert np.array_equal(source.train.x_NCHW[3, 2], x_NHWC[3, :, :, 2])


def test_medmnist_keys_are_read_with_their_validation_part(tmp_path: Path) -> None:
    arrays = {
        f"{part}_{kind}": np.zeros((6, 5, 4), np.uint8) if kind == "images" else np.arange(6)[:, np.newaxis] % 2
        for part in ("train", "val", "test")
        for kind in ("images", "labels")
    }

    source = read(save_npz(tmp_path / "med.npz", **arrays))

    assert source.validation is not None
    assert source.validation.labels_N.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x_train": np.zeros((12, 5, 4), np.float32)}, "uint8"),
        ({"x_train": np.full((12, 5, 4), np.nan)}, "uint8"),
        ({"x_train": np.zeros((12, 5, 4, 2), np.uint8)}, "1 or 3 channels"),
        ({"x_train": np.zeros((0, 5, 4), np.uint8), "y_train": np.zeros(0, int)}, "at least one image"),
        ({"x_train": np.zeros((12, 6, 4), np.uint8)}, "different shapes"),
        ({"y_train": np.zeros(12, int)}, "two classes or more"),
        ({"y_train": np.arange(11)}, "12 images but 11 labels"),
        ({"y_train": np.arange(12) - 1}, "below 0"),
        ({"y_train": np.arange(12) * 0.5}, "whole number"),
        ({"y_train": np.eye(12, dtype=int)}, "whole number"),
        ({"y_train": np.arange(12) % 3 * 2}, "no training sample"),
        ({"y_train": np.arange(12) * 10**9}, "fewer samples than classes"),
        ({"y_test": np.full(6, 3)}, "label 3, but the classes are 0 to 2"),
        ({"y_test": None}, "y_test is absent"),
        ({"x_train": None, "y_train": None}, "Needed: x_train"),
        ({"x_train": np.array([None] * 12)}, "cannot be read"),
    ],
)
def test_arrays_that_are_no_classification_data_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(save_npz(tmp_path / "a.npz", **keras_arrays(**changes)))


def test_a_file_that_is_absent_is_named_with_the_path_looked_at(tmp_path: Path) -> None:
    assert str(tmp_path / "none.npz") in refusal(f"npz:{tmp_path / 'none.npz'}")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_archive_is_refused_or_unchanged_in_content(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    intact = io.BytesIO()
    arrays = keras_arrays()
    np.savez_compressed(intact, **arrays)
    damaged = bytearray(intact.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=3)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])

    try:
        source = read(f"npz:{path}")
    except DataError as error:
        assert len(str(error).splitlines()) <= 3
    else:
        assert isinstance(source.train, Arrays)
        assert np.array_equal(source.train.x_NCHW[:, 0], arrays["x_train"])
        assert np.array_equal(source.train.labels_N, arrays["y_train"])


# image_folder


def test_a_folder_with_train_val_and_test_has_three_parts(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        save_images(tmp_path / part, ["cat", "dog"])

    source = read(f"image_folder:{tmp_path}")

    assert source.classes == ("cat", "dog")
    assert isinstance(source.validation, Files)
    assert source.validation.paths[2] == str(tmp_path / "val" / "dog" / "0.png")
    assert source.validation.labels_N.tolist() == [0, 0, 1, 1]


def test_val_without_test_is_the_test_part_as_in_imagenet(tmp_path: Path) -> None:
    save_images(tmp_path / "train", ["cat", "dog"])
    save_images(tmp_path / "val", ["cat", "dog"], count=1)

    source = read(f"image_folder:{tmp_path}")

    assert source.validation is None
    assert source.test is not None
    assert len(source.test.labels_N) == 2


def test_one_folder_of_classes_is_a_training_part_alone(tmp_path: Path) -> None:
    save_images(tmp_path, ["b", "a"])
    (tmp_path / ".cache").mkdir()

    source = read(f"image_folder:{tmp_path}")

    assert source.classes == ("a", "b")
    assert source.test is None


def test_folders_without_the_needed_classes_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"image_folder:{tmp_path / 'none'}")
    assert "no class folders" in refusal(f"image_folder:{tmp_path}")
    save_images(tmp_path / "train", ["cat", "dog"])
    save_images(tmp_path / "test", ["cat"])
    assert "'dog'" in refusal(f"image_folder:{tmp_path}")
    (tmp_path / "test" / "dog").mkdir()
    assert "no image" in refusal(f"image_folder:{tmp_path}")


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    save_images(tmp_path, ["cat"])

    assert "'cat' only" in refusal(f"image_folder:{tmp_path}")


def test_test_without_train_is_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "test", ["cat", "dog"])

    assert "without train/" in refusal(f"image_folder:{tmp_path}")


# torchvision


def write_idx(path: Path, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path, name: str = "MNIST") -> np.ndarray[Any, np.dtype[np.uint8]]:
    x_NHW = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for part, pixels in (("train", x_NHW[:20]), ("t10k", x_NHW[20:])):
        write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", pixels)
        write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(pixels), dtype=np.uint8) % 10)
    return x_NHW


def test_a_torchvision_set_is_read_with_its_class_names(tmp_path: Path) -> None:
    x_NHW = write_mnist(tmp_path, "FashionMNIST")

    source = read("torchvision:FashionMNIST", tmp_path)

    assert isinstance(source.test, Arrays)
    assert np.array_equal(source.test.x_NCHW[:, 0], x_NHW[20:])
    assert source.classes[1] == "Trouser"
    assert source.flip


def test_digits_of_torchvision_are_not_mirrored(tmp_path: Path) -> None:
    write_mnist(tmp_path)

    assert not read("torchvision:MNIST", tmp_path).flip


def test_a_torchvision_set_of_image_files_stays_on_disk(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    save_images(base / "GTSRB" / "Training", ["00000", "00001"])
    for path in (base / "GTSRB" / "Training").rglob("*.png"):
        path.rename(path.with_suffix(".ppm"))
    (base / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(base / "GTSRB" / "Final_Test" / "Images" / "0.ppm")
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;1\n")

    source = read("torchvision:GTSRB", tmp_path)

    assert isinstance(source.train, Files)
    assert source.train.labels_N.tolist() == [0, 0, 1, 1]
    assert source.test is not None
    assert source.test.labels_N.tolist() == [1]
    assert len(locate(DataConfig(source="torchvision:GTSRB", root=tmp_path), offline=True)) == 6


@pytest.mark.parametrize(
    "opened",
    [
        SimpleNamespace(data=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 1])),  # SVHN, STL10
        SimpleNamespace(data=np.zeros((2, 8, 8, 3), np.uint8), targets=[0, 1]),  # CIFAR
        SimpleNamespace(_image_files=["a.jpg", "b.jpg"], _labels=[0, 1]),  # Flowers102, Food101
        SimpleNamespace(_images=["a.jpg", "b.jpg"], _labels=[0, 1]),  # OxfordIIITPet
        SimpleNamespace(samples=[("a.jpg", 0), ("b.jpg", 1)], targets=[0, 1]),  # EuroSAT
        SimpleNamespace(_samples=[("a.jpg", 0), ("b.jpg", 1)]),  # GTSRB, Imagenette
    ],
)
def test_each_way_in_which_torchvision_holds_samples_is_read(opened: SimpleNamespace) -> None:
    part = vision.part_of(opened, "a set")

    assert part.labels_N.tolist() == [0, 1]
    assert part.x_NCHW.shape == (2, 3, 8, 8) if isinstance(part, Arrays) else part.paths == ("a.jpg", "b.jpg")


def test_the_table_names_sets_and_arguments_that_torchvision_has() -> None:
    import inspect

    import torchvision

    for name, known in vision.SETS.items():
        constructor = getattr(torchvision.datasets, name)
        accepted = {key for cls in constructor.__mro__ for key in inspect.signature(cls.__init__).parameters}
        for arguments in known.arguments:
            assert set(arguments or {}) | {"root", "download"} <= accepted, name


def test_offline_an_absent_set_is_refused_with_the_path_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        locate(DataConfig(source="torchvision:CIFAR10", root=tmp_path), offline=True)


def test_a_truncated_torchvision_file_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images_path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images_path.write_bytes(images_path.read_bytes()[:1000])

    assert str(tmp_path) in refusal("torchvision:MNIST", tmp_path)


def test_a_set_that_torchvision_has_not_is_refused_with_the_known_ones() -> None:
    assert "FashionMNIST" in refusal("torchvision:FashonMNIST")


# python


def write_module(directory: Path, name: str, body: str) -> None:
    (directory / f"{name}.py").write_text(f"import numpy as np\n\n{body}")


ARRAYS_BODY = """def make():
    x = np.zeros((6, 4, 4), np.uint8)
    return {"x_train": x, "y_train": np.arange(6) % 2, "x_test": x, "y_test": np.arange(6) % 2}
"""


def test_own_code_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "own_arrays", ARRAYS_BODY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    with pytest.raises(RecipeError, match="--allow-code"):
        read("python:own_arrays:make")
    assert "own_arrays" not in sys.modules

    assert read("python:own_arrays:make", allow_code=True).classes == ("0", "1")
    assert sys.path[-1] == str(tmp_path)


def test_own_datasets_are_read_into_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "def make():\n    return [[(np.full((4, 4), n, np.uint8), n % 2) for n in range(k)] for k in (6, 4)]\n"
    write_module(tmp_path, "own_datasets", body.replace("return [", "return tuple([").replace("(6, 4)]", "(6, 4)])"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    source = read("python:own_datasets:make", allow_code=True)

    assert isinstance(source.test, Arrays)
    assert source.test.x_NCHW[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_locating_own_code_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "own_trap", "raise SystemExit")
    monkeypatch.chdir(tmp_path)

    assert locate(DataConfig(source="python:own_trap:make"), offline=True) == (tmp_path / "own_trap.py",)


def test_what_a_factory_returns_is_checked() -> None:
    with pytest.raises(DataError, match="fewer samples than classes"):
        source_from_arrays(keras_arrays(y_train=np.arange(12) + 5), "python:own:make")
