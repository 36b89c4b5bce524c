"""Stage 0, data: divide, describe and lay out the data, once, for every later stage.

Reads what `data.source` names. Writes data.json (what the data are), split.npz (train, validation, calibration: indices into
the training part), train_x.npy and train_y.npy or files.json (the training part), and evaluation/ (the test part as the device
gets it). The test part is an input to nothing here: statistics and calibration come from train.
"""

# Shapes: N samples, C channels, H height, W width, K classes.
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.device.preprocess import geometric
from pipeline.learning.label_noise import with_noise
from pipeline.learning.sources import Arrays, Files, Part, Source, locate, read_source
from pipeline.learning.sources.image_file import inspect, read_image
from pipeline.progress import Progress, Quiet
from pipeline.recipe import DataConfig
from targets.base import Array, Preprocessing, write_json
from targets.errors import DataError

SHARD_BYTES = 64 * 2**20
NUM_ENCODED = 64
NUM_STATISTICS = 4096  # training files that mean and std are computed on: three digits, without decoding a million
CROP_SHARE = 0.875  # centre crop over shorter side, ImageNet's 224 of 256

Indices = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Split:
    """Indices into the training part; calibration lies within train, validation outside of it."""

    train: Indices
    validation: Indices
    calibration: Indices


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
    with warnings.catch_warnings():
        # What Pillow warns of either decodes or is an error, and stands in `skipped`.
        warnings.filterwarnings("ignore", module="PIL")
        _prepare(config, seed, out_dir, allow_code, progress or Quiet())


def _prepare(config: DataConfig, seed: int, out_dir: Path, allow_code: bool, progress: Progress) -> None:
    # A generator each: neither condition changes how the data are divided, nor the other.
    rng, share_rng, noise_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    with progress.task(f"reading {config.source}"):
        source = read_source(config, allow_code=allow_code)
    pre, source, skipped = _preprocessing(config, source, progress)
    part, test, split = divide(config, source, rng, share_rng)
    labels_N, num_noisy = with_noise(part.labels_N, split.train, config.label_noise, len(source.classes), noise_rng)
    part = replace(part, labels_N=labels_N)
    _check_divided(config, source.classes, part, test, split)
    histogram_CV = _pixel_histogram(part, split.train, pre, rng, config.workers, progress)
    mean, std = moments(histogram_CV, config.source)
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
        "workers": config.workers,
        "augment": _augment(config, source, height),
        "skipped": skipped,
        "preprocessing": {"mode": pre.mode, "resize": pre.resize, "crop": pre.crop},
    }
    write_json(out_dir / "data.json", described)


def divide(
    config: DataConfig, source: Source, rng: np.random.Generator, share_rng: np.random.Generator
) -> tuple[Part, Part, Split]:
    """The training part, the test part and the split of the first. What a set divides itself is kept as it is, but for
    `validation: 0`, which trains on its validation part too. Below a `train_share` of 1 the train samples that are not kept
    are in no split; test and validation are those of a share of 1."""
    part, test = source.train, source.test
    if test is None:
        held_out = stratified(part.labels_N, round(config.test * len(part.labels_N)), rng)
        part, test = _take(part, _others(held_out, len(part.labels_N))), _take(part, held_out)
    num_samples = len(part.labels_N)
    if source.validation is None or config.validation == 0:
        validation = stratified(part.labels_N, round(config.validation * num_samples), rng)
    else:
        validation = np.arange(num_samples, num_samples + len(source.validation.labels_N))
    if source.validation is not None:
        part = _join(part, source.validation)
    train = _others(validation, len(part.labels_N))
    if config.train_share < 1:
        train = train[stratified(part.labels_N[train], round(config.train_share * len(train)), share_rng)]
    chosen = stratified(part.labels_N[train], min(config.calibration, len(train)), rng)
    return part, test, Split(train, validation, train[chosen])


def stratified(labels_N: Indices, num_chosen: int, rng: np.random.Generator) -> Indices:
    """`num_chosen` sorted indices, each class with its share up to one sample (largest remainders, ties at random)."""
    order = rng.permutation(len(labels_N))
    counts_K = np.unique(labels_N, return_counts=True)[1]
    quota_K, remainder_K = np.divmod(counts_K * num_chosen, max(len(labels_N), 1))
    by_remainder = np.lexsort((rng.random(len(counts_K)), -remainder_K))
    quota_K[by_remainder[: num_chosen - quota_K.sum()]] += 1
    by_class = order[np.argsort(labels_N[order], kind="stable")]
    starts_K = np.cumsum(counts_K) - counts_K
    rank_N = np.arange(len(labels_N)) - np.repeat(starts_K, counts_K)  # a sample's place within its class
    return np.sort(by_class[rank_N < np.repeat(quota_K, counts_K)])


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
    """Decode every file once: the source without the unreadable ones, their names, and L where all images are grey."""
    modes: dict[str, str] = {}
    skipped: list[dict[str, str]] = []
    paths = [path for part in source.parts().values() if isinstance(part, Files) for path in part.paths]
    with progress.task("checking images", len(paths)) as task:
        for path, (mode, reason) in zip(paths, _parallel(inspect, paths, config.workers), strict=True):
            task.advance()
            if reason:
                skipped.append({"path": path, "reason": reason})
            else:
                modes[path] = mode
    if len(skipped) > config.max_unreadable * len(paths):
        raise DataError(
            f"{config.source}: {len(skipped)} of {len(paths)} images are unreadable, first {skipped[0]['path']}: "
            f"{skipped[0]['reason']} More than data.max_unreadable={config.max_unreadable} allows: replace them."
        )
    kept = {name: _keep(part, modes) for name, part in source.parts().items()}
    grey = set(modes.values()) <= {"1", "L", "LA"}
    remaining = Source(
        source.classes, kept["train"], kept.get("validation"), kept.get("test"), source.crop, source.flip
    )
    return remaining, skipped, "L" if grey else "RGB"


def _keep(part: Part, readable: Mapping[str, str]) -> Part:
    if isinstance(part, Arrays):
        return part
    return _take(part, np.array([index for index, path in enumerate(part.paths) if path in readable], dtype=np.int64))


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
    num_samples_K = np.bincount(part.labels_N[split.train], minlength=len(classes))
    if not num_samples_K.all():
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
        for images_NCHW in _pixel_batches(_take(part, train), pre, workers):
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


def _take(part: Part, indices: Indices) -> Part:
    if isinstance(part, Arrays):
        return Arrays(part.x_NCHW[indices], part.labels_N[indices])
    return Files(tuple(part.paths[index] for index in indices), part.labels_N[indices])


def _join(first: Part, second: Part) -> Part:
    labels_N = np.concatenate([first.labels_N, second.labels_N])
    if isinstance(first, Arrays) and isinstance(second, Arrays):
        return Arrays(np.concatenate([first.x_NCHW, second.x_NCHW]), labels_N)
    if isinstance(first, Files) and isinstance(second, Files):
        return Files(first.paths + second.paths, labels_N)
    raise DataError("The training and the validation part are of two kinds, arrays and files. Give both as one kind.")


def _others(indices: Indices, num_samples: int) -> Indices:
    return np.setdiff1d(np.arange(num_samples), indices, assume_unique=True)
