"""Image files as uint8 batches, decoded and resized by DataLoader workers.

Reads image files. Shapes: N batch, C channels, H height, W width. A view is a pure function of (view seed, index): neither the
number of workers nor the order of the batches changes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.learning.sources.image_file import read_image
from targets.base import Preprocessing
from targets.errors import DataError


@dataclass(frozen=True)
class FileImages:
    """A part that stays on disk. The paths are one array: a list of strings would be copied into every worker."""

    paths: npt.NDArray[np.str_]
    preprocessing: Preprocessing
    workers: int

    @classmethod
    def of(cls, paths: list[str], preprocessing: Preprocessing, workers: int) -> FileImages:
        return cls(np.array(paths), preprocessing, workers)

    def stream(self, batches: Iterable[Tensor], view_seed: int | None) -> Iterator[Tensor]:
        """uint8 (N, C, H, W) a batch of indices; raises DataError with the file's name where one cannot be read."""
        loader: DataLoader[Tensor] = DataLoader(
            _Views(self.paths, self.preprocessing, view_seed),
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            worker_init_fn=_silence_decoders,
            generator=torch.Generator().manual_seed(0),  # else a loader draws from the global generator
        )
        try:
            yield from loader
        except DataError as error:  # a worker's error comes with its traceback as text
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


class _Views(Dataset[Tensor]):
    """Single images: a random resized crop with a view seed, else resize and centre crop."""

    def __init__(self, paths: npt.NDArray[np.str_], preprocessing: Preprocessing, view_seed: int | None) -> None:
        from torchvision.transforms import v2

        if preprocessing.crop is None or preprocessing.resize is None:
            raise DataError("Image files need one size for all. Set data.image_size.")
        crop = list(preprocessing.crop)
        self._random = v2.RandomResizedCrop(crop, antialias=True)
        self._plain = v2.Compose([v2.Resize([preprocessing.resize], antialias=True), v2.CenterCrop(crop)])
        self._paths = paths
        self._mode = preprocessing.mode
        self._view_seed = view_seed

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        image = torch.tensor(read_image(str(self._paths[index]), self._mode)).permute(2, 0, 1)
        if self._view_seed is None:
            return _tensor(self._plain(image))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self._view_seed, index]).generate_state(1, np.uint64)[0]))
            return _tensor(self._random(image))


def _tensor(image: Any) -> Tensor:
    if not isinstance(image, Tensor):
        raise TypeError(f"a transform gave a {type(image).__name__}")
    return image


def _silence_decoders(worker: int) -> None:
    warnings.filterwarnings("ignore", module="PIL")
