"""Normalised scores: the geometric mean of latency ratios, over the models that both configurations have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.hardware.findings import Findings, findings_of
from benchmarks.hardware.scores import Score, geometric_mean
from benchmarks.records import Stored
from targets.errors import RecipeError

Make = Callable[..., Stored]
LATENCIES = {
    ("openvino-cpu", "fp32"): {"a": 10.0, "b": 20.0, "c": 30.0},
    ("openvino-cpu", "int8"): {"a": 4.0, "b": 5.0, "c": 20.0},
    ("onnxruntime-cpu", "fp32"): {"a": 12.0, "b": 30.0, "c": 33.0},
    ("onnxruntime-cpu", "int8"): {"a": 2.0, "b": 3.0, "d": 1.0},
}


def records(make: Make, directory: Path) -> list[Stored]:
    return [
        make(directory, model=model, runtime=runtime, precision=precision, p50_ms=p50_ms, num_launches=1)
        for (runtime, precision), models in LATENCIES.items()
        for model, p50_ms in models.items()
    ]


def score_of(findings: Findings, name: str) -> Score:
    return next(one for one in findings.scores if one.configuration.label(findings.varying) == name)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_geometric_mean_is_scipys(ratios: list[float]) -> None:
    assert geometric_mean(ratios) == pytest.approx(float(stats.gmean(ratios)), rel=1e-12)


def test_geometric_mean_of_nothing_is_none() -> None:
    assert geometric_mean([]) is None


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=12), st.floats(0.01, 100))
def test_ratio_of_two_scores_does_not_depend_on_the_baseline_and_scales(
    latencies: list[tuple[float, float]], factor: float
) -> None:
    """Fleming and Wallace 1986: the reason for this mean."""
    score = geometric_mean(base / own for base, own in latencies)
    inverse = geometric_mean(own / base for base, own in latencies)
    slowed = geometric_mean(base / (factor * own) for base, own in latencies)

    assert score is not None
    assert inverse is not None
    assert score * inverse == pytest.approx(1.0)
    assert slowed == pytest.approx(score / factor)


def test_scores_are_over_exactly_the_models_that_both_have(make_stored: Make, tmp_path: Path) -> None:
    findings = findings_of(records(make_stored, tmp_path), baseline="openvino-cpu fp32")

    int8 = score_of(findings, "openvino-cpu int8")
    fewer = score_of(findings, "onnxruntime-cpu int8")
    assert int8.speed == pytest.approx(float(stats.gmean([10 / 4, 20 / 5, 30 / 20])))
    assert int8.is_complete
    assert fewer.speed == pytest.approx(float(stats.gmean([10 / 2, 20 / 3])))
    assert fewer.ratios.keys() == {"a", "b"}
    assert (fewer.missing, fewer.beyond, fewer.is_complete) == (("c",), ("d",), False)


def test_the_baseline_scores_one(make_stored: Make, tmp_path: Path) -> None:
    for baseline in ("openvino-cpu fp32", "openvino-cpu int8", "onnxruntime-cpu int8"):
        findings = findings_of(records(make_stored, tmp_path), baseline=baseline)

        assert score_of(findings, baseline).speed == 1.0


def test_configurations_with_fewer_models_stand_behind_the_complete_ones(make_stored: Make, tmp_path: Path) -> None:
    findings = findings_of(records(make_stored, tmp_path))

    assert [one.configuration.label(findings.varying) for one in findings.scores] == [
        "openvino-cpu int8",
        "openvino-cpu fp32",
        "onnxruntime-cpu fp32",
        "onnxruntime-cpu int8",  # the fastest of all, of two models
    ]


def test_the_baseline_is_the_one_that_covers_most_models_and_fp32_first(make_stored: Make, tmp_path: Path) -> None:
    wide = [make_stored(tmp_path, model=model, precision="int8", threads=2) for model in "abcd"]

    by_precision = findings_of(records(make_stored, tmp_path))
    by_models = findings_of([*records(make_stored, tmp_path), *wide])

    assert by_precision.baseline.label(by_precision.varying) == "onnxruntime-cpu fp32"
    assert by_models.baseline.label(by_models.varying) == "openvino-cpu int8, 2 threads"


def test_words_that_fit_one_configuration_name_it(make_stored: Make, tmp_path: Path) -> None:
    findings = findings_of(records(make_stored, tmp_path), baseline="INT8 openvino-cpu")

    assert findings.baseline.label(findings.varying) == "openvino-cpu int8"


def test_a_baseline_that_does_not_exist_is_refused_with_the_near_ones(make_stored: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'openvino-cpu fp23'.*Did you mean: openvino-cpu fp32") as refused:
        findings_of(records(make_stored, tmp_path), baseline="openvino-cpu fp23")

    assert refused.value.exit_code == 2


def test_a_baseline_that_several_are_called_is_refused_with_their_names(make_stored: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 configurations fit: openvino-cpu int8; openvino-cpu fp32"):
        findings_of(records(make_stored, tmp_path), baseline="openvino-cpu")


def test_an_empty_baseline_fits_nothing(make_stored: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no configuration here is called so"):
        findings_of(records(make_stored, tmp_path), baseline="")


def test_perf_per_watt_is_over_the_models_whose_energy_both_know(make_stored: Make, tmp_path: Path) -> None:
    energies = {("fp32", "a"): 8.0, ("fp32", "b"): 9.0, ("int8", "a"): 2.0, ("int8", "b"): None}
    made = [
        make_stored(tmp_path, precision=precision, model=model, gross_mj=gross_mj)
        for (precision, model), gross_mj in energies.items()
    ]

    score = score_of(findings_of(made), "openvino-cpu int8")

    assert score.per_joule == pytest.approx(4.0)
    assert score.num_energy == 1


def test_models_of_a_measurement_that_is_not_valid_are_named(make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, model=model, precision=one) for model in "abc" for one in ("fp32", "int8")]
    made[1] = make_stored(tmp_path, model="a", precision="int8", p50_ms=0.1, valid=False)

    findings = findings_of(made)

    score = score_of(findings, "openvino-cpu int8")
    assert score.doubtful == ("a",)
    assert score.valid_speed == pytest.approx(1.0)
    assert findings.scores[0].speed > 1  # by that measurement alone
    assert (
        findings.headline == "No other configuration is faster than openvino-cpu fp32 over 3 models (geometric mean)."
    )
