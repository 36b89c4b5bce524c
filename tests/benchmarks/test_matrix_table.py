"""The tables of the published matrix: every cell stands in them, and the means are means."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import matrix_table
from benchmarks.hardware.rows import rows_of
from benchmarks.records import load_all

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "hardware.json"


def _lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_measured_cell_stands_in_the_table_once() -> None:
    rows, _ = rows_of(load_all([PUBLISHED]))

    head, _, *lines = _lines(matrix_table.cells(rows))

    found = [cell for line in lines for cell in line[2:] if cell != "-"]
    assert len(found) == len(rows) >= 80
    assert len({line[0] for line in lines}) >= 8
    assert all(len(line) == len(head) for line in lines)
    assert sum("*" in cell for cell in found) == sum(not row.valid for row in rows)


def test_a_gain_is_the_geometric_mean_of_the_ratios_to_fp32_on_the_same_runtime_and_threads() -> None:
    rows, _ = rows_of(load_all([PUBLISHED]))
    wanted = [row for row in rows if matrix_table.place_of(row) == ("openvino-cpu", "int8", 1)]
    base = {row.model: row.p50_ms for row in rows if matrix_table.place_of(row) == ("openvino-cpu", "fp32", 1)}

    line = next(line for line in _lines(matrix_table.ratios(rows)) if line[:3] == ["openvino-cpu", "1 thread", "int8"])

    mean = math.prod(base[row.model] / row.p50_ms for row in wanted) ** (1 / len(wanted))
    assert line[3] == str(len(wanted))
    assert float(line[4].split()[0]) == pytest.approx(mean, abs=0.006)


def test_a_file_that_is_no_matrix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")

    assert matrix_table.main([str(tmp_path / "other.json")]) > 0
    assert "other.json" in capsys.readouterr().err
