"""Difficulty against scipy, pacing as properties, and what is shown when."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from pipeline.learning.curriculum import adaptive_fraction, difficulty, first_samples, pacing_fraction, shown_samples
from pipeline.learning.curriculum.difficulty import ScoreHistory
from pipeline.learning.schedules import way_done
from pipeline.recipe import CurriculumConfig
from targets.errors import RecipeError, TrainingError

FUNCTIONS = (*("linear", "root", "quadratic", "competence", "step", "baby_step", "exponential", "log", "geometric"),)
CONFIGS = st.builds(
    CurriculumConfig,
    pacing=st.sampled_from(FUNCTIONS),
    order=st.sampled_from(["easy_first", "hard_first", "random"]),
    start_fraction=st.floats(0.01, 1.0),
    full_at=st.floats(0.01, 1.0),
    root_p=st.floats(0.1, 1000.0),
    num_steps=st.integers(1, 50),
)
PROGRESS = st.floats(0, 1)
TEACHER_NK = np.random.default_rng(0).normal(scale=3, size=(50, 5))
LABELS_N = np.random.default_rng(1).integers(5, size=50)


def measured(measure: str) -> np.ndarray:
    return difficulty(measure, torch.tensor(TEACHER_NK), torch.tensor(LABELS_N)).numpy()


def test_teacher_loss_is_the_negative_log_likelihood_of_the_label() -> None:
    expected = -log_softmax(TEACHER_NK, axis=1)[np.arange(50), LABELS_N]
    np.testing.assert_allclose(measured("teacher_loss"), expected, rtol=1e-12)


def test_teacher_entropy_is_that_of_its_distribution_in_nats() -> None:
    np.testing.assert_allclose(measured("teacher_entropy"), entropy(np.exp(TEACHER_NK), axis=1), rtol=1e-12)


def test_margin_is_positive_exactly_where_the_teacher_is_wrong() -> None:
    margin_N = measured("margin")

    np.testing.assert_array_equal(margin_N > 0, TEACHER_NK.argmax(1) != LABELS_N)
    others_N = [max(np.delete(row, label)) for row, label in zip(TEACHER_NK, LABELS_N, strict=True)]
    np.testing.assert_allclose(margin_N, others_N - TEACHER_NK[np.arange(50), LABELS_N])


@pytest.mark.parametrize("measure", ["teacher_loss", "teacher_entropy", "margin"])
def test_a_sure_and_right_teacher_calls_a_sample_easier_than_an_unsure_one(measure: str) -> None:
    teacher_NK = torch.tensor([[9.0, 0.0, 0.0], [0.5, 0.3, 0.0]])

    easy, hard = difficulty(measure, teacher_NK, torch.tensor([0, 0]))

    assert easy < hard


def test_a_teacher_that_gives_nan_is_refused() -> None:
    with pytest.raises(TrainingError, match="NaN or Inf"):
        difficulty("margin", torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match="teacher_loss"):
        difficulty("loss", torch.zeros(1, 2), torch.tensor([0]))


@given(CONFIGS, PROGRESS, PROGRESS)
@settings(max_examples=300)
def test_pacing_never_falls_and_stays_between_start_and_one(config: CurriculumConfig, p: float, q: float) -> None:
    early, late = pacing_fraction(config, min(p, q)), pacing_fraction(config, max(p, q))

    assert config.start_fraction <= early <= late <= 1.0


@given(CONFIGS)
def test_pacing_is_full_from_full_at_on(config: CurriculumConfig) -> None:
    assert pacing_fraction(config, config.full_at) == 1.0
    assert pacing_fraction(config, 1.0) == 1.0


@given(CONFIGS)
def test_pacing_begins_at_the_start_fraction(config: CurriculumConfig) -> None:
    assert pacing_fraction(config, 0.0) == pytest.approx(config.start_fraction, rel=1e-9)


@pytest.mark.parametrize(
    ("pacing", "quarter", "half"),
    [
        # b = 0.2, a = 0.5; progress 0.125 and 0.25 are x = 1/4 and 1/2
        ("linear", 0.2 + 0.8 / 4, 0.2 + 0.8 / 2),
        ("root", 0.2 + 0.8 / 2, 0.2 + 0.8 / math.sqrt(2)),
        ("quadratic", 0.2 + 0.8 / 16, 0.2 + 0.8 / 4),
        ("competence", (0.25 * (1 - 0.008) + 0.008) ** (1 / 3), (0.5 * (1 - 0.008) + 0.008) ** (1 / 3)),
        ("step", 0.2, 0.2),
        ("baby_step", 0.2 + 0.8 * 1 / 5, 0.2 + 0.8 * 2 / 5),
        (
            "exponential",
            0.2 + 0.8 * (math.exp(2.5) - 1) / (math.exp(10) - 1),
            0.2 + 0.8 * (math.exp(5) - 1) / (math.exp(10) - 1),
        ),
        (
            "log",
            0.2 + 0.8 * (1 + 0.1 * math.log(0.25 + math.exp(-10))),
            0.2 + 0.8 * (1 + 0.1 * math.log(0.5 + math.exp(-10))),
        ),
        ("geometric", 2 ** (math.log2(0.2) * 0.75), 2 ** (math.log2(0.2) * 0.5)),
    ],
)
def test_pacing_follows_the_published_formula(pacing: str, quarter: float, half: float) -> None:
    config = CurriculumConfig(pacing=pacing, start_fraction=0.2, full_at=0.5, root_p=3.0)

    assert pacing_fraction(config, 0.125) == pytest.approx(quarter)
    assert pacing_fraction(config, 0.25) == pytest.approx(half)


def test_a_step_is_taken_in_the_epoch_in_which_it_is_due() -> None:
    """In exact fractions; 6 / 10 / 0.8 * 4 is a little below 3 in floats."""
    for hundredths, num_epochs, num_steps in itertools.product(range(10, 101, 10), range(1, 41), range(1, 9)):
        config = CurriculumConfig(pacing="baby_step", start_fraction=0.5, full_at=hundredths / 100, num_steps=num_steps)
        for epoch in range(num_epochs):
            exact = Fraction(epoch * 100 * num_steps, num_epochs * hundredths)
            steps = min(math.floor(exact), num_steps)
            assert pacing_fraction(config, epoch / num_epochs) == pytest.approx(0.5 + 0.5 * steps / num_steps)
            done = way_done("step", epoch / num_epochs, full_at=hundredths / 100, num_steps=num_steps)
            assert done == pytest.approx(steps / num_steps)


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), PROGRESS)
def test_competence_with_root_one_is_linear(start: float, full_at: float, progress: float) -> None:
    competence = CurriculumConfig(pacing="competence", start_fraction=start, full_at=full_at, root_p=1.0)
    linear = CurriculumConfig(pacing="linear", start_fraction=start, full_at=full_at)

    assert pacing_fraction(competence, progress) == pytest.approx(pacing_fraction(linear, progress))


@given(CONFIGS, st.lists(st.floats(-5, 5), min_size=1, max_size=40), PROGRESS, PROGRESS, st.integers(0, 2**31 - 1))
@settings(max_examples=150, deadline=None)
def test_what_is_shown_once_stays_shown(config, difficulties, p, q, seed) -> None:
    early = shown_samples(config, torch.tensor(difficulties), min(p, q), seed=seed).tolist()
    late = shown_samples(config, torch.tensor(difficulties), max(p, q), seed=seed).tolist()

    assert late[: len(early)] == early
    assert len(set(late)) == len(late) >= 1
    assert sorted(shown_samples(config, torch.tensor(difficulties), 1.0, seed=seed).tolist()) == list(
        range(len(difficulties))
    )


@pytest.mark.parametrize(("order", "expected"), [("easy_first", {1, 3}), ("hard_first", {0, 2})])
def test_the_easiest_or_the_hardest_half_is_shown_first(order: str, expected: set[int]) -> None:
    config = CurriculumConfig(order=order, start_fraction=0.5)

    assert set(shown_samples(config, torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.0, seed=0).tolist()) == expected


def test_the_random_control_ignores_difficulty_and_depends_on_the_seed() -> None:
    config = CurriculumConfig(order="random", start_fraction=0.5)
    rising, falling = torch.arange(100.0), torch.arange(100.0).flip(0)

    assert torch.equal(shown_samples(config, rising, 0.0, seed=1), shown_samples(config, falling, 0.0, seed=1))
    assert not torch.equal(shown_samples(config, rising, 0.0, seed=1), shown_samples(config, rising, 0.0, seed=2))


def test_control_and_curriculum_show_equally_many() -> None:
    for progress in (0.0, 0.1, 0.3):
        sizes = {
            len(shown_samples(CurriculumConfig(order=order), torch.randn(101), progress, seed=0))
            for order in ("easy_first", "hard_first", "random")
        }
        assert len(sizes) == 1


def test_asking_what_is_shown_spends_no_random_number_of_the_caller() -> None:
    before = torch.get_rng_state()

    shown_samples(CurriculumConfig(order="random"), torch.arange(10.0), 0.0, seed=3)

    assert torch.equal(torch.get_rng_state(), before)


def test_equally_hard_samples_come_in_no_order_of_the_data() -> None:
    sorted_by_class = torch.zeros(1000)  # a teacher that is sure of everything

    shown = first_samples("easy_first", sorted_by_class, 0.1, seed=0)

    assert 400 < float(shown.double().mean()) < 600


# --- told by the student -----------------------------------------------------------------------------------------------

STUDENT_NK = np.random.default_rng(2).normal(scale=2, size=(50, 5))
P_NK, Q_NK = softmax(TEACHER_NK, axis=1), softmax(STUDENT_NK, axis=1)


@pytest.mark.parametrize(
    ("measure", "expected_N"),
    [
        ("teacher_doubt", 1 - P_NK[np.arange(50), LABELS_N]),
        ("self_paced", -np.log(Q_NK[np.arange(50), LABELS_N])),
        ("el2n", np.linalg.norm(Q_NK - np.eye(5)[LABELS_N], axis=1)),
        ("kl", entropy(P_NK, Q_NK, axis=1)),
        ("disagreement", np.abs(P_NK - Q_NK).sum(axis=1) / 2),
    ],
)
def test_measures_are_their_formulae(measure: str, expected_N: np.ndarray) -> None:
    found_N = difficulty(measure, torch.tensor(TEACHER_NK), torch.tensor(LABELS_N), torch.tensor(STUDENT_NK))

    np.testing.assert_allclose(found_N, expected_N, rtol=1e-9)


ANSWERS = st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=8)


@given(ANSWERS)
@settings(max_examples=60, deadline=None)
def test_forgetting_counts_the_falls_from_right_to_wrong(answers: list[list[int]]) -> None:
    labels_N = torch.tensor([0, 1, 2, 0, 1, 2])
    history = ScoreHistory(6)

    for classes in answers:
        history.add(torch.eye(3)[torch.tensor(classes)], labels_N)

    right = [[answer == label for answer, label in zip(row, labels_N.tolist(), strict=True)] for row in answers]
    for sample, found in enumerate(history.difficulty("forgetting").tolist()):
        course = [row[sample] for row in right]
        falls = sum(before and not after for before, after in itertools.pairwise(course))
        assert found == (falls if any(course) else len(course))


def test_aum_is_the_mean_margin_over_the_scorings() -> None:
    looks = np.random.default_rng(3).normal(size=(4, 50, 5))
    history = ScoreHistory(50)

    for look_NK in looks:
        history.add(torch.tensor(look_NK), torch.tensor(LABELS_N))

    margins = [
        [row[label] - max(np.delete(row, label)) for row, label in zip(look, LABELS_N, strict=True)] for look in looks
    ]
    np.testing.assert_allclose(history.difficulty("aum"), -np.mean(margins, axis=0), rtol=1e-12)


# --- adaptive pacing ---------------------------------------------------------------------------------------------------

ADAPTIVE = st.builds(
    CurriculumConfig,
    pacing=st.just("adaptive"),
    start_fraction=st.floats(0.01, 1.0),
    full_at=st.floats(0.01, 1.0),
    plateau=st.floats(0.0, 0.1),
    advance=st.floats(0.01, 1.0),
)
CURVES = st.lists(st.floats(0, 1), max_size=12)


@given(ADAPTIVE, CURVES, st.integers(1, 40))
@settings(max_examples=200)
def test_adaptive_pacing_starts_at_b_never_falls_and_has_shown_all_by_a(config, curve, spare) -> None:
    num_epochs = len(curve) + spare

    shares = [adaptive_fraction(config, epoch / num_epochs, curve[:epoch]) for epoch in range(len(curve) + 1)]

    assert shares[0] == (1.0 if config.full_at <= 0 else config.start_fraction)
    assert all(early <= late for early, late in itertools.pairwise(shares))
    assert adaptive_fraction(config, config.full_at, curve) == 1.0
    assert shares[-1] <= 1.0


@pytest.mark.parametrize(
    ("curve", "plateaus"),
    [
        ([0.5], 0),
        ([0.5, 0.501], 1),  # a plateau
        ([0.5, 0.497], 1),  # within the width, below
        ([0.5, 0.6], 0),  # still learning from what it has
        ([0.5, 0.3], 0),  # a drop holds
        ([0.5, 0.3, 0.501], 1),  # back at the best
        ([0.5, 0.501, 0.502, 0.503], 3),
        ([0.3, 0.5, 0.4, 0.45, 0.5], 1),
    ],
)
def test_a_plateau_advances_a_drop_and_a_gain_hold(curve: list[float], plateaus: int) -> None:
    config = CurriculumConfig(pacing="adaptive", start_fraction=0.2, full_at=1.0, plateau=0.005, advance=0.1)

    assert adaptive_fraction(config, 0.5, curve) == pytest.approx(0.2 + 0.1 * plateaus)
