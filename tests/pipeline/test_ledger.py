"""The ledger's numbers against independent computations: scipy, brute force, and tables worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from pipeline.ledger import MAX_FLIPPED_LISTED, Hop, hop_that_lost_most, ledger, mean_kl, output_differences
from targets.errors import ModelError, RecipeError

NUM_SAMPLES, NUM_CLASSES = 60, 4


def logits(seed: int, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(seed).normal(scale=2, size=(num_samples, NUM_CLASSES))
    return values.astype(np.float32)


def hop(name: str, logits_NK: np.ndarray, **more: Any) -> Hop:
    return Hop(hop=name, model="net", precision="fp32", logits_NK=logits_NK, **more)


def scores_of(classes_N: np.ndarray) -> np.ndarray:
    """Logits whose largest entry stands at the given classes."""
    rows_NK: np.ndarray = np.eye(NUM_CLASSES, dtype=np.float32)[classes_N]
    return rows_NK


LABELS_N = np.random.default_rng(9).integers(NUM_CLASSES, size=NUM_SAMPLES)
TEACHER, STUDENT, INT8 = (hop(name, logits(seed)) for seed, name in enumerate(("teacher", "student", "int8")))


def test_top1_and_agreements_are_those_counted_sample_by_sample() -> None:
    row = ledger([TEACHER, STUDENT, INT8], LABELS_N)[2]

    answers, before, first = (
        [max(range(NUM_CLASSES), key=list(scores).__getitem__) for scores in one.logits_NK]
        for one in (INT8, STUDENT, TEACHER)
    )
    assert row["top1"] == sum(a == y for a, y in zip(answers, LABELS_N, strict=True)) / NUM_SAMPLES
    assert row["agreement_teacher"] == sum(a == t for a, t in zip(answers, first, strict=True)) / NUM_SAMPLES
    assert row["agreement_previous"] == pytest.approx(
        sum(a == b for a, b in zip(answers, before, strict=True)) / NUM_SAMPLES
    )
    assert row["flipped"] == [i for i in range(NUM_SAMPLES) if answers[i] != before[i]][:MAX_FLIPPED_LISTED]


def test_the_interval_of_top1_is_wilsons() -> None:
    row = ledger([STUDENT], LABELS_N)[0]

    expected = stats.binomtest(round(row["top1"] * NUM_SAMPLES), NUM_SAMPLES).proportion_ci(method="wilson")
    assert row["ci95"] == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_kl_is_scipys_relative_entropy_in_nats() -> None:
    p_NK, q_NK = (special.softmax(one.logits_NK.astype(np.float64), axis=1) for one in (STUDENT, INT8))

    expected = special.rel_entr(p_NK, q_NK).sum(axis=1).mean()

    assert mean_kl(STUDENT.logits_NK, INT8.logits_NK) == pytest.approx(expected, rel=1e-9)
    assert ledger([STUDENT, INT8], LABELS_N)[1]["kl_previous"] == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 10_000), st.integers(-1000, 1000))
@settings(max_examples=50, deadline=None)
def test_kl_is_not_negative_and_forgets_what_softmax_forgets(seed: int, shift: int) -> None:
    before, after = logits(seed), logits(seed + 1)

    assert mean_kl(before, after) >= 0
    assert mean_kl(before, before + np.float32(shift)) == pytest.approx(0, abs=1e-6)


def test_kl_of_logits_far_apart_is_finite() -> None:
    assert mean_kl(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])) == pytest.approx(1e4)


def test_the_difference_is_paired_and_its_p_is_the_exact_binomial_tests() -> None:
    row = ledger([STUDENT, INT8], LABELS_N)[1]

    was, now = (one.logits_NK.argmax(1) == LABELS_N for one in (STUDENT, INT8))
    lost, won = int((was & ~now).sum()), int((now & ~was).sum())
    assert row["difference"]["top1"] == pytest.approx((won - lost) / NUM_SAMPLES)
    assert row["difference"]["mcnemar_p"] == pytest.approx(stats.binomtest(lost, lost + won, 0.5).pvalue)
    low, high = row["difference"]["ci95"]
    assert low < row["difference"]["top1"] < high


def test_equal_hops_differ_in_nothing() -> None:
    row = ledger([STUDENT, STUDENT], LABELS_N)[1]

    assert (row["agreement_previous"], row["kl_previous"], row["max_abs_delta"], row["num_flipped"]) == (1, 0, 0, 0)
    assert (row["difference"]["top1"], row["difference"]["mcnemar_p"]) == (0, 1.0)


def test_the_first_hop_has_nothing_before_it() -> None:
    row = ledger([TEACHER, STUDENT], LABELS_N)[0]

    assert (row["agreement_teacher"], row["difference"], row["kl_previous"], row["max_abs_delta"]) == (
        1.0,
        None,
        None,
        None,
    )


def test_a_hop_on_some_samples_is_compared_on_exactly_these() -> None:
    index_N = np.array([3, 11, 12, 40, 59])
    some = hop("raw bytes", logits(7, 5), index_N=index_N)

    row = ledger([TEACHER, STUDENT, some], LABELS_N)[2]

    whole = ledger(
        [
            hop("teacher", TEACHER.logits_NK[index_N]),
            hop("student", STUDENT.logits_NK[index_N]),
            hop("raw", logits(7, 5)),
        ],
        LABELS_N[index_N],
    )[2]
    assert row["n"] == 5
    assert row["flipped"] == [int(index_N[position]) for position in whole["flipped"]]  # numbered in the whole test set
    for key in (
        "top1",
        "ci95",
        "agreement_teacher",
        "agreement_previous",
        "kl_previous",
        "max_abs_delta",
        "difference",
    ):
        assert row[key] == whole[key]


def test_a_hop_may_follow_another_than_the_one_before_it() -> None:
    row = ledger([TEACHER, STUDENT, hop("fp32", logits(8), after="teacher")], LABELS_N)[2]

    assert row["max_abs_delta"] == pytest.approx(np.abs(logits(8) - TEACHER.logits_NK).max())


def test_only_so_many_flipped_samples_are_listed_but_all_are_counted() -> None:
    labels_N = np.zeros(MAX_FLIPPED_LISTED + 25, dtype=np.int64)

    row = ledger([hop("a", scores_of(labels_N)), hop("b", scores_of(labels_N + 1))], labels_N)[1]

    assert (len(row["flipped"]), row["num_flipped"]) == (MAX_FLIPPED_LISTED, MAX_FLIPPED_LISTED + 25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused_with_the_hops_name(bad: float) -> None:
    broken = logits(2)
    broken[17, 2] = bad

    with pytest.raises(ModelError, match="hop compiled of net"):
        ledger([TEACHER, hop("compiled", broken)], LABELS_N)


@pytest.mark.parametrize("shape", [(NUM_SAMPLES,), (NUM_SAMPLES - 1, NUM_CLASSES), (NUM_SAMPLES, NUM_CLASSES, 1)])
def test_logits_of_another_shape_than_the_samples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="one row of class scores a sample"):
        ledger([hop("onnx", np.zeros(shape, dtype=np.float32))], LABELS_N)


def test_the_hop_that_lost_most_is_named_and_chance_is_not_blamed() -> None:
    right, one_wrong, many_wrong = LABELS_N.copy(), LABELS_N.copy(), LABELS_N.copy()
    one_wrong[:1] = (one_wrong[:1] + 1) % NUM_CLASSES
    many_wrong[:20] = (many_wrong[:20] + 1) % NUM_CLASSES
    rows = [("teacher", right), ("student", one_wrong), ("int8", many_wrong), ("onnx", many_wrong)]

    assert hop_that_lost_most(ledger([hop(name, scores_of(classes)) for name, classes in rows], LABELS_N)) == "int8"
    assert hop_that_lost_most(ledger([hop(name, scores_of(classes)) for name, classes in rows[:2]], LABELS_N)) is None


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_any_ledger_is_plain_json_and_every_share_a_share(seeds: list[int], num_samples: int) -> None:
    labels_N = np.arange(num_samples) % NUM_CLASSES

    rows = ledger([hop(f"hop {i}", logits(seed, num_samples)) for i, seed in enumerate(seeds)], labels_N)

    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    for row in rows:
        assert 0 <= row["ci95"][0] <= row["top1"] <= row["ci95"][1] <= 1
        assert 0 <= row["agreement_teacher"] <= 1
        assert row["num_flipped"] == 0 or row["agreement_previous"] < 1


def test_outputs_without_labels_are_compared_by_cosine_and_largest_delta() -> None:
    a, b = np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])

    assert output_differences(a, b) == {"cosine": pytest.approx(9 / 25), "max_abs_delta": 4.0}
    assert output_differences(a, np.zeros_like(a)) == {"cosine": None, "max_abs_delta": 4.0}


def test_a_metric_of_ones_own_that_fails_is_named_with_the_hop() -> None:
    for metric, told in ((lambda *_: math.nan, "returned nan"), (lambda *_: {}["f1"], "KeyError")):
        with pytest.raises(RecipeError, match=rf"gate.metric, hop teacher: your .*{told}"):
            ledger([TEACHER], LABELS_N, metric)
