"""What a terminal, a log and a mail show alike: aligned tables and plots, in plain ASCII."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 60, 11


@dataclass(frozen=True)
class Point:
    """One value and the character that stands for it."""

    value: float
    mark: str = "o"


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows of one set of columns as lines, the column names first; nothing for no rows."""
    if not rows:
        return []
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def plot(
    points: Sequence[Point], lines: Mapping[str, float], *, lines_from: int = 0, height: int = HEIGHT
) -> list[str]:
    """One column a point, the last WIDTH of them. `lines`: horizontal lines by the character that draws them, from the
    point `lines_from` on.

    The highest and the lowest value stand beside their rows.
    """
    shown = points[-WIDTH:]
    if not shown:
        return []
    values = [*(point.value for point in shown), *lines.values()]
    low, high = min(values), max(values)
    grid = [[" "] * len(shown) for _ in range(height)]
    start = max(0, lines_from - (len(points) - len(shown)))
    for character, value in lines.items():
        grid[_row_of(value, low, high, height)][start:] = [character] * (len(shown) - start)
    for column, point in enumerate(shown):
        grid[_row_of(point.value, low, high, height)][column] = point.mark
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    width = max(map(len, labels.values()))
    return [f"{labels.get(row, ''):>{width}} |{''.join(cells)}".rstrip() for row, cells in enumerate(grid)]


def _row_of(value: float, low: float, high: float, height: int) -> int:
    """0 is the highest row; where all values are one, the middle."""
    return height // 2 if high == low else round((high - value) / (high - low) * (height - 1))
