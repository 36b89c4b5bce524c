"""Soft labels: a model's logits for every sample of a split, in the split's own order."""
# Shapes: N samples, K classes.

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.learning.data import Data
from pipeline.learning.models import predict


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
