"""The optimizer of a training, its learning rate at every step, and which memory format a net survives."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.recipe import TrainConfig


def make_optimizer(parameters: Iterable[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay is for matrices and filters: norms, biases and quantizer ranges are left alone."""
    decayed: list[Tensor] = []
    left_alone: list[Tensor] = []
    for parameter in parameters:
        (decayed if parameter.ndim > 1 and parameter[0].numel() > 1 else left_alone).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": left_alone, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The rate at `progress` epochs (a fraction of an epoch counts): linear warm-up, then cosine to 0, steps, or constant."""
    if progress < config.warmup_epochs:
        return config.lr * min((progress + 1e-3) / config.warmup_epochs, 1.0)
    if config.schedule == "cosine":
        share = (progress - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(progress >= milestone for milestone in config.milestones)
    return config.lr


def survives_channels_last(model: nn.Module) -> bool:
    """False for a net whose backward pass corrupts memory in channels_last on a CPU.

    Seen with torch 2.15 and its oneDNN: a strided 1x1 convolution of fewer than 16 input channels, an odd batch, two
    threads ("double free" or a segmentation fault; with 16 channels and more, with stride 1 or contiguous: never).
    """
    return not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
        for module in model.modules()
    )
