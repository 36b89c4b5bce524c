"""What the measurement of unlabelled.py says: accuracies with their intervals, and what each row has over KD on the labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.statistics import mean_interval

ALONE, LABELLED = "labels, no teacher", "KD, labelled images alone"
TITLES = {
    "digits": "From MNIST to scikit-learn's digits",
    "cifar10": "CIFAR-10 with a tenth of its labels",
}
HEAD = "| what learns | with a label | without | images shown | test top-1, % (95 % CI) | against KD on the labelled, points (95 % CI) |"


def by_unit(students: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Test top-1 of what is independent of each other: the draws of labels, each the mean of its students; of one draw the students."""
    key = "draw" if len({one["draw"] for one in students}) > 1 else "seed"
    units = sorted({one[key] for one in students})
    return {unit: float(np.mean([one["test_top1"] for one in students if one[key] == unit])) for unit in units}


def text(document: Mapping[str, Any]) -> str:
    """A table a part, in Markdown."""
    return "\n\n".join(_part(name, part) for name, part in document["parts"].items()) + _end(document)


def _part(name: str, part: Mapping[str, Any]) -> str:
    rows = {row["row"]: row for row in part["rows"]}
    baseline = by_unit(rows[LABELLED]["students"])
    lines = [f"**{TITLES[name]}**", "", HEAD, "| --- " * 6 + "|", *_teacher_lines(part)]
    lines += [_line(row, baseline) for row in part["rows"]]
    return "\n".join([*lines, "", _told(part)])


def _teacher_lines(part: Mapping[str, Any]) -> list[str]:
    """A line a teacher: the mean over the draws."""
    top1s: dict[str, dict[int, float]] = {}
    for row in part["rows"]:
        top1s.setdefault(row["teacher"], {}).update({one["draw"]: one["teacher_test_top1"] for one in row["students"]})
    return [
        f"| {teacher} |  |  |  | {100 * np.mean(list(found.values())):.2f} |  |" for teacher, found in top1s.items()
    ]


def _line(row: Mapping[str, Any], baseline: Mapping[int, float]) -> str:
    found = by_unit(row["students"])
    differences = [value - baseline[unit] for unit, value in found.items() if unit in baseline]
    (shown,) = {one["images_shown"] for one in row["students"]}
    against = "-" if row["row"] == LABELLED else _points(differences, signed=True)
    cells = [row["row"], f"{row['num_labelled']:,}", f"{row['num_unlabelled']:,}", f"{shown:,}"]
    return f"| {' | '.join([*cells, _points(list(found.values())), against])} |"


def _points(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and interval, in points."""
    sign = "+" if signed else ""
    told = f"{100 * float(np.mean(values)):{sign}.2f}"
    if (interval := mean_interval(values)) is None:
        return told
    low, high = (f"{100 * bound:{sign}.2f}" for bound in interval)
    return f"{told} ({low} to {high})"


def _told(part: Mapping[str, Any]) -> str:
    students = part["rows"][0]["students"]
    draws = sorted({one["draw"] for one in students})
    a_draw = len(students) // len(draws)
    units = (
        f"{len(draws)} draws of the labelled images, {a_draw} students each"
        if len(draws) > 1
        else f"{a_draw} students of one draw"
    )
    nets = " from ".join(
        f"{part[net]['model']} ({part[net]['parameters'] / 1e3:,.0f} K)" for net in ("student", "teacher")
    )
    return f"{nets}; {units}, the same in every row; batches of {part['batch_size']}, the last epoch, {part['num_test']:,} test images."


def _end(document: Mapping[str, Any]) -> str:
    part = next(iter(document["parts"].values()))
    return f"\n\n{document['utc'][:10]}, {part['machine']['cpu']}, {part['machine']['cores']} cores, torch {part['versions']['torch']}."
