"""What a comparison says: `to_json()` for machines, `junit()` for CI, `text()` for people. Values only, nothing is judged here."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.statistics import Interval
from benchmarks.terminal import aligned
from targets.errors import EdgestillError

SCHEMA_VERSION = 1
BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "same", "unknown"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of B against A. `ratio` is B over A; `p` is Holm's, one-sided, in the direction of the ratio."""

    metric: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    ci95: Interval | None
    p: float | None
    margin: float
    outcome: str
    verdict: str  # faster, slower, less, ..., no difference, cannot tell
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """p99 of B against what it may be: MLPerf's early-stopping estimate, above the true one with 99 % confidence."""

    limit_ms: float
    p99_ms: float | None
    passed: bool | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    interleaved: bool
    by_turns: bool  # the processes of a pair took turns
    num_pairs: int
    preset: str
    differences: tuple[Difference, ...]
    budget: Budget | None
    changed: Mapping[str, Any]  # hard keys that differ: [A's, B's]
    warnings: tuple[str, ...]
    failure: EdgestillError | None = None

    @property
    def verdict(self) -> str:
        """Of the first metric, which is the latency unless it was left out."""
        return self.differences[0].verdict

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "failure"}
        return {
            "schema_version": SCHEMA_VERSION,
            "verb": "compare",
            "verdict": self.verdict,
            **values,
            "differences": [asdict(one) for one in self.differences],
            "budget": asdict(self.budget) if self.budget else None,
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        paired = "pairs of processes that took turns" if self.by_turns else "interleaved pairs of launches"
        num_launches = f"{self.a['launches']} and {self.b['launches']} launches, measured apart"
        lines = [
            f"A  {self.a['label']}",
            f"B  {self.b['label']}",
            f"{f'{self.num_pairs} {paired}' if self.interleaved else num_launches}, preset {self.preset}",
            "",
            *aligned([_cells(one) for one in self.differences]),
            "",
        ]
        if self.budget:
            lines.append(budget_line(self.budget))
        lines += [f"note: {warning}" for warning in self.warnings]
        return "\n".join([*lines, sentence(self.differences[0])])

    def junit(self) -> str:
        """A test a metric, and one for the budget: failed when worse, skipped when it cannot be told."""
        cases = [(one.metric, one.outcome == WORSE, one.outcome == UNKNOWN, sentence(one)) for one in self.differences]
        if self.budget:
            told = budget_line(self.budget)
            cases.append(("p99 budget", self.budget.passed is False, self.budget.passed is None, told))
        suite = ElementTree.Element(
            "testsuite",
            name="edgestill compare",
            tests=str(len(cases)),
            failures=str(sum(failed for _, failed, _, _ in cases)),
            skipped=str(sum(skipped for _, _, skipped, _ in cases)),
        )
        for name, failed, skipped, told in cases:
            case = ElementTree.SubElement(suite, "testcase", classname="edgestill.compare", name=name)
            if failed or skipped:
                ElementTree.SubElement(case, "failure" if failed else "skipped", message=_plain(told))
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def sentence(one: Difference) -> str:
    """One metric in one sentence."""
    if one.ratio is None:
        return f"{one.metric}: cannot tell, {one.why}."
    change = f"{one.ratio - 1:+.1%}"
    if one.ci95:
        change += f" (95 % {one.ci95[0] - 1:+.1%} to {one.ci95[1] - 1:+.1%})"
    told = {
        UNKNOWN: f"cannot tell, {change}: {one.why}",
        SAME: f"no difference beyond {one.margin - 1:.0%}, {change}",
    }.get(one.outcome, f"B is {one.verdict} than A, {change}")
    return f"{one.metric}: {told}."


def budget_line(budget: Budget) -> str:
    """The p99 in one sentence."""
    if budget.p99_ms is None:
        return f"p99 of B: cannot tell, {budget.why}."
    relation = "within" if budget.passed else "beyond"
    return f"p99 of B: {budget.p99_ms:.3f} ms, {relation} the budget of {budget.limit_ms:g} ms."


def _cells(one: Difference) -> dict[str, str]:
    return {
        "": one.metric,
        "A": _value(one.a, one.unit),
        "B": _value(one.b, one.unit),
        "B against A": "-" if one.ratio is None else f"{one.ratio - 1:+.1%}",
        "95 % interval": f"{one.ci95[0] - 1:+.1%} to {one.ci95[1] - 1:+.1%}" if one.ci95 else "-",
        "p": "-" if one.p is None else f"{one.p:.2g}",
        "verdict": one.verdict,
    }


def _value(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g} {unit}"


def _plain(text: str) -> str:
    """Without what XML 1.0 may not hold."""
    return "".join(c for c in text if c.isprintable())
