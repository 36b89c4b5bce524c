"""What every target refuses in the same words: a precision it lacks, a batch the graph does not have, a wrong input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from targets.base import Array, Batch, Exported, TensorSpec
from targets.errors import TargetError


def check_precision(exported: Exported, precision: str, float_precisions: Sequence[str]) -> None:
    """A quantized graph runs as int8, a float graph as one of `float_precisions`; anything else raises TargetError."""
    known = float_precisions if exported.scheme is None else ("int8",)
    if precision not in known:
        kind = "a float graph" if exported.scheme is None else f"quantized ({exported.scheme})"
        raise TargetError(
            f"{exported.name}: precision '{precision}' was asked for, but it is {kind}, "
            f"which runs here as {' or '.join(known)}. Take that."
        )


def check_batch(inputs: Sequence[TensorSpec], batch: int) -> None:
    """A graph with a fixed batch runs with that one only; raises TargetError."""
    for spec in inputs:
        if spec.shape and spec.shape[0] is not None and spec.shape[0] != batch:
            raise TargetError(
                f"batch={batch}: input '{spec.name}' has the fixed shape {list(spec.shape)}. "
                f"Load with batch={spec.shape[0]}, or export with a free batch axis."
            )


def smallest_batch(inputs: Sequence[TensorSpec]) -> int:
    """1 where the batch is free, else the batch that the graph was made for."""
    return next((spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None), 1)


def fill(buffer: Array, name: str, batch: Batch) -> None:
    """Copy input `name` into its buffer without casting and without broadcasting; raises TargetError."""
    given = batch.get(name)
    if given is None or given.shape != buffer.shape or given.dtype != buffer.dtype:
        found = "nothing" if given is None else f"{given.dtype}{list(given.shape)}"
        raise TargetError(
            f"input '{name}' got {found}; the session was loaded for {buffer.dtype}{list(buffer.shape)}. "
            "Give that, or load with another batch."
        )
    np.copyto(buffer, given)
