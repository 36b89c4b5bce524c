"""DKD, DIST and logit standardization in float64, values and gradients: against numpy, finite differences, and torchdistill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import rel_entr, softmax
from torch import Tensor
from torchdistill.losses.mid_level import DISTLoss, KDLoss, LogitStdKDLoss

from pipeline.learning.losses import dist, dkd, kd, standardized

N, K = 5, 4
LOGITS = hnp.arrays(np.float64, (N, K), elements=st.floats(-8, 8))
LABELS = np.array([0, 3, 1, 2, 3])
TEMPERATURES = st.floats(0.5, 10)
STUDENT, TEACHER = np.random.default_rng(0).normal(scale=2, size=(2, N, K))


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.tensor(array) for array in arrays]


# --- decoupled KD ------------------------------------------------------------------------------------------------------


def dkd_by_hand(student_NK: np.ndarray, teacher_NK: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """TCKD and NCKD (N,), a sample at a time, with probabilities and scipy's relative entropy."""
    target, others = [], []
    for s, t, y in zip(softmax(student_NK / temperature, 1), softmax(teacher_NK / temperature, 1), LABELS, strict=True):
        s_others, t_others = np.delete(s, y), np.delete(t, y)
        # Their sum, not 1 - s_y, which near 1 keeps few digits.
        target.append(rel_entr([t[y], t_others.sum()], [s[y], s_others.sum()]).sum())
        others.append(rel_entr(t_others / t_others.sum(), s_others / s_others.sum()).sum())
    return np.array(target), np.array(others)


@given(LOGITS, LOGITS, TEMPERATURES, st.floats(0, 10), st.floats(0, 10))
@settings(max_examples=40, deadline=None)
def test_dkd_is_the_formula_of_zhao(student_NK, teacher_NK, temperature, alpha, beta) -> None:
    s, t, y = tensors(student_NK, teacher_NK, LABELS)

    found_N = dkd(s, t, y, temperature=temperature, alpha=alpha, beta=beta)

    target_N, others_N = dkd_by_hand(student_NK, teacher_NK, temperature)
    expected_N = temperature**2 * (alpha * target_N + beta * others_N)
    np.testing.assert_allclose(found_N, expected_N, rtol=1e-7, atol=1e-8)


@given(LOGITS, LOGITS, TEMPERATURES)
@settings(max_examples=30, deadline=None)
def test_kd_is_the_target_part_and_the_others_weighted_by_the_teachers_doubt(
    student_NK, teacher_NK, temperature
) -> None:
    s, t, y = tensors(student_NK, teacher_NK, LABELS)
    options = {"temperature": temperature}

    target_N = dkd(s, t, y, **options, alpha=1, beta=0)
    others_N = dkd(s, t, y, **options, alpha=0, beta=1)

    doubt_N = 1 - torch.tensor(softmax(teacher_NK / temperature, axis=1)[np.arange(N), LABELS])
    torch.testing.assert_close(kd(s, t, **options), target_N + doubt_N * others_N, rtol=1e-8, atol=1e-9)


# --- DIST --------------------------------------------------------------------------------------------------------------


@given(LOGITS, LOGITS, TEMPERATURES, st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_dist_is_one_minus_the_correlations_along_both_axes(student_NK, teacher_NK, temperature, beta, gamma) -> None:
    p, q = softmax(student_NK / temperature, axis=1), softmax(teacher_NK / temperature, axis=1)
    rows = [*p, *q, *p.T, *q.T]
    if min(np.linalg.norm(row - row.mean()) for row in rows) < 1e-5:  # a constant row has no correlation
        return

    found_N = dist(*tensors(student_NK, teacher_NK), temperature=temperature, beta=beta, gamma=gamma)

    inter_N = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    np.testing.assert_allclose(found_N, temperature**2 * (beta * np.array(inter_N) + gamma * intra), atol=1e-5)


def test_a_sample_of_weight_0_is_no_part_of_the_batch_that_dist_correlates() -> None:
    kept = np.array([0, 2, 3])
    weights_N = torch.zeros(N, dtype=torch.float64)
    weights_N[kept] = 5 / 3

    found_N = dist(*tensors(STUDENT, TEACHER), temperature=4.0, beta=1, gamma=2, weights_N=weights_N)

    alone_N = dist(*tensors(STUDENT[kept], TEACHER[kept]), temperature=4.0, beta=1, gamma=2)
    torch.testing.assert_close(found_N[kept], alone_N)


# --- standardization ---------------------------------------------------------------------------------------------------


@given(LOGITS, st.floats(0.1, 100), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_standardized_logits_forget_their_scale_and_their_mean(logits_NK, scale, shift) -> None:
    if logits_NK.std(axis=1).min() < 0.1:
        return

    found_NK = standardized(torch.tensor(logits_NK))

    expected_NK = (logits_NK - logits_NK.mean(1, keepdims=True)) / (logits_NK.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(found_NK, expected_NK, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(standardized(torch.tensor(scale * logits_NK + shift)), found_NK, atol=1e-4)


# --- gradients ---------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t: kd(s, t, temperature=3.0),
    "dkd": lambda s, t: dkd(s, t, torch.tensor(LABELS), temperature=3.0, alpha=1.0, beta=8.0),
    "dist": lambda s, t: dist(s, t, temperature=3.0, beta=1.0, gamma=2.0),
    "standardized kd": lambda s, t: kd(standardized(s), standardized(t), temperature=2.0),
    "standardized dkd": lambda s, t: dkd(
        standardized(s), standardized(t), torch.tensor(LABELS), temperature=2.0, alpha=1.0, beta=8.0
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    student_NK, teacher_NK = tensors(STUDENT, TEACHER)

    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher_NK), student_NK.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_temperature_that_is_learned_gets_the_gradient_of_finite_differences(name: str) -> None:
    s, t = tensors(STUDENT, TEACHER)
    y = torch.tensor(LABELS)
    of_temperature = {
        "kd": lambda T: kd(s, t, temperature=T),
        "dkd": lambda T: dkd(s, t, y, temperature=T, alpha=1.0, beta=8.0),
        "dist": lambda T: dist(s, t, temperature=T, beta=1.0, gamma=1.0),
    }.get(name.removeprefix("standardized "))
    assert of_temperature is not None

    assert torch.autograd.gradcheck(of_temperature, torch.tensor(3.0, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher_and_none_is_left_where_the_student_equals_it(name: str) -> None:
    student_NK, teacher_NK = tensors(TEACHER, TEACHER)

    LOSSES[name](student_NK.requires_grad_(), teacher_NK.requires_grad_()).sum().backward()

    assert teacher_NK.grad is None
    torch.testing.assert_close(student_NK.grad, torch.zeros_like(student_NK), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "rows", [[[1e4, -1e4, 0, 0]], [[40.0, 0, 0, 0]], [[0.0, 0, 0, 0]]], ids=["extreme", "sure", "equal"]
)
def test_logits_that_leave_no_room_in_float32_give_finite_values_and_gradients(name: str, rows: Any) -> None:
    student_NK = torch.tensor(rows * N, requires_grad=True)
    teacher_NK = torch.tensor(TEACHER).float()

    loss_N = LOSSES[name](student_NK, teacher_NK)
    loss_N.sum().backward()

    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(student_NK.grad).all()


# --- torchdistill ------------------------------------------------------------------------------------------------------


def theirs(loss: Any, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    value: Tensor = loss({"net": {"output": student_NK}}, {"net": {"output": teacher_NK}}, torch.tensor(LABELS))
    return value


PATHS = ("net", "output", "net", "output")
PAIRS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "KD": (
        KDLoss(*PATHS, temperature=4.0, alpha=0.1, beta=0.9),
        lambda s, t: (
            0.9 * kd(s, t, temperature=4.0).mean() + 0.1 * torch.nn.functional.cross_entropy(s, torch.tensor(LABELS))
        ),
    ),
    "DIST": (
        DISTLoss(*PATHS, beta=1.5, gamma=0.5, tau=4.0),
        lambda s, t: dist(s, t, temperature=4.0, beta=1.5, gamma=0.5).mean(),
    ),
    "LogitStd": (
        LogitStdKDLoss(*PATHS, temperature=2.0, alpha=0.1, beta=9.0),
        lambda s, t: (
            9 * kd(standardized(s), standardized(t), temperature=2.0).mean()
            + 0.1 * torch.nn.functional.cross_entropy(s, torch.tensor(LABELS))
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_torchdistill(name: str) -> None:
    loss_of_theirs, loss_of_ours = PAIRS[name]
    one_NK, other_NK = torch.tensor(STUDENT, requires_grad=True), torch.tensor(STUDENT, requires_grad=True)
    teacher_NK = torch.tensor(TEACHER)

    expected, found = theirs(loss_of_theirs, one_NK, teacher_NK), loss_of_ours(other_NK, teacher_NK)
    expected.backward()
    found.backward()

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_NK.grad, one_NK.grad, rtol=1e-8, atol=1e-12)
