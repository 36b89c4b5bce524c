"""What a distillation minimises, put together from the recipe; and a killed one with every axis moving goes on bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import PreparedData
from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation, losses_of
from pipeline.learning.losses import cross_entropy, dist, dkd, kd, kd_loss, standardized
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.models import save_weights
from pipeline.learning.teachers import TeacherTrajectory
from pipeline.learning.training import Trained, train
from pipeline.progress import Quiet
from pipeline.recipe import DataConfig, DistillConfig, TrainConfig
from pipeline.stages.data import prepare_data

pytestmark = pytest.mark.integration

SEED = 5
STUDENT_NK, TEACHER_NK = torch.randn(2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS_N = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def loss_at(epochs_done: float, num_epochs: int = 10, **config: Any) -> Tensor:
    whole = DistillConfig(model="m", train=TrainConfig(epochs=num_epochs), **config)
    assert whole.train is not None
    objective = Distillation(whole, whole.train)
    objective.begin_epoch(int(epochs_done), num_epochs, [], nn.Identity())
    objective.begin_step(epochs_done)
    value: Tensor = objective(STUDENT_NK, TEACHER_NK if whole.asks_teacher else None, LABELS_N)
    return value


# --- the sum -----------------------------------------------------------------------------------------------------------


def test_the_short_form_is_plain_kd() -> None:
    expected = kd_loss(STUDENT_NK, TEACHER_NK, LABELS_N, temperature=3.0, weight=0.7)

    torch.testing.assert_close(loss_at(0.0, temperature=3.0, kd_weight=0.7), expected)
    long = [{"name": "kd", "weight": 0.7}, {"name": "cross_entropy", "weight": 0.3}]
    torch.testing.assert_close(loss_at(0.0, temperature=3.0, losses=long), expected)


def test_losses_add_up_with_their_weights_and_cross_entropy_is_among_them_unless_the_list_says_otherwise() -> None:
    losses = [
        {"name": "dkd", "weight": 0.5, "alpha": 2, "beta": 3, "temperature": 2.0},
        {"name": "dist", "weight": 2.0, "standardize": True},
    ]

    s, t = standardized(STUDENT_NK), standardized(TEACHER_NK)
    expected = (
        0.5 * dkd(STUDENT_NK, TEACHER_NK, LABELS_N, temperature=2.0, alpha=2, beta=3).mean()
        + 2 * dist(s, t, temperature=4.0, beta=1, gamma=1).mean()
    )
    hard = cross_entropy(STUDENT_NK, LABELS_N)
    torch.testing.assert_close(loss_at(0.0, losses=losses), expected + hard)
    torch.testing.assert_close(loss_at(0.0, losses=[*losses, {"name": "cross_entropy", "weight": 0}]), expected)


@pytest.mark.parametrize(("epochs_done", "share"), [(0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (9.0, 1.0)])
def test_a_warm_up_lets_a_weight_grow_in_a_line(epochs_done: float, share: float) -> None:
    losses = [{"name": "kd", "weight": 2.0, "warmup_epochs": 4}, {"name": "cross_entropy", "weight": 0}]

    expected = 2 * share * kd(STUDENT_NK, TEACHER_NK, temperature=4.0).mean()
    torch.testing.assert_close(loss_at(epochs_done, losses=losses), expected)


def test_the_weight_axis_moves_from_the_teacher_to_the_labels() -> None:
    axis = {"schedule": "linear", "end": 0.0, "full_at": 1.0}

    found = loss_at(5.0, kd_weight=0.8, weight_curriculum=axis)

    expected = kd_loss(STUDENT_NK, TEACHER_NK, LABELS_N, temperature=4.0, weight=0.4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "teacher_alone",
    [
        {"kd_weight": 1.0},
        {"losses": [{"name": "kd", "weight": 1.0}, {"name": "cross_entropy", "weight": 0.0}]},
    ],
    ids=["short form", "list"],
)
def test_the_weight_axis_ends_at_the_labels_where_they_counted_nothing_before(teacher_alone: dict[str, Any]) -> None:
    axis = {"schedule": "linear", "end": 0.0, "full_at": 0.5}

    begin, end = (loss_at(epoch, **teacher_alone, weight_curriculum=axis) for epoch in (0.0, 9.0))

    torch.testing.assert_close(begin, kd(STUDENT_NK, TEACHER_NK, temperature=4.0).mean())
    torch.testing.assert_close(end, torch.nn.functional.cross_entropy(STUDENT_NK, LABELS_N))


def test_the_temperature_axis_is_that_of_every_loss_without_one_of_its_own() -> None:
    axis = {"schedule": "linear", "end": 2.0, "full_at": 1.0}
    losses = [{"name": "kd"}, {"name": "dist", "temperature": 7.0}, {"name": "cross_entropy", "weight": 0}]

    found = loss_at(5.0, temperature=6.0, temperature_curriculum=axis, losses=losses)

    expected = (
        kd(STUDENT_NK, TEACHER_NK, temperature=4.0).mean()
        + dist(STUDENT_NK, TEACHER_NK, temperature=7.0, beta=1, gamma=1).mean()
    )
    torch.testing.assert_close(found, expected)


def test_where_the_teacher_is_wrong_label_only_leaves_cross_entropy() -> None:
    is_right_N = (TEACHER_NK.argmax(1) == LABELS_N).double()

    found = loss_at(0.0, kd_weight=0.9, teacher_wrong="label_only")

    soft_N = kd(STUDENT_NK, TEACHER_NK, temperature=4.0)
    torch.testing.assert_close(found, 0.9 * (soft_N * is_right_N).mean() + 0.1 * cross_entropy(STUDENT_NK, LABELS_N))


def test_superloss_alone_has_the_gradient_of_the_published_loss() -> None:
    leaf_NK = STUDENT_NK.clone().requires_grad_()
    config = DistillConfig(
        model="m", kd_weight=0.0, weight_curriculum={"per_sample": "superloss", "superloss_lambda": 0.5}
    )
    assert config.train is not None
    Distillation(config, config.train)(leaf_NK, None, LABELS_N).backward()

    step, expected_NK = 1e-5, torch.zeros_like(STUDENT_NK)
    for index in [(0, 0), (3, 2), (7, 1)]:
        ends = []
        for sign in (1, -1):
            moved_NK = STUDENT_NK.clone()
            moved_NK[index] += sign * step
            ends.append(superloss(cross_entropy(moved_NK, LABELS_N, reduction="none"), math.log(4), 0.5))
        expected_NK[index] = (ends[0] - ends[1]) / (2 * step)
        assert leaf_NK.grad is not None
        assert float(leaf_NK.grad[index]) == pytest.approx(float(expected_NK[index]), rel=1e-3)


def superloss(loss_N: Tensor, tau: float, lam: float) -> float:
    """Its minimum over sigma, found by a fine search in ln sigma."""
    x = torch.linspace(-10, 1, 200_001, dtype=torch.float64)
    return sum(float(((loss - tau) * x.exp() + lam * x * x).min()) for loss in loss_N) / len(loss_N)


def test_what_no_loss_needs_is_not_asked() -> None:
    asked = {
        "plain": {"kd_weight": 0.0},
        "drop": {"kd_weight": 0.0, "teacher_wrong": "drop"},
        "features": {"losses": [{"name": "features", "student_layer": "a", "teacher_layer": "b"}]},
        "labels": {"losses": []},
    }

    assert {name: DistillConfig(model="m", **config).asks_teacher for name, config in asked.items()} == {
        "plain": False,
        "drop": True,
        "features": True,
        "labels": False,
    }
    assert [one.name for one in losses_of(DistillConfig(model="m", kd_weight=1.0))] == ["kd"]


# --- killed and gone on ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    directory = tmp_path_factory.mktemp("data")
    prepare_data(DataConfig(source="digits", test=0.5, calibration=32), SEED, directory)
    return Data.load(PreparedData(directory, ""))


def small_net(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, 2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, 10))


class Interrupts(Quiet):
    """Ends the process, as Ctrl-C would, when the line of an epoch has been said."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def say(self, line: str) -> None:
        if line.startswith(f"net {self.epoch}/"):
            raise KeyboardInterrupt


def run(data: Data, directory: Path, config: dict[str, Any], progress: Quiet | None = None) -> Trained:
    """A training of the student with the axes of `config`; everything is built afresh, as in a new process."""
    training = TrainConfig(epochs=4, batch_size=128, precision="fp32", lr=0.05, ema_decay=0.9)
    whole = DistillConfig(model="m", train=training, **config)
    student, teacher = small_net(4), small_net(8, seed=1)
    features = [
        FeatureLoss(student, teacher, student_layer="0", teacher_layer="0", example_NCHW=torch.zeros(2, 1, 8, 8))
        for one in losses_of(whole)
        if one.name == "features"
    ]
    way = None
    if whole.teacher_curriculum is not None:
        paths = [directory.parent / f"way-{number}.safetensors" for number in range(3)]
        for number, path in enumerate(paths):
            save_weights(small_net(8, seed=number), path)
        way = TeacherTrajectory(whole.teacher_curriculum, teacher, paths, SEED)
    samples = (
        None
        if whole.curriculum is None
        else SampleCurriculum(whole.curriculum, data, teacher, seed=SEED, batch_size=training.batch_size)
    )
    objective = Distillation(whole, training, samples=samples, trajectory=way, features=features, teacher_top1=0.9)
    return train(
        student,
        data,
        objective,
        training,
        seed=SEED,
        checkpoint_dir=directory,
        progress=progress or Quiet(),
        label="net",
        teacher=teacher,
    )


AXES: dict[str, dict[str, Any]] = {
    "learned temperature": {"temperature_curriculum": {"schedule": "learned", "reversal_epochs": 2}},
    "features": {"losses": [{"name": "kd"}, {"name": "features", "student_layer": "0", "teacher_layer": "0"}]},
    "adaptive pacing": {"curriculum": {"pacing": "adaptive", "start_fraction": 0.3, "plateau": 0.2, "full_at": 1.0}},
    "forgetting": {
        "curriculum": {"difficulty": "forgetting", "rescore_every": 2, "start_fraction": 0.3, "full_at": 1.0}
    },
    "epochs as long as all": {"curriculum": {"start_fraction": 0.3, "full_at": 1.0, "epoch_length": "all"}},
    "aum": {"curriculum": {"difficulty": "aum", "rescore_every": 1, "start_fraction": 0.3, "full_at": 1.0}},
    "all": {
        "losses": [
            {"name": "dkd", "standardize": True, "warmup_epochs": 2},
            {"name": "features", "weight": 0.1, "student_layer": "0", "teacher_layer": "0"},
        ],
        "curriculum": {
            "difficulty": "kl",
            "rescore_every": 2,
            "pacing": "adaptive",
            "start_fraction": 0.4,
            "plateau": 0.2,
        },
        "temperature_curriculum": {"schedule": "learned"},
        "weight_curriculum": {"schedule": "gap", "end": 0.1, "per_sample": "superloss"},
        "teacher_curriculum": {"full_at": 0.75},
        "teacher_wrong": "down_weight",
    },
}


@pytest.mark.parametrize("name", AXES)
def test_an_interrupted_distillation_goes_on_bit_for_bit(data: Data, tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", AXES[name], Interrupts(3))

    resumed, whole = run(data, tmp_path / "broken", AXES[name]), run(data, tmp_path / "whole", AXES[name])

    assert [key for key in whole.last if not torch.equal(whole.last[key], resumed.last[key])] == []
    said = ("loss", "shown_fraction", "temperature", "teacher_factor", "taught_by", "teacher_wrong")
    assert [[getattr(epoch, key) for key in said] for epoch in resumed.epochs] == [
        [getattr(epoch, key) for key in said] for epoch in whole.epochs
    ]


def test_with_every_axis_moving_the_curve_says_what_each_did(data: Data, tmp_path: Path) -> None:
    curve = run(data, tmp_path, AXES["all"]).epochs

    assert [epoch.taught_by for epoch in curve] == ["way-0", "way-0", "way-1", "teacher"]
    assert curve[0].teacher_factor == 1.0
    assert all(epoch.temperature is not None and 1 < epoch.temperature < 21 for epoch in curve)
    assert len({epoch.temperature for epoch in curve}) == 4  # it learns
    assert all(
        epoch.teacher_wrong is not None and 0.5 < epoch.teacher_wrong <= 1 for epoch in curve
    )  # untrained teachers
    assert curve[0].shown_fraction == pytest.approx(0.4, abs=1e-3)


def test_what_stands_still_leaves_no_trace_in_the_curve(data: Data, tmp_path: Path) -> None:
    (first, *_) = run(data, tmp_path, {}).epochs

    assert (first.temperature, first.teacher_factor, first.taught_by) == (None, None, None)


def test_the_log_of_adaptive_pacing_replayed_blind_gives_the_same_weights(data: Data, tmp_path: Path) -> None:
    pacing = {"start_fraction": 0.31, "plateau": 0.2, "advance": 0.17, "full_at": 1.0}
    adaptive = run(data, tmp_path / "a", {"curriculum": {**pacing, "pacing": "adaptive"}})
    log = [epoch.shown_fraction for epoch in adaptive.epochs]

    blind = run(data, tmp_path / "b", {"curriculum": {"pacing": "replay", "fractions": log}})
    control = run(data, tmp_path / "c", {"curriculum": {"pacing": "replay", "fractions": log, "order": "random"}})

    assert log == sorted(log)
    assert log[0] < log[-1]
    assert all(torch.equal(adaptive.last[key], blind.last[key]) for key in blind.last)
    assert [epoch.shown_fraction for epoch in control.epochs] == log
    assert not all(torch.equal(adaptive.last[key], control.last[key]) for key in control.last)


def test_the_student_is_asked_again_every_k_epochs(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    ask = SampleCurriculum._ask

    def counted(self: SampleCurriculum, student: nn.Module) -> None:
        ask(self, student)
        asked.append(self.difficulty_N.clone())

    monkeypatch.setattr(SampleCurriculum, "_ask", counted)
    run(data, tmp_path, {"curriculum": {"difficulty": "self_paced", "rescore_every": 3}})

    assert len(asked) == 2
    assert not torch.equal(*asked)
