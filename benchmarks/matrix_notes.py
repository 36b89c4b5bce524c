"""What a matrix says beside its records, as Markdown: where each model and its weights come from, and which cells are missing.

    python -m benchmarks.matrix_notes docs/results/hardware_models.json

Reads the second file that `edgestill matrix --export` writes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from targets.base import read_json
from targets.errors import EdgestillError

NUM_NAMED = 3


def main(argv: Sequence[str]) -> int:
    """Print a stored file; returns the exit code."""
    try:
        print(text(read_json(Path(argv[0]))))
    except (EdgestillError, IndexError, KeyError, TypeError) as error:
        print(f"{error}: give what `edgestill matrix --export` wrote.", file=sys.stderr)
        return error.exit_code if isinstance(error, EdgestillError) else 2
    return 0


def text(document: Mapping[str, Any]) -> str:
    """A row a model, then a line a reason for what is missing."""
    lines = ["| model | from | input | weights |", "| --- | --- | --- | --- |"]
    for model in document["models"]:
        cells = [model[key].replace("|", "/") for key in ("name", "source", "image", "weights")]
        lines.append(f"| {' | '.join(cells)} |")
    missing = missing_lines(document["missing"])
    return "\n".join([*lines, *(["", *(f"- {line}" for line in missing)] if missing else [])])


def missing_lines(missing: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a reason, with the cells that share it; a cell has model, target, precision and reason."""
    lines = []
    for reason, same in groupby(sorted(missing, key=lambda one: str(one["reason"])), key=lambda one: one["reason"]):
        cells = list(same)
        named = list(dict.fromkeys(f"{one['model']} {one['target']} {one['precision']}" for one in cells))
        more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
        count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
        lines.append(f"not measured ({count}): {', '.join(named[:NUM_NAMED])}{more}: {reason}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
