"""Test images made worse, always in the same way: five of the corruptions that Hendrycks and Dietterich (2019) named.

The parameters are our own and written here: figures are comparable with each other, not with CIFAR-10-C. Lengths are in pixels
of an image 32 high and grow with the height. What is drawn at random depends on the batch's first index alone, so that every model
sees the same images.
"""
# Shapes: N batch, C channels, H height, W width; pixels are float in 0..1.

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.learning.views import shifted

REFERENCE_HEIGHT = 32
# Severity 1 to 5 of each.
NOISE_STD = (0.04, 0.08, 0.12, 0.18, 0.25)
BLUR_SIGMA = (0.4, 0.7, 1.0, 1.4, 2.0)  # pixels
BRIGHTER_BY = (0.1, 0.2, 0.3, 0.4, 0.5)
CONTRAST_LEFT = (0.75, 0.6, 0.45, 0.3, 0.15)
MOVED_BY = (1, 2, 3, 4, 6)  # pixels


def corrupted(name: str, severity: int, x_NCHW: Tensor, first_index: int) -> Tensor:
    """`x_NCHW` corrupted, and rounded to the 256 levels that an image file holds."""
    generator = torch.Generator().manual_seed((severity << 32) + first_index)
    worse_NCHW = CORRUPTIONS[name](x_NCHW, severity - 1, generator)
    return (worse_NCHW.clamp(0, 1) * 255).round() / 255


def gaussian_noise(x_NCHW: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Independent noise on every pixel and channel."""
    return x_NCHW + NOISE_STD[level] * torch.randn(x_NCHW.shape, generator=generator).to(x_NCHW.device)


def gaussian_blur(x_NCHW: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """A Gaussian kernel cut at three sigma; beyond the border the image is mirrored, the border pixel not repeated."""
    channels, height, width = x_NCHW.shape[1:]
    sigma = BLUR_SIGMA[level] * height / REFERENCE_HEIGHT
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=x_NCHW.dtype, device=x_NCHW.device)
    kernel = torch.exp(-((offsets / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
    padded_NCHW = F.pad(x_NCHW, (radius,) * 4, mode="reflect")
    rows_NCHW = F.conv2d(padded_NCHW, kernel[:, :, None, :], groups=channels)
    return F.conv2d(rows_NCHW, kernel[:, :, :, None], groups=channels)


def brightness(x_NCHW: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """The same added to every pixel."""
    return x_NCHW + BRIGHTER_BY[level]


def contrast(x_NCHW: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Every pixel moved towards the mean of its image's channel."""
    mean_NC11 = x_NCHW.mean(dim=(2, 3), keepdim=True)
    return mean_NC11 + CONTRAST_LEFT[level] * (x_NCHW - mean_NC11)


def translate(x_NCHW: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Each image moved along one of the two diagonals, to either side; zeros come in."""
    height, width = x_NCHW.shape[2:]
    pixels = min(max(1, round(MOVED_BY[level] * height / REFERENCE_HEIGHT)), height - 1, width - 1)
    offsets_2N = 2 * pixels * torch.randint(0, 2, (2, len(x_NCHW)), generator=generator)
    return shifted(x_NCHW, pixels, offsets_2N.to(x_NCHW.device))


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    function.__name__: function for function in (gaussian_noise, gaussian_blur, brightness, contrast, translate)
}
