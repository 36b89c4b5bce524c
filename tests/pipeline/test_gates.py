"""What ships and what does not."""

from __future__ import annotations

import pytest

from pipeline.gates import (
    accuracy_gate,
    budget_error,
    budget_gates,
    first_failure,
    gate_error,
    lint_gate,
    placement_gate,
    speed_gate,
)
from pipeline.recipe import BudgetConfig

ROW = {"p50_ms": 2.0, "p99_ms": None, "peak_rss_mib": 90.0, "size_mib": 0.3, "load_ms": 50.0, "top1": 0.93}


def test_int8_that_is_not_faster_than_float_fails() -> None:
    assert not speed_gate(1.0, "fp32", "").passed
    assert speed_gate(0.99, "fp32", "").passed


def test_the_accuracy_gate_allows_exactly_the_drop() -> None:
    assert accuracy_gate(0.75, 1.0, 0.25).passed
    assert not accuracy_gate(0.749, 1.0, 0.25).passed


def test_a_silent_fallback_fails_placement() -> None:
    gate = placement_gate(0.61, 0.95)

    assert not gate.passed
    assert gate_error("openvino-cpu", gate).exit_code == 5


def test_only_lint_errors_fail_the_lint_gate() -> None:
    warning = {"code": "L01", "severity": "warning", "node": "conv", "message": "m", "advice": "a"}

    assert lint_gate([warning]).passed
    assert not lint_gate([warning, {**warning, "severity": "error"}]).passed


def test_the_first_failed_gate_is_named() -> None:
    gates = [lint_gate([]), accuracy_gate(0.5, 0.9, 0.01), speed_gate(2.0, "fp32", "")]

    failed = first_failure(gates)

    assert failed is not None
    assert failed.name == "accuracy"
    assert gate_error("t", failed).exit_code == 3


@pytest.mark.parametrize(
    ("budget", "exit_code"),
    [
        ({"p50_ms": 1.0}, 4),
        ({"p99_ms": 5.0}, 7),
        ({"p50_ms": 1.0, "p99_ms": 5.0}, 7),
        ({"top1_min": 0.95}, 4),
        ({"size_mib": 0.2}, 4),
        ({"load_ms": 49.0}, 4),
        ({"peak_rss_mib": 89.0}, 4),
    ],
)
def test_a_broken_budget_ends_with_its_exit_code(budget: dict[str, float], exit_code: int) -> None:
    error = budget_error("t", "int8", budget_gates(BudgetConfig(**budget), ROW))

    assert error is not None
    assert error.exit_code == exit_code


def test_a_kept_budget_is_no_error() -> None:
    kept = BudgetConfig(p50_ms=2.0, peak_rss_mib=90.0, size_mib=0.3, load_ms=50.0, top1_min=0.93)

    assert budget_error("t", "int8", budget_gates(kept, ROW)) is None
