"""The accuracy ledger: one row per hop from the teacher to the device, all on the same held-out samples.

A hop is something that was done to the model (distilled, quantized, exported, compiled) or to its input (the device's own
decode and resize). Each row compares with the hop before it, sample by sample, so that the hop that lost the accuracy has
a name; and says what becomes of the teacher's own errors. Reads logits; knows nothing of where they came from.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.statistics import mcnemar_exact_p, paired_difference, wilson_interval
from pipeline.learning.own_code import score
from pipeline.mistakes import where_teacher_errs
from targets.errors import ModelError

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Metric = Callable[[Logits, Labels], float]

SIGNIFICANT_P = 0.05
MAX_FLIPPED_LISTED = 50


@dataclass(frozen=True, kw_only=True)
class Hop:
    """The logits (N, K) of one model at one point of its way. `index` says which of the ledger's samples they are of,
    where a hop was taken on some only; `after` names the hop that it follows, where that is not the one before it."""

    hop: str
    model: str
    precision: str
    logits_NK: Logits
    index_N: npt.NDArray[np.int64] | None = None
    note: str | None = None
    after: str | None = None


def ledger(hops: Sequence[Hop], labels_N: Labels, metric: Metric | None = None) -> list[dict[str, Any]]:
    """Rows in the order of the hops. Fractions for accuracies, nats for KL, class ids (N,) for labels; `metric` is one of the
    person's own, scored beside top-1.

    Raises ModelError where a hop's logits are no numbers or of another shape than its samples, RecipeError where `metric` fails.
    """
    rows = []
    for position, hop in enumerate(hops):
        _check(hop, len(labels_N))
        previous = _previous(hops, position)
        labels = labels_N if hop.index_N is None else labels_N[hop.index_N]
        own = None if metric is None else score(metric, f"gate.metric, hop {hop.hop}", hop.logits_NK, labels)
        rows.append({**_row(hop, previous, hops[0], labels), "metric": own})
    return rows


def hop_that_lost_most(rows: Sequence[dict[str, Any]]) -> str | None:
    """The hop with the largest significant loss of top-1 against the hop before it (exact McNemar, p < 0.05), or None."""
    losses = [
        (row["difference"]["top1"], row["hop"])
        for row in rows
        if row["difference"] is not None
        and row["difference"]["top1"] < 0
        and row["difference"]["mcnemar_p"] < SIGNIFICANT_P
    ]
    return min(losses)[1] if losses else None


def _previous(hops: Sequence[Hop], position: int) -> Hop | None:
    if (after := hops[position].after) is not None:
        return next(hop for hop in hops if hop.hop == after)
    return hops[position - 1] if position else None


def _row(hop: Hop, previous: Hop | None, first: Hop, labels: Labels) -> dict[str, Any]:
    classes_N = hop.logits_NK.argmax(1)
    teacher_N = _same_samples(first, hop).argmax(1)
    right_N = classes_N == labels
    row: dict[str, Any] = {
        "hop": hop.hop,
        "model": hop.model,
        "precision": hop.precision,
        "n": len(labels),
        "top1": float(right_N.mean()),
        "ci95": list(wilson_interval(int(right_N.sum()), len(labels))),
        "agreement_teacher": float((classes_N == teacher_N).mean()),
        "where_teacher_errs": where_teacher_errs(teacher_N, classes_N, labels),
        "agreement_previous": None,
        "kl_previous": None,
        "max_abs_delta": None,
        "flipped": [],
        "num_flipped": 0,
        "difference": None,
        "note": hop.note,
    }
    if previous is not None:
        row.update(_against(hop, _same_samples(previous, hop), right_N, labels))
    return row


def _against(hop: Hop, before_NK: Logits, right_N: npt.NDArray[np.bool_], labels: Labels) -> dict[str, Any]:
    """What changed from the hop before, on the same samples."""
    was_right_N = before_NK.argmax(1) == labels
    flipped = np.flatnonzero(hop.logits_NK.argmax(1) != before_NK.argmax(1))
    lost, won = int((was_right_N & ~right_N).sum()), int((~was_right_N & right_N).sum())
    samples = flipped if hop.index_N is None else hop.index_N[flipped]
    return {
        "agreement_previous": 1.0 - len(flipped) / len(labels),
        "kl_previous": mean_kl(before_NK, hop.logits_NK),
        "max_abs_delta": float(np.abs(hop.logits_NK - before_NK).max()),
        "flipped": [int(sample) for sample in samples[:MAX_FLIPPED_LISTED]],
        "num_flipped": len(flipped),
        "difference": {
            "top1": (won - lost) / len(labels),
            "ci95": list(paired_difference(was_right_N, right_N)[1]),
            "mcnemar_p": mcnemar_exact_p(lost, won),
        },
    }


def mean_kl(before_NK: Logits, after_NK: Logits) -> float:
    """Mean over N of KL(softmax(before) || softmax(after)), in nats."""
    log_p_NK, log_q_NK = _log_softmax(before_NK), _log_softmax(after_NK)
    return float(max(0.0, (np.exp(log_p_NK) * (log_p_NK - log_q_NK)).sum(1).mean()))


def output_differences(before: Logits, after: Logits) -> dict[str, float | None]:
    """Without labels: cosine and max |delta| of one output, over all samples. Cosine is None for an output of zeros."""
    a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {"cosine": float(a @ b / norms) if norms else None, "max_abs_delta": float(np.abs(a - b).max(initial=0.0))}


def _same_samples(other: Hop, hop: Hop) -> Logits:
    return other.logits_NK if hop.index_N is None else other.logits_NK[hop.index_N]


def _log_softmax(logits_NK: Logits) -> npt.NDArray[np.float64]:
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(1, keepdims=True))
    return result


def _check(hop: Hop, num_samples: int) -> None:
    expected = num_samples if hop.index_N is None else len(hop.index_N)
    if hop.logits_NK.ndim != 2 or len(hop.logits_NK) != expected:
        raise ModelError(
            f"hop {hop.hop} of {hop.model}: logits of shape {hop.logits_NK.shape} for {expected} samples. "
            "A classifier returns one row of class scores a sample."
        )
    if not np.isfinite(hop.logits_NK).all():
        raise ModelError(
            f"hop {hop.hop} of {hop.model} ({hop.precision}) returns NaN or infinity. "
            "Look at its weights and at the ranges of its quantizers."
        )
