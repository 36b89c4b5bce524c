"""Knowledge that is wrong, as the ledger counts it and the report shows it; and the axes of a curriculum in the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report_figures import training_figure
from benchmarks.report_tables import EPOCHS, make_table
from pipeline.ledger import Hop, ledger
from pipeline.mistakes import where_teacher_errs
from targets.base import read_json

CLASSES = st.lists(st.integers(0, 2), min_size=20, max_size=20)


@given(CLASSES, CLASSES, CLASSES)
def test_counts_are_those_made_sample_by_sample(teacher: list[int], student: list[int], labels: list[int]) -> None:
    found = where_teacher_errs(*(np.array(row) for row in (teacher, student, labels)))

    errors = [(t, s, y) for t, s, y in zip(teacher, student, labels, strict=True) if t != y]
    assert found == {
        "num_wrong": len(errors),
        "num_right": sum(s == y for _, s, y in errors),
        "num_same": sum(s == t for t, s, _ in errors),
    }


def test_every_hop_of_the_ledger_says_what_became_of_the_teachers_errors() -> None:
    labels = np.array([0, 1, 2, 0])
    teacher, student = (np.eye(3, dtype=np.float32)[rows] for rows in ([0, 2, 1, 1], [0, 2, 2, 2]))
    hops = [
        Hop(hop=name, model="net", precision="fp32", logits_NK=logits_NK)
        for name, logits_NK in (("teacher", teacher), ("student", student))
    ]
    sampled = Hop(hop="raw bytes", model="net", precision="fp32", logits_NK=student[[1, 2]], index_N=np.array([1, 2]))

    rows = ledger([*hops, sampled], labels)

    assert [row["where_teacher_errs"] for row in rows] == [
        {"num_wrong": 3, "num_right": 0, "num_same": 3},
        {"num_wrong": 3, "num_right": 1, "num_same": 1},
        {"num_wrong": 2, "num_right": 1, "num_same": 1},
    ]


def test_the_report_of_a_run_shows_them_at_every_hop(built: Any) -> None:
    (verdict,) = built.dir.glob("verdict-*/verdict.json")
    page = (built.dir / "report" / "report.md").read_text()

    rows = read_json(verdict)["ledger"]
    assert {row["where_teacher_errs"]["num_wrong"] for row in rows[:5]} == {rows[0]["where_teacher_errs"]["num_wrong"]}
    assert "Where the teacher errs: the same error" in page
    assert "Teacher wrong" in page


def epochs(**axes: list[Any]) -> list[dict[str, Any]]:
    return [
        {"epoch": number + 1, "loss": 1.0, **{key: axis[number] for key, axis in axes.items()}} for number in range(3)
    ]


def test_each_axis_that_moves_is_drawn_and_tabled_and_no_other() -> None:
    moving = epochs(
        shown_fraction=[0.3, 0.6, 1.0],
        temperature=[8.0, 4.0, 1.0],
        teacher_factor=[1.0, 0.5, 0.0],
        taught_by=["a", "b", "c"],
    )

    figure, table = training_figure({"epochs": moving}), make_table("Epochs", EPOCHS, moving)

    assert figure is not None
    assert table is not None
    drawn = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert drawn["pacing: samples shown"] == [30, 60, 100]
    assert drawn["temperature"] == [8, 4, 1]
    assert drawn["weight of what the teacher says"] == [100, 50, 0]
    assert [row["Taught by"] for row in table.records()] == ["a", "b", "c"]
    still = training_figure({"epochs": epochs()})
    assert still is not None
    assert [trace["name"] for trace in still["data"]] == ["loss"]


@pytest.mark.parametrize("key", ["temperature", "teacher_factor", "taught_by"])
def test_an_axis_that_stands_still_has_no_column(key: str) -> None:
    table = make_table("Epochs", EPOCHS, epochs(**{key: [None] * 3}))

    assert table is not None
    assert key not in [column.key for column in table.columns]
