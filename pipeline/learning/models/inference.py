"""Running a finished model: on pixels, and over batches."""
# Shapes: N batch, C channels, H height, W width, K classes.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from targets.errors import ModelError


class LabelledBatch(Protocol):
    """Samples and their classes, on the model's device."""

    @property
    def x_NCHW(self) -> Tensor: ...  # noqa: N802 (shape suffix)

    @property
    def labels_N(self) -> Tensor: ...  # noqa: N802 (shape suffix)


class Normalized(nn.Module):
    """`net` on pixels: takes (N, C, H, W) uint8 or float, 0..255, and gives net((x / 255 - mean) / std).

    mean and std are per channel, in units of the full range (0..1). Written as one multiplication and one addition,
    which is what runtimes fold best; it differs from the three-step form by float rounding only.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ModelError(
                f"mean={list(mean)}, std={list(std)}: each channel needs one mean and one std above 0. Mend the statistics."
            )
        self.net = net
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std_C)).float().view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean_C / std_C).float().view(1, -1, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.net(x_NCHW.float() * self.scale + self.shift)
        return logits_NK


class Renormalized(nn.Module):
    """`net`, trained on (p - mean) / std of pixels p, where what comes in is (p / 255 - given_mean) / given_std.

    mean and std are of pixels 0..255, given_mean and given_std fractions of 255, one a channel: the inputs are brought to what the net
    knows by one multiplication and one addition a channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        given_mean: Sequence[float],
        given_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.net = net
        known_mean, known_std, from_mean, from_std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std, given_mean, given_std)
        )
        self.register_buffer("scale", (255 * from_std / known_std).float())
        self.register_buffer("shift", ((255 * from_mean - known_mean) / known_std).float())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.net(x_NCHW * self.scale + self.shift)
        return logits_NK


def as_named(model: nn.Module) -> nn.Module:
    """The network whose layers bear the names that its author gave them."""
    return model.net if isinstance(model, Renormalized) else model


def predict(model: nn.Module, batches: Iterable[LabelledBatch]) -> Tensor:
    """Logits (N, K) float32 over all batches, evaluated without gradients; the model's modes are restored."""
    with evaluating(model), torch.no_grad():
        return torch.cat([model(batch.x_NCHW).float() for batch in batches])


def accuracy(model: nn.Module, batches: Iterable[LabelledBatch]) -> float:
    """Top-1 over all batches, a fraction; logits are not kept."""
    num_right, num_seen = 0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            num_right += int((model(batch.x_NCHW).argmax(1) == batch.labels_N).sum())
            num_seen += len(batch.labels_N)
    return num_right / num_seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards for each module the mode that it had: frozen parts stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
