"""Empirical bias correction of a fake-quantized module (Nagel et al., 2019, section 4.2, on calibration samples).

Quantization shifts the mean of what a layer gives. Layer by layer, in the order of their calls, each bias takes back what
is left of that shift with everything before it quantized and corrected. NNCF's fast correction asks each layer with one
constant image of its inputs' means, which is another mean at the borders of a padded convolution; its accurate one does
not exist for torch.
"""
# Shapes: N samples, C channels.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.learning.models.inference import evaluating

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def correct_biases(quantized: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> int:
    """Correct the biases of `quantized` in place towards `original`, the float module of the same names.

    Returns how many layers were corrected: those with a bias that are called once. Costs one pass over `batches` a layer;
    some hundred samples do. A shift is shrunk by its own sampling error, see `shrunk_mean`.
    """
    layers = [name for name, module in original.named_modules() if type(module) in _LAYERS and module.bias is not None]
    expected = _means(original, layers, batches)
    for name, expected_NC in expected.items():
        shift_C = shrunk_mean(expected_NC - _means(quantized, [name], batches)[name])
        with torch.no_grad():
            cast(nn.Linear, quantized.get_submodule(name)).bias.add_(shift_C)
    return len(expected)


def shrunk_mean(shifts_NC: Tensor) -> Tensor:
    """The mean times max(0, 1 - v / mean^2), v = variance / N being the mean's own error (positive-part shrinkage): where
    samples disagree about a shift, to take it back would add noise."""
    mean_C, error_C = shifts_NC.mean(0), shifts_NC.var(0, correction=0) / len(shifts_NC)
    return mean_C * (1 - error_C / (mean_C**2).clamp(min=torch.finfo(mean_C.dtype).tiny)).clamp(min=0)


def _means(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean (N, C) of each layer's output over positions, in the order of the first calls; layers called once only."""
    seen = _Seen()
    hooks = [model.get_submodule(name).register_forward_hook(_Keeping(seen, name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(means) for name, means in seen.means.items() if len(means) == len(batches)}


@dataclass
class _Seen:
    """What each layer gave at each call."""

    means: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class _Keeping:
    """A forward hook that keeps the mean over positions."""

    seen: _Seen
    name: str

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output_NCP = (output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output).double()
        self.seen.means.setdefault(self.name, []).append(
            output_NCP.flatten(2).mean(2) if output.ndim > 2 else output_NCP
        )
