"""The numpy reference against Pillow and torchvision, and the evaluation set as the device reads it."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from benchmarks.device.preprocess import Evaluation, decode, geometric, load_evaluation, resize, to_input
from targets.base import Array, Preprocessing, TensorSpec, write_json
from targets.errors import DataError, IntegrityError, TargetError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pillow_resize(image_HWC: Array, height: int, width: int) -> Array:
    squeezed = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
    resized = Image.fromarray(squeezed).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(height, width, -1)


def encoded(image_HWC: Array, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, kind)
    return buffer.getvalue()


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    out_height=st.integers(1, 60),
    out_width=st.integers(1, 60),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=150, deadline=None)
def test_resize_is_pillows_bit_for_bit(height: int, width: int, out_height: int, out_width: int, channels: int) -> None:
    image = noise(height, width, channels)

    resized = resize(image, out_height, out_width)

    assert np.array_equal(resized, pillow_resize(image, out_height, out_width))


@given(height=st.integers(20, 90), width=st.integers(20, 90), shorter=st.integers(16, 80))
@settings(max_examples=100, deadline=None)
def test_geometry_brings_the_shorter_side_to_its_size_and_keeps_the_ratio(
    height: int, width: int, shorter: int
) -> None:
    image = noise(height, width)

    resized = geometric(image, Preprocessing(resize=shorter))

    scaled = v2.functional.resize(Image.fromarray(image), [shorter])
    assert np.array_equal(resized, np.asarray(scaled))


@given(height=st.integers(30, 200), width=st.integers(30, 200), crop=st.integers(8, 64))
@settings(max_examples=60, deadline=None)
def test_geometry_is_within_one_level_of_torchvisions_antialiased_resize_and_crop(
    height: int, width: int, crop: int
) -> None:
    image, shorter = noise(height, width), round(crop / 0.875)
    transform = v2.Compose([v2.Resize([shorter], antialias=True), v2.CenterCrop([crop, crop])])

    reference = geometric(image, Preprocessing(resize=shorter, crop=(crop, crop)))

    trained = transform(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert reference.shape == trained.shape
    assert np.abs(reference.astype(int) - trained).max() <= 1


def test_an_image_that_needs_no_geometry_stays_as_it_is() -> None:
    image = noise(28, 28, 1)

    assert np.array_equal(geometric(image, Preprocessing(mode="L")), image)


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(DataError, match="20x30 is smaller than the crop of 24x24"):
        geometric(noise(20, 30), Preprocessing(crop=(24, 24)))


def test_decode_gives_the_pixels_of_a_lossless_image_in_the_mode_asked_for() -> None:
    image = noise(5, 7)

    assert np.array_equal(decode(encoded(image, "PNG"), "RGB"), image)
    assert decode(encoded(image, "PNG"), "L").shape == (5, 7, 1)


def test_decode_refuses_more_than_eight_bits() -> None:
    deep = encoded(np.full((4, 4), 40_000, dtype=np.uint16), "PNG")

    with pytest.raises(DataError, match="more than 8 bits"):
        decode(deep, "L")


@given(kind=st.sampled_from(["PNG", "JPEG", "BMP"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_decode_to_pixels_or_to_a_data_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(noise(9, 8), kind))
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]

    try:
        pixels = decode(bytes(damaged), "RGB")
    except DataError as error:
        assert len(str(error).splitlines()) <= 3
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


def test_a_graph_that_normalises_by_itself_gets_the_uint8_pixels() -> None:
    x_NCHW = noise(2 * 3, 4, 5).reshape(2, 3, 4, 5)

    given_to_graph = to_input(x_NCHW, Preprocessing(), TensorSpec(name="x", shape=(None, 3, 4, 5), dtype="uint8"))

    assert given_to_graph.dtype == np.uint8
    assert np.array_equal(given_to_graph, x_NCHW)


def test_a_float_graph_gets_pixels_normalised_in_pixel_units_and_in_its_own_layout() -> None:
    x_NCHW = noise(2 * 3, 4, 5).reshape(2, 3, 4, 5)
    pre = Preprocessing(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0))

    x_NHWC = to_input(x_NCHW, pre, TensorSpec(name="x", shape=(None, 4, 5, 3), dtype="float32"))

    assert x_NHWC.dtype == np.float32
    assert x_NHWC[1, 2, 3, 1] == pytest.approx((float(x_NCHW[1, 1, 2, 3]) - 20.0) / 4.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "mean"),
    [
        ((None, 3, 4, 6), "float32", None),  # another width
        ((None, 3), "float32", None),  # no image
        ((None, 3, 4, 5), "int8", None),
        ((None, 3, 4, 5), "uint8", (0.0, 0.0, 0.0)),
    ],
)
def test_a_graph_whose_input_does_not_fit_is_refused(
    shape: tuple[int | None, ...], dtype: str, mean: tuple[float, ...] | None
) -> None:
    with pytest.raises(TargetError):
        to_input(
            np.zeros((1, 3, 4, 5), np.uint8), Preprocessing(mean=mean), TensorSpec(name="x", shape=shape, dtype=dtype)
        )


def write_evaluation(directory: Path, shard_lengths: list[int]) -> Array:
    x_NCHW = noise(sum(shard_lengths) * 1, 3, 4, seed=1).reshape(-1, 1, 3, 4)
    names = [f"x-{number:03d}.npy" for number in range(len(shard_lengths))]
    for name, shard in zip(names, np.split(x_NCHW, np.cumsum(shard_lengths)[:-1]), strict=True):
        np.save(directory / name, shard)
    write_json(
        directory / "spec.json",
        {
            "num_samples": len(x_NCHW),
            "classes": ["a", "b"],
            "preprocessing": {"mode": "L", "resize": None, "crop": None, "mean": None, "std": None},
            "shards": names,
            "encoded": [],
            "encoded_index": [],
        },
    )
    return x_NCHW


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_batches_are_all_samples_in_order_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch: int
) -> None:
    directory = tmp_path_factory.mktemp("evaluation")
    x_NCHW = write_evaluation(directory, lengths)

    evaluation: Evaluation = load_evaluation(directory)
    batches = list(evaluation.batches(batch, TensorSpec(name="x", shape=(None, 1, 3, 4), dtype="uint8")))

    assert all(len(part) == batch for part in batches[:-1])
    assert np.array_equal(np.concatenate(batches), x_NCHW)
    assert evaluation.labels is None


@pytest.mark.parametrize("harm", ["remove", "truncate", "recount"])
def test_a_damaged_evaluation_set_is_refused(tmp_path: Path, harm: str) -> None:
    write_evaluation(tmp_path, [3, 2])
    shard_path = tmp_path / "x-001.npy"
    if harm == "remove":
        shard_path.unlink()
    elif harm == "truncate":
        shard_path.write_bytes(shard_path.read_bytes()[:-7])
    else:
        np.save(tmp_path / "y.npy", np.zeros(4, np.int64))

    with pytest.raises(IntegrityError):
        load_evaluation(tmp_path)


def test_the_reference_needs_numpy_alone_until_it_decodes() -> None:
    code = "import sys, benchmarks.device.preprocess; print({'torch', 'PIL', 'pydantic'} & set(sys.modules))"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"
