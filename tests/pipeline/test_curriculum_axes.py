"""The other three axes: temperature, teacher, loss weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import lambertw, softmax
from torch import nn

from pipeline.learning.distillation import teacher_factor
from pipeline.learning.losses import cross_entropy, dist, kd
from pipeline.learning.models import save_weights
from pipeline.learning.sample_weights import SampleWeights, lambert_w, sample_weights, superloss_weights
from pipeline.learning.teachers import TeacherTrajectory
from pipeline.learning.temperature import LearnedTemperature, reversal, scheduled_temperature
from pipeline.recipe import (
    DistillConfig,
    TeacherCurriculumConfig,
    TemperatureCurriculumConfig,
    WeightCurriculumConfig,
)

FULL_AT = st.floats(0.01, 1.0)
PROGRESS = st.floats(0, 1)
SCHEDULES = st.sampled_from(["linear", "cosine", "step"])

# --- temperature -------------------------------------------------------------------------------------------------------


@given(SCHEDULES, st.floats(0.1, 20), st.floats(0.1, 20), FULL_AT, st.integers(1, 9), PROGRESS, PROGRESS)
@settings(max_examples=150)
def test_a_scheduled_temperature_goes_from_its_start_to_its_end_and_never_back(
    schedule, start, end, full_at, num_steps, p, q
) -> None:
    config = TemperatureCurriculumConfig(schedule=schedule, end=end, full_at=full_at, num_steps=num_steps)

    first, early, late, last = (
        scheduled_temperature(start, config, at, epoch=0) for at in (0.0, min(p, q), max(p, q), full_at)
    )

    assert first == start
    assert last == pytest.approx(end)
    assert (late - early) * (end - start) >= -1e-9
    assert min(start, end) - 1e-9 <= early <= max(start, end) + 1e-9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", 8 - 6 / 3), ("cosine", 8 - 6 * (1 - math.cos(math.pi / 3)) / 2), ("step", 8 - 6 / 4)],
)
def test_a_scheduled_temperature_is_its_formula(schedule: str, expected: float) -> None:
    config = TemperatureCurriculumConfig(schedule=schedule, end=2.0, full_at=0.75)

    assert scheduled_temperature(8.0, config, 0.25, epoch=0) == pytest.approx(expected)


def test_without_a_schedule_it_is_constant_and_a_replay_has_a_value_an_epoch() -> None:
    replay = TemperatureCurriculumConfig(schedule="replay", values=(3.0, 2.0, 5.0))

    assert scheduled_temperature(4.0, None, 0.7, epoch=2) == 4.0
    assert [scheduled_temperature(4.0, replay, epoch / 3, epoch=epoch) for epoch in range(3)] == [3.0, 2.0, 5.0]


def test_a_learned_temperature_begins_as_published_and_its_gradient_is_turned_round() -> None:
    learned = LearnedTemperature(TemperatureCurriculumConfig(schedule="learned")).double()
    sigmoid = 1 / (1 + math.exp(-1))

    for epochs_done, factor in ((0.0, 0.0), (5.0, -0.5), (10.0, -1.0), (99.0, -1.0)):
        learned.zero_grad()
        temperature = learned(epochs_done)
        temperature.backward()

        assert temperature.item() == pytest.approx(1 + 20 * sigmoid)
        assert float(learned.theta.grad) == pytest.approx(factor * 20 * sigmoid * (1 - sigmoid), abs=1e-12)


def test_a_learned_temperature_climbs_the_loss_that_the_student_descends() -> None:
    """One step of gradient descent on everything: the loss as a function of the temperature alone has grown."""
    student_NK, teacher_NK = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learned = LearnedTemperature(TemperatureCurriculumConfig(schedule="learned")).double()
    before = kd(student_NK, teacher_NK, temperature=learned(10.0)).mean()

    before.backward()
    with torch.no_grad():
        learned.theta -= 0.1 * learned.theta.grad

    assert kd(student_NK, teacher_NK, temperature=learned(10.0)).mean() > before


@given(st.floats(0, 50), st.floats(0, 50))
def test_the_reversal_goes_from_0_to_minus_1(p: float, q: float) -> None:
    assert 0 >= reversal(min(p, q), 10.0) >= reversal(max(p, q), 10.0) >= -1


# --- teacher -----------------------------------------------------------------------------------------------------------


def trajectory(tmp_path: Path, num_on_the_way: int, **config: object) -> TeacherTrajectory:
    paths = []
    for number in range(num_on_the_way + 1):
        path = tmp_path / f"epoch-{number:04d}.safetensors"
        if not path.exists():
            net = nn.Linear(1, 1)
            nn.init.constant_(net.weight, float(number))
            save_weights(net, path)
        paths.append(path)
    return TeacherTrajectory(TeacherCurriculumConfig(**config), nn.Linear(1, 1), paths, seed=3)


def taught_by(way: TeacherTrajectory, num_epochs: int) -> list[float]:
    taught = []
    for epoch in range(num_epochs):
        way.begin_epoch(epoch / num_epochs)
        taught.append(way.teacher.weight.item())
    return taught


def test_the_teacher_goes_its_own_way_then_stays(tmp_path: Path) -> None:
    way = trajectory(tmp_path, 3, full_at=0.6)

    assert taught_by(way, 10) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert (way.begin_epoch(0.0), way.begin_epoch(0.9)) == ("epoch-0000", "teacher")


def test_the_controls_of_the_teacher_go_backwards_and_at_random(tmp_path: Path) -> None:
    backwards = taught_by(trajectory(tmp_path, 4, full_at=1.0, order="hard_first"), 4)
    shuffled = taught_by(trajectory(tmp_path, 4, full_at=1.0, order="random"), 4)

    assert backwards == [3, 2, 1, 0]
    assert sorted(shuffled) == [0, 1, 2, 3]
    assert shuffled == taught_by(trajectory(tmp_path, 4, full_at=1.0, order="random"), 4)


@given(st.integers(1, 6), FULL_AT, PROGRESS, PROGRESS)
@settings(max_examples=60, deadline=None)
def test_the_teacher_never_goes_back_on_its_way(num_on_the_way, full_at, p, q) -> None:
    way = TeacherTrajectory(
        TeacherCurriculumConfig(full_at=full_at), nn.Identity(), [Path(str(n)) for n in range(num_on_the_way + 1)], 0
    )

    assert 0 == way.position(0.0) <= way.position(min(p, q)) <= way.position(max(p, q)) <= num_on_the_way
    assert way.position(full_at) == num_on_the_way


# --- loss weights ------------------------------------------------------------------------------------------------------


@given(SCHEDULES, st.floats(0, 1), FULL_AT, PROGRESS, PROGRESS)
@settings(max_examples=100)
def test_the_teachers_factor_falls_from_1_to_its_end(schedule, end, full_at, p, q) -> None:
    config = WeightCurriculumConfig(schedule=schedule, end=end, full_at=full_at)

    first, early, late, last = (teacher_factor(config, 0, at, [], None) for at in (0.0, min(p, q), max(p, q), full_at))

    assert first == 1.0
    assert last == pytest.approx(end)
    assert 1.0 >= early >= late - 1e-12
    assert late >= end - 1e-12


@pytest.mark.parametrize(
    ("curve", "expected"),
    [([], 1.0), ([0.5], 1.0), ([0.5, 0.7], 0.5), ([0.5, 0.4], 1.0), ([0.5, 0.95], 0.2), ([0.9, 0.5], 0.2)],
    ids=["before", "first epoch", "half the gap", "wider", "ahead", "level at once"],
)
def test_the_gap_on_validation_moves_the_factor(curve: list[float], expected: float) -> None:
    config = WeightCurriculumConfig(schedule="gap", end=0.2)

    assert teacher_factor(config, len(curve), 0.5, curve, 0.9) == pytest.approx(expected)


@given(st.floats(0, 6), st.floats(0.1, 5))
@settings(max_examples=40, deadline=None)
def test_superlosss_weight_is_the_sigma_that_minimises_it(loss: float, lam: float) -> None:
    tau = math.log(10)

    (found,) = superloss_weights(torch.tensor([loss], dtype=torch.float64), tau=tau, lam=lam)

    best = minimize_scalar(lambda x: (loss - tau) * math.exp(x) + lam * x * x, bounds=(-20, 1), method="bounded")
    assert float(found) == pytest.approx(math.exp(best.x), rel=1e-3)


def test_lambert_w_is_scipys_and_is_clamped_at_its_branch_point() -> None:
    x = torch.cat([torch.linspace(-0.3678, 3, 200), torch.logspace(-6, 9, 100)]).double()

    np.testing.assert_allclose(lambert_w(x), lambertw(x.numpy()).real, rtol=1e-9, atol=1e-12)
    assert lambert_w(torch.tensor([-5.0, -1 / math.e], dtype=torch.float64)).tolist() == pytest.approx(
        [-1, -1], abs=1e-6
    )


# --- knowledge that is wrong -------------------------------------------------------------------------------------------

STUDENT_NK, TEACHER_NK = torch.tensor(np.random.default_rng(0).normal(scale=2, size=(2, 12, 4)))
LABELS_N = TEACHER_NK.argmax(1).clone()
LABELS_N[::3] = (LABELS_N[::3] + 1) % 4
IS_WRONG_N = TEACHER_NK.argmax(1) != LABELS_N


def weights_of(**config: object) -> SampleWeights:
    return sample_weights(DistillConfig(model="m", **config), STUDENT_NK, TEACHER_NK, LABELS_N)


def test_the_batch_of_these_tests_has_right_and_wrong_answers() -> None:
    assert 2 < int(IS_WRONG_N.sum()) < 10


def test_a_sample_that_is_dropped_is_no_part_of_the_batch() -> None:
    weights = weights_of(teacher_wrong="drop")
    assert weights.soft_N is not None

    right = ~IS_WRONG_N
    for loss_N, alone_N in (
        (kd(STUDENT_NK, TEACHER_NK, temperature=2.0), kd(STUDENT_NK[right], TEACHER_NK[right], temperature=2.0)),
        (
            cross_entropy(STUDENT_NK, LABELS_N, reduction="none"),
            cross_entropy(STUDENT_NK[right], LABELS_N[right], reduction="none"),
        ),
        (
            dist(STUDENT_NK, TEACHER_NK, temperature=2.0, beta=1, gamma=1, weights_N=weights.soft_N),
            dist(STUDENT_NK[right], TEACHER_NK[right], temperature=2.0, beta=1, gamma=1),
        ),
    ):
        torch.testing.assert_close((loss_N * weights.soft_N).mean(), alone_N.mean())
    assert weights.hard_N is weights.soft_N


def test_label_only_takes_what_the_teacher_says_away_where_it_is_wrong() -> None:
    weights = weights_of(teacher_wrong="label_only")

    torch.testing.assert_close(weights.soft_N, (~IS_WRONG_N).double())
    assert weights.hard_N is None


def test_down_weight_is_the_teachers_own_odds_for_the_label_and_leaves_right_answers_alone() -> None:
    weights = weights_of(teacher_wrong="down_weight")

    p_NK = softmax(TEACHER_NK.numpy(), axis=1)
    np.testing.assert_allclose(weights.soft_N, p_NK[np.arange(12), LABELS_N] / p_NK.max(axis=1))
    assert bool((weights.soft_N[~IS_WRONG_N] == 1).all())
    assert bool((weights.soft_N[IS_WRONG_N] < 1).all())
    assert weights.hard_N is None


def test_kept_samples_all_count_alike() -> None:
    assert weights_of() == SampleWeights(None, None)


@pytest.mark.parametrize("per_sample", ["correctness", "confidence"])
def test_what_the_teacher_says_counts_as_much_as_it_is_trusted(per_sample: str) -> None:
    weights = weights_of(weight_curriculum={"per_sample": per_sample})

    p_NK = softmax(TEACHER_NK.numpy(), axis=1)
    expected_N = p_NK[np.arange(12), LABELS_N] if per_sample == "correctness" else p_NK.max(axis=1)
    np.testing.assert_allclose(weights.soft_N, expected_N)
    assert weights.hard_N is None


def test_a_batch_of_wrong_answers_only_is_dropped_without_a_nan() -> None:
    wrong = IS_WRONG_N
    weights = sample_weights(
        DistillConfig(model="m", teacher_wrong="drop"), STUDENT_NK[wrong], TEACHER_NK[wrong], LABELS_N[wrong]
    )

    loss_N = dist(STUDENT_NK[wrong], TEACHER_NK[wrong], temperature=1.0, beta=1, gamma=1, weights_N=weights.soft_N)

    assert float((loss_N * weights.soft_N).sum()) == 0.0
