"""`torchvision:NAME`: torchvision's image classification sets through one reader.

What differs between the sets (constructor arguments, where the files lie) is one table; how samples are held is found
on the object: `.data` arrays become arrays, lists of image files become files. torchvision is imported to read or download.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.learning.sources.parts import Arrays, Files, Part, Source, as_images, as_labels
from targets.errors import DataError

BY_TRAIN = ({"train": True}, None, {"train": False})
BY_SPLIT = ({"split": "train"}, None, {"split": "test"})
BY_THREE = ({"split": "train"}, {"split": "val"}, {"split": "test"})
UNDIVIDED: tuple[Mapping[str, Any] | None, ...] = ({}, None, None)


@dataclass(frozen=True)
class VisionSet:
    """`files` are patterns under the root; `arguments` are the constructor's for train, validation and test (None: no such
    part); `flip` says whether a mirrored image keeps its class."""

    files: tuple[str, ...]
    arguments: tuple[Mapping[str, Any] | None, ...]
    flip: bool


SETS = {
    "MNIST": VisionSet(("MNIST/raw/*-ubyte",), BY_TRAIN, flip=False),
    "FashionMNIST": VisionSet(("FashionMNIST/raw/*-ubyte",), BY_TRAIN, flip=True),
    "KMNIST": VisionSet(("KMNIST/raw/*-ubyte",), BY_TRAIN, flip=False),
    "EMNIST": VisionSet(
        ("EMNIST/raw/emnist-balanced-*-ubyte",),
        ({"split": "balanced", "train": True}, None, {"split": "balanced", "train": False}),
        flip=False,
    ),
    "USPS": VisionSet(("usps.bz2", "usps.t.bz2"), BY_TRAIN, flip=False),
    "CIFAR10": VisionSet(("cifar-10-batches-py/*_batch*", "cifar-10-batches-py/batches.meta"), BY_TRAIN, flip=True),
    "CIFAR100": VisionSet(tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")), BY_TRAIN, flip=True),
    "SVHN": VisionSet(("train_32x32.mat", "test_32x32.mat"), BY_SPLIT, flip=False),
    "STL10": VisionSet(
        ("stl10_binary/train_*", "stl10_binary/test_*", "stl10_binary/class_names.txt"), BY_SPLIT, flip=True
    ),
    "GTSRB": VisionSet(
        ("gtsrb/GTSRB/Training/*/*.ppm", "gtsrb/GTSRB/Final_Test/Images/*.ppm", "gtsrb/GT-final_test.csv"),
        BY_SPLIT,
        flip=False,
    ),
    "Flowers102": VisionSet(
        ("flowers-102/jpg/*.jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"), BY_THREE, flip=True
    ),
    "OxfordIIITPet": VisionSet(
        (
            "oxford-iiit-pet/images/*.jpg",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
        ({"split": "trainval"}, None, {"split": "test"}),
        flip=True,
    ),
    "Food101": VisionSet(("food-101/images/*/*.jpg", "food-101/meta/*.json"), BY_SPLIT, flip=True),
    "DTD": VisionSet(("dtd/dtd/images/*/*.jpg", "dtd/dtd/labels/*1.txt"), BY_THREE, flip=True),
    "FGVCAircraft": VisionSet(
        ("fgvc-aircraft-2013b/data/images/*.jpg", "fgvc-aircraft-2013b/data/*variant*.txt"), BY_THREE, flip=True
    ),
    "Imagenette": VisionSet(("imagenette2/*/*/*.JPEG",), ({"split": "train"}, None, {"split": "val"}), flip=True),
    "EuroSAT": VisionSet(("eurosat/2750/*/*.jpg",), UNDIVIDED, flip=True),
}


def locate(name: str, root: Path, *, offline: bool) -> tuple[Path, ...]:
    known = _known(name)
    if not _is_present(known, root):
        if offline:
            raise DataError(
                f"torchvision:{name} is not under {root.absolute()} (looked for {known.files[0]}), and --offline forbids to "
                "download it. Run once without --offline, or set data.root."
            )
        for arguments in known.arguments:
            if arguments is not None:
                _open(name, root, {**arguments, "download": True})
    return tuple(sorted(path.absolute() for pattern in known.files for path in root.glob(pattern)))


def read(name: str, root: Path) -> Source:
    known = _known(name)
    sets = [None if arguments is None else _open(name, root, arguments) for arguments in known.arguments]
    train, validation, test = (None if opened is None else part_of(opened, f"torchvision:{name}") for opened in sets)
    if train is None:
        raise DataError(f"torchvision:{name} has no training part. Choose another set.")
    num_classes = int(train.labels_N.max()) + 1 if len(train.labels_N) else 0
    return Source(class_names(sets[0], num_classes), train, validation, test, flip=known.flip)


def part_of(opened: Any, where: str) -> Part:
    """The samples of an opened torchvision set: its arrays if it holds any, else its image files."""
    labels = next(
        (value for name in ("targets", "labels", "_labels") if (value := getattr(opened, name, None)) is not None), None
    )
    if hasattr(opened, "data") and labels is not None:
        x_NCHW = as_images(np.asarray(opened.data), where)
        return Arrays(x_NCHW, as_labels(labels, len(x_NCHW), where))
    if pairs := getattr(opened, "_samples", None) or getattr(opened, "samples", None):
        paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    else:
        paths = getattr(opened, "_image_files", None) or getattr(opened, "_images", [])
    if labels is None or not paths:
        raise DataError(f"{where}: no labelled images found in it. Export them to an image_folder, and give that.")
    return Files(tuple(str(path) for path in paths), as_labels(labels, len(paths), where))


def class_names(opened: Any, num_classes: int) -> tuple[str, ...]:
    """The set's own names where it has one for each class, else the numbers."""
    names = [name if isinstance(name, str) else name[0] for name in getattr(opened, "classes", ())]
    return tuple(names) if len(names) >= num_classes else tuple(str(number) for number in range(num_classes))


def _known(name: str) -> VisionSet:
    if name not in SETS:
        raise DataError(f"torchvision:{name}: not a set that can be read. Known: {', '.join(SETS)}.")
    return SETS[name]


def _is_present(known: VisionSet, root: Path) -> bool:
    return all(next(root.glob(pattern), None) is not None for pattern in known.files)


def _open(name: str, root: Path, arguments: Mapping[str, Any]) -> Any:
    import torchvision

    try:
        return getattr(torchvision.datasets, name)(root=str(root), **arguments)
    # Readers of foreign files, and the network: they raise RuntimeError, OSError, URLError, BadZipFile, UnpicklingError, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(
            f"torchvision:{name} under {root.absolute()} cannot be read or downloaded: {reason}. "
            "Remove the damaged files and run again online, or set data.root."
        ) from None
