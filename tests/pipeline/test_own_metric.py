"""A metric of the person's own: every hop is scored with it, and the gate holds it in place of top-1."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from targets.base import read_json

METRIC = """
def macro_recall():
    import numpy as np

    def score(logits, labels):
        right = logits.argmax(1) == labels
        return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))

    return score


"""


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)


@pytest.mark.usefixtures("own_metrics")
def test_every_hop_is_scored_with_the_persons_own_metric(finished: Any, edgestill: Callable[..., Any]) -> None:
    metric = "gate.metric=python:own_metrics:macro_recall"

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--allow-code", "--set", metric, "--json")

    assert ended.code == 0, ended.err
    newest = max(finished.dir.glob("verdict-*/verdict.json"), key=lambda path: path.stat().st_mtime)
    verdict = read_json(newest)
    assert all(0 <= row["metric"] <= 1 for row in verdict["ledger"])
    assert "own_metrics:macro_recall" in next(gate for gate in verdict["gates"] if gate["name"] == "accuracy")["detail"]


@pytest.mark.usefixtures("own_metrics")
def test_a_metric_of_ones_own_does_not_run_unasked(finished: Any, edgestill: Callable[..., Any]) -> None:
    metric = "gate.metric=python:own_metrics:macro_recall"

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--set", metric)

    assert ended.code == 2
    assert "--allow-code" in ended.err
