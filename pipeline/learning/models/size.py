"""How large a model is: parameters, and multiply-accumulates a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pipeline.learning.models.inference import evaluating


def count_parameters(model: nn.Module) -> int:
    """Numbers that training sets; buffers (running statistics) are not among them, shared tensors count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one sample of `input_shape` (C, H, W; no N).

    Elementwise layers and products of two activations (attention) are not counted, as is usual in this field.
    """
    counter = _MacCounter()
    layers = [module for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))]
    hooks = [layer.register_forward_hook(counter) for layer in layers]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.macs


class _MacCounter:
    """A forward hook that adds up."""

    def __init__(self) -> None:
        self.macs = 0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, _ConvTransposeNd):  # each input value meets every weight of its group once
            self.macs += inputs[0].numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, _ConvNd):
            self.macs += output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            self.macs += output.numel() * layer.in_features
