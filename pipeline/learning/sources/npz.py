"""`npz:PATH`: one NumPy archive with Keras' keys (x_train ...) or MedMNIST's (train_images ...).

MedMNIST's val part becomes the validation split. Archives are read with allow_pickle=False: they cannot run code.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.learning.sources.parts import Arrays, Pixels, Source, as_images, as_labels, numbered_classes
from targets.errors import DataError

LONGEST_END = 22 + 65535  # bytes of a zip's last record, its comment included
# part: images' and labels' key, Keras' first
KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def locate(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"npz:{path}: there is no such file (looked at {path.absolute()}). Give the path of an .npz file."
        )
    return path.absolute()


def read(path: Path) -> Source:
    return source_from_arrays(load(locate(path)), str(path))


def source_from_arrays(arrays: Mapping[str, Any], where: str) -> Source:
    """A source from arrays under Keras' or MedMNIST's keys; raises DataError where they are no images with labels."""
    parts = {name: _part(arrays, keys, where) for name, keys in KEYS.items()}
    train = parts["train"]
    if train is None:
        raise DataError(
            f"{where}: holds {', '.join(sorted(arrays)) or 'nothing'}. Needed: x_train, y_train, x_test, y_test, or "
            "MedMNIST's train_images, train_labels, val_images, ..."
        )
    return Source(
        classes=numbered_classes(train.labels_N, where), train=train, validation=parts["validation"], test=parts["test"]
    )


def training_images(arrays: Mapping[str, Any], where: str) -> Pixels:
    """The training images (N, C, H, W), whether or not they have labels."""
    for images_key, _ in KEYS["train"]:
        if arrays.get(images_key) is not None:
            return as_images(arrays[images_key], f"{where}, {images_key}")
    raise DataError(
        f"{where}: holds {', '.join(sorted(arrays)) or 'nothing'}. Needed of unlabelled images: x_train or train_images."
    )


def _part(arrays: Mapping[str, Any], keys: tuple[tuple[str, str], ...], where: str) -> Arrays | None:
    for images_key, labels_key in keys:
        if images_key in arrays and labels_key in arrays:
            x_NCHW = as_images(arrays[images_key], f"{where}, {images_key}")
            return Arrays(x_NCHW, as_labels(arrays[labels_key], len(x_NCHW), f"{where}, {labels_key}"))
        if images_key in arrays or labels_key in arrays:
            raise DataError(f"{where}: one of {images_key} and {labels_key} is absent. Give both or neither.")
    return None


def load(path: Path) -> dict[str, Any]:
    """The arrays under known keys (None under others). Raises DataError where the file is no whole NPZ."""
    known = {key for pairs in KEYS.values() for pair in pairs for key in pair}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            _check_whole(file, len(archive.files))
            return {key: archive[key] if key in known else None for key in archive.files}
    # A flipped byte makes the zip and the header reader raise nearly anything, MemoryError included.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"npz:{path} cannot be read: {reason}. Write or copy the file again.") from None


def _check_whole(file: BinaryIO, num_found: int) -> None:
    """Compare with the count at the archive's end: of a damaged directory zipfile reads the beginning and says nothing."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_END))
    content = file.read()
    (num_written,) = struct.unpack_from("<H", content, content.rfind(b"PK\x05\x06") + 10)
    if num_written not in (num_found, 0xFFFF):  # more than 65,534 entries are counted elsewhere
        raise ValueError(f"it lists {num_found} of its {num_written} arrays")
