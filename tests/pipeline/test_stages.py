"""The learning stages on the finished run's data and models: rounds, the teacher's score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.trained import load_trained, open_data
from pipeline.recipe import DistillConfig, TeacherConfig
from pipeline.stages import distill as distill_stage
from pipeline.stages.distill import distill
from pipeline.stages.teacher import evaluate_teacher, train_teacher
from targets.base import read_json
from targets.errors import TrainingError

NET: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
ONE_EPOCH: dict[str, Any] = {"epochs": 1, "precision": "fp32", "batch_size": 256}


@pytest.fixture
def data(built: Any) -> PreparedData:
    return PreparedData(built.stage("data"), "")


@pytest.fixture
def teacher(built: Any) -> TrainedModel:
    return TrainedModel(built.stage("teacher"), "", "teacher")


@pytest.fixture
def student(built: Any) -> TrainedModel:
    return TrainedModel(built.stage("distill"), "", "distill")


# --- teacher -----------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Names one class, whatever it sees."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[torch.full((len(x_NCHW),), 3)]


def test_a_teacher_that_always_names_one_class_is_refused(data: PreparedData) -> None:
    with pytest.raises(TrainingError, match="always naming one class scores"):
        evaluate_teacher(Answers(), open_data(data), "validation")


def test_a_perfect_teacher_is_taken_also_where_validation_has_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    labels_N = torch.tensor([0, 1] * 4)
    answers = (torch.eye(2)[labels_N], labels_N)
    monkeypatch.setattr("pipeline.stages.teacher.soft_labels", lambda *_arguments: answers)

    assert evaluate_teacher(Answers(), SimpleNamespace(), "validation") == 1.0  # type: ignore[arg-type]


def test_a_teacher_that_knows_its_digits_is_scored_on_validation(data: PreparedData, teacher: TrainedModel) -> None:
    opened = open_data(data)
    net = load_trained(teacher, opened, allow_code=False)

    score = evaluate_teacher(net, opened, "validation")

    right = [
        int(net(batch.x_NCHW).argmax(1).eq(batch.labels_N).sum())
        for batch in opened.plain_batches("validation", batch_size=7)
    ]
    assert score == pytest.approx(sum(right) / opened.num_validation) == teacher.info["top1_validation"]


def test_an_untrained_teacher_from_a_checkpoint_is_taken_as_it_is(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    config = TeacherConfig(**NET, checkpoint=teacher.weights_path, train=None)

    train_teacher(config, data, tmp_path, How())

    taken = TrainedModel(tmp_path, "", "teacher")
    assert taken.info["training"] is None
    assert taken.info["top1_validation"] == teacher.info["top1_validation"]
    assert taken.weights_path.read_bytes() == teacher.weights_path.read_bytes()


def test_a_student_that_was_trained_elsewhere_is_taken_as_it_is(
    data: PreparedData, teacher: TrainedModel, student: TrainedModel, tmp_path: Path
) -> None:
    config = DistillConfig(**NET, checkpoint=student.weights_path, train=None)

    distill(config, data, teacher, tmp_path, How())

    taken = TrainedModel(tmp_path, "", "distill")
    assert taken.info["rounds"] == []
    assert taken.info["top1_validation"] == student.info["top1_validation"]
    assert taken.weights_path.read_bytes() == student.weights_path.read_bytes()


# --- distill: rounds ---------------------------------------------------------------------------------------------------


class FakeTraining:
    """In place of `train`: each round adds one to a weight of the student, so that every model can be told apart."""

    def __init__(self) -> None:
        self.taught_by: list[float | None] = []
        self.seeds: list[int] = []

    def __call__(
        self, student: nn.Module, *args: object, teacher: nn.Module | None, seed: int, **kwargs: object
    ) -> Any:
        self.taught_by.append(None if teacher is None else mark_of(teacher))
        self.seeds.append(seed)
        with torch.no_grad():
            next(student.parameters()).view(-1)[0] = float(len(self.seeds))
        last = {name: value.detach().clone() for name, value in student.state_dict().items()}
        return SimpleNamespace(summary=lambda: {"epochs": [], "best_epoch": 1}, last=last, best=last)


def mark_of(model: nn.Module) -> float:
    return float(next(model.parameters()).detach().view(-1)[0])


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(distill_stage, "train", fake)
    return fake


def with_scores(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    remaining: Iterator[float] = iter(scores)
    monkeypatch.setattr(distill_stage, "top1", lambda logits_NK, labels_N: next(remaining))


def rounds_of(directory: Path) -> list[tuple[str, float]]:
    return [
        (one["soft_labels_from"], one["validation_top1"]) for one in read_json(directory / "distill.json")["rounds"]
    ]


def test_rounds_end_when_the_target_is_met(
    data: PreparedData,
    teacher: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_training: FakeTraining,
    listening: Any,
) -> None:
    with_scores(monkeypatch, [0.9, 0.5, 0.85, 0.99])
    config = DistillConfig(**NET, rounds=5, target_top1=0.8)

    distill(config, data, teacher, tmp_path, How(progress=listening))

    assert rounds_of(tmp_path) == [("teacher", 0.5), ("teacher", 0.85)]
    assert listening.lines == ["distill: 85.00% on validation meets the target of 80.00%"]


def test_soft_labels_come_from_the_best_model_so_far(
    data: PreparedData,
    teacher: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_training: FakeTraining,
) -> None:
    with_scores(monkeypatch, [0.6, 0.5, 0.7, 0.65, 0.8])  # the teacher, then four rounds
    opened = open_data(data)

    distill(DistillConfig(**NET, rounds=4), data, teacher, tmp_path, How(seed=3))

    of_the_teacher = mark_of(load_trained(teacher, opened, allow_code=False))
    assert [name for name, _ in rounds_of(tmp_path)] == [
        "teacher",
        "teacher",
        "student of round 2",
        "student of round 2",
    ]
    # A copy: the student of round 2 still teaches in round 4, though the student itself went on.
    assert fake_training.taught_by == pytest.approx([of_the_teacher, of_the_teacher, 2.0, 2.0])
    assert len(set(fake_training.seeds)) == 4
    assert mark_of(load_trained(TrainedModel(tmp_path, "", "distill"), opened, allow_code=False)) == 4.0


def test_the_teacher_answers_the_validation_split_once_whatever_the_rounds(
    data: PreparedData,
    teacher: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_training: FakeTraining,
) -> None:
    answered: list[float] = []
    ask = distill_stage.soft_labels

    def noted(model: nn.Module, data: Any, split: str) -> Any:
        answered.append(mark_of(model))
        return ask(model, data, split)

    monkeypatch.setattr(distill_stage, "soft_labels", noted)
    with_scores(monkeypatch, [0.6, 0.5, 0.7, 0.8])

    distill(DistillConfig(**NET, rounds=3), data, teacher, tmp_path, How())

    of_the_teacher = mark_of(load_trained(teacher, open_data(data), allow_code=False))
    assert answered == pytest.approx([of_the_teacher, 1.0, 2.0, 3.0])
    for told in read_json(tmp_path / "distill.json")["rounds"]:
        assert told["teacher_wrong"]["num_validation"] == open_data(data).num_validation


def test_without_weight_on_soft_labels_no_teacher_is_asked(
    data: PreparedData,
    teacher: TrainedModel,
    tmp_path: Path,
    fake_training: FakeTraining,
) -> None:
    distill(DistillConfig(**NET, kd_weight=0.0), data, teacher, tmp_path, How())

    assert fake_training.taught_by == [None]


def test_the_random_control_visits_as_many_samples_as_the_curriculum_and_others(
    data: PreparedData, teacher: TrainedModel, tmp_path: Path
) -> None:
    curves, weights = [], []
    for order in ("easy_first", "hard_first", "random"):
        curriculum = {"order": order, "start_fraction": 0.3, "full_at": 0.6}
        config = DistillConfig(**NET, train={**ONE_EPOCH, "epochs": 3}, curriculum=curriculum)
        (tmp_path / order).mkdir()
        distill(config, data, teacher, tmp_path / order, How())
        (only,) = read_json(tmp_path / order / "distill.json")["rounds"]
        curves.append([epoch["shown_fraction"] for epoch in only["epochs"]])
        weights.append((tmp_path / order / "model.safetensors").read_bytes())

    assert curves[0] == curves[1] == curves[2]
    assert curves[0][0] == pytest.approx(0.3, abs=1e-3)
    assert curves[0][0] < curves[0][1] < curves[0][2] == 1.0
    assert len(set(weights)) == 3
