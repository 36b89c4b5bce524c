"""The ladder for an ONNX graph: which rung ships, and that the gate is held on the answers of the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.differences import Answers
from pipeline.gates import Gate
from pipeline.onnx_ladder import METHODS, Climb, Demands, Rung, climb, likeness_gate
from pipeline.progress import Quiet
from targets.errors import RecipeError

SCORES = {"y": [np.array([[0.0, 1.0, 0.5]]), np.array([[2.0, 1.0, 0.0]])]}
FLIPPED = {"y": [np.array([[0.0, 1.0, 0.5]]), np.array([[1.0, 2.0, 0.0]])]}


def test_one_output_of_scores_is_held_by_agreement() -> None:
    gate = likeness_gate(Demands(min_agreement=0.6), SCORES, FLIPPED)

    assert (gate.value, gate.limit, gate.passed) == (0.5, 0.6, False)
    assert likeness_gate(Demands(min_agreement=0.5), SCORES, FLIPPED).passed


def test_several_outputs_are_held_by_the_worst_cosine() -> None:
    expected = {**SCORES, "z": [np.array([1.0, 0.0]), np.array([1.0, 0.0])]}
    got = {**SCORES, "z": [np.array([1.0, 1.0]), np.array([1.0, 1.0])]}

    gate = likeness_gate(Demands(min_cosine=0.8), expected, got)

    assert gate.value == pytest.approx(np.sqrt(0.5))
    assert not gate.passed
    assert "'z'" in gate.detail


def test_a_metric_of_ones_own_takes_the_place_of_both() -> None:
    def metric(expected: Answers, got: Answers) -> float:
        return -float(np.abs(expected["y"][1] - got["y"][1]).max())

    assert likeness_gate(Demands(metric=metric, min_metric=-1.0), SCORES, FLIPPED).passed
    assert not likeness_gate(Demands(metric=metric, min_metric=-0.9), SCORES, FLIPPED).passed


def test_a_metric_that_gives_no_number_is_refused_by_name() -> None:
    for value in (float("nan"), float("inf"), None):
        with pytest.raises(RecipeError, match="--metric: your metric returned"):
            likeness_gate(Demands(metric=lambda *_, value=value: value), SCORES, FLIPPED)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qat"}, "--method qat"),
        ({"min_agreement": 1.2}, "--min-agreement 1.2"),
        ({"min_cosine": -1}, "0 to 1"),
    ],
)
def test_demands_that_nothing_can_meet_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Demands(**options)


def rung(name: str, failing: str | None) -> Rung:
    gates = tuple(Gate(name=gate, passed=gate != failing) for gate in ("lint", "placement", "likeness"))
    return Rung(rung=name, gates=gates, findings=(), differences=(), rewrites=())


@pytest.fixture
def climbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The rungs that are tried, when each fails the gate it is given (None: passes)."""

    def run(fails: dict[str, str | None], method: str = "ladder", left: tuple[str, ...] = ("conv",)) -> list[str]:
        monkeypatch.setattr("pipeline.onnx_ladder.node_by_node", lambda *_: SCORES)
        monkeypatch.setattr("pipeline.onnx_ladder._layers_to_leave", lambda _: left)
        monkeypatch.setattr("pipeline.onnx_ladder._try", lambda job, name, *_: rung(name, fails[name]))
        demands = Demands(method=method)
        job = Climb.__new__(Climb)
        for name, value in {
            "demands": demands,
            "progress": Quiet(),
            "floats": _Floats(),
            "calibration": _Samples(),
        }.items():
            object.__setattr__(job, name, value)
        rungs, directory = climb(job, tmp_path)
        assert directory == tmp_path / rungs[-1].rung
        return [one.rung for one in rungs]

    return run


class _Floats:
    model_path = Path("model.onnx")


class _Samples:
    held_out = samples = ()


def test_the_first_rung_that_passes_is_the_last_that_is_tried(climbed: Callable[..., list[str]]) -> None:
    miss = "likeness"

    assert climbed({"ptq": None}) == ["ptq"]
    assert climbed({"ptq": miss, "equalized": None}) == ["ptq", "equalized"]
    assert climbed({"ptq": miss, "equalized": miss, "mixed": None}) == ["ptq", "equalized", "mixed"]
    assert climbed({"ptq": miss, "equalized": miss, "mixed": miss}) == ["ptq", "equalized", "mixed"]


@pytest.mark.parametrize("gate", ["lint", "placement"])
def test_what_no_later_rung_can_mend_ends_the_ladder(gate: str, climbed: Callable[..., list[str]]) -> None:
    assert climbed({"ptq": gate}) == ["ptq"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_one_method_is_tried_alone(method: str, climbed: Callable[..., list[str]]) -> None:
    assert climbed({method: "likeness"}, method) == [method]
