"""A bundle of version 0.1.0, as it was written: every later version verifies and measures it (docs/bundles.md says how it
was made). Where this fails the code is at fault, not the bundle: it is not to be written again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.record import validate
from benchmarks.device.verify import verify_bundle
from benchmarks.devices import Local
from targets.base import read_json

pytestmark = pytest.mark.integration

COMMITTED = Path(__file__).parents[1] / "fixtures" / "bundle-quickstart"


def test_it_verifies_on_any_machine_and_answers_as_it_did() -> None:
    verified = verify_bundle(COMMITTED)

    assert read_json(COMMITTED / "manifest.json")["built_for"] == {}
    assert verified["name"] == "student-resnet8"
    assert list(verified["max_abs_delta"]) == ["logits"]
    assert verified["signature"]["status"] == "absent"


def test_it_is_measured(tmp_path: Path) -> None:
    arm = Arm("committed", COMMITTED / "model")

    (record,) = measure_arms(Local(), [arm], preset="smoke", launches=1, throughput=False, out_dir=tmp_path)

    assert record.model.name == "student-resnet8"
    assert record.launches[0].n >= 64
    assert 0 < record.summary.p50_us < 1e6


def test_its_record_can_still_be_read() -> None:
    record = validate(read_json(COMMITTED / "record.json"))

    assert record.model.precision == read_json(COMMITTED / "manifest.json")["precision"]


def test_it_is_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= 300_000
