from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.ablation.verdict import HELPS, HURTS, NO_DIFFERENCE, TOO_FEW, verdicts
from targets.errors import RecipeError

pytestmark = pytest.mark.integration

SEED_SD = 0.003  # of a difference between two arms of ResNet-20 size on CIFAR-10
DIFFERENCES = st.lists(st.floats(-0.05, 0.05).map(lambda value: round(value, 9)), min_size=3, max_size=8, unique=True)


def only(values: list[float]) -> str:
    (found,) = verdicts({"arm": values})
    return found.verdict


def test_the_four_words() -> None:
    assert only([0.020, 0.022, 0.018, 0.021, 0.019]) == HELPS
    assert only([-0.020, -0.022, -0.018, -0.021, -0.019]) == HURTS
    assert only([0.001, -0.001, 0.0005, -0.0005, 0.0002]) == NO_DIFFERENCE
    assert only([0.02, -0.015, 0.01, -0.01, 0.005]) == TOO_FEW


@given(DIFFERENCES)
def test_interval_and_p_are_those_of_the_paired_t_test(values: list[float]) -> None:
    (found,) = verdicts({"arm": values})

    result = stats.ttest_1samp(values, 0.0)
    interval = result.confidence_interval(0.95)
    assert found.ci95 == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found.p == pytest.approx(result.pvalue)


@given(DIFFERENCES)
@example([0.0, 3.6e-224, 6.0e-253])  # whose squares are no numbers any more
def test_help_seen_from_the_other_side_is_harm(values: list[float]) -> None:
    mirrored = {HELPS: HURTS, HURTS: HELPS}

    assert only([-value for value in values]) == mirrored.get(only(values), only(values))


@given(DIFFERENCES.filter(lambda values: np.std(values) > 1e-4))
def test_the_seeds_that_are_said_to_decide_do_and_one_fewer_do_not(values: list[float]) -> None:
    (found,) = verdicts({"arm": values})
    if found.verdict != TOO_FEW or found.seeds_needed is None:
        return

    sd, reach = float(np.std(values, ddof=1)), max(abs(found.mean), 0.005 - abs(found.mean))
    assert half_width(sd, found.seeds_needed) < reach
    assert found.seeds_needed == len(values) + 1 or half_width(sd, found.seeds_needed - 1) >= reach


def half_width(sd: float, num_seeds: int) -> float:
    """Of the 95 % t interval of a mean, by scipy's own."""
    return float(stats.t.interval(0.95, num_seeds - 1, scale=sd / num_seeds**0.5)[1])


@given(mean=st.floats(0.002, 0.02), sd=st.floats(0.002, 0.03), num_others=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_that_many_seeds_decide_though_the_arm_is_one_of_many(mean: float, sd: float, num_others: int) -> None:
    others = {f"other {i}": [0.0, 0.0] for i in range(num_others)}
    found = verdicts({"arm": spread_out(mean, sd, 3), **others})[0]
    needed = found.seeds_needed
    if needed is None:
        return

    with_them, with_one_fewer = (
        verdicts({"arm": spread_out(mean, sd, n), **others})[0].verdict for n in (needed, max(needed - 1, 3))
    )

    assert with_them != TOO_FEW
    assert with_one_fewer == TOO_FEW


def spread_out(mean: float, sd: float, num_seeds: int) -> list[float]:
    """So many values of exactly that mean and standard deviation."""
    even = np.linspace(-1, 1, num_seeds)
    values: list[float] = (mean + sd * even / np.std(even, ddof=1)).tolist()
    return values


def test_the_more_arms_the_more_a_claim_must_show() -> None:
    weak = [0.004, 0.009, 0.002, 0.007, 0.001]
    noise = np.random.default_rng(0).normal(0, SEED_SD, (7, 5)).tolist()

    (alone,) = verdicts({"arm": weak})
    among = verdicts({"arm": weak} | {f"other {i}": values for i, values in enumerate(noise)})[0]

    assert alone.verdict == HELPS
    assert among.p == pytest.approx(min(1.0, 8 * alone.p))
    assert among.verdict == TOO_FEW


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_arms_that_are_the_same_are_told_apart_in_at_most_one_of_twenty(num_seeds: int) -> None:
    spread = np.random.default_rng(num_seeds).normal(0, SEED_SD, (2000, num_seeds))

    wrong = sum(only(values.tolist()) in (HELPS, HURTS) for values in spread)

    assert stats.binomtest(wrong, 2000, 0.05, alternative="greater").pvalue > 1e-3


@given(st.lists(st.sampled_from([-0.0004, -0.0002, 0.0002, 0.0004, 0.05]), min_size=2, max_size=2))
def test_two_seeds_decide_nothing_for_equal_differences_are_common_among_counts(differences: list[float]) -> None:
    (found,) = verdicts({"arm": differences})

    assert found.verdict == TOO_FEW
    assert found.seeds_needed is None or found.seeds_needed >= 3


def test_on_a_small_test_set_equal_counts_are_no_proof() -> None:
    """Three seeds, a hundred test images, arms that are all the baseline again: differences of whole images are often equal."""
    images = np.random.default_rng(8).normal(0, 1, (1500, 8, 3)).round() / 100

    wrong = sum(
        any(
            one.verdict in (HELPS, HURTS)
            for one in verdicts({str(i): values for i, values in enumerate(arms.tolist())}, resolution=0.01)
        )
        for arms in images
    )

    assert stats.binomtest(wrong, 1500, 0.05, alternative="greater").pvalue > 1e-3


def test_identical_results_are_no_difference_and_one_seed_is_no_ablation() -> None:
    assert only([0.0, 0.0, 0.0]) == NO_DIFFERENCE
    with pytest.raises(RecipeError, match="arm 'arm' has fewer than two seeds"):
        only([0.1])
