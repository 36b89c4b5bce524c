import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.compare import compare, is_worse
from benchmarks.comparison import Comparison, Difference
from benchmarks.device.record import Record, validate
from targets.errors import MeasurementError, RecipeError

NOISE = [1.001, 0.998, 1.003, 0.999, 1.002, 0.997, 1.004, 0.996, 1.0005, 0.9985]


def record(p25s_us: Sequence[float], *, rss: float | None = 64.0, load_ms: float = 80.0, **changed: Any) -> Record:
    """As a session would make it; `changed` are hard keys, and bytes, es_p99_us and valid."""
    size, p99, valid = changed.pop("bytes", 2**20), changed.pop("es_p99_us", None), changed.pop("valid", True)
    hard = {"cpu": "one", "harness": 1, "model": "m", "precision": "int8", "batch": 1, **changed}
    launches = [_launch(i, p25, rss, load_ms) for i, p25 in enumerate(p25s_us)]
    return validate(
        {
            "schema_version": 1,
            "run_id": "r",
            "utc": "2026-01-01T00:00:00+00:00",
            "git": {},
            "model": {"name": "m", "sha256": "a", "bytes": size, "precision": "int8", "inputs": []},
            "runtime": {"name": "onnxruntime-cpu", "version": "1", "provider": "cpu", "flags": {}},
            "scenario": {
                "kind": "single_stream",
                "preset": "ci",
                "batch": 1,
                "boundary": "runtime",
                "warmup_s": 1.0,
                "min_s": 1.0,
                "min_q": 64,
                "seed": 0,
            },
            "launches": launches,
            "summary": {
                "p25_us": float(np.median(p25s_us)),
                "p50_us": 1.0,
                "ci95": None,
                "fps": 1.0,
                "es_p90_us": None,
                "es_p99_us": p99,
                "load_ms": load_ms,
                "first_ms": 1.0,
            },
            "host_e2e": None,
            "throughput": None,
            "memory": launches[0]["memory"],
            "energy": launches[0]["energy"],
            "accuracy": None,
            "env": {"hard": hard, "soft": {}, "hard_sha256": "h"},
            "telemetry": launches[0]["telemetry"],
            "validity": {"ok": valid, "flags": ["launch 0: throttled 3 times"]},
        }
    )


def _launch(i: int, p25: float, rss: float | None, load_ms: float) -> dict[str, Any]:
    latency = {"min": p25, "p25": p25, "p50": p25, "p90": None, "p99": None, "p999": None, "mean": p25, "sd": 0.0}
    return {
        "i": i,
        "arm": "A",
        "order": i,
        "n": 100,
        "load_ms": load_ms * NOISE[i % 10],
        "first_ms": 1.0,
        "lat_us": latency,
        "samples_file": "s.npy",
        "warmup_s": 0.5,
        "wall_s": 1.0,
        "cpu_s": 1.0,
        "nivcsw": 0,
        "majflt": 0,
        "overhead_us": 0.05,
        "memory": {
            "vmhwm_mib": None if rss is None else rss * NOISE[-i % 10],
            "baseline_mib": 1.0,
            "pss_mib": None,
            "cgroup_peak_mib": None,
        },
        "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
        "telemetry": {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": None},
        "disturbances": [],
        "flags": [],
    }


def times(factor: float, noise: Sequence[float] = NOISE) -> list[float]:
    return [1000.0 * factor * one for one in noise]


def by_name(found: Comparison) -> dict[str, Difference]:
    return {one.metric: one for one in found.differences}


def test_a_slow_down_of_three_percent_is_told_with_its_size_and_ends_with_exit_4() -> None:
    found = compare(record(times(1.0)), record(times(1.03, NOISE[::-1])))

    latency = by_name(found)["p25"]
    assert (latency.verdict, latency.outcome, found.verdict) == ("slower", "worse", "slower")
    assert latency.ratio == pytest.approx(1.03, abs=0.003)
    assert latency.ci95 is not None
    assert latency.ci95[0] < 1.03 < latency.ci95[1]
    assert found.failure is not None
    assert found.failure.exit_code == 4
    assert "p25: B is slower than A, +3" in str(found.failure)


def test_the_other_way_round_it_is_faster_and_no_failure() -> None:
    found = compare(record(times(1.03)), record(times(1.0, NOISE[::-1])))

    assert (found.verdict, found.failure) == ("faster", None)


def test_identical_launches_are_no_difference_and_noise_beyond_the_margin_cannot_be_told() -> None:
    noisy = [1000.0 * one for one in (1.0, 1.2, 0.9, 1.1, 0.8, 1.15, 1.05, 0.95, 1.0, 1.1)]

    same = compare(record(times(1.0)), record(times(1.0)))
    unclear = compare(record(noisy), record(noisy[::-1]))

    assert {one.verdict for one in same.differences} == {"no difference"}
    assert by_name(unclear)["p25"].verdict == "cannot tell"
    assert "Take more pairs" in by_name(unclear)["p25"].why
    assert same.failure is None
    assert unclear.failure is None


def test_one_percent_is_real_and_below_what_anybody_cares_for() -> None:
    found = compare(record(times(1.0)), record(times(1.01, NOISE[::-1])))

    assert by_name(found)["p25"].verdict == "no difference"


def test_memory_load_and_size_are_judged_too() -> None:
    a, b = record(times(1.0)), record(times(1.0), rss=70.0, load_ms=120.0, bytes=2**21)

    found = by_name(compare(a, b))

    assert {name: one.verdict for name, one in found.items()} == {
        "p25": "no difference",
        "peak RSS": "more",
        "load": "slower",
        "size": "larger",
    }
    assert found["size"].ratio == 2.0


def test_p_values_are_holms_over_the_metrics_that_were_tested() -> None:
    a, b = record(times(1.0)), record(times(1.03, NOISE[::-1]))
    raw = stats.wilcoxon(
        np.log([y / x for x, y in zip(times(1.0), times(1.03, NOISE[::-1]), strict=True)]),
        alternative="greater",
        method="exact",
    ).pvalue

    assert by_name(compare(a, b, metrics=["p25", "size"]))["p25"].p == pytest.approx(raw)
    assert by_name(compare(a, b))["p25"].p == pytest.approx(3 * raw)


def test_too_few_pairs_cannot_tell_whatever_they_show() -> None:
    found = compare(record(times(1.0)[:6]), record(times(2.0)[:6]), metrics=["p25"])

    assert found.verdict == "cannot tell"
    assert "too few pairs: 7" in found.differences[0].why


def test_what_could_not_be_read_is_not_compared() -> None:
    found = by_name(compare(record(times(1.0)), record(times(1.0), rss=None)))

    assert (found["peak RSS"].verdict, found["peak RSS"].p) == ("cannot tell", None)
    assert found["p25"].verdict == "no difference"


def test_records_of_two_machines_are_refused_and_the_subject_may_differ() -> None:
    with pytest.raises(MeasurementError, match="cpu: one and two"):
        compare(record(times(1.0)), record(times(1.0), cpu="two"))

    found = compare(record(times(1.0)), record(times(1.0), precision="fp32"))
    assert found.changed == {"precision": ["int8", "fp32"]}


def test_records_measured_apart_are_told_apart_only_beyond_ten_percent() -> None:
    a = record(times(1.0))

    near = compare(a, record(times(1.05)), interleaved=False, metrics=["p25"])
    far = compare(a, record(times(1.2)), interleaved=False, metrics=["p25"])

    assert (near.verdict, far.verdict) == ("cannot tell", "slower")
    assert "one session" in near.differences[0].why
    assert far.differences[0].ci95 is None
    assert "not measured in one session" in far.warnings[-1]
    assert "10 and 7 launches, measured apart" in compare(a, record(times(1.0)[:7]), interleaved=False).text()


@pytest.mark.parametrize(
    ("p99_us", "passed", "exit_code"), [(900.0, True, None), (1100.0, False, 4), (None, None, None)]
)
def test_p99_is_held_against_its_budget_and_never_compared(
    p99_us: float | None, passed: bool | None, exit_code: int | None
) -> None:
    found = compare(record(times(1.0)), record(times(1.0), es_p99_us=p99_us), max_p99_ms=1.0)

    assert found.budget is not None
    assert found.budget.passed is passed
    assert (found.failure.exit_code if found.failure else None) == exit_code


def test_a_disturbed_record_is_judged_and_said_to_be_doubtful() -> None:
    found = compare(record(times(1.0)), record(times(1.0), valid=False))

    assert "B is not trustworthy" in found.warnings[0]


def test_junit_fails_what_is_worse_and_skips_what_cannot_be_told() -> None:
    found = compare(record(times(1.0)), record(times(1.03, NOISE[::-1]), rss=None), labels=("a<b", "c&d"))

    suite = ElementTree.fromstring(found.junit())  # our own output
    outcomes = {case.get("name"): [child.tag for child in case] for case in suite}
    assert outcomes == {"p25": ["failure"], "peak RSS": ["skipped"], "load": [], "size": []}
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")


def test_the_answer_is_json_and_a_table() -> None:
    found = compare(record(times(1.0)), record(times(1.03, NOISE[::-1])))

    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (document["verdict"], document["exit_code"]) == ("slower", 4)
    assert [one["metric"] for one in document["differences"]] == ["p25", "peak RSS", "load", "size"]
    assert "B is slower than A" in found.text().splitlines()[-1]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(RecipeError, match="metric 'p99'"):
        compare(record(times(1.0)), record(times(1.0)), metrics=["p99"])


@settings(max_examples=30)
@given(st.lists(st.floats(0.9, 1.1), min_size=8, max_size=8), st.lists(st.floats(0.9, 1.1), min_size=8, max_size=8))
def test_what_is_faster_one_way_is_slower_the_other_way(a: list[float], b: list[float]) -> None:
    ours, theirs = record(times(1.0, a)), record(times(1.0, b))

    there, back = (compare(*pair, metrics=["p25"]).verdict for pair in ((ours, theirs), (theirs, ours)))

    mirrored = {"faster": "slower", "slower": "faster"}
    # Zeros count against the direction that is tested, and a shift of zero is tested in one direction only.
    assert back == mirrored.get(there, there)


@settings(max_examples=30)
@given(st.lists(st.floats(0.9, 1.1), min_size=7, max_size=10), st.floats(1e-3, 1e3))
def test_the_unit_of_the_latency_changes_no_verdict(noise: list[float], unit: float) -> None:
    a, b = times(1.0, noise), times(1.03, noise[::-1])

    verdicts = {
        compare(record([x * k for x in a]), record([x * k for x in b]), metrics=["p25"]).verdict for k in (1, unit)
    }

    assert len(verdicts) == 1


def test_the_gate_alone_is_the_rule_of_the_comparison() -> None:
    assert is_worse(np.log([1.03] * 10) + np.linspace(-1e-4, 1e-4, 10), 1.02)
    assert not is_worse(np.log([1.01] * 10) + np.linspace(-1e-4, 1e-4, 10), 1.02)
