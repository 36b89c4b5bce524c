"""Batches for learning: normalised, augmented, and the same on every run.

Reads what stage `data` wrote. Array sets live in memory as one uint8 tensor and are augmented a batch at a time; image files
stream through DataLoader workers, so that memory does not grow with the data.

Shapes: N batch, C channels, H height, W width. The order of an epoch is a pure function of (seed, epoch), so that a killed run
resumes bit for bit; how a sample looks in it one of (view seed, sample), so that a view can be shown again (views.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.device.preprocess import Evaluation, load_evaluation
from pipeline.artifacts import PreparedData
from pipeline.learning.image_stream import FileImages
from pipeline.learning.labels import UNLABELLED
from pipeline.learning.views import ORDER, VIEW, View, mixed_seed
from targets.base import preprocessing_from_json, read_json
from targets.errors import DataError

SPLITS = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Batch:
    """`index_N` is the position within the split: a row of the soft labels, a difficulty's entry."""

    x_NCHW: Tensor  # float32, (x / 255 - mean) / std
    labels_N: Tensor  # int64; UNLABELLED where there is none
    index_N: Tensor  # int64


class Images(Protocol):
    """A store of images by index."""

    def stream(self, batches: Iterable[Tensor], view_seed: int | None) -> Iterator[Tensor]:
        """uint8 (N, C, H, W) a batch of indices; with `view_seed`, files come as random resized crops."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """A part in memory, as one tensor."""

    x_NCHW: Tensor  # uint8

    def stream(self, batches: Iterable[Tensor], view_seed: int | None) -> Iterator[Tensor]:
        for index_N in batches:
            yield self.x_NCHW[index_N.to(self.x_NCHW.device)]


@dataclass(frozen=True)
class Data:
    """The prepared data as batches on `device`. `mean` and `std` are fractions of 255, of the train split."""

    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Mapping[str, Any]
    splits: Mapping[str, Tensor]  # name -> indices into the training part (test: into the test part)
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    evaluation: Evaluation
    device: torch.device

    @classmethod
    def load(cls, prepared: PreparedData, device: str = "cpu") -> Data:
        """Open what stage `data` wrote; raises IntegrityError or DataError where it is not whole."""
        info = prepared.info
        evaluation = load_evaluation(prepared.evaluation_dir)
        train_images, train_labels, test_images, test_labels = _open_parts(prepared.dir, info, evaluation, device)
        with np.load(prepared.dir / "split.npz", allow_pickle=False) as split:
            splits = {name: torch.from_numpy(split[name]) for name in SPLITS[:3]}
        return cls(
            classes=tuple(info["classes"]),
            channels=info["channels"],
            image_size=(info["height"], info["width"]),
            mean=tuple(info["mean"]),
            std=tuple(info["std"]),
            augment=info["augment"],
            splits={**splits, "test": torch.arange(len(test_labels))},
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            evaluation=evaluation,
            device=torch.device(device),
        )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_train(self) -> int:
        return len(self.splits["train"])

    @property
    def num_labelled(self) -> int:
        """How many of the train split have a label."""
        return len(self._labelled_train())

    @property
    def num_validation(self) -> int:
        return len(self.splits["validation"])

    def labelled(self) -> Data:
        """The same data, train without the samples that have no label: what can be learned from where no teacher is asked.
        Raises DataError where none has one."""
        if not (kept := self._labelled_train()).numel():
            raise DataError(
                "No train sample has a label, and no teacher is asked here: there is nothing to learn from. Raise "
                "data.labelled_share, or give a loss that asks the teacher its weight (distill.kd_weight)."
            )
        return replace(self, splits={**self.splits, "train": kept})

    def _labelled_train(self) -> Tensor:
        train = self.splits["train"]
        return train[self.train_labels[train] != UNLABELLED]

    def train_batches(
        self,
        *,
        epoch: int,
        seed: int,
        batch_size: int,
        shown: Tensor | None = None,
        view_seed: int | None = None,
        rows: Sequence[slice] | None = None,
        number: int = 0,
    ) -> Iterator[Batch]:
        """Augmented, shuffled batches of one pass of an epoch, its `number` from 0. `shown`: positions within the train split to
        visit (None: all); `view_seed`: the view to show (None: one that no other pass of any epoch shows); `rows`: which of
        each batch (None: all)."""
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, ORDER, number))
        # Sorted: which samples are shown tells their order, not by how little one is harder than the next.
        positions = torch.arange(self.num_train) if shown is None else shown.cpu().sort().values
        order = positions[torch.randperm(len(positions), generator=generator)]
        batches = [order[batch] for batch in batch_slices(len(order), batch_size)]
        if rows is not None:
            batches = [batch[own] for batch, own in zip(batches, rows, strict=True)]
        yield from self.view_batches(batches, mixed_seed(seed, epoch, VIEW, number) if view_seed is None else view_seed)

    def view_batches(self, batches: Sequence[Tensor], view_seed: int) -> Iterator[Batch]:
        """These positions of the train split, batch by batch, as one view shows them."""
        train = self.splits["train"]
        view = View.draw(self.augment, self.num_train, view_seed, self.device)
        resized = view_seed if self.augment["resized_crop"] else None
        images = self.train_images.stream([train[batch] for batch in batches], resized)
        for index_N, x_NCHW in zip(batches, images, strict=True):
            x_NCHW = view.of(x_NCHW.to(self.device), index_N.to(self.device))
            yield self._batch(x_NCHW, self.train_labels[train[index_N]], index_N)

    def num_train_batches(self, batch_size: int, num_shown: int | None = None) -> int:
        return len(batch_slices(self.num_train if num_shown is None else num_shown, batch_size))

    def plain_batches(self, split: str, *, batch_size: int = 500) -> Iterator[Batch]:
        """A whole split in order, unaugmented. `test` is the test part as training would transform it."""
        if split not in self.splits:
            raise DataError(f"split={split!r}: there is no such split. Choose one of: {', '.join(SPLITS)}.")
        indices = self.splits[split]
        images, labels = (
            (self.test_images, self.test_labels) if split == "test" else (self.train_images, self.train_labels)
        )
        batches = torch.arange(len(indices)).split(batch_size) if len(indices) else ()
        for index_N, x_NCHW in zip(batches, images.stream([indices[batch] for batch in batches], None), strict=True):
            yield self._batch(x_NCHW.to(self.device), labels[indices[index_N]], index_N)

    def evaluation_batches(self, *, batch_size: int = 500) -> Iterator[Batch]:
        """The test part with the pixels that the device gets (the numpy reference's), to hold against `test`."""
        for start, x_NCHW in enumerate(self.evaluation.pixels(batch_size)):
            index_N = torch.arange(start * batch_size, start * batch_size + len(x_NCHW))
            yield self._batch(torch.tensor(x_NCHW, device=self.device), self.test_labels[index_N], index_N)

    def _batch(self, x_NCHW: Tensor, labels_N: Tensor, index_N: Tensor) -> Batch:
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        x_NCHW = x_NCHW.float().div_(255).sub_(mean).div_(std)
        return Batch(x_NCHW, labels_N.to(self.device), index_N.to(self.device))


def batch_slices(num_samples: int, batch_size: int) -> list[slice]:
    """Consecutive slices. A single last sample joins the batch before it: BatchNorm cannot train on one sample."""
    starts = list(range(0, num_samples, batch_size))
    if batch_size > 1 and len(starts) > 1 and num_samples - starts[-1] == 1:
        del starts[-1]
    return [slice(start, stop) for start, stop in pairwise([*starts, num_samples])]


def _open_parts(
    directory: Path, info: Mapping[str, Any], evaluation: Evaluation, device: str
) -> tuple[Images, Tensor, Images, Tensor]:
    """Images and labels of the training and the test part. Arrays need no geometry: there the test pixels are the device's."""
    if info["storage"] == "arrays":
        train = ArrayImages(torch.from_numpy(np.load(directory / "train_x.npy", allow_pickle=False)).to(device))
        test = ArrayImages(torch.from_numpy(np.concatenate(evaluation.shards)).to(device))
        train_labels = torch.from_numpy(np.load(directory / "train_y.npy", allow_pickle=False))
        return train, train_labels, test, torch.from_numpy(evaluation.labels)
    files = read_json(directory / "files.json")
    pre = preprocessing_from_json(info["preprocessing"])
    stores = {name: FileImages.of(files[name]["paths"], pre, info["workers"]) for name in ("train", "test")}
    labels = {name: torch.tensor(files[name]["labels"], dtype=torch.int64) for name in ("train", "test")}
    return stores["train"], labels["train"], stores["test"], labels["test"]
