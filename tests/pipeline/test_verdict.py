"""What may decide that INT8 is faster than float: the verdict on the finished run's answers, over records that are changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.recording import NEVER_VALID
from pipeline.artifacts import CompiledArms, Measured, PreparedData, Scores, TrainedModel
from pipeline.gates import Gate
from pipeline.how import How
from pipeline.recipe import BudgetConfig, GateConfig, TargetConfig
from pipeline.scheme_choice import own_scheme
from pipeline.stages.verdict import _float_student, judge
from targets import make_target
from targets.base import read_json, write_json

NAME = "onnxruntime-cpu"
SCHEME = own_scheme(make_target(NAME, {}), here=True)  # this CPU may want weights of 7 bits
EMULATED = "aarch64 emulated on x86_64: function and accuracy hold, its times are those of no such machine"
FASTER, SLOWER = 0.5, 2.0
Change = Callable[[dict[str, Any]], None]
Judge = Callable[..., dict[str, Any]]


def emulated(record: dict[str, Any]) -> None:
    record["env"]["hard"]["emulated_on"] = "x86_64"
    record["validity"] = {"ok": False, "flags": [f"{NEVER_VALID}{EMULATED}", *record["validity"]["flags"]]}


def slowed(record: dict[str, Any]) -> None:
    record["validity"] = {"ok": False, "flags": [f"{NEVER_VALID}slowed by 30 us a call on purpose"]}


def disturbed(record: dict[str, Any]) -> None:
    record["validity"] = {"ok": False, "flags": ["launch 0: other work waited for a CPU in 9.0 % of the time"]}
    for launch in record["launches"]:
        launch["disturbances"] = ["other work waited for a CPU in 9.0 % of the time"]


def quiet(record: dict[str, Any]) -> None:
    record["validity"] = {"ok": True, "flags": []}
    for launch in record["launches"]:
        launch["disturbances"] = []


@pytest.fixture
def judged(built: Any, tmp_path: Path) -> Judge:
    """The verdict where INT8 takes `ratio` of float's time in a preset, every record quiet but for `changes`, by arm."""

    def of(
        ratio: float = FASTER,
        changes: Mapping[str, Change] | None = None,
        preset: str = "smoke",
        zero_calls: int = 0,
        **target: Any,
    ) -> dict[str, Any]:
        shutil.copytree(built.stage(f"measure-{NAME}"), tmp_path / "measured")
        records = read_json(tmp_path / "measured" / "records.json")
        for arm, record in records.items():
            p25_us = 100.0 * (ratio if arm == "student int8" else 1.0)
            record["summary"] |= {"p25_us": p25_us, "p50_us": 1.01 * p25_us}
            record["scenario"]["preset"] = preset
            for launch in record["launches"]:
                launch["lat_us"] |= dict.fromkeys(("min", "p25", "p50", "mean"), p25_us)
                launch["lat_us"] |= dict.fromkeys(("p90", "p99", "p999"))
                samples = tmp_path / "measured" / launch["samples_file"]
                np.save(samples, np.concatenate([np.zeros(zero_calls, dtype=np.int64), np.load(samples)]))
            quiet(record)
            (changes or {}).get(arm, quiet)(record)
        write_json(tmp_path / "measured" / "records.json", records)
        judge(
            TargetConfig(name=NAME, **target),
            GateConfig(max_drop=1.0),
            PreparedData(built.stage("data"), ""),
            (TrainedModel(built.stage("teacher"), "", "teacher"), TrainedModel(built.stage("distill"), "", "distill")),
            (Scores(built.stage(f"score-{SCHEME}"), ""), Scores(built.stage(f"score-onnx-{SCHEME}-onnxruntime"), "")),
            CompiledArms(built.stage(f"compile-{NAME}"), "", NAME),
            Measured(tmp_path / "measured", ""),
            tmp_path,
            How(),
        )
        verdict: dict[str, Any] = read_json(tmp_path / "verdict.json")
        return verdict

    return of


def arm_of(precision: str, role: str = "student", error: str | None = None) -> dict[str, Any]:
    return {"arm": f"{role} {precision}", "role": role, "precision": precision, "error": error}


@pytest.mark.parametrize(
    ("precisions", "expected"),
    [
        (["int8", "bf16", "fp32"], "student fp32"),
        (["int8", "fp32", "fp16"], "student fp32"),
        (["int8", "fp16", "bf16"], "student fp16"),
    ],
)
def test_accuracy_is_held_against_the_student_as_it_was_trained_however_slow(
    precisions: list[str], expected: str
) -> None:
    teacher = arm_of("fp32", "teacher")

    assert _float_student([teacher, *(arm_of(precision) for precision in precisions)]) == expected


def test_a_float_that_did_not_compile_is_no_reference() -> None:
    assert _float_student([arm_of("int8"), arm_of("fp32", error="no"), arm_of("fp16")]) == "student fp16"


def speed_of(verdict: Mapping[str, Any]) -> dict[str, Any]:
    (gate,) = [gate for gate in verdict["gates"] if gate["name"] == "faster than float"]
    return dict(gate)


@pytest.mark.parametrize(("ratio", "shipped"), [(FASTER, "int8"), (SLOWER, "fp32")])
def test_a_measured_speed_decides_what_ships(judged: Judge, ratio: float, shipped: str) -> None:
    verdict = judged(ratio)

    assert (verdict["shipped"], speed_of(verdict)["passed"]) == (shipped, ratio == FASTER)


@pytest.mark.parametrize("ratio", [FASTER, SLOWER])
@pytest.mark.parametrize("preset", ["smoke", "ci"])
def test_an_emulated_speed_decides_nothing_and_the_verdict_says_so(judged: Judge, ratio: float, preset: str) -> None:
    verdict = judged(ratio, {"student int8": emulated, "student fp32": emulated}, preset)

    gate = speed_of(verdict)
    assert (verdict["shipped"], verdict["exit"]) == ("int8", None)
    assert (gate["passed"], gate["value"]) == (None, None)
    assert gate["detail"].endswith(f"not judged: student int8: {EMULATED}")
    assert verdict["why"] == (
        f"INT8 passed every gate but that of speed, which was not judged (student int8: {EMULATED})"
    )


@pytest.mark.parametrize(
    ("arm", "change", "preset", "why"),
    [
        ("student int8", slowed, "smoke", "slowed by 30 us a call on purpose"),
        ("student int8", disturbed, "ci", "1 of 1 launches were disturbed"),
        ("student fp32", disturbed, "release", "1 of 1 launches were disturbed"),
    ],
)
def test_a_speed_that_is_not_valid_is_no_proof_on_either_side(
    judged: Judge, arm: str, change: Change, preset: str, why: str
) -> None:
    verdict = judged(SLOWER, {arm: change}, preset)

    assert verdict["shipped"] == "int8"
    assert f"which was not judged ({arm}: {why})" in verdict["why"]


def test_the_noise_of_a_short_look_is_let_pass(judged: Judge) -> None:
    verdict = judged(SLOWER, {"student int8": disturbed, "student fp32": disturbed}, "smoke")

    assert (verdict["shipped"], speed_of(verdict)["passed"]) == ("fp32", False)


def test_the_other_gates_hold_where_speed_is_not_judged(judged: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Gate(name="placement", passed=False, value=0.5, limit=0.9, detail="as if")
    monkeypatch.setattr("pipeline.stages.verdict.placement_gate", lambda *args: failed)

    verdict = judged(FASTER, {"student int8": emulated, "student fp32": emulated})

    assert (verdict["shipped"], verdict["float_reason"]) == ("fp32", "placement: 0.5 against 0.9 (as if)")
    assert speed_of(verdict)["passed"] is None


def test_a_recipe_that_forbids_float_ends_with_7_where_speed_was_not_judged(judged: Judge) -> None:
    verdict = judged(FASTER, {"student int8": emulated, "student fp32": emulated}, on_failure="error")

    assert verdict["exit"]["code"] == 7
    assert "whether INT8 is faster than float was not judged" in verdict["exit"]["message"]


@pytest.mark.parametrize("limit", ["p50_ms", "load_ms", "peak_rss_mib"])
def test_a_budget_is_not_judged_by_what_an_emulated_machine_took(judged: Judge, limit: str) -> None:
    budget = BudgetConfig(**{limit: 1e-6})

    verdict = judged(FASTER, {"student int8": emulated, "student fp32": emulated}, budget=budget)

    assert verdict["exit"]["code"] == 7
    assert f"{limit} of student int8 could not be read" in verdict["exit"]["message"]


def test_calls_of_no_time_are_in_no_curve(judged: Judge) -> None:
    verdict = judged(zero_calls=3)

    assert all(min(row["latency_ecdf_ms"]) > 0 for row in verdict["rows"])
