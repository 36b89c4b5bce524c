"""The sample curriculum: a difficulty measurer, which orders, and a pacing function, which says how many are shown.

Terms and pacing functions as in Wang et al., 2021 and Wu et al., 2021; competence as in Platanios et al., 2019. On
standard data at full budget a random order with the same pacing does as well as an easy-to-hard one (Wu et al.), so
`order: random` is the control that every curriculum is compared with.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.recipe import CurriculumConfig
from targets.errors import RecipeError, TrainingError


def difficulty(measure: str, teacher_NK: Tensor, labels_N: Tensor) -> Tensor:
    """How hard the teacher finds each sample, (N,), larger is harder; from its logits (N, K) and the class ids (N,).

    teacher_loss: -ln p(y), nats. teacher_entropy: nats; needs no label, so a wrong one does not make a sample hard.
    margin: largest other logit less the true class's (Pleiss et al., 2020), positive where the teacher is wrong.
    """
    if not bool(torch.isfinite(teacher_NK).all()):
        raise TrainingError(
            "The teacher's logits hold NaN or Inf: no sample can be called easy. Check its weights and the data."
        )
    if measure == "teacher_loss":
        return F.cross_entropy(teacher_NK, labels_N, reduction="none")
    if measure == "teacher_entropy":
        log_p_NK = F.log_softmax(teacher_NK, dim=1)
        return -(log_p_NK.exp() * log_p_NK).sum(1)
    if measure == "margin":
        return _margin(teacher_NK, labels_N)
    raise RecipeError(f"difficulty={measure}: no such measure. Choose teacher_loss, teacher_entropy or margin.")


def _margin(teacher_NK: Tensor, labels_N: Tensor) -> Tensor:
    true_N1 = labels_N[:, None]
    others_NK = teacher_NK.scatter(1, true_N1, -torch.inf)
    return others_NK.amax(1) - teacher_NK.gather(1, true_N1)[:, 0]


def pacing_fraction(config: CurriculumConfig, progress: float) -> float:
    """The share of samples shown at `progress` = t / T, in 0..1.

    It begins at b = start_fraction, never falls, and is 1 from a = full_at on. With x = t / (a T): linear b + (1 - b) x;
    root with x^0.5; quadratic with x^2; competence (x (1 - b^p) + b^p)^(1/p), p = root_p.
    """
    a, b = config.full_at, config.start_fraction
    if progress >= a:
        return 1.0
    x = max(0.0, progress) / a
    if config.pacing == "competence":
        p = config.root_p
        competence: float = (x * (1 - b**p) + b**p) ** (1 / p)
        return max(b, competence)  # b^p underflows for a large p
    exponent = {"linear": 1.0, "root": 0.5, "quadratic": 2.0}[config.pacing]
    fraction: float = b + (1 - b) * x**exponent
    return fraction


def shown_samples(config: CurriculumConfig, difficulty_N: Tensor, progress: float, *, seed: int) -> Tensor:
    """Indices of the samples to show at `progress`, at least one; what is shown once stays shown later.

    easy_first takes the easiest, hard_first the hardest, random a permutation fixed by `seed`; equally hard samples
    come in the data's order. Classes are not balanced: easy classes come first, which is the curriculum's own effect,
    and the random control, which is balanced on average, shows it.
    """
    num_samples = len(difficulty_N)
    num_shown = max(1, round(pacing_fraction(config, progress) * num_samples))
    if config.order == "random":
        order_N = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).to(difficulty_N.device)
    else:
        order_N = torch.argsort(difficulty_N, stable=True, descending=config.order == "hard_first")
    return order_N[:num_shown]
