"""The samples of a model in the matrix: what sets its ranges, and what is held out to ask whether INT8 answers as float does.

Reads a folder of images or an NPZ file; makes synthetic images where there is none. Imports no torch.
"""
# Shapes: N samples, C channels, H height, W width.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.device.preprocess import to_input
from pipeline.calibration import Calibration, image_input, read_calibration
from pipeline.learning.sources import data_digest
from pipeline.learning.sources.folder import EXTENSIONS
from pipeline.matrix.recipe import InputConfig
from pipeline.progress import Progress
from targets.base import Array, Preprocessing, TensorSpec
from targets.checks import smallest_batch
from targets.errors import DataError

SYNTHETIC = "synthetic images"
GRAIN = 16  # pixels; photographs are smooth over some of them


def samples_of(
    source: Path | None, inputs: Sequence[TensorSpec], pixels: InputConfig, num_samples: int, progress: Progress
) -> Calibration:
    """`num_samples` for the ranges and up to 64 held out; synthetic samples hold none out: they stand for no data.

    Raises DataError, ModelError or RecipeError as `edgestill quantize` does.
    """
    if source is None:
        return _synthetic(inputs, pixels, num_samples)
    from_images = source.is_dir()
    return read_calibration(
        source,
        inputs,
        num_samples=num_samples,
        mean=pixels.mean if from_images and _normalised(inputs) else None,
        std=pixels.std if from_images and _normalised(inputs) else None,
        resize=pixels.resize if from_images else None,
        progress=progress,
    )


def digest_of(source: Path | None, cache_path: Path) -> str:
    """What the samples are made from, by content. Raises DataError where it is not there."""
    if source is None:
        return SYNTHETIC
    if not source.exists():
        raise DataError(
            f"calibration {source}: there is no such folder or file. Give a folder of images or an NPZ file."
        )
    paths = [path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS] if source.is_dir() else [source]
    if not paths:
        raise DataError(f"calibration {source}: no image in it ({' '.join(EXTENSIONS)}). Give a folder that has some.")
    return data_digest(paths, cache_path)


def _normalised(inputs: Sequence[TensorSpec]) -> bool:
    """A uint8 input takes the pixels as they are."""
    return inputs[0].dtype != "uint8"


def _synthetic(inputs: Sequence[TensorSpec], pixels: InputConfig, num_samples: int) -> Calibration:
    mean, std = (pixels.mean, pixels.std) if _normalised(inputs) else (None, None)
    spec, preprocessing = image_input(inputs, mean=mean, std=std, resize=pixels.resize)
    batch = smallest_batch(inputs)
    images_NCHW = _images(num_samples * batch, preprocessing)
    samples = [
        {spec.name: to_input(images_NCHW[start : start + batch], preprocessing, spec)}
        for start in range(0, len(images_NCHW), batch)
    ]
    return Calibration(samples=tuple(samples), held_out=(), how=SYNTHETIC, preprocessing=preprocessing)


def _images(num_images: int, preprocessing: Preprocessing) -> Array:
    """uint8 (N, C, H, W), seeded: coarse patches of any brightness under a fine grain."""
    height, width = preprocessing.crop or (GRAIN, GRAIN)
    channels = 1 if preprocessing.mode == "L" else 3
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (num_images, channels, -(-height // GRAIN), -(-width // GRAIN)))
    patches = coarse.repeat(GRAIN, axis=2).repeat(GRAIN, axis=3)[:, :, :height, :width]
    grain = generator.normal(0, 16, patches.shape)
    images: Array = np.clip(patches + grain, 0, 255).astype(np.uint8)
    return images
