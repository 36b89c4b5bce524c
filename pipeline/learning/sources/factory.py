"""`python:package.module:factory`: data from a person's own code, behind --allow-code.

`factory()` returns arrays under Keras' keys, or (train_dataset, test_dataset) of (image, label) pairs. Datasets are read
once into memory: their images must be uint8 and of one size, and their transforms must not be random.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.learning.own_code import called, own_factory
from pipeline.learning.sources.npz import source_from_arrays, training_images
from pipeline.learning.sources.parts import Pixels, Source
from targets.errors import DataError


def locate(target: str) -> Path:
    """The module's file, found without running it. What the factory reads itself is not known, and not part of the digest."""
    module, _ = _split(target)
    for folder in [*sys.path, os.curdir]:
        stem = Path(folder or os.curdir, *module.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path.absolute()
    raise DataError(
        f"python:{target}: no module {module!r} on sys.path or in {Path.cwd()}. Run in the folder that holds it, or install it."
    )


def read(target: str, *, allow_code: bool) -> Source:
    return source_from_arrays(_arrays(target, allow_code=allow_code, key="data.source"), f"python:{target}")


def read_images(target: str, *, allow_code: bool) -> Pixels:
    """The training images (N, C, H, W); labels are not needed, and not looked at."""
    return training_images(_arrays(target, allow_code=allow_code, key="data.unlabelled"), f"python:{target}")


def _arrays(target: str, *, allow_code: bool, key: str) -> Mapping[str, Any]:
    """What the factory returns, under Keras' keys; `key` of the recipe names it in messages."""
    made = called(own_factory(f"python:{target}", key, allow_code=allow_code), key)
    where = f"python:{target}"
    if isinstance(made, Mapping):
        return made
    if isinstance(made, tuple) and len(made) == 2:
        return {**_stack(made[0], "train", where), **_stack(made[1], "test", where)}
    raise DataError(
        f"{where} returned a {type(made).__name__}. Return a dict of x_train, y_train, x_test, y_test, "
        "or (train_dataset, test_dataset)."
    )


def _split(target: str) -> tuple[str, str]:
    module, _, name = target.partition(":")
    if not module or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise DataError(f"python:{target} is not of the form python:package.module:factory. Write both names.")
    return module, name


def _stack(dataset: Any, part: str, where: str) -> dict[str, Any]:
    pairs = [dataset[index] for index in range(len(dataset))]
    images = [np.asarray(image) for image, _ in pairs]
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{where}: images of several sizes in the {part} part. Resize them in the factory.")
    return {f"x_{part}": np.array(images), f"y_{part}": np.array([int(label) for _, label in pairs], dtype=np.int64)}
