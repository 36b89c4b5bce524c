"""`python -m targets.lint` prints all rules as the tables of docs/lint.md."""

from __future__ import annotations

from targets.lint import RULES
from targets.lint.rule import Rule


def tables() -> str:
    """Markdown: one table a runtime, one row a rule."""
    return "\n\n".join(f"## {dialect}\n\n{_table(rules)}" for dialect, rules in RULES.items())


def _table(rules: tuple[Rule, ...]) -> str:
    head = ["| code | severity | what is wrong | what to do | known |", "|---|---|---|---|---|"]
    rows = [f"| {rule.code} | {rule.severity} | {rule.title} | {rule.advice} | {rule.evidence} |" for rule in rules]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(tables())
