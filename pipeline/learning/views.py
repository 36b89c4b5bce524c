"""Views: what augmentation makes of the training samples, each a pure function of (view seed, position in the train split).

So a view can be shown again: in whatever order the samples come, in whatever batches, and however many are left out. All that
is random in a view is drawn at once, for the whole split. Shapes: N samples, C channels, H height, W width; images are uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# What is drawn from beside (seed, epoch) or, of stored views, beside (seed, number). An epoch's order must not go with its view.
VIEW, ORDER, STORED = 0, 1, 2


@dataclass(frozen=True)
class View:
    """The draws of one view, a column a sample of the train split; None for what these data are not augmented by."""

    padding: int
    offsets_2N: Tensor | None  # down and right, 0 to 2 * padding
    flips_N: Tensor | None
    erase_probability: float
    erasing_5N: Tensor | None  # uniform in [0, 1)

    @classmethod
    def draw(cls, augment: Mapping[str, Any], num_samples: int, view_seed: int, device: torch.device) -> View:
        """`augment` as data.json has it; drawn on the CPU, so that a view is the same on every device."""
        generator = torch.Generator().manual_seed(view_seed)
        offsets_2N = flips_N = erasing_5N = None
        if augment["crop"]:
            offsets_2N = torch.randint(0, 2 * augment["crop"] + 1, (2, num_samples), generator=generator).to(device)
        if augment["flip"]:
            flips_N = (torch.rand(num_samples, generator=generator) < 0.5).to(device)
        if augment["erase"]:
            erasing_5N = torch.rand(5, num_samples, generator=generator).to(device)
        return cls(augment["crop"], offsets_2N, flips_N, augment["erase"], erasing_5N)

    def of(self, x_NCHW: Tensor, index_N: Tensor) -> Tensor:
        """The samples at `index_N` of the split as this view shows them; x_NCHW holds their pixels, in the same order."""
        if self.offsets_2N is not None:
            x_NCHW = shifted(x_NCHW, self.padding, self.offsets_2N[:, index_N])
        if self.flips_N is not None:
            x_NCHW = torch.where(self.flips_N[index_N][:, None, None, None], x_NCHW.flip(3), x_NCHW)
        if self.erasing_5N is not None:
            x_NCHW = erased(x_NCHW, self.erase_probability, self.erasing_5N[:, index_N])
        return x_NCHW


def view_seeds(seed: int, num_views: int) -> tuple[int, ...]:
    """The seeds of that many views; of a smaller number these come first. None is a view that a training with this seed draws for
    itself: a teacher is asked about images that it has not been trained on, so far as augmentation makes others of them."""
    return tuple(mixed_seed(seed, number, STORED) for number in range(num_views))


def mixed_seed(*numbers: int) -> int:
    """One 64-bit seed from all of them, without the overlap that their sum would have. A 0 at the end changes nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def shifted(x_NCHW: Tensor, padding: int, offsets_2N: Tensor) -> Tensor:
    """Random crop: the window at each image's own offset (down, right) in the image with `padding` zeros around it."""
    height, width = x_NCHW.shape[2:]
    windows = pad(x_NCHW, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: no pixel is copied
    down_N, right_N = offsets_2N
    return windows[torch.arange(len(x_NCHW), device=x_NCHW.device), :, down_N, right_N]


def erased(x_NCHW: Tensor, probability: float, draws_5N: Tensor) -> Tensor:
    """With `probability`, zero a rectangle of 1 pixel to half of each side: a quarter of the image at most."""
    height, width = x_NCHW.shape[2:]
    inside_NH = _interval(height, draws_5N[0], draws_5N[1])
    inside_NW = _interval(width, draws_5N[2], draws_5N[3])
    erased_NHW = inside_NH[:, :, None] & inside_NW[:, None, :] & (draws_5N[4] < probability)[:, None, None]
    return x_NCHW.masked_fill(erased_NHW[:, None], 0)


def _interval(size: int, length_draw_N: Tensor, start_draw_N: Tensor) -> Tensor:
    """Bool (N, size), true on an interval of 1 to size // 2 pixels. The draws are uniform in [0, 1)."""
    length_N = 1 + (length_draw_N * (size // 2)).long().clamp(max=max(size // 2 - 1, 0))
    start_N = (start_draw_N * (size - length_N + 1)).long()
    pixels = torch.arange(size, device=length_N.device)
    return (pixels >= start_N[:, None]) & (pixels < (start_N + length_N)[:, None])
