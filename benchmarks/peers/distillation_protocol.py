"""The published protocol of distilling on CIFAR images (Tian et al., 2020), as torchdistill and ours are both told it."""

from __future__ import annotations

BATCH_SIZE, LR, GAMMA, MOMENTUM, WEIGHT_DECAY = 64, 0.05, 0.1, 0.9, 5e-4
TEMPERATURE, LABEL_WEIGHT = 4.0, 0.1  # Hinton's T, and the share of the labels in the loss
PADDING = 4  # pixels, before a crop of the image's own size
PUBLISHED_EPOCHS, PUBLISHED_MILESTONES = 240, (150, 180, 210)


def milestones(num_epochs: int) -> list[int]:
    """The epochs after which the rate falls, scaled from the published 240 to `num_epochs`, a half rounded up."""
    return [int(num_epochs * epoch / PUBLISHED_EPOCHS + 0.5) for epoch in PUBLISHED_MILESTONES]
