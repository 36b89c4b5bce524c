"""What every reader hands over, and the checks that every source must pass.

Shapes: N samples, C channels (1 or 3), H height, W width. Pixels are uint8 0..255, labels are class ids 0..K-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.errors import DataError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arrays:
    """A part that fits into memory, all images of one size."""

    x_NCHW: Pixels
    labels_N: Labels


@dataclass(frozen=True)
class Files:
    """A part that stays on disk: one image file a sample."""

    paths: tuple[str, ...]
    labels_N: Labels


Part = Arrays | Files


@dataclass(frozen=True)
class Source:
    """A whole data set. `validation` and `test` are None where it has no such part of its own."""

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    crop: int | None = None  # pixels of padding before the random crop; None: an eighth of the height
    flip: bool = False  # whether a mirrored image keeps its class; digits, letters and traffic signs do not

    def parts(self) -> Mapping[str, Part]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}


def take(part: Part, indices: Labels) -> Part:
    """The samples at `indices`, in their order."""
    if isinstance(part, Arrays):
        return Arrays(part.x_NCHW[indices], part.labels_N[indices])
    return Files(tuple(part.paths[index] for index in indices), part.labels_N[indices])


def join(first: Part, second: Part) -> Part:
    """The samples of both; raises DataError where one is arrays and the other files."""
    labels_N = np.concatenate([first.labels_N, second.labels_N])
    if isinstance(first, Arrays) and isinstance(second, Arrays):
        return Arrays(np.concatenate([first.x_NCHW, second.x_NCHW]), labels_N)
    if isinstance(first, Files) and isinstance(second, Files):
        return Files(first.paths + second.paths, labels_N)
    raise DataError("The training and the validation part are of two kinds, arrays and files. Give both as one kind.")


def as_images(raw: Any, where: str) -> Pixels:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) uint8 as contiguous (N, C, H, W); C is 1 or 3."""
    images = np.asarray(raw)
    if images.dtype != np.uint8:
        raise DataError(f"{where}: images of type {images.dtype}, but pixels are uint8, 0 to 255. Store them as uint8.")
    if images.ndim == 3:
        images = images[:, np.newaxis]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{where}: images of shape {np.shape(raw)}. Needed: (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with 1 or 3 channels and at least one image."
        )
    return np.ascontiguousarray(images)


def as_labels(raw: Any, num_samples: int, where: str) -> Labels:
    """(N,) or (N, 1) whole numbers from 0 as (N,) int64."""
    labels = np.asarray(raw)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels of shape {np.shape(raw)} and type {labels.dtype}. Needed: one class id, a whole number, a sample."
        )
    if len(labels) != num_samples:
        raise DataError(f"{where}: {num_samples} images but {len(labels)} labels. Give each image one label.")
    if len(labels) and labels.min() < 0:
        raise DataError(
            f"{where}: label {labels.min()} is below 0. Number the classes from 0; images without a label go to data.unlabelled."
        )
    if len(labels) and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where}: label {labels.max()} is no class id. Number the classes from 0 without gaps.")
    return labels.astype(np.int64)


def numbered_classes(train_labels_N: Labels, where: str) -> tuple[str, ...]:
    """Names for classes that have none: their numbers. Bounded by the samples, so that one wild label costs no memory."""
    num_classes = int(train_labels_N.max()) + 1 if len(train_labels_N) else 0
    if num_classes > len(train_labels_N):
        raise DataError(
            f"{where}: label {num_classes - 1} among {len(train_labels_N)} training samples: fewer samples than classes. "
            "Number the classes from 0 without gaps, or add samples."
        )
    return tuple(str(number) for number in range(num_classes))


def check_source(source: Source, name: str) -> None:
    """Two classes or more, labels within them, every class trained, all parts of one shape. Raises DataError."""
    num_classes = len(source.classes)
    if num_classes < 2:
        only = f"the class {source.classes[0]!r} only" if source.classes else "no class"
        raise DataError(f"{name}: {only}. A classifier needs two classes or more: add the others.")
    for part_name, part in source.parts().items():
        _check_labels(part.labels_N, source.classes, f"{name}, {part_name} part")
    num_samples_K = np.bincount(source.train.labels_N, minlength=num_classes)
    if len(source.train.labels_N) < num_classes:
        raise DataError(
            f"{name}: {len(source.train.labels_N)} training samples for {num_classes} classes. Add samples."
        )
    if (absent := np.flatnonzero(num_samples_K == 0)).size:
        raise DataError(
            f"{name}: class {source.classes[absent[0]]!r} has no training sample ({absent.size} such). "
            "Add samples, or number the classes from 0 without gaps."
        )
    shapes = {part.x_NCHW.shape[1:] for part in source.parts().values() if isinstance(part, Arrays)}
    if len(shapes) > 1:
        raise DataError(f"{name}: parts with images of different shapes (C, H, W): {sorted(shapes)}. Make them equal.")


def _check_labels(labels_N: Labels, classes: tuple[str, ...], where: str) -> None:
    if not len(labels_N):
        raise DataError(f"{where}: no samples. Add some, or leave the part out.")
    if labels_N.max() >= len(classes):
        raise DataError(
            f"{where}: label {labels_N.max()}, but the classes are 0 to {len(classes) - 1}. "
            "Mend the label, or add the class to the training part."
        )
