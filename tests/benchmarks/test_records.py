"""Records as they come: when they were made, and which of them are arms of one session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench import Arm
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Environment
from benchmarks.evidence.history_writes import record_of as a_record
from benchmarks.recording import LATENCY, Setting, record_of
from benchmarks.records import Stored, moment_of, one_session
from targets.base import CompiledModel
from targets.errors import DataError

Make = Callable[..., Stored]


def arms(make_stored: Make, tmp_path: Path, first_utc: str, second_utc: str) -> tuple[Stored, Stored]:
    """Two of one file, whose launches stand in places of their own."""
    first = make_stored(tmp_path, utc=first_utc)
    second = make_stored(tmp_path, precision="int8", utc=second_utc)
    later = tuple(replace(one, order=100 + one.order) for one in second.record.launches)
    return first, replace(second, record=replace(second.record, launches=later))


@pytest.mark.parametrize(
    ("second_utc", "together"),
    [
        ("2026-11-20T10:00:00+00:00", True),
        ("2026-11-20T12:00:04+02:00", True),
        ("2026-11-20T10:00:00", True),  # without a zone: UTC
        ("2026-11-20T10:00:06+00:00", False),
        ("2026-11-20T10:00:00+02:00", False),
    ],
)
def test_arms_of_one_session_are_known_by_their_moment(
    make_stored: Make, tmp_path: Path, second_utc: str, together: bool
) -> None:
    first, second = arms(make_stored, tmp_path, "2026-11-20T10:00:00+00:00", second_utc)

    assert one_session(first, second) is together


def test_a_record_whose_time_is_none_is_refused_in_words(make_stored: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"utc='yesterday' is no date\. Mend the record"):
        one_session(*arms(make_stored, tmp_path, "2026-11-20T10:00:00+00:00", "yesterday"))


@given(st.datetimes(timezones=st.timezones()))
def test_a_moment_is_the_same_in_any_zone(moment: datetime) -> None:
    record = replace(a_record(0, 0), utc=moment.isoformat())

    try:
        assert abs((moment_of(record) - moment.astimezone(UTC)).total_seconds()) < 60  # a zone's seconds are cut off
    except (DataError, OverflowError):
        assert moment.year in (1, 9999)  # beyond the calendar in UTC


def test_a_record_carries_the_moment_of_its_session(compiled: CompiledModel, tmp_path: Path, make_stored: Make) -> None:
    launch: dict[str, Any] = make_stored(tmp_path, num_launches=1).record.to_json()["launches"][0]
    np.save(tmp_path / "samples.npy", np.arange(1, 101, dtype=np.int64))
    machine = Environment(hard={"cpu": "one"}, soft={}, hard_sha256="0", flags=())
    setting = Setting(config=PRESETS["smoke"], machine=machine, seed=0, out_dir=tmp_path)
    answers = {LATENCY: [{**launch, "samples_file": "samples.npy"}]}

    record = record_of(Arm("a", compiled.directory), answers, setting, utc="2026-11-20T10:00:00+00:00")

    assert record.utc == "2026-11-20T10:00:00+00:00"
