"""A record as a row of the hardware comparison: who it is, what it says, and why what is absent is absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hardware.identity import identity_of, varying
from benchmarks.hardware.rows import HardwareRow, accuracy_of, reasons_of, rows_of
from benchmarks.records import Stored
from targets.base import LayerPlacement, Placement
from targets.errors import MeasurementError

Make = Callable[..., Stored]
TOP1 = {"dataset": "digits", "n": 500, "metric": "top1", "value": 0.9, "teacher": 0.95}


def row_of(stored: Stored) -> HardwareRow:
    (row,) = rows_of([stored])[0]
    return row


def test_one_model_in_two_precisions_keeps_its_name(make_stored: Make, tmp_path: Path) -> None:
    records = [make_stored(tmp_path, model="student", precision=one) for one in ("int8", "fp32")]

    assert [one.record.model.name for one in records] == ["student-int8", "student"]
    assert {row.model for row in rows_of(records)[0]} == {"student"}


def test_no_absent_value_is_zero_and_each_says_why(make_stored: Make, tmp_path: Path) -> None:
    row = row_of(make_stored(tmp_path, num_launches=3))

    values = row.flat()
    absent = {name for name, value in values.items() if value is None}
    assert {"gross_mj", "net_mj", "gpu_mib", "accuracy", "delta", "int8_share", "p99_ms", "p50_ci95_ms"} <= absent
    assert set(row.absent) == absent
    assert all(row.absent.values())
    assert row.absent["gross_mj"] == "this machine shows no RAPL package counter"
    assert row.absent["p99_ms"] == "n too small: fewer than 662 queries"


def test_net_energy_without_an_idle_power_says_that(make_stored: Make, tmp_path: Path) -> None:
    row = row_of(make_stored(tmp_path, p50_ms=2.0, gross_mj=40.0))

    assert (row.gross_mj, row.net_mj, row.per_joule) == (40.0, None, 25.0)
    assert row.absent["net_mj"] == "idle power was not measured"


def test_the_newest_record_of_an_identity_stands_and_the_older_is_kept(make_stored: Make, tmp_path: Path) -> None:
    old = make_stored(tmp_path, p50_ms=3.0, utc="2026-11-01T10:00:00+00:00")
    new = make_stored(tmp_path, p50_ms=2.0, utc="2026-11-02T10:00:00+00:00")

    rows, older = rows_of([new, old])

    assert [row.p50_ms for row in rows] == [2.0]
    assert older == [old]


def test_a_valid_record_stands_before_a_newer_one_that_is_not(make_stored: Make, tmp_path: Path) -> None:
    valid = make_stored(tmp_path, p50_ms=3.0, utc="2026-11-01T10:00:00+00:00")
    disturbed = make_stored(tmp_path, p50_ms=2.0, utc="2026-11-02T10:00:00+00:00", valid=False)

    rows, older = rows_of([valid, disturbed])

    assert [row.p50_ms for row in rows] == [3.0]
    assert older == [disturbed]


def test_a_longer_measurement_stands_before_a_newer_short_look(make_stored: Make, tmp_path: Path) -> None:
    looks = {"release": (60.0, 1, True), "ci": (10.0, 2, True), "smoke": (1.0, 3, True), "disturbed": (60.0, 4, False)}
    made = []
    for preset, (min_s, day, valid) in looks.items():
        one = make_stored(tmp_path, utc=f"2026-11-0{day}T10:00:00+00:00", valid=valid)
        made.append(
            replace(one, record=replace(one.record, scenario=replace(one.record.scenario, preset=preset, min_s=min_s)))
        )

    rows, older = rows_of(made)

    assert [row.stored for row in rows] == made[:1]
    assert older == made[1:]


def test_two_artifacts_of_one_name_that_were_compared_are_two_rows(make_stored: Make, tmp_path: Path) -> None:
    made = make_stored(tmp_path, model="model")
    digests = {"A": "a" * 64, "B": "b" * 64}
    v1, v2 = (
        replace(made, arm=arm, record=replace(made.record, model=replace(made.record.model, sha256=digest), run_id=arm))
        for arm, digest in digests.items()
    )
    later = replace(v2, file=tmp_path / "later" / "records.json", record=replace(v2.record, run_id="later"))

    assert [row.model for row in rows_of([v1, v2])[0]] == ["model (A)", "model (B)"]
    assert [row.model for row in rows_of([v1, later])[0]] == ["model"]  # a new build of it, measured another day


@pytest.mark.parametrize(
    "other",
    [
        {"model": "resnet50"},
        {"precision": "int8"},
        {"runtime": "onnxruntime-cpu"},
        {"threads": 2},
        {"cpu": "CPU Two"},
        {"hard": {"power_mode": "MAXN"}},
        {"hard": {"governor": "performance"}},
        {"hard": {"gpu": "GPU One"}},
        {"hard": {"cpus_allowed": [0]}},
        {"hard": {"turns": True}},
    ],
    ids=str,
)
def test_what_differs_in_one_of_these_is_another_row(make_stored: Make, tmp_path: Path, other: dict[str, Any]) -> None:
    rows, older = rows_of([make_stored(tmp_path), make_stored(tmp_path, **other)])

    names = varying(row.identity for row in rows)
    assert len(rows) == 2
    assert older == []
    assert len({row.identity.label(names) for row in rows}) == 2


def test_names_hold_only_what_tells_rows_apart(make_stored: Make, tmp_path: Path) -> None:
    records = [make_stored(tmp_path, threads=threads) for threads in (1, 2)]

    names = varying(identity_of(one.record) for one in records)

    assert [identity_of(one.record).label(names) for one in records] == [
        "resnet18 fp32 on openvino-cpu, 1 thread",
        "resnet18 fp32 on openvino-cpu, 2 threads",
    ]


def test_two_versions_of_one_runtime_are_told_apart_and_two_runtimes_need_no_version(
    make_stored: Make, tmp_path: Path
) -> None:
    one, other = make_stored(tmp_path), make_stored(tmp_path, runtime="onnxruntime-cpu")
    newer = replace(one.record, runtime=replace(one.record.runtime, version="openvino 2.0"))

    assert varying(identity_of(record) for record in (one.record, other.record)) == {"runtime"}
    assert varying(identity_of(record) for record in (one.record, newer)) == {"version"}


def test_an_interval_that_does_not_hold_the_accuracy_is_that_of_the_difference() -> None:
    of_value = accuracy_of({**TOP1, "ci95": [0.87, 0.92]})
    of_delta = accuracy_of({**TOP1, "ci95": [-0.07, -0.03]})

    assert of_value is not None
    assert of_delta is not None
    assert (of_value.ci95, of_value.delta_ci95) == ((0.87, 0.92), None)
    assert (of_delta.ci95, of_delta.delta_ci95) == (None, (-0.07, -0.03))
    assert of_delta.delta == pytest.approx(-0.05)


@pytest.mark.parametrize("value", [None, float("nan"), "0.9", True])
def test_an_accuracy_without_a_number_is_none(value: Any) -> None:
    assert accuracy_of({**TOP1, "value": value}) is None


def test_a_reason_against_an_accuracy_is_told(make_stored: Make, tmp_path: Path) -> None:
    row = row_of(make_stored(tmp_path, accuracy={"value": None, "why": "random weights"}))

    assert row.accuracy is None
    assert row.absent["accuracy"] == row.absent["delta"] == "random weights"


def test_a_gate_that_int8_missed_is_a_note_and_why_there_is_no_accuracy_is_its_reason(
    make_stored: Make, tmp_path: Path
) -> None:
    stored = make_stored(tmp_path, precision="int8")
    flags = ("int8: would not ship, 80.0 % of the MACs", "accuracy: random weights")
    record = replace(stored.record, validity=replace(stored.record.validity, flags=flags))

    row = row_of(replace(stored, record=record))

    assert row.notes == ("int8: would not ship, 80.0 % of the MACs",)
    assert row.absent["accuracy"] == "random weights"


def test_memory_without_the_arena_stands_beside_the_peak_where_it_was_taken(make_stored: Make, tmp_path: Path) -> None:
    stored = make_stored(tmp_path)
    memory = stored.record.memory
    both = replace(
        stored.record,
        memory=replace(memory, arena=True, vmhwm_mib=100.0),
        other_arena=replace(memory, arena=False, vmhwm_mib=80.0),
    )

    row = row_of(replace(stored, record=both))

    assert (row.peak_rss_mib, row.arena_off_rss_mib) == (100.0, 80.0)
    assert row_of(stored).arena_off_rss_mib is None


def test_alike_disturbances_are_told_once_with_their_launches(make_stored: Make, tmp_path: Path) -> None:
    record = make_stored(tmp_path, valid=False, num_launches=3).record
    second = replace(
        record.launches[1], disturbances=("other work waited for a CPU in 7.0 % of the time", "throttled 2 times")
    )

    told = reasons_of(replace(record, launches=(record.launches[0], second, record.launches[2])))

    assert told == [
        "other work waited for a CPU in 22.9 % of the time (3 of 3 launches)",
        "throttled 2 times (1 of 3 launches)",
    ]


def test_shares_and_ops_come_from_the_placement_where_it_is_there(make_stored: Make, tmp_path: Path) -> None:
    layers = tuple(
        LayerPlacement(name=name, op="Conv", precision=precision, macs=macs)
        for name, precision, macs in (("a", "int8", 300), ("b", "fp32", 100))
    )
    stored = replace(make_stored(tmp_path, precision="int8"), placement=Placement(layers=layers, source="the graph"))

    row = row_of(stored)

    assert row.shares == {"int8": 0.75, "fp32": 0.25}
    assert row.int8_share == 0.75
    assert row.fallback_ops == ("b",)


def test_a_call_that_takes_no_time_is_refused(make_stored: Make, tmp_path: Path) -> None:
    stored = make_stored(tmp_path)
    broken = replace(stored.record, summary=replace(stored.record.summary, p50_us=0.0))

    with pytest.raises(MeasurementError, match="no call takes no time"):
        rows_of([replace(stored, record=broken)])
