"""Decoupled knowledge distillation: KD taken apart into the target class and the others, each with a weight of its own."""
# Shapes: N batch, K classes, L = K - 1 classes that are not the label.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)


def dkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """Zhao et al., 2022: T^2 * (alpha * TCKD + beta * NCKD), (N,), in nats; from raw logits (N, K) and class ids (N,).

    TCKD = KL of (p_y, 1 - p_y), teacher || student; NCKD = KL of the distributions over the K - 1 other classes. KD itself is
    TCKD + (1 - teacher's p_y) * NCKD: a confident teacher's knowledge of the others, which KD loses, counts in full here.
    In log space throughout: the published code's log of a sum of softmaxes gives NaN where p_y rounds to 1 in float32.
    """
    student_NK, teacher_NK = student_NK / temperature, teacher_NK.detach() / temperature
    student_N2, teacher_N2 = _target_against_rest(student_NK, labels_N), _target_against_rest(teacher_NK, labels_N)
    student_NL, teacher_NL = _others(student_NK, labels_N), _others(teacher_NK, labels_N)
    target_N = _kl(teacher_N2, student_N2)
    others_N = _kl(teacher_NL.log_softmax(1), student_NL.log_softmax(1))
    return temperature**2 * (alpha * target_N + beta * others_N)


def _target_against_rest(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """(N, 2): log p_y and log(1 - p_y)."""
    scores_N2 = torch.stack(
        [logits_NK.gather(1, labels_N[:, None])[:, 0], _others(logits_NK, labels_N).logsumexp(1)], dim=1
    )
    return scores_N2.log_softmax(1)


def _others(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """(N, K - 1): the logits without the label's."""
    num_samples, num_classes = logits_NK.shape
    is_other_NK = torch.arange(num_classes, device=labels_N.device) != labels_N[:, None]
    return logits_NK[is_other_NK].view(num_samples, num_classes - 1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
