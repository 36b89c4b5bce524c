"""DIST: the student is to rank as the teacher does, not to give its probabilities."""
# Shapes: N batch, K classes.

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)


def dist(
    student_NK: Tensor,
    teacher_NK: Tensor,
    *,
    temperature: float | Tensor,
    beta: float,
    gamma: float,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Huang et al., 2022: T^2 * (beta * inter + gamma * intra), (N,); dimensionless, from raw logits (N, K).

    With r Pearson's correlation of the softened probabilities of student and teacher: inter = 1 - r over the classes of a sample;
    intra = the mean over classes of 1 - r over the samples of the batch, the same for every sample. `weights_N` weigh the
    samples in the latter: one of weight 0 is not part of the batch. T^2 as in the published code, not in the paper.
    """
    student_NK = (student_NK / temperature).softmax(1)
    teacher_NK = (teacher_NK.detach() / temperature).softmax(1)
    inter_N = 1 - _correlation(student_NK, teacher_NK, None)
    intra = (1 - _correlation(student_NK.T, teacher_NK.T, weights_N)).mean()
    return temperature**2 * (beta * inter_N + gamma * intra)


def _correlation(x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """Pearson's r of each row of x with that of y; weights are of the columns. A constant row has r = 0."""
    x, y = x - _mean(x, weights), y - _mean(y, weights)
    if weights is not None:
        x, y = x * weights.sqrt(), y * weights.sqrt()
    return F.cosine_similarity(x, y, dim=1, eps=1e-8)


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return x.mean(1, keepdim=True)
    return (x * weights).sum(1, keepdim=True) / weights.sum().clamp_min(1e-12)
