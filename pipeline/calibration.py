"""Calibration samples of a person's own: a folder of images, or an NPZ file, as what a graph's inputs take.

Reads image files or one .npz; writes nothing. A seeded draw decides which samples set the ranges and which are held out for
the comparison with float, so that the same files give the same INT8 model. Imports no torch.
"""
# Shapes: N batch, C channels, H height, W width.

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.device.preprocess import geometric, to_input
from pipeline.learning.sources.folder import EXTENSIONS
from pipeline.learning.sources.image_file import read_image
from pipeline.progress import Progress
from targets.base import Array, Preprocessing, TensorSpec
from targets.checks import smallest_batch
from targets.errors import DataError, ModelError, RecipeError

Sample = Mapping[str, Array]  # one array an input, of the batch that the graph runs with

NUM_HELD_OUT = 64
HELD_OUT_SHARE = 5  # where there are too few: one in five
MAX_UNREADABLE = 0.1  # ranges need typical images, not each of them; a folder that is mostly broken is another folder
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`samples` set the ranges, `held_out` is compared with float (empty where there is one sample); `how` is for people."""

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    how: str
    notes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def read_calibration(
    path: Path,
    inputs: Sequence[TensorSpec],
    *,
    num_samples: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: int | None,
    progress: Progress,
) -> Calibration:
    """Read `num_samples` samples and up to NUM_HELD_OUT others. mean and std are in pixel units, 0..255; resize in pixels.

    Raises DataError (nothing there, unreadable, names), ModelError (inputs that images cannot feed), RecipeError (options).
    """
    if path.is_dir():
        return _from_images(path, inputs, num_samples, mean, std, resize, progress)
    if not path.is_file():
        raise DataError(f"calibration {path}: there is no such folder or file. Give a folder of images or an NPZ file.")
    if mean is not None or std is not None or resize is not None:
        raise RecipeError(f"--mean, --std and --resize are for images; {path.name} is fed as it is. Drop them.")
    samples = split_batches(_read_npz(path, inputs), smallest_batch(inputs), num_samples + NUM_HELD_OUT)
    return divide(samples, num_samples, how=f"arrays of {path.name}, as they are")


def divide(
    samples: Sequence[Sample],
    num_samples: int,
    *,
    how: str,
    notes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> Calibration:
    """The first up to `num_samples` set the ranges; up to NUM_HELD_OUT behind them, or one in five, are held out."""
    num_held_out = min(NUM_HELD_OUT, max(len(samples) - num_samples, len(samples) // HELD_OUT_SHARE))
    num_used = min(num_samples, len(samples) - num_held_out)
    return Calibration(
        samples=tuple(samples[:num_used]),
        held_out=tuple(samples[num_used : num_used + num_held_out]),
        how=how,
        notes=tuple(notes),
        preprocessing=preprocessing,
    )


def split_batches(arrays: Mapping[str, Array], batch: int, limit: int) -> list[Sample]:
    """Rows in a seeded order, `batch` of them a sample, at most `limit` samples; a rest that fills no batch is left out."""
    num_rows = len(next(iter(arrays.values())))
    order = np.random.default_rng(SEED).permutation(num_rows)
    groups = [order[start : start + batch] for start in range(0, num_rows - batch + 1, batch)][:limit]
    if not groups:
        raise DataError(f"calibration holds {num_rows} samples, the graph runs {batch} at once. Give at least as many.")
    return [{name: array[group] for name, array in arrays.items()} for group in groups]


def image_input(
    inputs: Sequence[TensorSpec],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: int | None,
) -> tuple[TensorSpec, Preprocessing]:
    """The one input that images feed, with its layout, and how an image becomes it.

    A uint8 input takes the pixels as they are. A float input needs mean and std: a wrong guess would set wrong ranges, and
    the comparison with float, fed the same wrong values, would not show it.
    """
    spec = inputs[0]
    layout = layout_of(spec)
    if len(inputs) != 1 or layout is None:
        shapes = ", ".join(f"'{spec.name}' {list(spec.shape)}" for spec in inputs)
        raise ModelError(
            f"images feed one input of 1 or 3 channels; the graph takes {shapes}. "
            "Give an NPZ file with one array an input, batch first."
        )
    channels, height, width = (spec.shape[axis] for axis in ((1, 2, 3) if layout == "NCHW" else (3, 1, 2)))
    crop = _crop(spec, height, width, resize)
    mean_C, std_C = _normalisation(spec, int(channels or 0), mean, std)
    return replace(spec, layout=layout), Preprocessing(
        mode="L" if channels == 1 else "RGB", resize=resize or max(crop), crop=crop, mean=mean_C, std=std_C
    )


def layout_of(spec: TensorSpec) -> str | None:
    """NCHW or NHWC, by where the one or three channels stand; None for what is no image."""
    if len(spec.shape) != 4:
        return None
    return "NCHW" if spec.shape[1] in (1, 3) else "NHWC" if spec.shape[3] in (1, 3) else None


def _crop(spec: TensorSpec, height: int | None, width: int | None, resize: int | None) -> tuple[int, int]:
    if (height is None or width is None) and resize is None:
        raise ModelError(
            f"'{spec.name}' {list(spec.shape)} leaves height or width free, so the images' size is not known. "
            "Say it: --resize PIXELS."
        )
    crop = (height or resize or 0, width or resize or 0)
    if resize is not None and resize < max(crop):
        raise RecipeError(
            f"--resize {resize}: the crop of {crop[0]}x{crop[1]} does not fit in. Give {max(crop)} or more."
        )
    return crop


def _normalisation(
    spec: TensorSpec, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std, each of them one number a channel; both None for a graph that takes pixels."""
    if np.dtype(spec.dtype).kind != "f":
        if mean is not None or std is not None:
            raise RecipeError(f"--mean, --std: '{spec.name}' takes {spec.dtype} pixels as they are. Drop them.")
        return None, None
    if mean is None or std is None:
        raise RecipeError(
            f"'{spec.name}' takes {spec.dtype}, and nothing says how pixels become that. Give --mean and --std in 0..255:\n"
            "--mean 0 --std 255 for 0..1, --mean 0 --std 1 for raw pixels, or what the model was trained with, e.g.\n"
            "--mean 123.675,116.28,103.53 --std 58.395,57.12,57.375 (ImageNet's)."
        )
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            raise RecipeError(
                f"{option} {list(values)}: give one finite number, or one for each of {channels} channels."
            )
    if not all(value > 0 for value in std):
        raise RecipeError(f"--std {list(std)}: pixels are divided by it, so it must be above 0. Mend it.")
    return _broadcast(mean, channels), _broadcast(std, channels)


def _broadcast(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * (channels if len(values) == 1 else 1)


def _from_images(
    folder: Path,
    inputs: Sequence[TensorSpec],
    num_samples: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: int | None,
    progress: Progress,
) -> Calibration:
    spec, preprocessing = image_input(inputs, mean=mean, std=std, resize=resize)
    batch = smallest_batch(inputs)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not paths:
        raise DataError(f"calibration {folder}: no image in it ({' '.join(EXTENSIONS)}). Give a folder that has some.")
    order = np.random.default_rng(SEED).permutation(len(paths))[: (num_samples + NUM_HELD_OUT) * batch]
    unreadable: list[str] = []
    with progress.task("read calibration images", total=len(order)) as task:
        images = []
        for image_CHW in _readable((paths[i] for i in order), preprocessing, unreadable):
            images.append(image_CHW)
            task.advance()
    _check_unreadable(unreadable, len(order), folder)
    pixels_NCHW = np.stack(images)
    samples = [
        {spec.name: to_input(pixels_NCHW[start : start + batch], preprocessing, spec)}
        for start in range(0, len(pixels_NCHW) - batch + 1, batch)
    ]
    if not samples:
        raise DataError(f"calibration {folder}: {len(images)} images, the graph runs {batch} at once. Give more.")
    notes = [f"{len(unreadable)} of {len(order)} images could not be read: {_named(unreadable)}"] if unreadable else []
    how = _in_words(preprocessing, spec)
    return divide(samples, num_samples, how=how, notes=notes, preprocessing=preprocessing)


def _readable(paths: Iterator[Path], preprocessing: Preprocessing, unreadable: list[str]) -> Iterator[Array]:
    """Each image that can be decoded as uint8 (C, H, W); the others are told in `unreadable`."""
    for path in paths:
        try:
            image_HWC = read_image(str(path), preprocessing.mode)
        except DataError as error:
            unreadable.append(str(error))
            continue
        yield np.ascontiguousarray(geometric(image_HWC, preprocessing).transpose(2, 0, 1))


def _check_unreadable(unreadable: Sequence[str], num_tried: int, folder: Path) -> None:
    if len(unreadable) > MAX_UNREADABLE * num_tried:
        raise DataError(
            f"calibration {folder}: {len(unreadable)} of {num_tried} images cannot be read, at most "
            f"{MAX_UNREADABLE:.0%} may be: {_named(unreadable)}\nReplace or remove them."
        )


def _named(reasons: Sequence[str]) -> str:
    more = len(reasons) - 2
    return "; ".join(reasons[:2]) + (f" and {more} more" if more > 0 else "")


def _in_words(pre: Preprocessing, spec: TensorSpec) -> str:
    height, width = pre.crop or (0, 0)
    values = "pixels as they are"
    if pre.mean is not None:
        values = f"(pixel - {_numbers(pre.mean)}) / {_numbers(pre.std or ())}"
    return (
        f"{pre.mode}, shorter side to {pre.resize}, centre crop {height}x{width}, {values}, {spec.dtype} {spec.layout}"
    )


def _numbers(values: Sequence[float]) -> str:
    shown = [f"{value:g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else f"[{', '.join(shown)}]"


def _read_npz(path: Path, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    try:
        # np.load leaves a file open that it opened itself and cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one nameless array")
            arrays: dict[str, Array] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path} cannot be read as NPZ: {reason}. Write it with np.savez(path, INPUT=array).") from None
    wanted = [spec.name for spec in inputs]
    if sorted(arrays) != sorted(wanted):
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'no array'}; the graph's inputs are {', '.join(wanted)}. "
            "Save one array an input, under its name."
        )
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{path}: rows of its arrays: {told}. Give each input the same number, one or more.")
    return {name: arrays[name] for name in wanted}
