"""Stage data with images that have no label: whose label is hidden, what joins the train split, and what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.device.preprocess import decode, geometric, load_evaluation
from pipeline.artifacts import PreparedData
from pipeline.learning.data import Data
from pipeline.learning.labels import UNLABELLED
from pipeline.recipe import DataConfig, Recipe, parse_recipe
from pipeline.run import run_recipe
from pipeline.stages.data import prepare_data
from targets.base import read_json
from targets.errors import DataError

SEED = 3
SHARE = 0.1


def prepared(directory: Path, *, allow_code: bool = False, **changes: Any) -> Path:
    config = DataConfig(**{"source": "digits", "calibration": 50, **changes})
    prepare_data(config, SEED, directory, allow_code=allow_code)
    return directory


def split_of(directory: Path) -> dict[str, Any]:
    with np.load(directory / "split.npz") as split:
        return dict(split)


def loaded(directory: Path) -> Data:
    return Data.load(PreparedData(directory, ""))


def pixels(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_npz(path: Path, seed: int = 9, count: int = 6, **more: Any) -> str:
    np.savez(path, x_train=pixels(seed, count, 8, 8), **more)
    return f"npz:{path}"


def save_images(directory: Path, names: list[str], seed: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed + number, 20 + number, 24, 3)).save(path)


def save_folder(root: Path) -> dict[str, Any]:
    """A source of image files: two classes, 10 train and 4 test images each."""
    for part, count in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            save_images(root / part / name, [f"{index}.png" for index in range(count)], seed=count * ord(name[0]))
    return {"source": f"image_folder:{root}", "image_size": 16, "workers": 0, "validation": 0.2}


def refusal(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        prepared(tmp_path / "refused", **changes)
    assert len(str(refused.value).splitlines()) <= 3
    assert not (tmp_path / "refused").exists()
    return str(refused.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("few"), labelled_share=SHARE)


# --- hidden labels -----------------------------------------------------------------------------------------------------


def test_a_share_of_every_class_keeps_its_label_and_no_other_split_loses_any(whole: Path, few: Path) -> None:
    split, true_N, labels_N = split_of(few), np.load(whole / "train_y.npy"), np.load(few / "train_y.npy")

    assert all(np.array_equal(split[name], indices) for name, indices in split_of(whole).items())
    assert np.array_equal(labels_N[split["validation"]], true_N[split["validation"]])
    train_N = labels_N[split["train"]]
    kept = train_N != UNLABELLED
    assert np.array_equal(train_N[kept], true_N[split["train"]][kept])
    assert set(train_N[~kept]) == {-1}
    counts_K, before_K = (np.bincount(one, minlength=10) for one in (train_N[kept], true_N[split["train"]]))
    assert np.abs(counts_K - SHARE * before_K).max() < 1.5
    for name in ("x-000.npy", "y.npy"):
        assert (few / "evaluation" / name).read_bytes() == (whole / "evaluation" / name).read_bytes()


def test_the_file_says_how_many_there_are_of_each_kind_and_the_statistics_are_those_of_all(
    whole: Path, few: Path
) -> None:
    told, before = read_json(few / "data.json"), read_json(whole / "data.json")

    num_labelled = round(SHARE * before["num_train"])
    assert told["labels"] == {
        "labelled_share": SHARE,
        "num_labelled": num_labelled,
        "num_unlabelled": before["num_train"] - num_labelled,
        "unlabelled": [],
    }
    assert {key: value for key, value in told.items() if key != "labels"} == {
        key: value for key, value in before.items() if key != "labels"
    }
    data = loaded(few)
    assert (data.num_labelled, data.num_train) == (num_labelled, before["num_train"])


def test_the_labelled_samples_are_those_that_a_train_share_of_the_size_would_keep(few: Path, tmp_path: Path) -> None:
    alone = loaded(prepared(tmp_path, train_share=SHARE))
    labelled = loaded(few).labelled()

    assert torch.equal(labelled.splits["train"], alone.splits["train"])
    assert torch.equal(labelled.train_labels[labelled.splits["train"]], alone.train_labels[alone.splits["train"]])
    assert labelled.num_train == labelled.num_labelled == alone.num_train


def test_noise_is_in_labels_that_are_kept(few: Path, tmp_path: Path) -> None:
    noisy = prepared(tmp_path, labelled_share=SHARE, label_noise=0.5)

    before_N, noisy_N = np.load(few / "train_y.npy"), np.load(noisy / "train_y.npy")
    changed = np.flatnonzero(before_N != noisy_N)
    assert len(changed) == round(0.5 * read_json(noisy / "data.json")["labels"]["num_labelled"])
    assert (before_N[changed] != UNLABELLED).all()
    assert (noisy_N[changed] != UNLABELLED).all()


def test_none_may_have_a_label(tmp_path: Path) -> None:
    data = loaded(prepared(tmp_path, labelled_share=0))

    assert (data.num_labelled, data.num_validation > 0) == (0, True)
    with pytest.raises(DataError, match=r"No train sample has a label.*data\.labelled_share"):
        data.labelled()


def test_data_that_have_all_labels_lose_none(whole: Path) -> None:
    data = loaded(whole)

    assert torch.equal(data.labelled().splits["train"], data.splits["train"])


def test_a_share_that_leaves_a_class_without_a_label_is_refused(tmp_path: Path) -> None:
    assert "leaves class '" in (message := refusal(tmp_path, labelled_share=0.001))
    assert "without a label. Raise it" in message


# --- images from elsewhere ---------------------------------------------------------------------------------------------


def test_foreign_arrays_stand_behind_the_datas_own_and_change_nothing_of_them(whole: Path, tmp_path: Path) -> None:
    first, second = save_npz(tmp_path / "first.npz", seed=1), save_npz(tmp_path / "second.npz", seed=2, count=4)

    directory = prepared(tmp_path / "data", unlabelled=[first, second])

    split, before = split_of(directory), split_of(whole)
    num_own = len(np.load(whole / "train_y.npy"))
    assert np.array_equal(split["train"], [*before["train"], *range(num_own, num_own + 10)])
    assert np.array_equal(split["validation"], before["validation"])
    assert np.array_equal(split["calibration"], before["calibration"])
    images = np.load(directory / "train_x.npy")
    assert np.array_equal(images[num_own:, 0], np.concatenate([pixels(1, 6, 8, 8), pixels(2, 4, 8, 8)]))
    assert np.array_equal(np.load(directory / "train_y.npy")[num_own:], [-1] * 10)
    info, own = read_json(directory / "data.json"), read_json(whole / "data.json")
    assert (info["mean"], info["std"], info["num_train"]) == (own["mean"], own["std"], own["num_train"] + 10)
    assert info["labels"]["unlabelled"] == [
        {"source": first, "num_samples": 6},
        {"source": second, "num_samples": 4},
    ]
    assert info["labels"]["num_labelled"] == own["num_train"]


def test_labels_that_a_foreign_source_has_are_not_read(tmp_path: Path) -> None:
    written = []
    for name, labels in (("a", np.arange(6) % 3), ("b", np.full(6, 7)), ("c", np.array(["x"] * 6))):
        source = save_npz(tmp_path / "same.npz", y_train=labels)
        directory = prepared(tmp_path / name, unlabelled=[source])
        written.append([(directory / file).read_bytes() for file in ("train_x.npy", "train_y.npy", "data.json")])

    assert written[0] == written[1] == written[2]


def test_a_labelled_source_gives_its_training_part(tmp_path: Path) -> None:
    more = {"y_train": np.arange(6) % 3, "x_test": pixels(5, 3, 8, 8), "y_test": np.arange(3)}
    own = save_npz(tmp_path / "own.npz", count=60, seed=4, **{**more, "y_train": np.arange(60) % 3})

    data = loaded(prepared(tmp_path / "a", source=own, unlabelled=[save_npz(tmp_path / "other.npz", **more), "digits"]))

    assert data.num_train - data.num_labelled == 6 + 1797  # digits have no test part: all they have


def test_a_factory_may_return_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_images.py").write_text(
        "import numpy as np\ndef make():\n    return {'x_train': np.zeros((5, 8, 8), np.uint8)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    data = loaded(prepared(tmp_path / "data", unlabelled=["python:own_images:make"], allow_code=True))

    assert data.num_train - data.num_labelled == 5
    sys.modules.pop("own_images")


@pytest.mark.parametrize(
    "names",
    [["a.png", "b.JPG", "notes.txt"], ["x/a.png", "y/z/b.png"], ["train/deep/a.png", "train/b.png", "test/c.png"]],
    ids=["flat", "nested", "train alone"],
)
def test_every_image_below_a_folder_is_taken_whatever_the_folders_are(tmp_path: Path, names: list[str]) -> None:
    own = save_folder(tmp_path / "own")
    save_images(tmp_path / "more", [name for name in names if not name.endswith("txt")], seed=50)
    (tmp_path / "more" / "notes.txt").write_text("no image")

    directory = prepared(tmp_path / "data", unlabelled=[f"image_folder:{tmp_path / 'more'}"], **own)

    data, files = loaded(directory), read_json(directory / "files.json")["train"]
    assert (data.num_labelled, data.num_train) == (16, 18)
    assert files["labels"][20:] == [-1, -1]
    pre = load_evaluation(directory / "evaluation").preprocessing
    last = list(data.view_batches([torch.tensor([16, 17])], view_seed=0))
    plain = torch.cat([batch.x_NCHW for batch in data.plain_batches("train")])[16:]
    expected = np.stack([geometric(decode(Path(path).read_bytes(), "RGB"), pre) for path in files["paths"][20:]])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(
        (plain * std + mean) * 255, torch.tensor(expected).permute(0, 3, 1, 2).float(), atol=1.01, rtol=0
    )  # torchvision and the device's numpy differ by a pixel value at most
    assert last[0].labels_N.tolist() == [-1, -1]


def test_coloured_images_beside_grey_data_become_grey(tmp_path: Path) -> None:
    own = save_folder(tmp_path / "own")
    for path in (tmp_path / "own").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    save_images(tmp_path / "more", ["a.png"])

    directory = prepared(tmp_path / "data", unlabelled=[f"image_folder:{tmp_path / 'more'}"], **own)

    assert read_json(directory / "data.json")["mode"] == "L"
    assert next(iter(loaded(directory).plain_batches("train"))).x_NCHW.shape[1] == 1


def test_a_foreign_file_that_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    own = save_folder(tmp_path / "own")
    save_images(tmp_path / "more", ["a.png", "b.png"])
    (tmp_path / "more" / "c.png").write_bytes(b"no image")

    directory = prepared(tmp_path / "data", unlabelled=[f"image_folder:{tmp_path / 'more'}"], max_unreadable=0.5, **own)

    info = read_json(directory / "data.json")
    assert info["labels"]["num_unlabelled"] == 2
    assert [Path(one["path"]).name for one in info["skipped"]] == ["c.png"]


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_images_that_cannot_stand_beside_the_datas_own_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x_train=pixels(0, 3, 8, 9))
    np.savez(tmp_path / "colour.npz", x_train=pixels(0, 3, 8, 8, 3))
    np.savez(tmp_path / "square.npz", x_train=pixels(0, 3, 16, 16, 3))
    own = save_folder(tmp_path / "own")
    save_images(tmp_path / "more", ["a.png"])
    folder = f"image_folder:{tmp_path / 'more'}"

    assert "(1, 8, 9), but those of digits are (1, 8, 8)" in refusal(
        tmp_path, unlabelled=[f"npz:{tmp_path / 'wide.npz'}"]
    )
    assert "(3, 8, 8), but" in refusal(tmp_path, unlabelled=[f"npz:{tmp_path / 'colour.npz'}"])
    assert "has image files, but digits holds arrays" in refusal(tmp_path, unlabelled=[folder])
    assert "holds arrays, but" in refusal(tmp_path, unlabelled=[f"npz:{tmp_path / 'square.npz'}"], **own)


def test_sources_without_an_image_are_refused(tmp_path: Path) -> None:
    own = save_folder(tmp_path / "own")
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    np.savez(tmp_path / "labels.npz", y_train=np.arange(3))

    def told(name: str, **more: Any) -> str:
        return refusal(tmp_path, unlabelled=[name], **more)

    assert "no image in it" in told(f"image_folder:{tmp_path / 'empty'}", **own)
    assert "1 of 1 images are unreadable" in told(f"image_folder:{tmp_path / 'broken'}", **own)
    assert "no image that can be read" in told(f"image_folder:{tmp_path / 'broken'}", max_unreadable=1.0, **own)
    assert "there is no such folder" in told(f"image_folder:{tmp_path / 'absent'}", **own)
    assert "Needed of unlabelled images: x_train" in told(f"npz:{tmp_path / 'labels.npz'}")
    assert "there is no such file" in told(f"npz:{tmp_path / 'absent.npz'}")
    for unknown in ("folder:x", "npz:", "digits:3", "MNIST"):
        assert f"data.unlabelled: '{unknown}' is no source that is known" in told(unknown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled_share": 1.1}, "less than or equal to 1"),
        ({"labelled_share": -0.1}, "greater than or equal to 0"),
        ({"unlabelled": ["digits"]}, "digits is the data themselves"),
        ({"unlabelled": ["npz:a", "npz:a"]}, "npz:a stands there twice"),
    ],
)
def test_a_section_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="digits", **changes)


# --- keys --------------------------------------------------------------------------------------------------------------


def recipe_on(data: dict[str, Any]) -> Recipe:
    net = {"model": "resnet8"}
    whole = {"name": "r", "data": data, "teacher": net, "distill": net, "targets": [{"name": "onnxruntime-cpu"}]}
    return parse_recipe(whole, "r.yaml")


def test_what_a_foreign_folder_holds_is_part_of_the_datas_key(tmp_path: Path) -> None:
    own = save_folder(tmp_path / "own")
    save_images(tmp_path / "more", ["a.png", "b.png"])
    recipe = recipe_on({**own, "unlabelled": [f"image_folder:{tmp_path / 'more'}"]})
    built = []
    for name in ("a.png", "a.png", "c.png"):
        shutil.copy(tmp_path / "more" / "b.png", tmp_path / "more" / name)
        built.append(run_recipe(recipe, runs_dir=tmp_path / "runs", until="data").built)

    assert built == [("data",), (), ("data",)]


def test_what_a_reader_of_ones_own_imports_is_part_of_the_datas_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_reader.py").write_text("from own_drawing import draw as make\n")
    drawing = tmp_path / "own_drawing.py"
    drawing.write_text(
        "import numpy as np\n"
        "def draw():\n"
        "    x, y = np.arange(60 * 64).reshape(60, 8, 8).astype('uint8'), np.arange(60) % 2\n"
        "    return {'x_train': x[:50], 'y_train': y[:50], 'x_test': x[50:], 'y_test': y[50:]}\n"
    )
    recipe = recipe_on({"source": "python:own_reader:make", "calibration": 8})
    built = []
    for line in ("", "", "STYLE = 2\n"):
        drawing.write_text(drawing.read_text() + line)
        built.append(run_recipe(recipe, runs_dir=tmp_path / "runs", until="data", allow_code=True).built)

    assert built == [("data",), (), ("data",)]
