"""How much each sample of a batch counts: what is done where the teacher is wrong, and weights by its trust or by the loss."""
# Shapes: N batch, K classes.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.learning.labels import UNLABELLED
from pipeline.recipe import DistillConfig


@dataclass(frozen=True)
class SampleWeights:
    """Factors (N,) of what the teacher says and of the label; None is 1 for all."""

    soft_N: Tensor | None = None
    hard_N: Tensor | None = None


def sample_weights(
    config: DistillConfig, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor
) -> SampleWeights:
    """The weights of a batch, from raw logits (N, K) and class ids (N,); no gradient goes through them.

    teacher_wrong: drop takes the sample out, the mean is over the others; down_weight gives what the teacher says p_T(y) / max p_T,
    which is 1 where it is right; label_only gives it 0. Without a label nothing says that the teacher is wrong: it counts as right.
    per_sample multiplies: correctness p_T(y), confidence max p_T, superloss
    the sigma of `superloss_weights` on all of the sample.
    """
    soft_N, hard_N = None, None
    if teacher_NK is not None:
        soft_N, hard_N = _where_wrong(config.teacher_wrong, teacher_NK, labels_N)
    weighted = config.weight_curriculum
    if weighted is not None and weighted.per_sample == "superloss":
        loss_N = F.cross_entropy(student_NK.detach(), labels_N, reduction="none")
        sigma_N = superloss_weights(loss_N, tau=math.log(student_NK.shape[1]), lam=weighted.superloss_lambda)
        soft_N, hard_N = _product(soft_N, sigma_N), _product(hard_N, sigma_N)
    elif weighted is not None and weighted.per_sample != "none" and teacher_NK is not None:
        soft_N = _product(soft_N, _trust(weighted.per_sample, teacher_NK, labels_N))
    return SampleWeights(soft_N, hard_N)


def _product(factor_N: Tensor | None, other_N: Tensor) -> Tensor:
    return other_N if factor_N is None else factor_N * other_N


def _where_wrong(choice: str, teacher_NK: Tensor, labels_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Factors of the teacher's part and of the label's."""
    if choice == "keep":
        return None, None
    has_label_N = labels_N != UNLABELLED
    is_right_N = ((teacher_NK.argmax(1) == labels_N) | ~has_label_N).to(teacher_NK.dtype)
    if choice == "drop":
        kept_N = is_right_N * (len(labels_N) / is_right_N.sum().clamp_min(1))
        return kept_N, kept_N
    if choice == "label_only":
        return is_right_N, None
    first_N = labels_N.clamp_min(0)  # any class id, where there is no label
    correctness_N, confidence_N = (_trust(of, teacher_NK, first_N) for of in ("correctness", "confidence"))
    return torch.where(has_label_N, correctness_N / confidence_N, 1.0), None


def _trust(of: str, teacher_NK: Tensor, labels_N: Tensor) -> Tensor:
    """p_T(y) for correctness, max p_T for confidence."""
    p_NK = teacher_NK.detach().softmax(1)
    return p_NK.gather(1, labels_N[:, None])[:, 0] if of == "correctness" else p_NK.amax(1)


def superloss_weights(loss_N: Tensor, *, tau: float, lam: float) -> Tensor:
    """Castells et al., 2020: the sigma that minimises (l - tau) sigma + lambda ln^2 sigma, (N,).

    sigma = exp(-W(max(-2 / e, (l - tau) / lambda) / 2)), W Lambert's function: above 1 for easy samples (at most e), below 1
    for hard ones. tau = ln K, the loss of a guess. At the minimum the loss's gradient is sigma times that of l.
    """
    return (-lambert_w((loss_N - tau) / (2 * lam))).exp()


def lambert_w(x: Tensor) -> Tensor:
    """The principal branch: w e^w = x, for x clamped to -1/e from below (W = -1); by Halley's iteration in float64."""
    x_64 = x.double().clamp_min(-1 / math.e)
    # Near the branch point by its series, elsewhere from ln(1 + x), which lies above it.
    w = torch.where(x_64 < -0.25, -1 + (2 * (math.e * x_64 + 1)).clamp_min(0).sqrt(), x_64.clamp_min(-0.25).log1p())
    for _ in range(12):
        grown = w.exp()
        miss = w * grown - x_64
        step = grown * (w + 1) - (w + 2) * miss / (2 * w + 2).clamp_min(1e-12)
        w = w - torch.where(miss == 0, 0.0, miss / step.where(step.abs() > 1e-300, torch.ones_like(step)))
    return w.to(x.dtype)
