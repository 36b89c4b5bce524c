"""Test sets that the training data are not drawn like: the recipe's own, corrupted, or one from another source."""
# Shapes: N samples, C channels, H height, W width.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from pipeline.artifacts import PreparedData
from pipeline.learning.corruptions import corrupted
from pipeline.learning.data import ArrayImages, Batch, Data, Images
from pipeline.learning.image_stream import FileImages
from pipeline.learning.sources import Arrays, Part, Source, read_source
from pipeline.recipe import DataConfig, ShiftConfig
from targets.base import preprocessing_from_json
from targets.errors import DataError

BATCH = 500


def shifted_batches(
    shift: ShiftConfig, data: Data, config: DataConfig, prepared: PreparedData, *, allow_code: bool
) -> Iterator[Batch]:
    """The shifted test set, normalised as training has it; `config` says where torchvision's sets lie.

    Of another source its test part, or its training part where it has none. Raises DataError where that does not fit the data.
    """
    if shift.source is not None:
        source = read_source(config.model_copy(update={"source": shift.source}), allow_code=allow_code)
        yield from _drawn(source, shift.source, data, prepared, config.workers).plain_batches("test", batch_size=BATCH)
        return
    assert shift.corruption is not None  # ShiftConfig has one of both
    mean, std = (torch.tensor(values, device=data.device).view(-1, 1, 1) for values in (data.mean, data.std))
    for batch in data.plain_batches("test", batch_size=BATCH):
        pixels_NCHW = (batch.x_NCHW * std + mean).clamp(0, 1)
        worse_NCHW = corrupted(shift.corruption, shift.severity, pixels_NCHW, int(batch.index_N[0]))
        yield replace(batch, x_NCHW=(worse_NCHW - mean) / std)


def _drawn(source: Source, name: str, data: Data, prepared: PreparedData, workers: int) -> Data:
    """`data` with another test split."""
    _check_classes(source, data, name)
    part = source.test or source.train
    labels = torch.from_numpy(part.labels_N)
    images = _images(part, name, data, prepared, workers)
    splits = {**data.splits, "test": torch.arange(len(labels))}
    return replace(data, test_images=images, test_labels=labels, splits=splits)


def _images(part: Part, name: str, data: Data, prepared: PreparedData, workers: int) -> Images:
    """With the size that the data have: files are resized and cropped as the data's own, arrays must have it."""
    if isinstance(part, Arrays):
        wanted, found = (data.channels, *data.image_size), part.x_NCHW.shape[1:]
        if wanted != found:
            raise DataError(
                f"ablation.shift, {name}: images of shape (C, H, W) {tuple(found)}, but the data's are {wanted}. "
                "Give images of that shape."
            )
        return ArrayImages(torch.from_numpy(part.x_NCHW).to(data.device))
    if prepared.info["storage"] == "arrays":
        raise DataError(
            f"ablation.shift, {name}: image files, but the data are arrays of one size. Give an npz of that size."
        )
    return FileImages.of(list(part.paths), preprocessing_from_json(prepared.info["preprocessing"]), workers)


def _check_classes(source: Source, data: Data, name: str) -> None:
    numbered = {tuple(str(number) for number in range(len(classes))) for classes in (source.classes, data.classes)}
    same = source.classes == data.classes or bool(numbered & {source.classes, data.classes})
    if len(source.classes) != len(data.classes) or not same:
        raise DataError(
            f"ablation.shift, {name}: its classes are {', '.join(source.classes[:5])} ... ({len(source.classes)}), the data's "
            f"{', '.join(data.classes[:5])} ... ({len(data.classes)}). Give the same classes in the same order."
        )
