"""Stored records, put side by side: the rows, their scores against the baseline, and what they say in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.hardware.headline import headline_of
from benchmarks.hardware.identity import Configuration, varying
from benchmarks.hardware.rows import HardwareRow, rows_of
from benchmarks.hardware.scores import Score, choose_baseline, scores_of
from benchmarks.records import Stored
from targets.errors import DataError

TITLE = "Hardware comparison"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """`older` are records that a valid, a longer or a newer one of the same identity stands for; `varying` are the fields in
    which rows differ, and so what stands in their names."""

    title: str
    headline: str
    rows: tuple[HardwareRow, ...]
    older: tuple[Stored, ...]
    baseline: Configuration
    scores: tuple[Score, ...]
    varying: frozenset[str]

    @property
    def num_invalid(self) -> int:
        return sum(not row.valid for row in self.rows)


def findings_of(stored: Sequence[Stored], *, baseline: str | None = None, title: str | None = None) -> Findings:
    """Raises DataError without a record, RecipeError for a baseline that none or several are called."""
    if not stored:
        raise DataError("no records to compare were given. Measure first: edgestill bench MODEL --out DIR.")
    rows, older = rows_of(stored)
    names = varying(row.identity for row in rows)
    chosen = choose_baseline(rows, baseline)
    scores = scores_of(rows, chosen)
    return Findings(
        title=title or TITLE,
        headline=headline_of(rows, scores, chosen, names),
        rows=tuple(rows),
        older=tuple(older),
        baseline=chosen,
        scores=tuple(scores),
        varying=names,
    )
