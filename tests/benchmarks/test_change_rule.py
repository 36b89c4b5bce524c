import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.change_rule import (
    FASTER,
    MIN_SIGMA,
    NEEDED,
    NOISES,
    SLOWER,
    WINDOW,
    Noise,
    Share,
    creep_seen,
    false_alarms,
    first_alarms,
    follow,
    level_of,
    power,
    shift_between,
    verdict_of,
)

Floats = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, num_runs: int, sd: float = 0.01) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(0.0, sd, num_runs)]


def stepped(seed: int, before: int, after: int, step: float, sd: float = 0.005) -> list[float]:
    """ln p25 with a step: `before` runs at 0, `after` at `step`."""
    return [value + step * (i >= before) for i, value in enumerate(noise(seed, before + after, sd))]


@given(seeds, st.integers(10, 30))
def test_the_level_is_the_median_and_scipys_normal_mad(seed: int, num_runs: int) -> None:
    window = np.array(noise(seed, num_runs))

    m, sigma = level_of(window)

    assert m == pytest.approx(np.median(window))
    assert sigma == pytest.approx(max(stats.median_abs_deviation(window, scale="normal"), MIN_SIGMA), rel=1e-4)


@given(seeds, st.integers(10, 30), st.floats(-0.2, 0.2))
def test_the_shift_is_where_mann_whitney_is_in_balance(seed: int, num_runs: int, step: float) -> None:
    window, suspects = np.array(noise(seed, num_runs)), np.array(noise(seed + 1, 3)) + step

    shift = float(shift_between(window, suspects))

    above = stats.mannwhitneyu(suspects - shift + 1e-9, window).statistic
    below = stats.mannwhitneyu(suspects - shift - 1e-9, window).statistic
    assert below <= 3 * num_runs / 2 <= above


@pytest.mark.parametrize(
    ("newest", "is_alarm"),
    [
        ((0.05, 0.05, 0.05), True),
        ((0.05, 0.05, 0.0), False),  # two slow runs are no alarm
        ((0.05, 0.0, 0.05), False),  # nor are two of three
        ((0.0, 0.0, 2.0), False),  # nor is one, whatever its size
        ((0.029, 0.029, 0.029), False),  # ln 1.03 is 0.0296
        ((0.030, 0.030, 0.030), True),
        ((-0.05, -0.05, -0.05), False),
    ],
)
def test_three_in_a_row_beyond_three_percent_alarm_and_nothing_less(newest: Sequence[float], is_alarm: bool) -> None:
    quiet = [0.001, -0.001] * 15

    course = follow([*quiet, *newest])

    assert (course.open is not None and course.open.direction == SLOWER) is is_alarm


def test_the_shift_must_be_beyond_three_sigma_where_runs_vary_much() -> None:
    window = np.array([0.02, -0.02] * 15)  # sigma 0.0297: 3 sigma 0.089, 2 sigma 0.059

    assert verdict_of(window, np.array([0.08, 0.08, 0.08])) == 0
    assert verdict_of(window, np.array([0.10, 0.10, 0.10])) == SLOWER


def test_the_window_ends_before_the_suspects_and_holds_the_last_thirty() -> None:
    logs = [0.1, *[0.0] * (WINDOW // 2), *[0.01] * (WINDOW // 2), 0.1, 0.1, 0.1]

    course = follow(logs)

    assert course.open is not None
    assert (course.open.first, course.open.confirmed) == (WINDOW + 1, WINDOW + 3)
    assert course.median == pytest.approx(0.005)  # with one more run, before or after, it would be 0.0 or 0.01


@given(seeds, st.floats(0.1, 3.0))
def test_nothing_is_told_of_fewer_runs_than_ten_and_three(seed: int, step: float) -> None:
    logs = stepped(seed, 9, 3, step)

    course = follow(logs)

    assert (course.changes, course.shift, course.median, course.num_runs) == ((), None, None, NEEDED - 1)
    assert follow([0.0, *logs]).open is not None


def test_slow_runs_never_become_the_level_by_themselves() -> None:
    course = follow(stepped(0, 20, 200, 0.06))

    assert course.open is not None
    assert course.open.first == 20
    assert len(course.changes) == 1
    assert course.shift == pytest.approx(0.06, abs=0.01)


def test_three_runs_back_at_the_level_end_a_change_and_a_new_one_is_seen_again() -> None:
    flat, slow = [0.001, -0.001] * 10, [0.06] * 5

    course = follow([*flat, *slow, 0.0, 0.0, 0.0, *slow])

    assert [(change.first, change.ended) for change in course.changes] == [(20, 25), (28, None)]


def test_two_runs_back_do_not_end_a_change() -> None:
    course = follow([*[0.0] * 20, *[0.06] * 5, 0.0, 0.0, 0.06, 0.0, 0.0])

    assert course.open is not None


def test_an_accepted_level_is_what_later_runs_are_held_against() -> None:
    logs = stepped(1, 20, 30, 0.06)

    before, after = follow(logs), follow(logs, accepted={20})

    assert before.open is not None
    assert after.changes == ()
    assert after.median == pytest.approx(0.06, abs=0.005)
    assert follow([*logs, 0.12, 0.12, 0.12], accepted={20}).open is not None


def test_after_accepting_ten_runs_and_three_are_needed_again() -> None:
    logs = stepped(2, 20, NEEDED - 1, 0.06)

    course = follow(logs, accepted={20})

    assert (course.num_runs, course.shift) == (NEEDED - 1, None)


def test_accepting_later_than_the_first_slow_run_closes_the_change() -> None:
    course = follow(stepped(3, 20, 10, 0.06), accepted={24})

    assert [(change.first, change.accepted, change.is_open) for change in course.changes] == [(20, True, False)]
    assert course.open is None


@given(st.floats(-20, 20), st.integers(0, 80))
def test_a_constant_series_never_changes(log: float, num_runs: int) -> None:
    assert follow([log] * num_runs).changes == ()


@settings(max_examples=50)
@given(seeds, st.floats(-0.1, 0.1), st.floats(1e-3, 1e3))
def test_latencies_in_another_unit_get_the_same_verdicts(seed: int, step: float, factor: float) -> None:
    logs = stepped(seed, 20, 20, step, sd=0.01)

    scaled = follow([log + math.log(factor) for log in logs])

    assert [(c.first, c.confirmed, c.ended, c.direction) for c in scaled.changes] == [
        (c.first, c.confirmed, c.ended, c.direction) for c in follow(logs).changes
    ]


@given(seeds, st.floats(-0.1, 0.1))
def test_an_improvement_is_a_slow_down_mirrored(seed: int, step: float) -> None:
    window, suspects = np.array(noise(seed, 20)), np.array(noise(seed + 1, 3)) + step

    assert verdict_of(-window, -suspects) == -verdict_of(window, suspects)


def test_an_improvement_is_the_new_level_at_once_and_losing_it_again_is_an_alarm() -> None:
    fast = [0.001, -0.001] * 10

    improved = follow([*[0.1] * 20, *fast[:3]])
    lost = follow([*[0.1] * 20, *fast, 0.06, 0.06, 0.06])

    assert [(change.first, change.direction, change.is_open) for change in improved.changes] == [(20, FASTER, False)]
    assert (improved.begin, improved.num_runs, improved.shift) == (20, 3, None)
    assert lost.open is not None
    assert lost.open.first == 40


@settings(max_examples=50)
@given(seeds, st.floats(-0.02, 0.1))
def test_the_simulation_alarms_at_the_run_at_which_a_history_does(seed: int, step: float) -> None:
    logs = stepped(seed, 25, 35, step, sd=0.015)
    changes = follow(logs).changes
    assume(all(change.direction == SLOWER for change in changes[:1]))

    first = first_alarms(np.array([logs]))[0]

    assert first == (changes[0].confirmed if changes else -1)


def test_independent_runs_hardly_ever_alarm_and_a_slow_down_of_five_percent_is_seen() -> None:
    independent, outliers, drift, far_drift = NOISES

    alarms = {one.name: _false(one) for one in NOISES}
    seen = {one.name: _seen(one) for one in NOISES}

    # The full size has 0.0, 1.9, 0.9 and 3.9 % and 99.6, 97.5, 98.2 and 90.0 %: the bounds lie five standard errors away.
    assert alarms[independent.name] <= 0.005
    assert alarms[outliers.name] <= 0.045
    assert alarms[drift.name] <= 0.030
    assert 0.010 <= alarms[far_drift.name] <= 0.085
    assert seen[independent.name] >= 0.96
    assert min(seen[outliers.name], seen[drift.name]) >= 0.92
    assert seen[far_drift.name] >= 0.80


def test_a_slow_down_within_the_noise_of_a_single_run_is_seen_more_often_the_larger_it_is() -> None:
    shares = [
        power(NOISES[0], slow, step_at=30, within=10, num_series=300, num_runs=45, seed=5).share
        for slow in (0.0, 0.02, 0.03, 0.05)
    ]

    assert shares == sorted(shares)
    assert shares[0] < 0.02 < 0.95 < shares[-1]


def test_a_creep_that_the_window_follows_is_mostly_missed() -> None:
    assert creep_seen(NOISES[0], 0.0005, num_series=300, num_runs=60, seed=6).share < 0.1


def test_each_noise_has_the_spread_that_it_names() -> None:
    spreads = [float(one.sample(np.random.default_rng(7), 2000, 60).std()) for one in (NOISES[0], *NOISES[2:])]

    assert spreads == pytest.approx([0.01, 0.01, 0.0125], rel=0.02)


@given(st.integers(0, 400), st.integers(1, 400))
def test_a_share_carries_the_exact_interval(count: int, more: int) -> None:
    share = Share(count=count, num_series=count + more)

    interval = stats.binomtest(count, count + more).proportion_ci(0.95, method="exact")

    assert share.ci95 == pytest.approx((interval.low, interval.high), abs=1e-9)


def _false(one: Noise) -> float:
    return false_alarms(one, num_series=1000, num_runs=60, seed=11).share


def _seen(one: Noise) -> float:
    return power(one, 0.05, step_at=30, within=30, num_series=500, num_runs=60, seed=12).share
