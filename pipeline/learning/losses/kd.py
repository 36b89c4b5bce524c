"""Knowledge distillation: the divergence of the student's distribution from the teacher's, both softened."""
# Shapes: N batch, K classes.

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.learning.losses.labels import cross_entropy


def kd(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Hinton et al., 2015: T^2 * KL(softmax(teacher / T) || softmax(student / T)), (N,), in nats.

    Takes raw logits (N, K). T^2 keeps the gradient the same size when T changes. The KL is summed over classes: averaging
    over them as well, as reduction="mean" does, would shrink it K-fold. No gradient reaches the teacher.
    """
    log_student_NK = F.log_softmax(student_NK / temperature, dim=1)
    log_teacher_NK = F.log_softmax(teacher_NK.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student_NK, log_teacher_NK, reduction="none", log_target=True).sum(1)


def kd_loss(
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    weight: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Hinton et al., 2015: weight * T^2 * KL(teacher || student) + (1 - weight) * cross-entropy.

    Takes raw logits (N, K) and class ids (N,), UNLABELLED where cross-entropy is off; returns a scalar in nats, mean over N.
    """
    soft = kd(student_NK, teacher_NK, temperature=temperature).mean()
    hard = cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)
    return weight * soft + (1 - weight) * hard
