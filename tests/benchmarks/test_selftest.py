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


def _pairs(sd: float, num: int = 320) -> list[float]:
    return [float(one) for one in np.random.default_rng(0).normal(0, sd, num)]


def test_identical_pairs_raise_no_alarm_and_a_slow_down_is_seen_in_every_window() -> None:
    found = selftest(_pairs(0.005))

    assert (found.false_alarms.alarms, found.false_alarms.windows) == (0, 301)
    assert found.false_alarms.upper95 < 0.01
    assert (found.apart.windows, found.num_measured, found.num_pairs) == (16, 320, 20)
    assert (found.power["+3%"].share, found.power["+5%"].share) == (1.0, 1.0)
    assert found.spread == pytest.approx(0.005, rel=0.1)


def test_noise_that_is_larger_than_the_slow_down_costs_power_and_no_false_alarms() -> None:
    found = selftest(_pairs(0.15), num_pairs=10)  # of ten pairs all throws of the coins are counted

    assert found.power["+3%"].share < 0.5
    assert found.counted < 0.01


def test_a_window_is_so_many_pairs_in_their_order_each_with_a_sign_of_its_own() -> None:
    differences = _pairs(0.03, 12)

    found = selftest(differences, num_pairs=9, seed=3)

    coins = np.random.default_rng(3)
    windows = [np.array(differences[i : i + 9]) * coins.choice((-1.0, 1.0), 9) for i in range(4)]
    slower = [is_worse(window + np.log(1.03), 1.02) for window in windows]
    assert (found.power["+3%"].alarms, found.power["+3%"].windows) == (sum(slower), 4)
    assert found.apart.windows == 1


def test_what_is_counted_is_every_throw_of_the_coins() -> None:
    pairs = np.abs(np.random.default_rng(1).normal(0, 0.1, 7))

    thrown = [is_worse(pairs * coins, 1.02) for coins in itertools.product([-1, 1], repeat=7)]

    assert selftest(pairs.tolist(), num_pairs=7).counted == pytest.approx(np.mean(thrown))
    assert np.mean(thrown) > 0


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert Rate(alarms=0, windows=300).upper95 == pytest.approx(1 - 0.05 ** (1 / 300))
    assert Rate(alarms=300, windows=300).lower95 == pytest.approx(0.05 ** (1 / 300))


def test_too_few_pairs_are_refused_and_the_answer_is_json() -> None:
    with pytest.raises(RecipeError, match="19 pairs are no comparison of 20"):
        selftest([0.01] * 19)

    found = selftest(_pairs(0.01, 40))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["false_alarms"]["windows"] == 21
    assert "21 windows" in found.text()
