"""Losses in float64, values and gradients, against numpy and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr, softmax

from pipeline.learning.losses import cross_entropy, kd_loss

LOGITS = hnp.arrays(np.float64, (3, 4), elements=st.floats(-8, 8))
LABELS = np.array([0, 3, 1])


def kd_by_hand(student_NK, teacher_NK, temperature, weight, smoothing=0.0):
    """The formula with scipy's relative entropy and a written-out target distribution."""
    soft = rel_entr(softmax(teacher_NK / temperature, axis=1), softmax(student_NK / temperature, axis=1)).sum(1).mean()
    target_NK = (1 - smoothing) * np.eye(4)[LABELS] + smoothing / 4
    hard = -(target_NK * log_softmax(student_NK, axis=1)).sum(1).mean()
    return weight * temperature**2 * soft + (1 - weight) * hard


def kd(student_NK, teacher_NK, **options):
    return kd_loss(torch.as_tensor(student_NK), torch.as_tensor(teacher_NK), torch.as_tensor(LABELS), **options)


def gradient(student_NK, teacher_NK, **options):
    leaf_NK = torch.tensor(student_NK, requires_grad=True)
    kd(leaf_NK, teacher_NK, **options).backward()
    return leaf_NK.grad.numpy()


@given(LOGITS, LOGITS, st.floats(0.5, 10), st.floats(0, 1), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_kd_is_the_formula_of_hinton(student_NK, teacher_NK, temperature, weight, smoothing) -> None:
    loss = kd(student_NK, teacher_NK, temperature=temperature, weight=weight, label_smoothing=smoothing)

    expected = kd_by_hand(student_NK, teacher_NK, temperature, weight, smoothing)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(LOGITS, LOGITS, st.floats(0.5, 10), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_kd_gradient_is_the_difference_of_the_distributions(student_NK, teacher_NK, temperature, weight) -> None:
    found_NK = gradient(student_NK, teacher_NK, temperature=temperature, weight=weight)

    soft_NK = temperature * (softmax(student_NK / temperature, axis=1) - softmax(teacher_NK / temperature, axis=1))
    hard_NK = softmax(student_NK, axis=1) - np.eye(4)[LABELS]
    np.testing.assert_allclose(found_NK, (weight * soft_NK + (1 - weight) * hard_NK) / 3, atol=1e-12)


def test_kd_gradient_agrees_with_finite_differences() -> None:
    student_NK, teacher_NK = np.random.default_rng(0).normal(size=(2, 3, 4))
    step = 1e-6

    found_NK = gradient(student_NK, teacher_NK, temperature=4.0, weight=0.9, label_smoothing=0.1)

    for index in np.ndindex(3, 4):
        moved_NK = np.zeros((3, 4))
        moved_NK[index] = step
        up = kd_by_hand(student_NK + moved_NK, teacher_NK, 4.0, 0.9, 0.1)
        down = kd_by_hand(student_NK - moved_NK, teacher_NK, 4.0, 0.9, 0.1)
        assert found_NK[index] == pytest.approx((up - down) / (2 * step), abs=1e-8)


@given(LOGITS, st.floats(0.5, 10))
@settings(max_examples=20, deadline=None)
def test_a_student_equal_to_its_teacher_has_no_soft_loss_and_no_soft_gradient(logits_NK, temperature) -> None:
    assert float(kd(logits_NK, logits_NK, temperature=temperature, weight=1.0)) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(gradient(logits_NK, logits_NK, temperature=temperature, weight=1.0), 0, atol=1e-12)


@given(LOGITS, LOGITS, st.floats(-50, 50), st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_a_constant_added_to_all_logits_changes_nothing(student_NK, teacher_NK, a, b) -> None:
    plain = float(kd(student_NK, teacher_NK, temperature=3.0, weight=0.7))

    shifted = float(kd(student_NK + a, teacher_NK + b, temperature=3.0, weight=0.7))

    assert shifted == pytest.approx(plain, rel=1e-9, abs=1e-9)


def test_t_squared_keeps_the_soft_gradient_as_temperature_grows() -> None:
    student_NK, teacher_NK = np.random.default_rng(1).normal(size=(2, 3, 4))
    centred_NK = (student_NK - student_NK.mean(1, keepdims=True)) - (teacher_NK - teacher_NK.mean(1, keepdims=True))

    hot_NK = gradient(student_NK, teacher_NK, temperature=1e4, weight=1.0)

    # Hinton et al.: in the high-temperature limit distillation is matching centred logits, (z - v) / K
    np.testing.assert_allclose(hot_NK, centred_NK / 4 / 3, rtol=1e-3, atol=1e-6)


def test_weight_zero_is_plain_cross_entropy() -> None:
    student_NK, teacher_NK = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels_N = torch.tensor(LABELS)

    loss = kd_loss(student_NK, teacher_NK, labels_N, temperature=4.0, weight=0.0, label_smoothing=0.1)

    assert float(loss) == pytest.approx(float(cross_entropy(student_NK, labels_N, label_smoothing=0.1)), rel=1e-12)


def test_uniform_logits_cost_ln_k_nats() -> None:
    assert float(cross_entropy(torch.zeros(5, 10), torch.arange(5))) == pytest.approx(np.log(10))


def test_no_gradient_reaches_the_teacher() -> None:
    student_NK, teacher_NK = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)

    kd_loss(student_NK, teacher_NK, torch.tensor(LABELS), temperature=2.0, weight=0.9).backward()

    assert student_NK.grad is not None
    assert teacher_NK.grad is None


def test_extreme_logits_in_float32_stay_finite() -> None:
    student_NK, teacher_NK = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([[-1e4, 1e4]])

    loss = kd_loss(student_NK, teacher_NK, torch.tensor([1]), temperature=1.0, weight=0.5)
    loss.backward()

    assert torch.isfinite(loss)
    assert torch.isfinite(student_NK.grad).all()
