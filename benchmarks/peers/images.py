"""One folder of photographs as both: what every quantizer calibrates on, and what every model is asked afterwards.

Reads image files in the order of their names: every other one calibrates, the rest is held out. Writes calibration.npz (the
graph's input as the quantizers take it) and evaluation/ (uint8, as the device program takes it; `y.npy` where all file
names begin with a class id, as 0123_name.jpg).
"""
# Shapes: N samples, C channels, H height, W width.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.evaluate import pixels_of
from benchmarks.device.preprocess import to_input
from targets.base import Array, Preprocessing, TensorSpec, write_json
from targets.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True, kw_only=True)
class Images:
    """`labels` are the class ids of the held-out samples, None where the file names hold none."""

    calibration: Path
    evaluation_dir: Path
    num_calibration: int
    labels: Array | None
    num_held_out: int


def prepare_images(folder: Path, spec: TensorSpec, preprocessing: Preprocessing, out_dir: Path) -> Images:
    """Write both forms under `out_dir`. Raises DataError where the folder holds fewer than two images."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    if len(paths) < 2:
        raise DataError(f"{folder}: {len(paths)} images in it, two are the least. Give a folder of photographs.")
    evaluation_dir = out_dir / "evaluation"
    evaluation_dir.mkdir(parents=True, exist_ok=True)
    calibration_NCHW, held_out_NCHW = (_pixels(half, preprocessing) for half in (paths[::2], paths[1::2]))
    arrays: dict[str, Any] = {spec.name: to_input(calibration_NCHW, preprocessing, spec)}
    np.savez(out_dir / "calibration.npz", **arrays)
    np.save(evaluation_dir / "x-000.npy", held_out_NCHW)
    labels = labels_of(paths[1::2])
    if labels is not None:
        np.save(evaluation_dir / "y.npy", labels)
    _describe(evaluation_dir, len(held_out_NCHW), labels, preprocessing)
    return Images(
        calibration=out_dir / "calibration.npz",
        evaluation_dir=evaluation_dir,
        num_calibration=len(calibration_NCHW),
        labels=labels,
        num_held_out=len(held_out_NCHW),
    )


def labels_of(paths: Sequence[Path]) -> Array | None:
    """Class ids (N,) from names as 0123_name.jpg; None where one of them is named otherwise."""
    prefixes = [path.name.partition("_")[0] for path in paths]
    return np.array([int(prefix) for prefix in prefixes]) if all(prefix.isdecimal() for prefix in prefixes) else None


def _pixels(paths: Sequence[Path], preprocessing: Preprocessing) -> Array:
    return np.concatenate([pixels_of(path.read_bytes(), preprocessing) for path in paths])


def _describe(evaluation_dir: Path, num_samples: int, labels: Array | None, preprocessing: Preprocessing) -> None:
    """The evaluation set's spec.json. No encoded samples: their way is measured elsewhere."""
    spec = {
        "num_samples": num_samples,
        "classes": [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)],
        "preprocessing": {"mode": preprocessing.mode, "resize": preprocessing.resize, "crop": preprocessing.crop},
        "shards": ["x-000.npy"],
        "encoded": [],
        "encoded_index": [],
    }
    write_json(evaluation_dir / "spec.json", spec)
