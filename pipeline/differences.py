"""How far one output moved from one hop to the next, on the same samples, where there are no labels.

Values only: nothing here runs a model. Imports no torch.
"""
# Shapes: K classes.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.errors import DataError

Array = npt.NDArray[Any]
Answers = Mapping[str, Sequence[Array]]  # output -> one array a sample


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """One output at one hop against `against`. Cosines are a sample's, between flattened outputs; 1.0 if both are all zeros.

    `agreement` is the share of rows with the same largest class, for outputs (N, K) of two classes or more; else None.
    """

    hop: str
    against: str
    name: str
    num_samples: int
    cosine_mean: float
    cosine_min: float
    max_abs_delta: float
    agreement: float | None


def differences(hop: str, against: str, before: Answers, after: Answers) -> tuple[OutputDifference, ...]:
    """One row an output, in the order of `before`. Raises DataError without samples, or where an output is no number."""
    return tuple(_difference(hop, against, name, before[name], after[name]) for name in before)


def _difference(hop: str, against: str, name: str, before: Sequence[Array], after: Sequence[Array]) -> OutputDifference:
    if not before:
        raise DataError("no samples: outputs cannot be compared. Give at least one input.")
    wide = [
        (a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)) for a, b in zip(before, after, strict=True)
    ]
    if not all(np.isfinite(a).all() and np.isfinite(b).all() for a, b in wide):
        raise DataError(
            f"output '{name}' holds values that are no numbers. Look at the samples and at the float model."
        )
    if any(a.shape != b.shape for a, b in wide):
        raise DataError(
            f"output '{name}' changes its size between {against} and {hop}: nothing to compare. Leave out NMS."
        )
    cosines = [_cosine(a, b) for a, b in wide]
    return OutputDifference(
        hop=hop,
        against=against,
        name=name,
        num_samples=len(wide),
        cosine_mean=float(np.mean(cosines)),
        cosine_min=float(np.min(cosines)),
        max_abs_delta=max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in wide),
        agreement=_agreement(before, after),
    )


def _agreement(before: Sequence[Array], after: Sequence[Array]) -> float | None:
    if not all(array.ndim == 2 and array.shape[1] >= 2 for array in before):
        return None
    same = [a.argmax(1) == b.argmax(1) for a, b in zip(before, after, strict=True)]
    return float(np.concatenate(same).mean())


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))
