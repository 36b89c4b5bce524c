"""A matrix as two Markdown tables: the median of every cell, and in one number what a precision gains on a runtime.

    python -m benchmarks.matrix_table docs/results/hardware.json [--runtimes]

Reads the first file that `edgestill matrix --export` writes. Milliseconds are medians over the launches' p50; a cell of which half of
the launches or more were disturbed has an asterisk. `--runtimes` prints geometric means of ratios in place of the cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.hardware.rows import HardwareRow, rows_of
from benchmarks.hardware.scores import geometric_mean
from benchmarks.records import load_all
from targets.errors import EdgestillError

Place = tuple[str, str, int | None]  # runtime, precision, threads
BASELINE = "fp32"
PRECISIONS = (BASELINE, "fp16", "bf16", "int8")
CELLS_NOTE = (
    "Milliseconds a sample; in brackets the share of multiply-accumulates that ran in INT8. `*`: half of the launches or more were "
    "disturbed, by other work on the machine or by the second thread's own waits."
)
RATIOS_NOTE = (
    "Geometric means over the models, of FP32's time over this precision's on the same runtime and threads, and in the last column of "
    "this runtime's time over the fastest cell of the same model and threads. In brackets the smallest and the largest ratio."
)


def main(argv: Sequence[str]) -> int:
    """Print a stored matrix; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--runtimes", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        rows, _ = rows_of(load_all([arguments.records]))
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = sorted(rows, key=_order)
    print(ratios(rows) if arguments.runtimes else cells(rows))
    return 0


def cells(rows: Sequence[HardwareRow]) -> str:
    """A row a model and precision, a column a runtime and number of threads."""
    found = {(row.model, place_of(row)): row for row in rows}
    columns = list(
        dict.fromkeys((row.identity.configuration.runtime, row.identity.configuration.threads) for row in rows)
    )
    heads = ["model", "precision", *(f"{runtime}, {_threads(threads)}" for runtime, threads in columns)]
    lines = []
    for model, precision in dict.fromkeys((row.model, row.precision) for row in rows):
        line = [found.get((model, (runtime, precision, threads))) for runtime, threads in columns]
        lines.append([model, precision, *map(_cell, line)])
    return "\n".join([_table(heads, lines), "", CELLS_NOTE])


def ratios(rows: Sequence[HardwareRow]) -> str:
    """A row a runtime, number of threads and precision: what it gains over FP32, and what it lacks to the fastest cell."""
    p50_ms = {(row.model, place_of(row)): row.p50_ms for row in rows}
    fastest: dict[tuple[str, int | None], float] = {}
    for (model, (_, _, threads)), value in p50_ms.items():
        fastest[model, threads] = min(value, fastest.get((model, threads), value))
    lines = []
    for place in dict.fromkeys(place_of(row) for row in rows):
        runtime, precision, threads = place
        own = {model: value for (model, where), value in p50_ms.items() if where == place}
        base = {model: p50_ms.get((model, (runtime, BASELINE, threads))) for model in own}
        gains = [float32 / own[model] for model, float32 in base.items() if float32 is not None]
        lags = [value / fastest[model, threads] for model, value in own.items()]
        lines.append([runtime, _threads(threads), precision, str(len(own)), _mean(gains), _mean(lags)])
    heads = ["runtime", "threads", "precision", "models", "times as fast as FP32", "time over the fastest cell"]
    return "\n".join([_table(heads, lines), "", RATIOS_NOTE])


def place_of(row: HardwareRow) -> Place:
    where = row.identity.configuration
    return where.runtime, where.precision, where.threads


def _order(row: HardwareRow) -> tuple[str, int, str, int]:
    where = row.identity.configuration
    known = where.precision in PRECISIONS
    return row.model, where.threads or 0, where.runtime, PRECISIONS.index(where.precision) if known else len(PRECISIONS)


def _cell(row: HardwareRow | None) -> str:
    if row is None:
        return "-"
    share = f" ({row.int8_share:.0%})" if row.precision == "int8" and row.int8_share is not None else ""
    return f"{row.p50_ms:.3g}{'' if row.valid else '*'}{share}"


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    mean = geometric_mean(known)
    return "-" if mean is None else f"{mean:.2f} ({min(known):.2f} to {max(known):.2f})"


def _threads(threads: int | None) -> str:
    return "its own threads" if threads is None else f"{threads} thread{'' if threads == 1 else 's'}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
