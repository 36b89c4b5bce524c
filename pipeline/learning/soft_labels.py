"""Soft labels: a model's logits for the samples of a split, as they are, or as augmented views show them."""
# Shapes: N samples, K classes.

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.learning.data import Batch, Data
from pipeline.learning.label_cache import LabelCache, LabelsOf, LabelWriter
from pipeline.learning.models import predict
from pipeline.learning.models.inference import evaluating
from pipeline.learning.precision import FP32, has_bf16_kernels
from pipeline.progress import Progress, Task
from pipeline.recipe import TrainConfig
from targets.errors import RecipeError

BATCH_SIZE = 256


def soft_labels(model: nn.Module, data: Data, split: str) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and class ids (N,) of `split`, without augmentation, in evaluation mode."""
    logits_NK = predict(model, data.plain_batches(split))
    labels_N = torch.cat([batch.labels_N for batch in data.plain_batches(split)])
    return logits_NK, labels_N


def top1(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Share of samples whose largest logit is their class."""
    return float((logits_NK.argmax(1) == labels_N.to(logits_NK.device)).float().mean())


def validation_top1(model: nn.Module, data: Data) -> float | None:
    """Top-1 on the validation split; None where the recipe keeps none."""
    return top1(*soft_labels(model, data, "validation")) if data.num_validation else None


def labels_of(
    teacher: nn.Module, data: Data, data_digest: str, view_seeds: tuple[int, ...], *, dtype: str, top_k: int | None
) -> LabelsOf:
    """What soft labels of this teacher on these views of the train split are to hold for."""
    if top_k is not None and top_k >= data.num_classes:
        raise RecipeError(
            f"distill.cache.top_k={top_k}: the data have {data.num_classes} classes, so nothing would be left out. "
            "Set it lower, or to null."
        )
    return LabelsOf(
        teacher=weights_digest(teacher),
        data=data_digest,
        transform=transform_digest(data),
        view_seeds=view_seeds,
        num_samples=data.num_train,
        num_classes=data.num_classes,
        dtype=dtype,
        top_k=top_k,
    )


def cache_soft_labels(
    teacher: nn.Module,
    data: Data,
    of: LabelsOf,
    directory: Path,
    config: TrainConfig,
    progress: Progress,
    *,
    after_view: Callable[[], object] = lambda: None,
) -> LabelCache:
    """Ask the teacher once for every view that `directory` lacks, and open the cache. One process alone writes; the others, where
    there are any, can be told after each view that it is still at work.

    In the student's precision and memory format, as a teacher that is asked online: `auto` is the faster one of the teacher's own
    forward pass, decided before the first view and written down. Evaluation mode: a batch's other samples move a logit by float
    rounding only.
    """
    if config.channels_last:
        teacher.to(memory_format=torch.channels_last)
    writer = LabelWriter(directory, of)
    missing = writer.missing
    precision = writer.precision or _precision(config.precision, teacher, data, of)
    with progress.task("soft labels", total=len(missing) * len(_batches(data))) as task:
        for view in missing:
            logits = _told(view_logits(teacher, data, of.view_seeds[view], bf16=precision == "bf16"), task)
            writer.write(view, logits, precision=precision)
            after_view()
    return LabelCache.open(directory, of, data.device)


def view_logits(model: nn.Module, data: Data, view_seed: int, *, bf16: bool) -> Iterator[Tensor]:
    """Logits (N, K) float32 of the train split as one view shows it, in the split's own order, batch by batch."""
    with evaluating(model):
        for batch in data.view_batches(_batches(data), view_seed):
            yield _logits(model, batch, bf16=bf16)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def transform_digest(data: Data) -> str:
    """sha256 over all that turns a stored image into what a network is shown, but for the view's seed."""
    geometry = data.evaluation.preprocessing
    parts = {
        "augment": dict(data.augment),
        "mean": data.mean,
        "std": data.std,
        "size": [data.channels, *data.image_size],
        "geometry": [geometry.mode, geometry.resize, geometry.crop],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _batches(data: Data) -> tuple[Tensor, ...]:
    batches: tuple[Tensor, ...] = torch.arange(data.num_train).split(BATCH_SIZE)
    return batches


def _logits(model: nn.Module, batch: Batch, *, bf16: bool) -> Tensor:
    with torch.no_grad(), torch.autocast(batch.x_NCHW.device.type, torch.bfloat16, enabled=bf16):
        logits_NK: Tensor = model(batch.x_NCHW).float()
    return logits_NK


def _told(logits: Iterator[Tensor], task: Task) -> Iterator[Tensor]:
    begun_s, num_done = time.monotonic(), 0
    for logits_NK in logits:
        num_done += len(logits_NK)
        task.advance(1, f"{num_done / (time.monotonic() - begun_s):.0f} images/s")
        yield logits_NK


def _precision(wanted: str, model: nn.Module, data: Data, of: LabelsOf) -> str:
    """fp32 or bf16 as it is wanted; auto: whichever forward pass is faster here."""
    if wanted != "auto":
        return wanted
    if not has_bf16_kernels(data.device):
        return FP32
    batch = next(iter(data.view_batches(_batches(data)[:1], of.view_seeds[0])))
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with evaluating(model):
        for _ in range(5):
            for precision, taken in seconds.items():
                begun_s = time.perf_counter()
                _logits(model, batch, bf16=precision == "bf16").sum().item()  # waits for a GPU
                taken.append(time.perf_counter() - begun_s)
    return min(seconds, key=lambda precision: min(seconds[precision]))
