"""`image_folder:PATH`: one folder a class, in `train/` and `test/`, or in PATH itself (a test part is then split off).

`val/` or `valid/` is the validation split where `test/` stands beside it, and the test part where it does not (ImageNet's
layout). Class ids follow the sorted folder names, as torchvision's ImageFolder has them. No image is opened here.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.learning.sources.parts import Files, Source
from targets.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
LAYOUT = "Needed: PATH/train/CLASS/image.jpg and PATH/test/CLASS/image.jpg, or PATH/CLASS/image.jpg"


def locate(root: Path) -> tuple[Path, ...]:
    source = read(root)
    return tuple(Path(path) for part in source.parts().values() if isinstance(part, Files) for path in part.paths)


def read(root: Path) -> Source:
    if not root.is_dir():
        raise DataError(f"image_folder:{root}: there is no such folder (looked at {root.absolute()}). {LAYOUT}.")
    part_dirs = _part_dirs(root.absolute())
    classes = _class_names(part_dirs["train"])
    parts = {name: _read_part(directory, classes) for name, directory in part_dirs.items()}
    return Source(
        classes=classes, train=parts["train"], validation=parts.get("validation"), test=parts.get("test"), flip=True
    )


def _part_dirs(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        for name in ("test", "val", "valid"):
            if (root / name).is_dir():
                raise DataError(f"image_folder:{root}: {name}/ without train/. {LAYOUT}.")
        return {"train": root}
    held_out = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    if not held_out:
        return {"train": root / "train"}
    found = {"train": root / "train", "test": held_out[0]}
    if held_out[0].name == "test" and len(held_out) > 1:
        found["validation"] = held_out[1]
    return found


def _class_names(directory: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{directory}: no class folders in it. {LAYOUT}.")
    return tuple(names)


def _read_part(directory: Path, classes: tuple[str, ...]) -> Files:
    names = _class_names(directory)
    if names != classes:
        differing = sorted(set(names) ^ set(classes))
        raise DataError(
            f"{directory}: class folders differ from the training part's, first {differing[0]!r} ({len(differing)} in all). "
            "Give both the same class folders."
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = image_paths(directory / name)
        paths += found
        labels += [label] * len(found)
    return Files(tuple(paths), np.array(labels, dtype=np.int64))


def image_paths(directory: Path) -> list[str]:
    """All images below `directory`, sorted. Raises DataError where there is none."""
    found = sorted(
        os.path.join(folder, name)  # noqa: PTH118  (a Path for each of a million images costs seconds)
        for folder, _, names in os.walk(directory, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )
    if not found:
        raise DataError(f"{directory}: no image in it ({' '.join(EXTENSIONS)}). Add images, or remove the folder.")
    return found
