"""The ladder on the finished run's student: which rungs are tried, which one ships, and what stands beside QAT."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.deployed import quantized_model
from pipeline.learning.trained import open_data
from pipeline.recipe import DataConfig, QuantizeConfig
from pipeline.scheme_choice import own_scheme
from pipeline.schemes import SCHEMES, SEVEN_BITS
from pipeline.stages import quantize as stage
from pipeline.stages.data import prepare_data
from pipeline.stages.quantize import quantize
from targets import make_target
from targets.base import read_json
from targets.errors import ModelError, RecipeError

pytestmark = pytest.mark.integration

ONE_EPOCH: dict[str, Any] = {"epochs": 1, "precision": "fp32", "batch_size": 256}

SCHEME = own_scheme(make_target("onnxruntime-cpu", {}), here=True)  # this CPU may want weights of 7 bits


@pytest.fixture
def data(built: Any) -> PreparedData:
    return PreparedData(built.stage("data"), "")


@pytest.fixture
def student(built: Any) -> TrainedModel:
    return TrainedModel(built.stage("distill"), "", "distill")


def quantized(
    data: PreparedData, student: TrainedModel, out_dir: Path, how: How | None = None, **config: Any
) -> dict[str, Any]:
    config = {"train": ONE_EPOCH, **config}
    quantize(QuantizeConfig(**config), SCHEME, data, student, out_dir, how or How())
    facts: dict[str, Any] = read_json(out_dir / "quantize.json")
    return facts


class Scores:
    """In place of `validation_top1`: given scores first, then what `later` says of a model."""

    def __init__(self, first: Sequence[float], later: Callable[[nn.Module], float] | None = None) -> None:
        self.first = list(first)
        self.later = later

    def __call__(self, model: nn.Module, data: object) -> float:
        if self.first:
            return self.first.pop(0)
        assert self.later is not None, "one score more than expected"
        return self.later(model)


def quantized_layers(model: nn.Module) -> set[str]:
    """The layers with a weight quantizer, by their names in NNCF's graph."""
    found = (re.fullmatch(r"__nncf_hooks\.pre_hooks\.(.+)__1\.0", name) for name, _ in model.named_modules())
    return {match[1] for match in found if match}


def rungs_of(facts: dict[str, Any]) -> list[tuple[str, bool | None]]:
    return [(rung["rung"], rung["passed"]) for rung in facts["rungs"]]


def test_the_ladder_stops_at_ptq_where_that_passes(
    data: PreparedData, student: TrainedModel, tmp_path: Path, listening: Any
) -> None:
    facts = quantized(data, student, tmp_path, How(progress=listening), method="ladder", max_drop=1.0)

    assert rungs_of(facts) == [("ptq", True)]
    assert (facts["shipped_rung"], facts["passed"], facts["training"], facts["controls"]) == ("ptq", True, None, [])
    assert facts["rungs"][0]["seconds"] > 0
    *before, line = listening.lines
    assert before == ([f"quantize: scheme {SCHEME}: {SCHEMES[SCHEME].why}"] if SCHEME == SEVEN_BITS else [])
    assert line.startswith("quantize: ptq in ")
    assert line.endswith(": passes")


def test_the_ladder_climbs_to_equalization_before_anything_is_trained(
    data: PreparedData, student: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "validation_top1", Scores([0.90, 0.80, 0.895]))

    facts = quantized(data, student, tmp_path, max_drop=0.01)

    assert rungs_of(facts) == [("ptq", False), ("equalized", True)]
    assert (facts["shipped_rung"], facts["training"], facts["controls"]) == ("equalized", None, [])
    assert facts["rungs"][1]["equalized_pairs"] == 3  # the two convolutions within each residual block
    assert facts["rungs"][1]["corrected_biases"] == 10
    monkeypatch.undo()
    reloaded = quantized_model(TrainedModel(tmp_path, "", "quantize"), student, open_data(data), allow_code=False)
    assert stage.validation_top1(reloaded, open_data(data)) > 0.5


def test_a_student_that_cannot_be_traced_still_has_its_biases_corrected(
    data: PreparedData, student: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "equalize", _refuse)

    facts = quantized(data, student, tmp_path, method="equalized")

    assert facts["shipped_rung"] == "equalized"
    assert facts["rungs"][1]["not_equalized"] == "no trace"
    assert facts["rungs"][1]["corrected_biases"] == 10


def _refuse(model: nn.Module) -> None:
    raise ModelError("no trace")


@pytest.mark.parametrize(("scores", "start"), [([0.80, 0.70], "ptq"), ([0.70, 0.80], "equalized")])
def test_qat_starts_from_the_better_rung_and_stands_beside_its_controls(
    data: PreparedData,
    student: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    start: str,
) -> None:
    monkeypatch.setattr(stage, "validation_top1", Scores([0.90, *scores, 0.895, 0.91, 0.86]))

    facts = quantized(data, student, tmp_path, max_drop=0.01)

    assert rungs_of(facts) == [("ptq", False), ("equalized", False), ("qat", True)]
    assert (facts["shipped_rung"], facts["rungs"][2]["start"]) == ("qat", start)
    assert [(control["name"], control["top1_validation"]) for control in facts["controls"]] == [
        ("PTQ only", scores[0]),
        ("FP32 fine-tune of the same length", 0.91),
        ("QAT without distillation", 0.86),
    ]
    assert facts["training"] == facts["rungs"][2]["training"]


def test_without_weight_on_soft_labels_qat_is_its_own_control(
    data: PreparedData, student: TrainedModel, tmp_path: Path
) -> None:
    facts = quantized(data, student, tmp_path, method="qat", kd_weight=0.0)

    assert [control["name"] for control in facts["controls"]] == ["PTQ only", "FP32 fine-tune of the same length"]


def test_mixed_precision_leaves_as_few_layers_in_float_as_pass(
    data: PreparedData, student: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: Any
) -> None:
    num_layers = 10

    def score(model: nn.Module) -> float:
        return 0.90 if len(quantized_layers(model)) <= num_layers - 2 else 0.80

    monkeypatch.setattr(stage, "validation_top1", Scores([0.90, 0.80, 0.81, 0.82], score))
    facts = quantized(data, student, tmp_path, How(progress=listening), max_drop=0.01, controls=False)

    mixed = facts["rungs"][-1]
    assert rungs_of(facts) == [("ptq", False), ("equalized", False), ("qat", False), ("mixed", True)]
    assert (facts["shipped_rung"], mixed["start"], len(mixed["layers_in_float"])) == ("mixed", "qat", 2)
    macs = {layer["name"]: layer["macs"] for layer in mixed["sensitivities"]}
    assert len(macs) == num_layers
    assert mixed["macs_in_float"] == sum(macs[name] for name in mixed["layers_in_float"])
    assert mixed["share_of_macs_in_float"] == pytest.approx(mixed["macs_in_float"] / facts["macs"])
    assert "2 layers with" in listening.lines[-1]
    reloaded = quantized_model(TrainedModel(tmp_path, "", "quantize"), student, open_data(data), allow_code=False)
    assert quantized_layers(reloaded) == set(macs) - set(mixed["layers_in_float"])


def test_a_ladder_without_a_rung_that_passes_ships_the_best_and_leaves_the_word_to_the_device(
    data: PreparedData, student: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: Any
) -> None:
    monkeypatch.setattr(stage, "validation_top1", Scores([0.90, 0.80, 0.86, 0.85], lambda model: 0.5))

    facts = quantized(data, student, tmp_path, How(progress=listening), method="ladder", max_drop=0.01, controls=False)

    assert rungs_of(facts)[-1] == ("mixed", False)
    assert facts["rungs"][-1]["note"] == "missed even with every layer but one in float"
    assert (facts["shipped_rung"], facts["passed"], facts["controls"]) == ("equalized", False, [])
    assert listening.lines[-1] == (
        "quantize: equalized has 86.00% on validation, the float student 90.00%: more than the 1.00 points that may be "
        "lost. The gate on the device decides."
    )


@pytest.mark.parametrize(
    ("method", "rungs"),
    [("ptq", ["ptq"]), ("equalized", ["ptq", "equalized"]), ("mixed", ["ptq", "equalized", "mixed"])],
)
def test_a_method_that_does_not_train_never_trains_even_where_it_fails(
    data: PreparedData,
    student: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    rungs: list[str],
) -> None:
    monkeypatch.setattr(stage, "validation_top1", Scores([0.90], lambda model: 0.10))

    facts = quantized(data, student, tmp_path, method=method, max_drop=0.0)

    assert ([rung["rung"] for rung in facts["rungs"]], facts["passed"], facts["training"]) == (rungs, False, None)


def test_mixed_precision_leaves_nothing_in_float_where_int8_passes(
    data: PreparedData, student: TrainedModel, tmp_path: Path
) -> None:
    facts = quantized(data, student, tmp_path, method="mixed", max_drop=1.0)

    assert (facts["shipped_rung"], facts["rungs"][-1]["layers_in_float"]) == ("mixed", [])
    assert facts["rungs"][-1]["top1_validation"] == max(rung["top1_validation"] for rung in facts["rungs"])


def test_the_same_recipe_gives_the_same_quantized_weights(
    built: Any, data: PreparedData, student: TrainedModel, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantized(data, student, tmp_path / name, method="qat", controls=False)

    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert (
        weights[0]
        != (
            built.stage(f"quantize-{own_scheme(make_target('onnxruntime-cpu', {}), here=True)}") / "model.safetensors"
        ).read_bytes()
    )


@pytest.fixture
def unvalidated(tmp_path: Path) -> PreparedData:
    prepare_data(DataConfig(source="digits", validation=0, calibration=32), 0, tmp_path / "data")
    return PreparedData(tmp_path / "data", "")


@pytest.mark.parametrize("method", ["qat", "ptq", "equalized"])
def test_without_a_validation_split_no_rung_is_judged(
    unvalidated: PreparedData, student: TrainedModel, tmp_path: Path, method: str
) -> None:
    (tmp_path / "q").mkdir()

    facts = quantized(unvalidated, student, tmp_path / "q", method=method, controls=False)

    expected = [method] if method == "ptq" else ["ptq", method]
    assert [rung["rung"] for rung in facts["rungs"]] == expected
    assert (facts["shipped_rung"], facts["passed"], facts["top1_validation"]) == (method, None, None)


def test_mixed_precision_without_a_validation_split_is_refused(
    unvalidated: PreparedData, student: TrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.method=mixed.*nothing to choose layers by"):
        quantized(unvalidated, student, tmp_path, method="mixed")


def test_the_float_student_is_no_worse_for_being_quantized(data: PreparedData, student: TrainedModel) -> None:
    before = student.weights_path.read_bytes()
    model = stage.load_trained(student, open_data(data), allow_code=False)
    weights = [parameter.clone() for parameter in model.parameters()]
    job = stage._Job(QuantizeConfig(), SCHEME, open_data(data), model, None, Path(), How())

    stage._equalized(job)

    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert student.weights_path.read_bytes() == before
