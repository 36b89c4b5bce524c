"""Labelled or not: what stands in a label's place where an image has none, and how labels are taken away."""
# Shapes: N samples.

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]

UNLABELLED = -1  # in the place of a class id, from the files of stage `data` to the losses


def with_hidden(labels_N: Labels, train: Labels, labelled: Labels) -> Labels:
    """The labels without those at `train` that are not at `labelled` too (indices, both)."""
    hidden_N = labels_N.copy()
    hidden_N[np.setdiff1d(train, labelled)] = UNLABELLED
    return hidden_N
