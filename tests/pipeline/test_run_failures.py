"""Runs that end badly: budgets, gates and full disks end with their code, after the report, and lose nothing."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.artifacts import Artifact
from pipeline.gates import Gate
from pipeline.progress import Quiet
from pipeline.run import run_recipe
from pipeline.workspace import Workspace
from targets.base import read_json
from targets.errors import DeviceError, GateError, TrainingError

pytestmark = pytest.mark.integration

TARGET = "onnxruntime-cpu"


def ended_with(finished: Any, edgestill: Callable[..., Any], code: int, *sets: str) -> dict[str, Any]:
    """Run again with overrides that end with `code`; the report stands, the bundle is taken down; returns the result."""
    args = [part for one in sets for part in ("--set", one)]

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json", *args)

    result: dict[str, Any] = json.loads(ended.out)  # one document, though the command failed
    assert (ended.code, result["exit_code"]) == (code, code)
    assert ended.err.splitlines()[-1].startswith(f"edgestill: {TARGET}: ")
    assert len(str(result["error"]).splitlines()) <= 3
    assert "report" in result["built"]
    assert result["bundles"] == {}
    assert list((finished.dir / "bundles").iterdir()) == []  # nobody picks up what an earlier run shipped
    return result


@pytest.mark.parametrize(
    "limit", ["size_mib=0.000001", "p50_ms=0.000001", "peak_rss_mib=1", "load_ms=0.0001", "top1_min=1.0"]
)
def test_a_broken_budget_ends_with_4_after_the_report(finished: Any, edgestill: Callable[..., Any], limit: str) -> None:
    result = ended_with(finished, edgestill, 4, f"targets.0.budget.{limit}")

    assert f"breaks its budget: {limit.partition('=')[0]}" in result["error"]


def test_a_budget_that_cannot_be_read_ends_with_7(
    finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.verdict._ms", lambda value_us: None)  # as after too few queries for a p99

    result = ended_with(finished, edgestill, 7, "targets.0.budget.p99_ms=1000")

    assert "p99_ms" in result["error"]
    assert "could not be read" in result["error"]


@pytest.mark.parametrize(("gate", "code"), [("accuracy", 3), ("placement", 5)])
def test_a_failed_gate_ends_the_run_where_the_recipe_forbids_float(
    finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, gate: str, code: int
) -> None:
    failed = Gate(name=gate, passed=False, value=0.5, limit=0.9, detail="as if")
    monkeypatch.setattr(f"pipeline.stages.verdict.{gate}_gate", lambda *args: failed)

    result = ended_with(finished, edgestill, code, "targets.0.on_failure=error")

    assert f"INT8 does not pass the gate {gate}: 0.5 against 0.9" in result["error"]


def test_a_failed_gate_ships_float_with_its_reason_where_the_recipe_allows_it(
    finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Gate(name="accuracy", passed=False, value=0.5, limit=0.9, detail="as if")
    monkeypatch.setattr("pipeline.stages.verdict.accuracy_gate", lambda *args: failed)

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--set", "gate.max_drop=0.2")

    assert ended.code == 0
    assert "fp32 ships: accuracy: 0.5 against 0.9" in ended.out
    manifest = read_json(finished.dir / "bundles" / TARGET / "manifest.json")
    assert (manifest["precision"], manifest["float_reason"]) == ("fp32", "accuracy: 0.5 against 0.9 (as if)")


def test_python_callers_get_the_failure_as_a_value(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Gate(name="accuracy", passed=False, value=0.5, limit=0.9, detail="as if")
    monkeypatch.setattr("pipeline.stages.verdict.accuracy_gate", lambda *args: failed)

    result = run_recipe(finished.recipe, overrides=["targets.0.on_failure=error"], runs_dir=finished.runs)

    assert isinstance(result.failure, GateError)
    assert result.report_path is not None
    assert result.report_path.is_file()


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full refuses every write with ENOSPC, whoever writes: here torch, which says something else."""
    teacher = finished.stage("teacher")
    shutil.rmtree(teacher)
    (teacher / ".checkpoint").mkdir(parents=True)
    (teacher / ".checkpoint" / "training.pt.partial").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        ended = edgestill("run", finished.recipe, "--runs", finished.runs)

    assert ended.code == 1
    assert ended.err.splitlines()[-1] == (
        f"edgestill: {teacher}: no space is left on the disk. Free some and run again: finished stages are kept."
    )
    assert not (teacher / "stage.json").exists()
    (teacher / ".checkpoint" / "training.pt.partial").unlink()
    again = edgestill("run", finished.recipe, "--runs", finished.runs, "--until", "teacher", "--json")
    assert json.loads(again.out)["built"] == ["teacher"]


@pytest.mark.parametrize(
    ("error", "free", "named"),
    [
        (RuntimeError("unexpected pos 576 vs 534"), 0, True),  # torch
        (OSError("300000 requested and 76768 written"), 0, True),  # numpy: no number
        (ValueError("I/O error: No space left on device (os error 28)"), 2**40, True),  # safetensors cleans up first
        (DeviceError("local: RuntimeError: basic_ios::clear: iostream error"), 0, True),
        (DeviceError("orin: no space is left there (No space left on device: /there/x)."), 2**40, False),  # its disk
        (RuntimeError("something else"), 2**40, False),
        (TrainingError("the loss is nan"), 0, False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_full_disk_is_told_from_other_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int, named: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))

    def fail(out_dir: Path) -> None:
        raise error

    with pytest.raises(OSError if named else type(error)) as caught:
        Workspace(tmp_path, "r", Quiet()).build(Artifact, "teacher", {}, [], fail, module="pipeline.gates")

    assert (getattr(caught.value, "errno", None) == errno.ENOSPC) is named
    assert named or caught.value is error
