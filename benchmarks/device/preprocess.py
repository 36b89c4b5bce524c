"""From encoded bytes to what a graph's input takes: the one reference, on the host and on the device.

Reads an evaluation set (spec.json, x-000.npy, ..., y.npy, encoded/). Resize gives the pixels of Pillow's antialiased bilinear
filter, bit for bit. Shapes: N samples, C channels, H height, W width; images are uint8.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from targets.base import Array, Preprocessing, TensorSpec, preprocessing_from_json, read_json
from targets.errors import DataError, IntegrityError, TargetError

PRECISION_BITS = 22  # of Pillow's fixed-point weights (Resample.c: 32 - 8 - 2)


def decode(data: bytes, mode: str) -> Array:
    """Encoded image to uint8 (H, W, C) in `mode` (RGB or L). Raises DataError. An EXIF orientation is not applied, as in
    torchvision's loader."""
    try:
        from PIL import Image
    except ImportError:
        raise TargetError(
            "Decoding an image needs Pillow, which is not installed here. Run: pip install pillow."
        ) from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}, more than 8 bits")
            pixels: Array = np.asarray(image.convert(mode))
    # Decoders meet damaged bytes with nearly any exception: to us it is one thing.
    except Exception as error:
        raise DataError(f"An image cannot be decoded: {' '.join(str(error).split())[:120]}. Replace it.") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]


def resize(image_HWC: Array, height: int, width: int) -> Array:
    """Antialiased bilinear resize of uint8 (H, W, C): one axis after the other, each pass rounded to uint8, as Pillow does it.

    The order of the axes decides the last bit: Pillow 13 begins with the height where it shrinks by more than twice the
    pixels that the width shrinks by (found by trial: it holds for 3,000 of 3,000 random sizes). Else one level differs.
    """
    height_first = 0 < image_HWC.shape[0] - height > 2 * (image_HWC.shape[1] - width)
    for axis in (0, 1) if height_first else (1, 0):
        image_HWC = _resize_axis(image_HWC, axis, (height, width)[axis])
    return np.ascontiguousarray(image_HWC)


def geometric(image_HWC: Array, pre: Preprocessing) -> Array:
    """Shorter side to `pre.resize`, centre crop to `pre.crop`; sizes and offsets round as torchvision's do."""
    height, width = image_HWC.shape[:2]
    if pre.resize is not None and min(height, width) != pre.resize:
        longer = int(pre.resize * max(height, width) / min(height, width))
        height, width = (pre.resize, longer) if height <= width else (longer, pre.resize)
        image_HWC = resize(image_HWC, height, width)
    if pre.crop is None:
        return image_HWC
    if pre.crop[0] > height or pre.crop[1] > width:
        raise DataError(
            f"An image of {height}x{width} is smaller than the crop of {pre.crop[0]}x{pre.crop[1]}. Resize it first."
        )
    top, left = round((height - pre.crop[0]) / 2.0), round((width - pre.crop[1]) / 2.0)
    return image_HWC[top : top + pre.crop[0], left : left + pre.crop[1]]


def to_input(x_NCHW: Array, pre: Preprocessing | None, spec: TensorSpec) -> Array:
    """uint8 (N, C, H, W) to the graph's layout and dtype; (x - mean) / std in pixel units only where `pre` gives a mean.

    Raises TargetError where the graph takes another size, or whole numbers that a normalised image does not have.
    """
    x = x_NCHW
    if pre is not None and pre.mean is not None:
        if np.dtype(spec.dtype).kind != "f":
            raise TargetError(
                f"Input '{spec.name}' takes {spec.dtype}, but the image is normalised. Drop mean and std."
            )
        std = np.ones(len(pre.mean)) if pre.std is None else np.asarray(pre.std)
        x = (x.astype(np.float32) - _per_channel(pre.mean)) / _per_channel(std)
    elif spec.dtype != "uint8" and np.dtype(spec.dtype).kind != "f":
        raise TargetError(
            f"Input '{spec.name}' takes {spec.dtype}; images are uint8 or floats. Export it with one of these."
        )
    if _is_channels_last(spec, x.shape[1]):
        x = x.transpose(0, 2, 3, 1)
    if len(spec.shape) != 4 or any(
        needed not in (None, got) for needed, got in zip(spec.shape[1:], x.shape[1:], strict=True)
    ):
        raise TargetError(
            f"Input '{spec.name}' takes shape {spec.shape}, the images are {x.shape}. "
            "Prepare the data with the model's image size and channels."
        )
    return np.ascontiguousarray(x, dtype=spec.dtype)


@dataclass(frozen=True)
class Evaluation:
    """Held-out samples after geometric preprocessing, memory-mapped: uint8 (N, C, H, W) in shards."""

    directory: Path
    shards: tuple[Array, ...]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    labels: Array | None  # (N,) int64
    encoded_names: tuple[str, ...]
    encoded_index: tuple[int, ...]  # which sample each encoded file is

    @cached_property
    def num_samples(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def batches(self, batch: int, spec: TensorSpec) -> Iterator[Array]:
        """All samples in order as the graph's input; the last batch may be smaller."""
        for x_NCHW in self.pixels(batch):
            yield to_input(x_NCHW, self.preprocessing, spec)

    def pixels(self, batch: int) -> Iterator[Array]:
        """All samples in order as uint8 (batch, C, H, W)."""
        for start in range(0, self.num_samples, batch):
            yield self._slice(start, min(start + batch, self.num_samples))

    def encoded(self) -> list[bytes]:
        """The bytes of the samples `encoded_index` as they are before decoding."""
        return [(self.directory / name).read_bytes() for name in self.encoded_names]

    def _slice(self, start: int, stop: int) -> Array:
        pieces = []
        for shard in self.shards:
            if start < len(shard) and stop > 0:
                pieces.append(shard[max(start, 0) : stop])
            start, stop = start - len(shard), stop - len(shard)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def load_evaluation(directory: Path) -> Evaluation:
    """Open an evaluation set; raises IntegrityError where a file is absent, damaged, or does not fit the others."""
    spec = read_json(directory / "spec.json")
    labels_path = directory / "y.npy"
    try:
        evaluation = Evaluation(
            directory=directory,
            shards=tuple(np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in spec["shards"]),
            classes=tuple(spec["classes"]),
            preprocessing=preprocessing_from_json(spec["preprocessing"]),
            labels=np.load(labels_path, allow_pickle=False) if labels_path.is_file() else None,
            encoded_names=tuple(spec["encoded"]),
            encoded_index=tuple(spec["encoded_index"]),
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"The evaluation set {directory} cannot be read: {error}. Write or send it again."
        ) from None
    num_labels = evaluation.num_samples if evaluation.labels is None else len(evaluation.labels)
    if not evaluation.num_samples == spec["num_samples"] == num_labels:
        raise IntegrityError(f"The evaluation set {directory} is not whole: its counts differ. Write or send it again.")
    return evaluation


def _resize_axis(image: Array, axis: int, out_size: int) -> Array:
    """Resize one axis of a uint8 image with int32 fixed-point weights."""
    if image.shape[axis] == out_size:
        return image
    image_HWC = np.moveaxis(image, axis, 0)
    starts_O, weights_OT = _fixed_point_weights(image_HWC.shape[0], out_size)
    total = np.full((out_size, *image_HWC.shape[1:]), 1 << (PRECISION_BITS - 1), dtype=np.int32)
    last = image_HWC.shape[0] - 1
    for tap in range(weights_OT.shape[1]):
        rows = image_HWC[np.minimum(starts_O + tap, last)]
        total += rows.astype(np.int32) * weights_OT[:, tap, np.newaxis, np.newaxis]
    return np.moveaxis(np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8), 0, axis)


def _fixed_point_weights(in_size: int, out_size: int) -> tuple[Array, Array]:
    """First input row and weights (times 2^22) of each output row: a triangle as wide as the reduction (precompute_coeffs)."""
    scale = in_size / out_size
    support = max(scale, 1.0)
    centers_O = (np.arange(out_size) + 0.5) * scale
    starts_O = np.maximum((centers_O - support + 0.5).astype(np.int64), 0)
    ends_O = np.minimum((centers_O + support + 0.5).astype(np.int64), in_size)
    taps_OT = starts_O[:, np.newaxis] + np.arange((ends_O - starts_O).max())
    distances_OT = np.abs((taps_OT - centers_O[:, np.newaxis] + 0.5) * (1.0 / support))
    weights_OT = np.where(taps_OT < ends_O[:, np.newaxis], np.maximum(1.0 - distances_OT, 0.0), 0.0)
    weights_OT /= weights_OT.sum(axis=1, keepdims=True)
    return starts_O, (weights_OT * (1 << PRECISION_BITS) + 0.5).astype(np.int32)


def _is_channels_last(spec: TensorSpec, num_channels: int) -> bool:
    if spec.layout:
        return spec.layout == "NHWC"
    return len(spec.shape) == 4 and spec.shape[1] != num_channels and spec.shape[3] == num_channels


def _per_channel(values: tuple[float, ...] | Array) -> Array:
    return np.asarray(values, dtype=np.float32)[:, np.newaxis, np.newaxis]
