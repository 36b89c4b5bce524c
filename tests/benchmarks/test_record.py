import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import record
from benchmarks.device.record import latency_of, validate, validity_of
from targets.errors import MeasurementError

MEMORY = {"vmhwm_mib": 90.5, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None}
ENERGY = {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None}
TELEMETRY = {"temp_c": None, "clk_mhz": None, "throttle_delta": 0, "psi_cpu": 1.5}
LAUNCH = {
    "i": 0,
    "arm": "int8",
    "order": 3,
    "n": 100,
    "load_ms": 80.0,
    "first_ms": 2.0,
    "lat_us": {"min": 5.0, "p25": 6.0, "p50": 7, "p90": 9.0, "p99": None, "p999": None, "mean": 7.1, "sd": 0.4},
    "samples_file": "samples/int8-runtime-0.npy",
    "warmup_s": 0.5,
    "wall_s": 1.0,
    "cpu_s": 0.99,
    "nivcsw": 2,
    "majflt": 0,
    "overhead_us": 0.06,
    "memory": MEMORY,
    "energy": ENERGY,
    "telemetry": TELEMETRY,
    "disturbances": [],
    "flags": ["p99: n too small (100 of 662 queries)"],
}
SUMMARY = {
    "p25_us": 6.0,
    "p50_us": 7.0,
    "ci95": [6.5, 7.5],
    "fps": 140.0,
    "es_p90_us": 9.5,
    "es_p99_us": None,
    "load_ms": 80.0,
    "first_ms": 2.0,
}
SCENARIO = {"kind": "single_stream", "preset": "smoke", "batch": 1, "boundary": "runtime"}
RECORD = {
    "schema_version": 1,
    "run_id": "0" * 32,
    "utc": "2026-01-01T00:00:00+00:00",
    "git": {"sha": None, "dirty": None},
    "model": {"name": "student", "sha256": "a" * 64, "bytes": 1000, "precision": "int8", "inputs": [{"name": "image"}]},
    "runtime": {"name": "onnxruntime-cpu", "version": "onnxruntime 1", "provider": "cpu", "flags": {"num_threads": 1}},
    "scenario": {**SCENARIO, "warmup_s": 0.5, "min_s": 1.0, "min_q": 64, "seed": 0},
    "launches": [LAUNCH],
    "summary": SUMMARY,
    "host_e2e": None,
    "throughput": {"fps": 1000.0, "batch": 32, "n": 640},
    "memory": MEMORY,
    "energy": ENERGY,
    "accuracy": None,
    "env": {"hard": {"cpu": "x"}, "soft": {}, "hard_sha256": "b" * 64, "flags": []},
    "telemetry": TELEMETRY,
    "validity": {"ok": True, "flags": []},
}


def _copy() -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(RECORD))
    return copy


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of the record that a schema names (the insides of free dictionaries are free)."""
    if path and path[-1] in ("git", "flags", "hard", "soft", "rails", "inputs", "ci95"):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [found for key, item in items for found in _paths(item, (*path, key))]


def _set(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    node: Any = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def test_a_record_survives_the_way_through_json() -> None:
    read = validate(_copy())

    assert validate(json.loads(json.dumps(read.to_json()))) == read
    assert read.launches[0].lat_us.p50 == 7.0
    assert read.summary.ci95 == (6.5, 7.5)


@pytest.mark.parametrize("path", _paths(RECORD), ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_a_wrong_kind_anywhere_is_refused_by_its_name(path: tuple[Any, ...]) -> None:
    broken = _copy()
    _set(broken, path, object())

    with pytest.raises(MeasurementError, match=r"schema_version|record\." + r"\.".join(map(str, path))):
        validate(broken)


@given(st.sampled_from([path for path in _paths(RECORD) if isinstance(path[-1], str)]), st.data())
def test_an_unknown_or_absent_key_is_refused(path: tuple[Any, ...], data: st.DataObject) -> None:
    broken = _copy()
    node: Any = broken
    for key in path[:-1]:
        node = node[key]
    if data.draw(st.booleans()):
        node[f"{path[-1]}_x"] = node[path[-1]]
    elif path[-1] in ("name", "n", "p50", "preset", "summary", "ok", "hard", "fps"):
        del node[path[-1]]
    else:
        node[path[-1]] = float("nan")

    with pytest.raises(MeasurementError):
        validate(broken)


@pytest.mark.parametrize(("key", "value"), [("n", 0), ("wall_s", 0.0)])
def test_a_launch_that_contradicts_itself_is_refused(key: str, value: float) -> None:
    broken = _copy()
    broken["launches"][0][key] = value

    with pytest.raises(MeasurementError, match="contradicts itself"):
        validate(broken)


def test_percentiles_out_of_order_are_refused() -> None:
    broken = _copy()
    broken["launches"][0]["lat_us"]["p90"] = 6.5

    with pytest.raises(MeasurementError, match="contradicts itself"):
        validate(broken)


def test_a_record_without_launches_is_refused() -> None:
    with pytest.raises(MeasurementError, match="launches is empty"):
        validate({**_copy(), "launches": []})


def test_another_schema_is_refused_with_both_versions() -> None:
    with pytest.raises(MeasurementError, match="schema_version=2, this edgestill reads 1"):
        validate(_copy() | {"schema_version": 2})


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=800))
def test_latency_summary_is_numpys_in_microseconds(samples_ns: list[int]) -> None:
    summary = latency_of(samples_ns)

    assert summary.p50 == pytest.approx(np.median(samples_ns) / 1e3)
    assert summary.min <= summary.p25 <= summary.p50
    assert (summary.p90 is None, summary.p99 is None) == (len(samples_ns) < 64, len(samples_ns) < 662)
    assert summary.p999 is None


def test_a_record_of_before_these_fields_still_reads() -> None:
    old = validate(_copy())

    assert (old.device, old.other_arena, old.scenario.injected_us) == (None, None, None)
    assert (old.launches[0].overhead, old.launches[0].device, old.launches[0].repeated) == (None, None, ())
    assert (old.telemetry.clk_locked_mhz, old.launches[0].waited_s) == (None, None)


@pytest.mark.parametrize(
    ("disturbed", "launches", "ok"), [(0, 1, True), (1, 1, False), (1, 2, False), (1, 3, True), (5, 10, False)]
)
def test_a_record_is_trusted_while_fewer_than_half_of_its_launches_were_disturbed(
    disturbed: int, launches: int, ok: bool
) -> None:
    made = [
        record.from_json(
            record.Launch, {**LAUNCH, "i": i, "disturbances": ["noise"] if i < disturbed else []}, "launch"
        )
        for i in range(launches)
    ]

    validity = validity_of(made, ["clk_mhz: unreadable", "clk_mhz: unreadable"])

    assert validity.ok == ok
    assert sum(flag.endswith("noise") for flag in validity.flags) == disturbed
    assert validity.flags.count("clk_mhz: unreadable") == 1
