"""What `edgestill ablate` answers, and its tables in Markdown: `python -m pipeline.ablation.report FILE...`, with `--overview` one
table for all the files, a row a file.

Every figure is computed here from the raw ones of the document, seed by seed, so that no table can say what its file does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.ablation.figures import (
    comparisons,
    condition,
    doubts,
    failed_lines,
    gains,
    generalization,
    overview,
    provenance,
    tuning_line,
)
from pipeline.verb_reports import SCHEMA_VERSION, table
from targets.base import read_json
from targets.errors import EdgestillError, IntegrityError, RecipeError


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """How much of an arm is done. `same_as`: it shares that arm's trainings."""

    arm: str
    num_trainings: int
    num_finished: int
    same_as: str | None = None

    @property
    def cells(self) -> dict[str, str]:
        left = self.num_trainings - self.num_finished
        to_train = f"{left}" if self.same_as is None else f"none, the same as {self.same_as}"
        return {"arm": self.arm, "finished": str(self.num_finished), "to train": to_train}


@dataclass(frozen=True, kw_only=True)
class AblationReport:
    """The arms of a recipe against tuned plain KD; or, of a dry run, what would be trained."""

    run_dir: Path
    document: Mapping[str, Any] | None = None
    plan: tuple[PlannedArm, ...] = ()
    seconds: float = 0.0
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        head = {"schema_version": SCHEMA_VERSION, "verb": "ablate", "run": str(self.run_dir)}
        found: dict[str, Any] = {"plan": [asdict(one) for one in self.plan]}
        if self.document is not None:
            found = {**self.document, "comparisons": [one.to_json() for one in comparisons(self.document)]}
        return {
            **head,
            **found,
            "seconds": round(self.seconds, 2),
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        if self.document is None:
            return "\n".join(table([one.cells for one in self.plan]))
        document = self.document
        lines = [*table(gains(document)), "", *table(generalization(document)), "", *failed_lines(document)]
        lines += [condition(document), tuning_line(document), provenance(document), *doubts(document)]
        return "\n".join([*lines, f"written to {self.run_dir}, {self.seconds:.1f} s"])


def markdown(document: Mapping[str, Any]) -> str:
    """Two tables, and the lines that say what they hold for."""
    lines = [*_markdown_table(gains(document)), "", *_markdown_table(generalization(document)), ""]
    told = [
        condition(document),
        tuning_line(document),
        provenance(document),
        *doubts(document),
        *failed_lines(document),
    ]
    return "\n".join([*lines, " ".join(told)])


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> Iterable[str]:
    if not rows:
        return
    yield _line(rows[0])
    yield _line(["---"] * len(rows[0]))
    for row in rows:
        yield _line(row.values())


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(paths: Sequence[str]) -> None:
    """Print the tables of these documents, each under its recipe's name where they are several. Raises an EdgestillError."""
    in_one = paths[:1] == ["--overview"]
    paths = paths[1:] if in_one else paths
    if not paths:
        raise RecipeError(
            "No file is named. Give what edgestill ablate --export wrote: python -m pipeline.ablation.report FILE..."
        )
    documents = [_read(Path(path)) for path in paths]
    if in_one:
        print("\n".join(_markdown_table([overview(document) for document in documents])))
        return
    heads = [f"**{document['name']}**\n\n" if len(documents) > 1 else "" for document in documents]
    print("\n\n".join(head + markdown(document) for head, document in zip(heads, documents, strict=True)))


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_json(path)
    if document.get("verb") != "ablate" or "arms" not in document:
        raise IntegrityError(f"{path} holds no ablation. Write one: edgestill ablate RECIPE --export {path}.")
    return document


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgestillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
