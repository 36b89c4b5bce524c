"""What a training holds does not grow with its epochs, nor a distillation with its rounds: live tensors are counted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation
from pipeline.learning.soft_labels import cache_soft_labels, labels_of
from pipeline.learning.training import train
from pipeline.learning.views import view_seeds
from pipeline.progress import Quiet
from pipeline.recipe import DistillConfig
from pipeline.stages import distill as distill_stage

pytestmark = pytest.mark.integration

NET: dict[str, Any] = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}


class Counts(Quiet):
    """At each line that begins so: how many tensors live, and how many bytes their storages have together."""

    def __init__(self, beginning: str) -> None:
        self.beginning = beginning
        self.counts: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        if line.startswith(self.beginning):
            self.counts.append(live_tensors())


def live_tensors() -> tuple[int, int]:
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return len(tensors), sum(storages.values())


@pytest.fixture(autouse=True)
def only_what_is_new() -> Iterator[None]:
    """What lived before is not collected, searched or counted: with all libraries loaded that takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def prepared(built: Any) -> PreparedData:
    return PreparedData(built.stage("data"), "")


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_training_holds_as_much_after_its_sixth_epoch_as_after_its_second(
    prepared: PreparedData, tmp_path: Path, is_cached: bool
) -> None:
    data = Data.load(prepared)
    config = DistillConfig(
        model="m",
        train={"epochs": 6, "batch_size": 256, "precision": "fp32", "ema_decay": 0.9, "schedule": "constant"},
        curriculum={"difficulty": "forgetting", "rescore_every": 1, "start_fraction": 0.3, "full_at": 1.0},
        temperature_curriculum={"schedule": "learned"},
    )
    assert config.train is not None
    num_pixels = data.channels * data.image_size[0] * data.image_size[1]
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 10)) for _ in range(2))
    labels = None
    if is_cached:
        of = labels_of(teacher, data, "", view_seeds(0, 2), dtype="fp16", top_k=None)
        labels = cache_soft_labels(teacher, data, of, tmp_path / "cache", config.train, Quiet())
    assert config.curriculum is not None
    samples = SampleCurriculum(config.curriculum, data, teacher, seed=0, batch_size=config.train.batch_size)
    progress = Counts("net ")

    train(
        student,
        data,
        Distillation(config, config.train, samples=samples),
        config.train,
        seed=0,
        checkpoint_dir=tmp_path / "t",
        progress=progress,
        label="net",
        teacher=None if is_cached else teacher,
        labels=labels,
    )

    assert len(progress.counts) == 6
    assert progress.counts[1:] == [progress.counts[1]] * 5
    assert progress.counts[1][1] > 0


@pytest.mark.parametrize("change", [{}, {"teacher_forward": "cached"}])
def test_a_distillation_holds_as_much_in_its_sixth_round_as_in_its_third(
    prepared: PreparedData, built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    scores = iter([number / 10 for number in range(8)])  # each student beats its teacher, and teaches the next round
    monkeypatch.setattr(distill_stage, "top1", lambda logits_NK, labels_N: next(scores))
    progress = Counts("distill round")
    config = DistillConfig(**NET, train={"epochs": 1, "batch_size": 512, "precision": "fp32"}, rounds=6, **change)
    teacher = TrainedModel(built.stage("teacher"), "", "teacher")

    distill_stage.distill(config, prepared, teacher, tmp_path, How(progress=progress))

    assert len(progress.counts) == 6
    assert progress.counts[2:] == [progress.counts[2]] * 4
