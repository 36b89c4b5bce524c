"""What training minimises: cross-entropy on the labels, and knowledge distillation on a teacher's soft labels."""
# Shapes: N batch, K classes.

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)


def cross_entropy(logits_NK: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against (1 - s) * onehot + s / K (Szegedy et al., 2016), s = label_smoothing.

    Takes raw logits (N, K) and class ids (N,); returns a scalar in nats, mean over N.
    """
    return F.cross_entropy(logits_NK, labels_N, label_smoothing=label_smoothing)


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

    Takes raw logits (N, K) and class ids (N,); returns a scalar in nats, mean over N. T^2 keeps the soft term's
    gradient the same size when T changes. The KL is summed over classes: averaging over them as well, as
    reduction="mean" does, would shrink the soft term K-fold. No gradient reaches the teacher.
    """
    log_student_NK = F.log_softmax(student_NK / temperature, dim=1)
    log_teacher_NK = F.log_softmax(teacher_NK.detach() / temperature, dim=1)
    soft = F.kl_div(log_student_NK, log_teacher_NK, reduction="batchmean", log_target=True)
    hard = cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)
    return weight * temperature**2 * soft + (1 - weight) * hard
