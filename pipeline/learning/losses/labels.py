"""Cross-entropy on the labels, where there are any."""
# Shapes: N batch, K classes.

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.learning.labels import UNLABELLED


def cross_entropy(
    logits_NK: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Cross-entropy against (1 - s) * onehot + s / K (Szegedy et al., 2016), s = label_smoothing.

    Takes raw logits (N, K) and class ids (N,); returns nats: a scalar, the mean over N, or (N,) where nothing is reduced. A sample
    whose label is UNLABELLED has a loss of 0 and no gradient, but counts in N: each labelled image weighs the same in any batch, and
    a batch without labels gives 0.
    """
    loss = F.cross_entropy(
        logits_NK,
        labels_N,
        ignore_index=UNLABELLED,
        label_smoothing=label_smoothing,
        reduction="sum" if reduction == "mean" else "none",
    )
    return loss / len(labels_N) if reduction == "mean" else loss
