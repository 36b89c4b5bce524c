"""Stage 0, data: divide, describe and lay out the data, once, for every later stage.

Reads what `data.source` names. Writes data.json (what the data are), split.npz (train, validation, calibration: indices into
the training part), train_x.npy and train_y.npy or files.json (the training part), and evaluation/ (the test part as the device
gets it). The test part is an input to nothing here: statistics and calibration come from train. Images without a label
(`data.unlabelled`, and those whose label `data.labelled_share` hides) stand in train with UNLABELLED for a label.
"""

# Shapes: N samples, C channels, H height, W width, K classes.
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.device.preprocess import geometric
from pipeline.learning.division import Indices, Split, divide, labelled_samples, with_unlabelled
from pipeline.learning.label_noise import with_noise
from pipeline.learning.labels import UNLABELLED, with_hidden
from pipeline.learning.sources import (
    Arrays,
    Files,
    Part,
    Source,
    locate,
    locate_unlabelled,
    read_source,
    read_unlabelled,
)
from pipeline.learning.sources.image_file import inspect, read_image
from pipeline.learning.sources.parts import take
from pipeline.progress import Progress, Quiet
from pipeline.recipe import DataConfig
from targets.base import Array, Preprocessing, write_json
from targets.errors import DataError

SHARD_BYTES = 64 * 2**20
NUM_ENCODED = 64
NUM_STATISTICS = 4096  # training files that mean and std are computed on: three digits, without decoding a million
CROP_SHARE = 0.875  # centre crop over shorter side, ImageNet's 224 of 256

T = TypeVar("T")
R = TypeVar("R")


def prepare_data(
    config: DataConfig,
    seed: int,
    out_dir: Path,
    *,
    offline: bool = False,
    allow_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Read, check, divide and write the data, downloading what is absent unless `offline`. Raises DataError."""
    locate(config, offline=offline)
    for name in config.unlabelled:
        locate_unlabelled(config, name, offline=offline)
    with warnings.catch_warnings():
        # What Pillow warns of either decodes or is an error, and stands in `skipped`.
        warnings.filterwarnings("ignore", module="PIL")
        _prepare(config, seed, out_dir, allow_code, progress or Quiet())


def _prepare(config: DataConfig, seed: int, out_dir: Path, allow_code: bool, progress: Progress) -> None:
    # A generator each: neither condition changes how the data are divided, nor the other. Labels are kept as samples are: those
    # that have one are the samples that a train_share of the same size would keep.
    rng, share_rng, noise_rng, label_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1, 2, 1))
    with progress.task(f"reading {config.source}"):
        source = read_source(config, allow_code=allow_code)
    pre, source, skipped = _preprocessing(config, source, progress)
    foreign, unreadable = _unlabelled(config, source.train, allow_code, progress)
    part, test, split = divide(config, source, rng, share_rng)
    labelled = labelled_samples(config, part.labels_N, split.train, label_rng)
    noisy_N, num_noisy = with_noise(part.labels_N, labelled, config.label_noise, len(source.classes), noise_rng)
    part = replace(part, labels_N=with_hidden(noisy_N, split.train, labelled))
    _check_divided(config, source.classes, part, test, split)
    histogram_CV = _pixel_histogram(part, split.train, pre, rng, config.workers, progress)
    mean, std = moments(histogram_CV, config.source)
    part, split = with_unlabelled(part, split, foreign.values())
    out_dir.mkdir(parents=True, exist_ok=True)
    np.savez(out_dir / "split.npz", **asdict(split))
    _write_training_part(part, test, out_dir)
    channels, height, width = _write_evaluation(
        test, source.classes, pre, out_dir / "evaluation", config.workers, progress
    )
    described = {
        "source": config.source,
        "storage": "arrays" if isinstance(part, Arrays) else "files",
        "classes": source.classes,
        "num_classes": len(source.classes),
        "channels": channels,
        "height": height,
        "width": width,
        "mode": pre.mode,
        "mean": mean,
        "std": std,
        "num_train": len(split.train),
        "num_validation": len(split.validation),
        "num_calibration": len(split.calibration),
        "num_test": len(test.labels_N),
        "condition": {
            "train_share": config.train_share,
            "label_noise": config.label_noise,
            "num_noisy_labels": num_noisy,
            "seed": seed,
        },
        "labels": _told_labels(config, split, labelled, foreign),
        "workers": config.workers,
        "augment": _augment(config, source, height),
        "skipped": [*skipped, *unreadable],
        "preprocessing": {"mode": pre.mode, "resize": pre.resize, "crop": pre.crop},
    }
    write_json(out_dir / "data.json", described)


def _told_labels(config: DataConfig, split: Split, labelled: Indices, foreign: Mapping[str, Part]) -> dict[str, object]:
    """How many of the train samples have a label, and where the others are from."""
    return {
        "labelled_share": config.labelled_share,
        "num_labelled": len(labelled),
        "num_unlabelled": len(split.train) - len(labelled),
        "unlabelled": [{"source": name, "num_samples": len(one.labels_N)} for name, one in foreign.items()],
    }


def moments(histogram_CV: Indices, name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel as fractions of 255, exact, from the counts of the 256 pixel values."""
    values_V = np.arange(256) / 255
    total_C = histogram_CV.sum(axis=1)
    mean_C = histogram_CV @ values_V / total_C
    std_C = np.sqrt((histogram_CV * (values_V - mean_C[:, np.newaxis]) ** 2).sum(axis=1) / total_C)
    if std_C.min() == 0:
        raise DataError(
            f"{name}: all training pixels of channel {std_C.argmin()} are equal: nothing to learn from. Check the images."
        )
    return mean_C.tolist(), std_C.tolist()


def _preprocessing(
    config: DataConfig, source: Source, progress: Progress
) -> tuple[Preprocessing, Source, list[dict[str, str]]]:
    """How an image gets its size, and the source without the files that cannot be read."""
    if isinstance(source.train, Arrays):
        if config.image_size is not None:
            raise DataError(
                f"data.image_size={config.image_size}: the images of {config.source} are arrays of one size, "
                f"{source.train.x_NCHW.shape[2]}x{source.train.x_NCHW.shape[3]}. Drop data.image_size."
            )
        return Preprocessing(mode="L" if source.train.x_NCHW.shape[1] == 1 else "RGB"), source, []
    if config.image_size is None:
        raise DataError(f"{config.source}: image files have many sizes. Set data.image_size, for example 224.")
    source, skipped, mode = _readable(config, source, progress)
    resize = round(config.image_size / CROP_SHARE)
    return Preprocessing(mode=mode, resize=resize, crop=(config.image_size, config.image_size)), source, skipped


def _readable(config: DataConfig, source: Source, progress: Progress) -> tuple[Source, list[dict[str, str]], str]:
    """The source without the files that are unreadable, their names, and L where all images are grey."""
    paths = [path for part in source.parts().values() if isinstance(part, Files) for path in part.paths]
    modes, skipped = _inspected(config, config.source, paths, progress)
    kept = {name: _keep(part, modes) for name, part in source.parts().items()}
    grey = set(modes.values()) <= {"1", "L", "LA"}
    remaining = Source(
        source.classes, kept["train"], kept.get("validation"), kept.get("test"), source.crop, source.flip
    )
    return remaining, skipped, "L" if grey else "RGB"


def _inspected(
    config: DataConfig, name: str, paths: Sequence[str], progress: Progress
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Decode every file of source `name` once: the mode of each that can be read, and why the others cannot."""
    modes: dict[str, str] = {}
    skipped: list[dict[str, str]] = []
    with progress.task("checking images", len(paths)) as task:
        for path, (mode, reason) in zip(paths, _parallel(inspect, paths, config.workers), strict=True):
            task.advance()
            if reason:
                skipped.append({"path": path, "reason": reason})
            else:
                modes[path] = mode
    if len(skipped) > config.max_unreadable * len(paths):
        raise DataError(
            f"{name}: {len(skipped)} of {len(paths)} images are unreadable, first {skipped[0]['path']}: "
            f"{skipped[0]['reason']} More than data.max_unreadable={config.max_unreadable} allows: replace them."
        )
    return modes, skipped


def _unlabelled(
    config: DataConfig, own: Part, allow_code: bool, progress: Progress
) -> tuple[dict[str, Part], list[dict[str, str]]]:
    """The images of each source of data.unlabelled that can stand beside the data's own, and the files that cannot be read."""
    parts: dict[str, Part] = {}
    skipped: list[dict[str, str]] = []
    for name in config.unlabelled:
        with progress.task(f"reading {name}"):
            part = read_unlabelled(config, name, allow_code=allow_code)
        _check_fits(part, own, name, config.source)
        if isinstance(part, Files):
            modes, unreadable = _inspected(config, name, part.paths, progress)
            part = _keep(part, modes)
            skipped += unreadable
        if not len(part.labels_N):
            raise DataError(f"data.unlabelled: {name} has no image that can be read. Add images, or leave it out.")
        parts[name] = part
    return parts, skipped


def _check_fits(part: Part, own: Part, name: str, source: str) -> None:
    """Files get the data's size; arrays must have it."""
    if isinstance(part, Arrays) and isinstance(own, Arrays):
        found, wanted = part.x_NCHW.shape[1:], own.x_NCHW.shape[1:]
        if found != wanted:
            raise DataError(
                f"data.unlabelled: {name} has images of shape (C, H, W) {tuple(found)}, but those of {source} are "
                f"{tuple(wanted)}. Bring them to that shape, or give both as image folders: files are resized to data.image_size."
            )
    elif isinstance(part, Arrays):
        raise DataError(
            f"data.unlabelled: {name} holds arrays, but {source} has image files. Write its images to a folder, and give "
            "that: image_folder:PATH."
        )
    elif isinstance(own, Arrays):
        raise DataError(
            f"data.unlabelled: {name} has image files, but {source} holds arrays of one size. Give an npz of that size: "
            "npz:PATH with x_train."
        )


def _keep(part: Part, readable: Mapping[str, str]) -> Part:
    if isinstance(part, Arrays):
        return part
    return take(part, np.array([index for index, path in enumerate(part.paths) if path in readable], dtype=np.int64))


def _check_divided(config: DataConfig, classes: tuple[str, ...], part: Part, test: Part, split: Split) -> None:
    if not len(test.labels_N):
        raise DataError(
            f"{config.source} has no test part, and data.test={config.test} splits none off. Raise data.test."
        )
    if config.validation > 0 and not len(split.validation):
        raise DataError(
            f"{config.source}: data.validation={config.validation} of {len(part.labels_N)} samples is none. "
            "Raise it, or set it to 0: then no choice is made."
        )
    labels_N = part.labels_N[split.train]
    num_samples_K = np.bincount(labels_N[labels_N != UNLABELLED], minlength=len(classes))
    if 0 < config.labelled_share < 1 and not num_samples_K.all():
        raise DataError(
            f"{config.source}: data.labelled_share={config.labelled_share} of {len(labels_N)} train samples leaves class "
            f"{classes[int(num_samples_K.argmin())]!r} without a label. Raise it; 0 learns from the teacher alone."
        )
    if config.labelled_share == 1 and not num_samples_K.all():
        raise DataError(
            f"{config.source}: class {classes[int(num_samples_K.argmin())]!r} has no training sample after the split. "
            "Add samples, lower data.validation and data.test, or mend data.train_share and data.label_noise."
        )


def _augment(config: DataConfig, source: Source, height: int) -> dict[str, Any]:
    """What `augment: null` means for these data. Files: torchvision's random resized crop unless a padding is given."""
    wanted = config.augment
    resized_crop = isinstance(source.train, Files) and wanted.crop is None
    default = 0 if resized_crop else height // 8 if source.crop is None else source.crop
    return {
        "crop": default if wanted.crop is None else wanted.crop,
        "resized_crop": resized_crop,
        "flip": source.flip if wanted.flip is None else wanted.flip,
        "erase": wanted.erase,
    }


def _pixel_histogram(
    part: Part, train: Indices, pre: Preprocessing, rng: np.random.Generator, workers: int, progress: Progress
) -> Indices:
    """How often each pixel value stands in each channel (C, 256), over train or NUM_STATISTICS files of it."""
    if isinstance(part, Files) and len(train) > NUM_STATISTICS:
        train = np.sort(rng.choice(train, NUM_STATISTICS, replace=False))
    histogram_CV = np.zeros((1 if pre.mode == "L" else 3, 256), dtype=np.int64)
    with progress.task("mean and std", len(train)) as task:
        for images_NCHW in _pixel_batches(take(part, train), pre, workers):
            for channel, counts_V in enumerate(histogram_CV):
                counts_V += np.bincount(images_NCHW[:, channel].ravel(), minlength=256)
            task.advance(len(images_NCHW))
    return histogram_CV


def _pixel_batches(part: Part, pre: Preprocessing, workers: int, size: int = 64) -> Iterator[Array]:
    """A part as uint8 (size, C, H, W) after geometric preprocessing, in order; memory does not grow with the part."""
    if isinstance(part, Arrays):
        for start in range(0, len(part.labels_N), 4096):
            yield part.x_NCHW[start : start + 4096]
        return
    images = _parallel(lambda path: geometric(read_image(path, pre.mode), pre), part.paths, workers)
    while chunk := list(islice(images, size)):
        yield np.stack(chunk).transpose(0, 3, 1, 2)


def _parallel(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = 64) -> Iterator[R]:
    """Map in threads, in order, `ahead` items at a time: Pillow decodes and NumPy computes without the interpreter's lock."""
    remaining = iter(items)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while chunk := list(islice(remaining, ahead)):
            yield from pool.map(function, chunk)


def _write_training_part(part: Part, test: Part, out_dir: Path) -> None:
    if isinstance(part, Arrays):
        np.save(out_dir / "train_x.npy", part.x_NCHW)
        np.save(out_dir / "train_y.npy", part.labels_N)
    if isinstance(part, Files) and isinstance(test, Files):
        write_json(out_dir / "files.json", {"train": _listed(part), "test": _listed(test)})


def _listed(part: Files) -> dict[str, Any]:
    return {"paths": part.paths, "labels": part.labels_N.tolist()}


def _write_evaluation(
    test: Part, classes: tuple[str, ...], pre: Preprocessing, directory: Path, workers: int, progress: Progress
) -> tuple[int, int, int]:
    """Write the test part as the device gets it; returns an image's (C, H, W)."""
    (directory / "encoded").mkdir(parents=True, exist_ok=True)
    shards: list[str] = []
    with progress.task("evaluation set", len(test.labels_N)) as task:
        for shard_NCHW in _shards(_pixel_batches(test, pre, workers)):
            shards.append(f"x-{len(shards):03d}.npy")
            np.save(directory / shards[-1], shard_NCHW)
            task.advance(len(shard_NCHW))
            shape = shard_NCHW.shape[1:]
    np.save(directory / "y.npy", test.labels_N)
    encoded = [_write_encoded(test, index, directory) for index in range(min(NUM_ENCODED, len(test.labels_N)))]
    write_json(
        directory / "spec.json",
        {
            "num_samples": len(test.labels_N),
            "classes": classes,
            "preprocessing": asdict(pre),
            "shards": shards,
            "encoded": encoded,
            "encoded_index": list(range(len(encoded))),
        },
    )
    return (int(shape[0]), int(shape[1]), int(shape[2]))


def _shards(batches: Iterable[Array]) -> Iterator[Array]:
    """Join batches to shards of at most SHARD_BYTES (or of one batch, where that is larger)."""
    held: list[Array] = []
    for batch_NCHW in batches:
        if held and sum(piece.nbytes for piece in held) + batch_NCHW.nbytes > SHARD_BYTES:
            yield np.concatenate(held)
            held = []
        held.append(batch_NCHW)
    yield np.concatenate(held)


def _write_encoded(test: Part, index: int, directory: Path) -> str:
    """One test sample as encoded bytes: a file's own, or an array as PNG. Returns its name within the evaluation set."""
    from PIL import Image

    if isinstance(test, Files):
        name = f"encoded/{index:04d}{Path(test.paths[index]).suffix.lower()}"
        (directory / name).write_bytes(Path(test.paths[index]).read_bytes())
        return name
    name = f"encoded/{index:04d}.png"
    image_HWC = test.x_NCHW[index].transpose(1, 2, 0)
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(directory / name)
    return name
