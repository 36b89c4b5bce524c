"""The proof that a dialect changes nothing: the graph before and after each rewrite, node by node on the same samples.

Both run in ONNX Runtime with every optimization off, so that what differs is the rewrite and no kernel. Returns figures;
a rewrite that should be exact and moves an output further than rounding can is a fault of ours and raises ModelError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline.graphs.dialects import rewrites_of
from targets.errors import ModelError

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]

REWRITES_FILE = "rewrites.json"
ROUNDS = frozenset({"integer_bias"})  # half a step of the accumulator, see there
# An exact rewrite may still order float additions anew (a folded BatchNorm): where a value lies between two integers, the
# other one is taken, which moves an output by a step or so. More than this share of its range is no rounding.
MOST_MOVED = 0.05


@dataclass(frozen=True, kw_only=True)
class RewriteProof:
    """One rewrite: `num_changes` places, and by how much the outputs moved at most, absolute and as a share of the range
    of that output. `exact` is what is claimed; a rewrite that rounds says so."""

    rewrite: str
    exact: bool
    num_changes: int
    max_abs_delta: float
    share_of_range: float


def apply_proved(model: ir.Model, dialect: str, samples: Sequence[Sample]) -> tuple[RewriteProof, ...]:
    """Apply a dialect in place and prove each rewrite on `samples`; one row for each that changed something.

    Raises ModelError for a dialect that nobody speaks, or a rewrite that changes what the graph computes.
    """
    proofs = []
    before = answers_of(model, samples)
    for rewrite in rewrites_of(dialect):
        num_changes = rewrite(model)
        if not num_changes:
            continue
        after = answers_of(model, samples)
        proof = _compared(rewrite.__name__, num_changes, before, after)
        if proof.exact and proof.share_of_range > MOST_MOVED:
            raise ModelError(
                f"rewrite {proof.rewrite} for dialect '{dialect}' moves an output by {proof.share_of_range:.1%} of its range, "
                "and should not move it at all. Report this model."
            )
        proofs.append(proof)
        before = after
    return tuple(proofs)


def answers_of(model: ir.Model, samples: Sequence[Sample]) -> dict[str, list[Array]]:
    """Every output, node by node: name -> one array a sample. Raises ModelError where ONNX Runtime refuses the graph."""
    return _run(ir.to_proto(model).SerializeToString(), samples)


def node_by_node(path: Path, samples: Sequence[Sample]) -> dict[str, list[Array]]:
    """The same of a file, with the weights that lie beside it."""
    return _run(str(path), samples)


def _run(model: bytes | str, samples: Sequence[Sample]) -> dict[str, list[Array]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # the message below says it
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        rows = [session.run(names, dict(sample)) for sample in samples]
    except Exception as error:  # ORT's errors share no base class but Exception
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"ONNX Runtime cannot run the graph node by node: {reason}. Mend the model.") from None
    return {name: [np.asarray(row[i]) for row in rows] for i, name in enumerate(names)}


def _compared(
    name: str, num_changes: int, before: Mapping[str, list[Array]], after: Mapping[str, list[Array]]
) -> RewriteProof:
    deltas, shares = [0.0], [0.0]
    for output, old in before.items():
        for a, b in zip(old, after[output], strict=True):
            delta, extent = _moved(a.astype(np.float64), b.astype(np.float64))
            deltas.append(delta)
            shares.append(delta / extent if extent else float(delta > 0))
    return RewriteProof(
        rewrite=name,
        exact=name not in ROUNDS,
        num_changes=num_changes,
        max_abs_delta=max(deltas),
        share_of_range=max(shares),
    )


def _moved(a: Array, b: Array) -> tuple[float, float]:
    """By how much b differs from a at most, and the range of a, both where a is finite; infinitely where b is not finite there."""
    finite = np.isfinite(a)
    if not np.isfinite(b[finite]).all():
        return math.inf, 0.0
    if not finite.any():
        return 0.0, 0.0
    return float(np.abs(a[finite] - b[finite]).max()), float(np.ptp(a[finite]))
