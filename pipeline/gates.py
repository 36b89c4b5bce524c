"""What may ship: the gates in their order, on the artifact that ships, on the device that runs it.

lint, compile, placement, accuracy, faster than the fastest float, budgets. A gate that fails ships float (or stops the
run, as the recipe's `on_failure` says); a budget is about whatever ships, so breaking it always ends with its exit code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.recipe import BudgetConfig
from targets.errors import BudgetError, EdgestillError, GateError, MeasurementError, TargetError

ERROR_OF_GATE: Mapping[str, type[EdgestillError]] = {
    "lint": TargetError,
    "compile": TargetError,
    "placement": TargetError,
    "accuracy": GateError,
    "likeness": GateError,
    "faster than float": GateError,
}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check. `value` and `limit` are in the unit that `detail` names; value is None where nothing could be read."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lint_gate(findings: Sequence[Mapping[str, Any]]) -> Gate:
    errors = [finding for finding in findings if finding["severity"] == "error"]
    first = {finding["code"]: finding for finding in reversed(errors)}
    told = [f"{code} at {first[code]['node']}: {first[code]['message'].rstrip('.')}" for code in sorted(first)[:3]]
    detail = "; ".join(told) or "no error"
    return Gate(name="lint", passed=not errors, value=float(len(errors)), limit=0.0, detail=detail)


def placement_gate(int8_share: float, min_int8_share: float) -> Gate:
    return Gate(
        name="placement",
        passed=int8_share >= min_int8_share,
        value=int8_share,
        limit=min_int8_share,
        detail="share of multiply-accumulates that the runtime executes in INT8",
    )


def accuracy_gate(value: float, value_float: float, max_drop: float, metric: str = "top-1") -> Gate:
    """value, value_float: the metric of the artifact and of the float student on the test split, larger is better."""
    return Gate(
        name="accuracy",
        passed=value >= value_float - max_drop,
        value=value,
        limit=value_float - max_drop,
        detail=f"test {metric}; the float student has {value_float:.4f}, {max_drop:.4f} may be lost",
    )


def speed_gate(ratio: float, baseline: str, detail: str) -> Gate:
    """ratio: latency of INT8 over that of the fastest float, p25 of launches."""
    return Gate(
        name="faster than float",
        passed=ratio < 1.0,
        value=ratio,
        limit=1.0,
        detail=f"latency over that of {baseline}; {detail}",
    )


def budget_gates(budget: BudgetConfig, row: Mapping[str, Any]) -> list[Gate]:
    """One gate a limit of the budget; `row` is the shipped artifact's line of the report."""
    gates = []
    limits = {
        "p50_ms": row["p50_ms"],
        "p99_ms": row["p99_ms"],
        "peak_rss_mib": row["peak_rss_mib"],
        "size_mib": row["size_mib"],
        "load_ms": row["load_ms"],
    }
    for name, value in limits.items():
        if (limit := getattr(budget, name)) is not None:
            gates.append(_budget(name, value, limit, value is not None and value <= limit))
    if budget.top1_min is not None:
        gates.append(
            _budget(
                "top1_min", row["top1"], budget.top1_min, row["top1"] is not None and row["top1"] >= budget.top1_min
            )
        )
    return gates


def _budget(name: str, value: float | None, limit: float, passed: bool) -> Gate:
    detail = "could not be read" if value is None else ""
    return Gate(name=f"budget {name}", passed=passed, value=value, limit=limit, detail=detail)


def first_failure(gates: Sequence[Gate]) -> Gate | None:
    return next((gate for gate in gates if not gate.passed), None)


def why_not(gate: Gate) -> str:
    """The failed gate in one sentence."""
    if gate.value is None:
        return f"{gate.name}: {gate.detail}"
    return f"{gate.name}: {gate.value:.4g} against {gate.limit:.4g} ({gate.detail})"


def gate_error(target: str, gate: Gate) -> EdgestillError:
    """The error that `on_failure: error` ends with."""
    return ERROR_OF_GATE[gate.name](
        f"{target}: INT8 does not pass the gate {why_not(gate)}. "
        "Mend the model or the recipe, or allow float: on_failure: float."
    )


def budget_error(target: str, shipped: str, gates: Sequence[Gate]) -> EdgestillError | None:
    """The error for a broken budget: unreadable (exit 7) before exceeded (exit 4); None where all is kept."""
    failed = [gate for gate in gates if gate.name.startswith("budget ") and not gate.passed]
    if unread := [gate.name.removeprefix("budget ") for gate in failed if gate.value is None]:
        return MeasurementError(
            f"{target}: {', '.join(unread)} of {shipped} could not be read, so the budget cannot be judged. "
            "Measure longer (bench.preset: ci), or drop that limit."
        )
    if failed:
        broken = ", ".join(
            f"{gate.name.removeprefix('budget ')} {gate.value:.4g} (limit {gate.limit:.4g})" for gate in failed
        )
        return BudgetError(
            f"{target}: {shipped} breaks its budget: {broken}. Raise the limit or make the student smaller."
        )
    return None
