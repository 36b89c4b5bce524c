"""Labels that are wrong on purpose: the condition under which a curriculum is said to help most."""
# Shapes: N samples, K classes.

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]


def with_noise(
    labels_N: Labels, train: Labels, share: float, num_classes: int, rng: np.random.Generator
) -> tuple[Labels, int]:
    """Symmetric noise: round(share * len(train)) of the labels at `train` replaced, and how many that are.

    Each by another class, drawn uniformly from the K - 1 others, so that a replaced label is always wrong. Papers that draw from
    all K classes mean share * (K - 1) / K of wrong labels by the same number.
    """
    num_replaced = round(share * len(train))
    chosen = rng.choice(train, num_replaced, replace=False)
    noisy_N = labels_N.copy()
    noisy_N[chosen] = (noisy_N[chosen] + rng.integers(1, num_classes, num_replaced)) % num_classes
    return noisy_N, num_replaced
