"""What the first run of a kit amounts to: pure functions over what was built, answered and measured.

Latencies are microseconds, shares and accuracies fractions. No statistics beyond medians: those need scipy, which a board
does not have; the launches stand in the result for whoever has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the verdict. `passed` None: could not be asked; `exit_code` 0: tells something, decides nothing."""

    check: str
    passed: bool | None
    detail: str
    exit_code: int


def accuracy_of(
    classes: Mapping[str, Any], labels_N: Any | None, expected: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Top-1 an arm where there are labels, agreement of INT8 with the first float that answered; beside what was expected."""
    answered = {precision: classes_N for precision, classes_N in classes.items() if classes_N is not None}
    if not answered:
        return None
    top1 = {
        precision: float((classes_N == labels_N).mean()) if labels_N is not None else None
        for precision, classes_N in answered.items()
    }
    reference = next((precision for precision in answered if precision != "int8"), None)
    agreement = None
    if "int8" in answered and reference is not None:
        agreement = float((answered["int8"] == answered[reference]).mean())
    observed = None
    if expected is not None:
        observed = top1.get("int8") if expected["metric"] == "top1" else agreement
    return {
        "n": len(next(iter(answered.values()))),
        "top1": top1,
        "agreement": agreement,
        "agreement_with": reference,
        "expected": expected,
        "observed": observed,
    }


def speed_of(reports: Sequence[Report]) -> dict[str, Any] | None:
    """INT8 against the fastest float, by the median p25 of the launches (their quietest statistic); ratio above 1: faster."""
    measured = {report["precision"]: report["latency"]["p25_us"] for report in reports if report["latency"]}
    floats = {precision: p25_us for precision, p25_us in measured.items() if precision != "int8"}
    if "int8" not in measured or not floats:
        return None
    fastest = min(floats, key=lambda precision: floats[precision])
    num_launches = min(len(report["launches"]) for report in reports if report["latency"])
    return {
        "fastest_float": fastest,
        "ratio": floats[fastest] / measured["int8"],
        "basis": f"ratio of median p25 over {num_launches} interleaved launches, no test",
    }


def checks_of(
    reports: Sequence[Report],
    accuracy: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None,
    *,
    min_int8_share: float,
    trusted: bool,
) -> list[Check]:
    """In the order in which they decide. `trusted`: the preset claims that its latencies can be trusted."""
    return [
        _compile(reports),
        _placement(reports[0], min_int8_share),
        _accuracy(reports, accuracy),
        _measurement(reports, trusted=trusted),
        _speed(speed),
    ]


def exit_code_of(checks: Sequence[Check]) -> int:
    """Of the first check that failed and counts; 0 for none."""
    return next((check.exit_code for check in checks if check.passed is False and check.exit_code), 0)


def _compile(reports: Sequence[Report]) -> Check:
    """INT8 and at least one float must build: without a float there is nothing to compare with."""
    built = [report["precision"] for report in reports if "compiled" in report]
    failed = "; ".join(
        f"{report['precision']}: {_said(report, 'compile')}" for report in reports if "compiled" not in report
    )
    passed = "int8" in built and len(built) > 1
    told = f"built {', '.join(built) or 'nothing'}" + (f"; not built {failed}" if failed else "")
    return Check(check="compile", passed=passed, detail=told, exit_code=5)


def _placement(int8: Report, min_int8_share: float) -> Check:
    if "placement" not in int8:
        detail = _said(int8, "placement") if "compiled" in int8 else "nothing was built"
        return Check(check="placement", passed=False if "compiled" in int8 else None, detail=detail, exit_code=5)
    share = int8["placement"]["int8_share"]
    detail = f"{share:.1%} of the multiply-accumulates run in INT8, {min_int8_share:.0%} are asked for"
    return Check(check="placement", passed=share >= min_int8_share, detail=detail, exit_code=5)


def _accuracy(reports: Sequence[Report], accuracy: Mapping[str, Any] | None) -> Check:
    """Too low fails; too high is told as well, for then the samples may not be those that were expected."""
    expected = accuracy["expected"] if accuracy else None
    if accuracy is None or expected is None or accuracy["observed"] is None:
        detail = _said(reports[0], "evaluate") or "nothing was expected, or there are no samples"
        return Check(check="accuracy", passed=None, detail=detail, exit_code=3)
    observed, tolerance = accuracy["observed"], expected["tolerance"]
    detail = (
        f"{expected['metric']} {observed:.4f}, expected {expected['value']:.4f} within {tolerance:g}, n={accuracy['n']}"
    )
    if accuracy["n"] != expected["n"]:
        return Check(check="accuracy", passed=False, detail=f"{detail}, but for n={expected['n']}", exit_code=3)
    if observed > expected["value"] + tolerance:
        detail += ": higher than expected, are these the same samples?"
    return Check(check="accuracy", passed=observed >= expected["value"] - tolerance, detail=detail, exit_code=3)


def _measurement(reports: Sequence[Report], *, trusted: bool) -> Check:
    """Every arm that was built was measured, and undisturbed where the preset claims so."""
    built = [report for report in reports if "compiled" in report]
    failed = [report for report in built if _said(report, "measure") or report["latency"] is None]
    disturbed = [
        report["precision"] for report in built if report["latency"] and not report["latency"]["validity"]["ok"]
    ]
    if not built:
        return Check(check="measurement", passed=None, detail="nothing was built", exit_code=7)
    if failed:
        detail = "; ".join(f"{report['precision']}: {_said(report, 'measure')}" for report in failed)
        return Check(check="measurement", passed=False, detail=detail, exit_code=7)
    if disturbed:
        claim = "" if trusted else " (preset smoke claims nothing: take --preset ci for figures)"
        detail = f"disturbed: {', '.join(disturbed)}{claim}"
        return Check(check="measurement", passed=not trusted, detail=detail, exit_code=7)
    return Check(check="measurement", passed=True, detail="every launch was undisturbed enough", exit_code=7)


def _speed(speed: Mapping[str, Any] | None) -> Check:
    if speed is None:
        return Check(check="speed", passed=None, detail="INT8 and a float were not both measured", exit_code=0)
    detail = f"INT8 is {speed['ratio']:.2f}x as fast as {speed['fastest_float']} ({speed['basis']})"
    return Check(check="speed", passed=speed["ratio"] > 1, detail=detail, exit_code=0)


def _said(report: Report, step: str) -> str:
    return "; ".join(error["message"] for error in report["errors"] if error["step"] == step)


def summary_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """For a person: the machine, a line an arm, a line a check."""
    hard = result["environment"]["hard"]
    toolchain = next((arm["compiled"]["toolchain"] for arm in result["arms"] if "compiled" in arm), result["target"])
    yield f"{result['name']} with {toolchain} on {hard.get('soc') or hard.get('cpu') or hard['arch']}"
    for arm in result["arms"]:
        yield f"  {arm['precision']:5} {', '.join(_facts(arm, result['accuracy'])) or 'not built'}"
    words = {True: "ok", False: "FAILED", None: "not asked"}
    for check in result["checks"]:
        word = "slower" if check["check"] == "speed" and check["passed"] is False else words[check["passed"]]
        yield f"  {check['check']}: {word}: {check['detail']}"


def _facts(arm: Report, accuracy: Mapping[str, Any] | None) -> Iterator[str]:
    if arm["latency"]:
        yield f"p50 {arm['latency']['p50_us'] / 1e3:.3f} ms"
    if "placement" in arm:
        yield f"INT8 share {arm['placement']['int8_share']:.1%}"
    top1 = accuracy["top1"].get(arm["precision"]) if accuracy else None
    if top1 is not None and np.isfinite(top1):
        yield f"top-1 {top1:.2%}"
    if "build_s" in arm:
        yield f"built in {arm['build_s']:.1f} s"
