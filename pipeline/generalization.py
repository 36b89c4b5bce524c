"""How far what a model says of samples it has not seen can be believed: calibration and likelihood, from its logits."""
# Shapes: N samples, K classes.

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Classes = npt.NDArray[np.int64]

NUM_BINS = 15


def expected_calibration_error(logits_NK: Logits, labels_N: Classes, num_bins: int = NUM_BINS) -> float:
    """sum_b n_b / N * |accuracy_b - confidence_b| over bins of equal width (Guo et al., 2017); 0 is best, a fraction.

    Confidence is the largest softmax probability, bin b holds those in (b / B, (b + 1) / B]. It says nothing of the classes that
    are not named, and falls with the number of bins: comparable only at the same B.
    """
    probabilities_NK = np.exp(log_softmax(logits_NK))
    confidence_N = probabilities_NK.max(axis=1)
    right_N = (logits_NK.argmax(axis=1) == labels_N).astype(np.float64)
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gap_B = np.bincount(bin_N, weights=right_N - confidence_N, minlength=num_bins)  # n_b * (accuracy_b - confidence_b)
    return float(np.abs(gap_B).sum() / len(labels_N))


def negative_log_likelihood(logits_NK: Logits, labels_N: Classes) -> float:
    """Mean of -ln p(y) in nats."""
    return float(-np.take_along_axis(log_softmax(logits_NK), labels_N[:, np.newaxis], axis=1).mean())


def log_softmax(logits_NK: Logits) -> npt.NDArray[np.float64]:
    """ln of the probabilities, (N, K) float64."""
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    log_NK: npt.NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
    return log_NK
