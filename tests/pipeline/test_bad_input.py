"""What people bring by mistake, through the command line: three lines at most, the right exit code, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

Refused = Callable[..., str]
NET = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}


@pytest.fixture
def refused(edgestill: Callable[..., Any]) -> Refused:
    """Run a command that must be refused with `code`; returns its message."""

    def run(*argv: object, code: int = 2) -> str:
        ended = edgestill(*argv, "--json")

        document = json.loads(ended.out)
        assert (ended.code, document["exit_code"]) == (code, code), ended.err
        message: str = document["error"]
        assert 1 <= len(message.splitlines()) <= 3, message
        assert "Traceback" not in ended.err
        assert "internal error" not in ended.err
        return message

    return run


@pytest.fixture
def run_on(refused: Refused, tiny_recipe: Callable[..., Path], tmp_path: Path) -> Refused:
    """Run the tiny recipe on `source`, as far as the data go; it must be refused."""

    def run(source: str, **config: Any) -> str:
        recipe = tiny_recipe(data={"source": source, "workers": 1, **config})
        return refused("run", recipe, "--runs", tmp_path / "runs", "--until", "data", "--offline")

    return run


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def take_checkpoint(tiny_recipe: Callable[..., Path], finished: Any, refused: Refused) -> Callable[..., str]:
    """Take a file as the teacher, untrained; it must be refused before it teaches anybody."""

    def take(path: Path, code: int = 2) -> str:
        recipe = tiny_recipe(teacher={**NET, "checkpoint": str(path), "train": None})
        return refused("run", recipe, "--runs", finished.runs, code=code)

    return take


@pytest.fixture
def weights(finished: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(finished.stage("teacher") / "model.safetensors")
    return tensors


def test_a_teacher_with_random_weights_is_refused_by_its_score(
    take_checkpoint: Callable[..., str], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    chance = {
        name: torch.randn_like(value) * 0.1 if value.ndim > 1 else value.zero_() if "fc" in name else value
        for name, value in weights.items()
    }
    save_file(chance, tmp_path / "random.safetensors")

    message = take_checkpoint(tmp_path / "random.safetensors", code=3)

    assert "its weights are probably not loaded" in message
    assert "on validation" in message


def test_a_checkpoint_with_nan_is_refused_with_the_tensors_name(
    take_checkpoint: Callable[..., str], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = next(name for name, value in weights.items() if value.ndim == 4)
    weights[name][0, 0, 0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")

    assert f"{name} hold NaN" in take_checkpoint(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("num_classes", [2, 11])
def test_a_checkpoint_with_another_number_of_classes_is_refused_with_both_shapes(
    take_checkpoint: Callable[..., str], weights: dict[str, torch.Tensor], tmp_path: Path, num_classes: int
) -> None:
    head = next(name for name, value in weights.items() if value.ndim == 2)
    features = weights[head].shape[1]
    weights[head] = torch.zeros(num_classes, features)
    torch.save(weights, tmp_path / "head.pt")

    message = take_checkpoint(tmp_path / "head.pt")

    assert f"{head} ([{num_classes}, {features}], the model has [10, {features}])" in message


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "pickle"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_checkpoint_is_refused_by_name(
    take_checkpoint: Callable[..., str],
    finished: Any,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    damage: str,
    suffix: str,
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(weights, tmp_path / "whole.pt")
    whole = finished.stage("teacher") / "model.safetensors" if suffix == ".safetensors" else tmp_path / "whole.pt"
    content = whole.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "text": b"<html>404 not found</html>",
        "empty": b"",
        "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    }
    path.write_bytes(damaged[damage])

    assert str(path) in take_checkpoint(path)


# --- data --------------------------------------------------------------------------------------------------------------


def arrays(num_classes: int = 3, num_samples: int = 90) -> dict[str, Any]:
    x = np.random.default_rng(0).integers(0, 256, (num_samples, 8, 8), dtype=np.uint8)
    y = np.arange(num_samples) % num_classes
    return {"x_train": x, "y_train": y, "x_test": x[:30], "y_test": y[:30]}


def test_data_of_one_class_are_refused(run_on: Refused, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **arrays(num_classes=1))

    assert "class" in run_on(f"npz:{tmp_path / 'one.npz'}")


@pytest.mark.parametrize(
    "change",
    [
        {"y_train": np.zeros(7, dtype=np.int64)},
        {"y_train": np.full(90, np.nan)},
        {"y_test": np.arange(30) + 100},
        {"x_train": np.zeros((90, 8, 8), dtype=np.uint8)},
        {"x_train": np.zeros((90, 8), dtype=np.uint8)},
        {"x_train": np.array([object()] * 90)},
        {"x_test": np.zeros((30, 9, 9), dtype=np.uint8)},
        {"x_test": np.zeros((0, 8, 8), dtype=np.uint8), "y_test": np.zeros(0, dtype=np.int64)},
    ],
    ids=lambda change: ",".join(f"{name}{list(value.shape)}{value.dtype}" for name, value in change.items()),
)
def test_arrays_that_do_not_fit_are_refused(run_on: Refused, tmp_path: Path, change: dict[str, Any]) -> None:
    np.savez(tmp_path / "odd.npz", **{**arrays(), **change})

    assert "odd.npz" in run_on(f"npz:{tmp_path / 'odd.npz'}")


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("npz") / "whole.npz"
    np.savez_compressed(path, **arrays())
    return path.read_bytes()


@given(cut=st.floats(0, 0.999) | st.none(), flip=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_data_file_is_read_as_it_was_or_refused(
    edgestill: Callable[..., Any],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    npz: bytes,
    cut: float | None,
    flip: float,
    bit: int,
) -> None:
    content = bytearray(npz)
    if cut is None:
        content[int(flip * len(content))] ^= 1 << bit
    else:
        content = content[: int(cut * len(content))]
    (tmp_path / "d.npz").write_bytes(content)
    recipe = tiny_recipe(data={"source": f"npz:{tmp_path / 'd.npz'}", "calibration": 8})

    ended = edgestill("run", recipe, "--runs", tmp_path / "r", "--until", "data", "--json")

    assert ended.code in (0, 2), ended.err
    assert "internal error" not in ended.err
    if ended.code == 0:  # the flipped bit lies where nothing is read, in a date or the like: the values are the same
        assert cut is None
        with np.load(tmp_path / "d.npz") as read:
            assert all(np.array_equal(read[name], value) for name, value in arrays().items())
    else:
        assert "d.npz" in ended.err
        assert len(json.loads(ended.out)["error"].splitlines()) <= 3


def test_arrays_that_a_damaged_directory_hides_are_missed(
    edgestill: Callable[..., Any], tiny_recipe: Callable[..., Path], tmp_path: Path, npz: bytes
) -> None:
    content = bytearray(npz)
    third = content.rfind(b"PK\x01\x02", 0, content.rfind(b"x_test.npy"))
    content[third + 29] ^= 1  # the length of its name, 256 too many: zipfile sees what stands before, and no test split
    (tmp_path / "d.npz").write_bytes(content)
    with np.load(tmp_path / "d.npz") as read:
        assert "x_test" not in read.files

    ended = edgestill("run", tiny_recipe(data={"source": f"npz:{tmp_path / 'd.npz'}"}), "--runs", tmp_path / "r")

    assert ended.code == 2
    assert "of its 4 arrays" in ended.err


def write_images(folder: Path, num_classes: int = 2, num_images: int = 12) -> Path:
    generator = np.random.default_rng(0)
    for label in range(num_classes):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)
        for i in range(num_images):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class-{label}" / f"{i:02}.png")
    return folder


def test_a_folder_that_is_not_there_or_empty_is_refused_with_its_path(run_on: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cats").mkdir(parents=True)
    (tmp_path / "hollow" / "dogs").mkdir()

    for name in ("absent", "empty", "hollow"):
        assert str(tmp_path / name) in run_on(f"image_folder:{tmp_path / name}", image_size=8)


def test_a_folder_with_one_class_is_refused(run_on: Refused, tmp_path: Path) -> None:
    assert "class" in run_on(f"image_folder:{write_images(tmp_path / 'one', num_classes=1)}", image_size=8)


def test_unreadable_images_are_counted_named_and_refused_above_the_limit(run_on: Refused, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "class-0" / "03.png").write_bytes(b"\x89PNG but no more")
    (folder / "class-1" / "07.png").write_bytes((folder / "class-1" / "07.png").read_bytes()[:60])

    message = run_on(f"image_folder:{folder}", image_size=8)

    assert "2 of 24 images are unreadable" in message
    assert str(folder / "class-0" / "03.png") in message
    assert "data.max_unreadable" in message


def test_unreadable_images_below_the_limit_are_left_out_and_named_in_the_stage(
    edgestill: Callable[..., Any], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "class-0" / "03.png").write_bytes(b"no image")
    recipe = tiny_recipe(
        data={
            "source": f"image_folder:{folder}",
            "image_size": 8,
            "max_unreadable": 0.1,
            "calibration": 4,
            "workers": 1,
        }
    )

    ended = edgestill("run", recipe, "--runs", tmp_path / "runs", "--until", "data")

    assert ended.code == 0
    (stage,) = (tmp_path / "runs" / "tiny").glob("data-*")
    info = json.loads((stage / "data.json").read_text())
    assert [Path(one["path"]).name for one in info["skipped"]] == ["03.png"]
    assert info["num_train"] + info["num_validation"] + info["num_test"] == 23


# --- what training makes of it -----------------------------------------------------------------------------------------


def test_a_rate_that_blows_training_up_ends_with_3_and_what_to_do(finished: Any, refused: Refused) -> None:
    message = refused(
        *("run", finished.recipe, "--runs", finished.runs, "--until", "distill"),
        *("--set", "distill.train.lr=1e30"),
        code=3,
    )

    assert "distill: the loss is" in message
    assert "Lower train.lr" in message


def test_a_refused_run_leaves_the_finished_one_as_it_was(
    finished: Any, refused: Refused, edgestill: Callable[..., Any]
) -> None:
    refused("run", finished.recipe, "--runs", finished.runs, "--set", "distill.train.lr=1e30", code=3)

    again = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

    assert (again.code, json.loads(again.out)["built"]) == (0, [])


# --- ONNX files --------------------------------------------------------------------------------------------------------


def graph(values: np.ndarray) -> bytes:
    weights = numpy_helper.from_array(values.astype(np.float32), "weights")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y"))
    made = helper.make_graph([helper.make_node("MatMul", ["x", "weights"], ["y"])], "g", [x], [y], [weights])
    content: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return content


NO_ONNX = {
    "empty": b"",
    "text": b"this is no protobuf at all, only words\n" * 20,
    "truncated": graph(np.eye(4))[:-40],
    "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "cyclic": onnx.helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["a", "b"], ["b"]), helper.make_node("Add", ["b", "a"], ["a"])], "g", [], []
        )
    ).SerializeToString(),
}


@pytest.mark.parametrize("content", NO_ONNX.values(), ids=NO_ONNX.keys())
@pytest.mark.parametrize("verb", ["compile", "bench", "lint", "quantize"])
def test_a_file_that_is_no_onnx_model_is_refused_by_every_verb(
    refused: Refused, tmp_path: Path, verb: str, content: bytes
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 4), dtype=np.float32))
    out = ["--out", tmp_path / "out"] if verb != "lint" else []
    calibration = ["--calibration", tmp_path / "c.npz"] if verb == "quantize" else []

    message = refused(verb, model, *out, *calibration)

    assert "model.onnx" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["compile", "bench", "lint", "quantize"])
def test_an_onnx_file_that_is_not_there_is_refused(refused: Refused, tmp_path: Path, verb: str) -> None:
    calibration = ["--calibration", tmp_path] if verb == "quantize" else []

    assert "absent.onnx" in refused(verb, tmp_path / "absent.onnx", *calibration)


def test_an_unknown_target_is_refused_with_the_nearest_one(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(graph(np.eye(4)))

    assert "Did you mean 'openvino-cpu'?" in refused(
        "compile", tmp_path / "m.onnx", "--target", "openvino", "--out", tmp_path / "o"
    )


def test_a_model_with_nan_in_its_weights_is_not_quantized(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "nan.onnx").write_bytes(graph(np.full((4, 4), np.nan)))
    np.savez(tmp_path / "c.npz", x=np.ones((8, 4), dtype=np.float32))

    message = refused("quantize", tmp_path / "nan.onnx", "--calibration", tmp_path / "c.npz", "--out", tmp_path / "out")

    assert "nan.onnx" in message
