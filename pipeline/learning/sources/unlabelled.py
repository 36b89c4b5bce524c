"""Images that are taken without their labels: the training part of any source, or all that it has.

`image_folder:PATH` may be a flat folder here: all images below PATH/train, or below PATH where there is no such folder. An NPZ, or what
a factory returns, needs no labels. Reads what `data.unlabelled` of the recipe names, as the readers beside it do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.learning.labels import UNLABELLED
from pipeline.learning.sources import factory, folder, npz
from pipeline.learning.sources.parts import Arrays, Files, Labels, Part, Pixels
from targets.errors import DataError


def locate_folder(root: Path) -> tuple[Path, ...]:
    return tuple(Path(path) for path in read_folder(root).paths)


def read_folder(root: Path) -> Files:
    """Every image below the folder, in whatever folders; none is opened."""
    if not root.is_dir():
        raise DataError(
            f"image_folder:{root}: there is no such folder (looked at {root.absolute()}). Give a folder that holds images."
        )
    paths = folder.image_paths(root.absolute() / "train" if (root / "train").is_dir() else root.absolute())
    return Files(tuple(paths), no_labels(len(paths)))


def read_npz(path: Path) -> Arrays:
    return _part(npz.training_images(npz.load(npz.locate(path)), str(path)))


def read_factory(target: str, *, allow_code: bool) -> Arrays:
    return _part(factory.read_images(target, allow_code=allow_code))


def without_labels(part: Part) -> Part:
    """The same images, each of them unlabelled."""
    unlabelled_N = no_labels(len(part.labels_N))
    return Arrays(part.x_NCHW, unlabelled_N) if isinstance(part, Arrays) else Files(part.paths, unlabelled_N)


def no_labels(num_samples: int) -> Labels:
    return np.full(num_samples, UNLABELLED, dtype=np.int64)


def _part(x_NCHW: Pixels) -> Arrays:
    return Arrays(x_NCHW, no_labels(len(x_NCHW)))
