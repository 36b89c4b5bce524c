"""Logit standardization: what the teacher's logits are to each other is taught, not how large they are."""
# Shapes: N batch, K classes.

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-7
LEAST_VARIANCE = 1e-20


def standardized(logits_NK: Tensor) -> Tensor:
    """Sun et al., 2024: (z - mean) / (std + 1e-7) a sample, std with K - 1; before any division by a temperature.

    A row of equal logits becomes zeros and gets no gradient: the square root's own would be NaN there.
    """
    centred_NK = logits_NK - logits_NK.mean(1, keepdim=True)
    variance_N1 = centred_NK.square().sum(1, keepdim=True) / (logits_NK.shape[1] - 1)
    return centred_NK / (variance_N1.clamp_min(LEAST_VARIANCE).sqrt() + EPSILON)
