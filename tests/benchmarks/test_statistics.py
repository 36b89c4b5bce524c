import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import statistics
from benchmarks.device.record import MIN_QUERIES, percentile

SMALL_SAMPLES = st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=2, max_size=8)


@given(SMALL_SAMPLES)
def test_hodges_lehmann_is_the_median_of_all_pairwise_means(values: list[float]) -> None:
    means = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2)]

    assert statistics.hodges_lehmann(values) == pytest.approx(float(np.median(means)))


@given(SMALL_SAMPLES, st.floats(-100, 100))
def test_hodges_lehmann_moves_with_its_data(values: list[float], shift: float) -> None:
    moved = statistics.hodges_lehmann([value + shift for value in values])

    assert moved == pytest.approx(statistics.hodges_lehmann(values) + shift, abs=1e-9)


@pytest.mark.parametrize("values", [[0.3, -0.1, 0.2, 0.7, 0.5], [-1.0, -2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
def test_wilcoxon_p_is_the_share_of_sign_patterns_with_as_large_a_rank_sum(values: list[float]) -> None:
    ranks = stats.rankdata(np.abs(values))
    observed = ranks[np.array(values) > 0].sum()
    sums = [np.dot(ranks, signs) for signs in itertools.product([0, 1], repeat=len(values))]

    assert statistics.wilcoxon_greater_p(values) == pytest.approx(np.mean([rank_sum >= observed for rank_sum in sums]))


def test_seven_pairs_are_the_fewest_that_can_reach_one_percent() -> None:
    assert statistics.wilcoxon_greater_p([1.0, 2, 3, 4, 5, 6]) == pytest.approx(1 / 64)
    assert statistics.wilcoxon_greater_p([1.0, 2, 3, 4, 5, 6, 7]) == pytest.approx(1 / 128)


def test_equal_launches_are_no_evidence() -> None:
    assert statistics.wilcoxon_greater_p([0.0] * 10) == 1.0
    assert statistics.wilcoxon_greater_p([0.0, 1.0, 2.0]) > statistics.wilcoxon_greater_p([0.5, 1.0, 2.0])


@pytest.mark.parametrize("n", range(1, 25))
def test_median_interval_has_the_coverage_that_enumeration_gives(n: int) -> None:
    interval = statistics.median_interval(np.arange(1, n + 1))

    coverages = {k: 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)}
    enough = [k for k, coverage in coverages.items() if coverage >= 0.95]
    assert interval == ((max(enough), n + 1 - max(enough)) if enough else None)


def test_median_interval_needs_six_launches() -> None:
    assert statistics.median_interval([1.0] * 5) is None
    assert statistics.median_interval([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == (1.0, 6.0)


@pytest.mark.parametrize(("q", "needed"), MIN_QUERIES.items())
def test_a_percentile_is_reported_from_the_early_stopping_count_on(q: float, needed: int) -> None:
    assert statistics.early_stopping_percentile(np.arange(needed - 1), q) is None
    assert statistics.early_stopping_percentile(np.arange(needed), q) == needed - 1
    assert percentile(np.arange(needed - 1), q) is None
    assert percentile(np.arange(needed), q) == pytest.approx(np.percentile(np.arange(needed), q))


@given(st.integers(64, 700), st.sampled_from([90.0, 95.0, 99.0]))
def test_early_stopping_drops_as_many_as_the_binomial_tail_allows(n: int, q: float) -> None:
    over, tail, allowed = 1 - q / 100, 0.0, -1
    while (tail := tail + math.comb(n, allowed + 1) * over ** (allowed + 1) * (1 - over) ** (n - allowed - 1)) <= 0.01:
        allowed += 1

    expected = None if allowed < 1 else n - allowed
    assert statistics.early_stopping_percentile(np.arange(n), q) == expected


@given(st.integers(1, 400), st.data())
def test_proportion_intervals_are_scipys(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    scipy_result = stats.binomtest(k, n)

    wilson, exact = scipy_result.proportion_ci(method="wilson"), scipy_result.proportion_ci(method="exact")
    assert statistics.wilson_interval(k, n) == pytest.approx((wilson.low, wilson.high))
    assert statistics.clopper_pearson_interval(k, n) == pytest.approx((exact.low, exact.high))


@given(st.integers(1, 100_000), st.data())
def test_an_interval_contains_its_estimate_and_stays_a_fraction(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    for low, high in (statistics.wilson_interval(k, n), statistics.clopper_pearson_interval(k, n)):
        assert 0.0 <= low <= k / n <= high <= 1.0


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_counts_the_splits_that_are_as_uneven(only_first: int, only_second: int) -> None:
    n, least = only_first + only_second, min(only_first, only_second)
    as_uneven = sum(math.comb(n, i) for i in range(n + 1) if min(i, n - i) <= least)

    assert statistics.mcnemar_exact_p(only_first, only_second) == pytest.approx(as_uneven / 2**n)


def _table(both: int, only_second: int, only_first: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, False, True, False], [both, only_second, only_first, neither])
    second = np.repeat([True, True, False, False], [both, only_second, only_first, neither])
    return first, second


def test_paired_difference_meets_newcombes_published_example() -> None:
    difference, interval = statistics.paired_difference(*_table(36, 12, 2, 0))  # Newcombe 1998, table II

    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_interval_covers_the_true_difference_over_all_tables_of_a_size() -> None:
    n, probabilities = 16, (0.7, 0.12, 0.06, 0.12)
    truth, covered = probabilities[1] - probabilities[2], 0.0
    for both, only_second, only_first in itertools.product(range(n + 1), repeat=3):
        if (neither := n - both - only_second - only_first) >= 0:
            counts = (both, only_second, only_first, neither)
            _, (low, high) = statistics.paired_difference(*_table(*counts))
            covered += stats.multinomial.pmf(counts, n, probabilities) if low <= truth <= high else 0.0

    assert covered >= 0.93


@given(*[st.integers(0, 40)] * 3, st.integers(1, 40))
def test_paired_difference_is_antisymmetric_and_inside_its_interval(a: int, b: int, c: int, d: int) -> None:
    first, second = _table(a, b, c, d)
    difference, (low, high) = statistics.paired_difference(first, second)
    reverse, (reverse_low, reverse_high) = statistics.paired_difference(second, first)

    assert -1.0 - 1e-12 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1.0 + 1e-12
    assert (reverse, reverse_low, reverse_high) == pytest.approx((-difference, -high, -low))


def test_a_proportion_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no proportion"):
        statistics.wilson_interval(1, 0)
    with pytest.raises(ValueError, match="paired"):
        statistics.paired_difference(np.array([True]), np.array([True, False]))


@pytest.mark.parametrize("n", range(1, 11))
def test_signed_rank_distribution_is_that_of_all_sign_patterns(n: int) -> None:
    sums = [np.dot(range(1, n + 1), signs) for signs in itertools.product([0, 1], repeat=n)]

    expected = [np.mean([rank_sum <= t for rank_sum in sums]) for t in range(n * (n + 1) // 2 + 1)]
    assert statistics.signed_rank_cdf(n).tolist() == pytest.approx(expected)


@given(st.lists(st.integers(-(10**6), 10**6).map(lambda value: value / 977), min_size=6, max_size=9, unique=True))
def test_the_interval_of_the_shift_holds_what_the_two_sided_test_would_not_refuse(values: list[float]) -> None:
    interval = statistics.hodges_lehmann_interval(values)
    assert interval is not None
    low, high = interval
    width = max(high - low, 1e-6)

    def p_of(shift: float) -> float:
        return float(stats.wilcoxon(np.array(values) - shift, method="exact").pvalue)

    assert p_of(low - 1e-7 * width) <= 0.05 < p_of(low + 1e-7 * width)
    assert p_of(high + 1e-7 * width) <= 0.05 < p_of(high - 1e-7 * width)


def test_the_interval_of_the_shift_needs_six_pairs() -> None:
    assert statistics.hodges_lehmann_interval([1.0, 2, 3, 4, 5]) is None
    assert statistics.hodges_lehmann_interval([1.0, 2, 3, 4, 5, 6]) == (1.0, 6.0)


def test_holm_on_the_example_of_a_textbook() -> None:
    # Four tests at 0.05: 0.005 and 0.01 are refused, 0.03 is not (2 x 0.03 > 0.05), so 0.04 is not either.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_lies_between_nothing_and_bonferroni_and_keeps_the_order(ps: list[float]) -> None:
    adjusted = statistics.holm(ps)

    assert all(p <= q <= min(1.0, p * len(ps)) + 1e-12 for p, q in zip(ps, adjusted, strict=True))
    assert [adjusted[i] for i in np.argsort(ps, kind="stable")] == sorted(adjusted)
