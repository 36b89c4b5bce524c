"""How hard a sample is: told by the teacher once, or by the student again and again."""
# Shapes: N samples, K classes.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from targets.errors import RecipeError, TrainingError

OF_TEACHER = ("teacher_loss", "teacher_doubt", "teacher_entropy", "margin")
OF_STUDENT = ("self_paced", "el2n", "kl", "disagreement")
OF_HISTORY = ("forgetting", "aum")


def difficulty(measure: str, teacher_NK: Tensor, labels_N: Tensor, student_NK: Tensor | None = None) -> Tensor:
    """How hard each sample is, (N,), larger is harder; from logits (N, K) of teacher and student and the class ids (N,).

    teacher_loss: -ln p_T(y), nats. teacher_doubt: 1 - p_T(y). teacher_entropy: nats; needs no label, so a wrong one does not
    make a sample hard. margin: largest other logit less the true class's (Pleiss et al., 2020), positive where the teacher is wrong.
    self_paced: the student's -ln p_S(y) (Kumar et al., 2010). el2n: ||p_S - onehot(y)||_2 (Paul et al., 2021). kl: KL(p_T || p_S),
    nats. disagreement: half of sum |p_T - p_S|, 0 to 1. forgetting and aum need more than one look: `ScoreHistory`.
    """
    _check(teacher_NK, "teacher")
    if measure in OF_TEACHER:
        return _of_teacher(measure, teacher_NK, labels_N)
    if measure in OF_STUDENT and student_NK is not None:
        _check(student_NK, "student")
        return _of_student(measure, teacher_NK, student_NK, labels_N)
    known = ", ".join((*OF_TEACHER, *OF_STUDENT, *OF_HISTORY))
    raise RecipeError(f"difficulty={measure}: no measure of these logits. Choose one of {known}.")


def _of_teacher(measure: str, teacher_NK: Tensor, labels_N: Tensor) -> Tensor:
    if measure == "teacher_loss":
        return F.cross_entropy(teacher_NK, labels_N, reduction="none")
    if measure == "teacher_doubt":
        return 1 - teacher_NK.softmax(1).gather(1, labels_N[:, None])[:, 0]
    if measure == "margin":
        return other_margin(teacher_NK, labels_N)
    log_p_NK = F.log_softmax(teacher_NK, dim=1)
    return -(log_p_NK.exp() * log_p_NK).sum(1)


def _of_student(measure: str, teacher_NK: Tensor, student_NK: Tensor, labels_N: Tensor) -> Tensor:
    if measure == "self_paced":
        return F.cross_entropy(student_NK, labels_N, reduction="none")
    p_NK = student_NK.softmax(1)
    if measure == "el2n":
        return (p_NK - F.one_hot(labels_N, student_NK.shape[1])).square().sum(1).sqrt()
    if measure == "disagreement":
        return (teacher_NK.softmax(1) - p_NK).abs().sum(1) / 2
    log_p_NK, log_q_NK = F.log_softmax(teacher_NK, dim=1), F.log_softmax(student_NK, dim=1)
    return F.kl_div(log_q_NK, log_p_NK, reduction="none", log_target=True).sum(1)


def other_margin(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Largest other logit less the true class's, (N,)."""
    true_N1 = labels_N[:, None]
    others_NK = logits_NK.scatter(1, true_N1, -torch.inf)
    return others_NK.amax(1) - logits_NK.gather(1, true_N1)[:, 0]


class ScoreHistory(nn.Module):
    """What forgetting and aum are told by: the student's answers at every scoring so far, as buffers that are kept with the weights.

    forgetting: how often a sample went from right to wrong between two scorings (Toneva et al., 2019, who count at every visit
    of a mini-batch); one that was never right counts as forgotten at every scoring. aum: minus the area under the margin,
    the mean over scorings of the largest other logit less the true class's (Pleiss et al., 2020).
    """

    num_scorings: Tensor
    num_forgotten_N: Tensor
    was_right_N: Tensor
    was_ever_right_N: Tensor
    margin_sum_N: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.register_buffer("num_scorings", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_forgotten_N", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("was_right_N", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("was_ever_right_N", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("margin_sum_N", torch.zeros(num_samples, dtype=torch.float64))

    def add(self, student_NK: Tensor, labels_N: Tensor) -> None:
        """One more scoring of all samples."""
        _check(student_NK, "student")
        is_right_N = student_NK.argmax(1) == labels_N
        self.num_forgotten_N += self.was_right_N & ~is_right_N
        self.was_right_N.copy_(is_right_N)
        self.was_ever_right_N |= is_right_N
        self.margin_sum_N += other_margin(student_NK, labels_N)
        self.num_scorings += 1

    def difficulty(self, measure: str) -> Tensor:
        """(N,) float64, after one scoring at least."""
        if measure == "aum":
            return self.margin_sum_N / self.num_scorings
        return torch.where(self.was_ever_right_N, self.num_forgotten_N, self.num_scorings).double()


def _check(logits_NK: Tensor, whose: str) -> None:
    if not bool(torch.isfinite(logits_NK).all()):
        raise TrainingError(
            f"The {whose}'s logits hold NaN or Inf: no sample can be called easy. Check its weights and the data."
        )
