"""The evidence about the harness: what its tables say of given figures. Nothing is measured here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence.benchmark_app_agreement import agreement
from benchmarks.evidence.benchmark_app_agreement import text as agreement_text
from benchmarks.evidence.graphs import convolutions, exported_of, relu
from benchmarks.evidence.overhead import PLAIN, arm_name, claims
from benchmarks.evidence.overhead import text as overhead_text
from targets import make_target
from targets.errors import ModelError


def _launch(p25_us: float, gap_us: float | None = 4.0) -> dict[str, Any]:
    overhead = {"null_us": 0.07, "null_wall_us": 0.2, "closure_us": 0.3, "spin_100_us": 100.0, "spin_1000_us": 1000.0}
    own = None if gap_us is None else {"clock": "its own", "p50_us": 1.0, "gap_us": gap_us}
    why = "device: no clock" if gap_us is None else None
    return {"p25_us": p25_us, "overhead": overhead, "own_clock": own, "why_not": why, "disturbances": []}


def _document(recovered_us: float = 100.5, gap_us: float | None = 4.0) -> dict[str, Any]:
    """Three rounds, the second twice as slow as the others in all of its launches."""
    plain_us = [5.0, 10.0, 5.0]
    arms = {
        PLAIN: [_launch(us, gap_us) for us in plain_us],
        arm_name(100.0): [_launch(us + recovered_us) for us in plain_us],
        arm_name(1000.0): [_launch(us + 1000.5) for us in plain_us],
    }
    machine = {"cpu": "a cpu", "python": "3.11"}
    return {
        "preset": "smoke",
        "machine": machine,
        "utc": "2026-01-01T00:00:00+00:00",
        "runtimes": {"one-cpu": {"toolchain": "one 1.0", "arms": arms}},
    }


def test_every_promise_is_judged_by_its_limit() -> None:
    held = claims(_document())

    assert [one.holds for one in held] == [True] * 8
    assert [one.measured for one in held[-2:]] == ["100.5 µs (+0.50%)", "1000.5 µs (+0.05%)"]
    assert [one.holds for one in claims(_document(recovered_us=101.1))][-2:] == [False, True]
    assert claims(_document(gap_us=10.0))[5].holds is False


@pytest.mark.parametrize(("key", "limit"), [("null_us", 1.0), ("null_wall_us", 2.0), ("closure_us", 2.0)])
def test_a_harness_that_adds_too_much_is_told(key: str, limit: float) -> None:
    document = _document()
    for arm in document["runtimes"]["one-cpu"]["arms"].values():
        for launch in arm:
            launch["overhead"][key] = limit

    assert [one.holds for one in claims(document)].count(False) == 1
    assert "**no**" in overhead_text(document)


def test_a_runtime_without_a_clock_is_not_known_and_not_passed() -> None:
    (gap,) = [one for one in claims(_document(gap_us=None)) if "own clock" in one.what]

    assert (gap.holds, gap.measured) == (None, "null (device: no clock)")


def test_the_table_tells_how_many_launches_were_disturbed() -> None:
    document = _document()
    document["runtimes"]["one-cpu"]["arms"][PLAIN][0]["disturbances"] = ["noise"]

    assert "9 launches in 3 interleaved rounds, preset smoke, of which 1 were disturbed" in overhead_text(document)


def test_agreement_is_by_pairs_and_one_of_two_limits_is_enough() -> None:
    app = np.array([1000.0, 2000.0, 1000.0, 4000.0, 1000.0, 1000.0, 1500.0, 1000.0])

    close, quick, off = agreement(app * 1.02, app), agreement(app / 100 + 5.0, app / 100), agreement(app * 1.04, app)

    assert (close.ratio, close.holds) == (pytest.approx(1.02), True)
    assert (quick.difference_us, quick.holds) == (pytest.approx(5.0), True)
    assert (off.ratio, off.holds) == (pytest.approx(1.04), False)


def test_too_few_pairs_show_nothing() -> None:
    found = agreement([1.0] * 5, [1.0] * 5)

    assert (found.ratio_ci95, found.holds) == (None, False)


def test_both_boundaries_stand_in_the_table_and_a_clock_that_is_not_there_is_null() -> None:
    pair = {"runtime_us": 1010.0, "device_us": 1000.0, "app_us": 1000.0, "disturbances": []}
    document: dict[str, Any] = {
        "preset": "smoke",
        "app_seconds": 3,
        "num_threads": 1,
        "machine": {"cpu": "a cpu"},
        "toolchain": "openvino 1",
        "utc": "2026-01-01",
        "models": [{"model": "net", "precision": "bf16", "pairs": [pair] * 10}],
    }
    bare = copy.deepcopy(document)
    for one in bare["models"][0]["pairs"]:
        one["device_us"] = None

    assert agreement_text(document).count("| yes |") == 2
    assert "| net in bf16 | OpenVINO's clock, read by us | 1000 | null | - | - | not known |" in agreement_text(bare)


@pytest.mark.parametrize("make", [relu, convolutions])
def test_the_graphs_run_on_every_cpu_target(make: Any, tmp_path: Path) -> None:
    exported = exported_of(make(tmp_path / "model.onnx"), tmp_path / "exported")

    for name in ("onnxruntime-cpu", "openvino-cpu"):
        target = make_target(name, {})
        session = target.load(target.compile(exported, tmp_path / name, "fp32"))
        (spec,) = session.inputs
        (answer,) = session.run({spec.name: np.ones(spec.fixed(1), spec.dtype)}).values()
        assert np.isfinite(answer).all()
        assert answer.any()


def test_a_free_axis_beside_the_batch_is_refused(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(relu(tmp_path / "model.onnx")))
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    onnx.save(model, str(tmp_path / "model.onnx"))

    with pytest.raises(ModelError, match="free axis beside the batch"):
        exported_of(tmp_path / "model.onnx", tmp_path / "exported")
