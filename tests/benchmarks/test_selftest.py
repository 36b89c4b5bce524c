import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.compare import is_worse
from benchmarks.selftest import Rate, alarms, selftest
from targets.errors import RecipeError


@given(
    st.lists(st.integers(-(10**6), 10**6).filter(bool).map(lambda v: v / 10**7), min_size=7, max_size=10, unique_by=abs)
)
def test_the_gate_on_many_rows_is_the_gate_on_each(differences: list[float]) -> None:
    rows = np.array([differences, np.abs(differences), -np.abs(differences)])

    assert alarms(rows).tolist() == [is_worse(row, 1.02) for row in rows]


def test_identical_launches_raise_no_alarm_and_a_slow_down_is_seen_in_every_window() -> None:
    p25s = 1000 * np.exp(np.random.default_rng(0).normal(0, 0.002, 340))

    found = selftest(p25s.tolist())

    assert (found.false_alarms.alarms, found.false_alarms.windows) == (0, 321)
    assert found.false_alarms.upper95 < 0.01
    assert (found.apart.windows, found.num_launches) == (17, 340)
    assert (found.power["+3%"].share, found.power["+5%"].share) == (1.0, 1.0)


def test_noise_that_is_larger_than_the_slow_down_costs_power_and_no_false_alarms() -> None:
    p25s = 1000 * np.exp(np.random.default_rng(0).normal(0, 0.1, 340))

    found = selftest(p25s.tolist())

    assert found.power["+3%"].share < 0.5
    assert found.counted < 0.01


def test_what_is_counted_is_every_throw_of_the_coins() -> None:
    p25s = 1000 * np.exp(np.random.default_rng(1).normal(0, 0.1, 14))
    pairs = np.abs(np.diff(np.log(p25s).reshape(7, 2)).ravel())

    thrown = [is_worse(pairs * coins, 1.02) for coins in itertools.product([-1, 1], repeat=7)]

    assert selftest(p25s.tolist(), num_pairs=7).counted == pytest.approx(np.mean(thrown))
    assert np.mean(thrown) > 0


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert Rate(alarms=0, windows=300).upper95 == pytest.approx(1 - 0.05 ** (1 / 300))
    assert Rate(alarms=300, windows=300).lower95 == pytest.approx(0.05 ** (1 / 300))


def test_too_few_launches_are_refused_and_the_answer_is_json() -> None:
    with pytest.raises(RecipeError, match="19 launches are no comparison of 10 pairs"):
        selftest([1.0] * 19)

    p25s = 1000 * np.exp(np.random.default_rng(0).normal(0, 0.01, 40))
    assert json.loads(json.dumps(selftest(p25s.tolist()).to_json(), allow_nan=False))["false_alarms"]["windows"] == 21
