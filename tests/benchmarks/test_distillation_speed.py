"""The distillation beside a published loop: what its tables say of given figures, and that the loop is given what ours is given."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.evidence import distillation_speed as speed
from benchmarks.evidence.distillation_speed import Measurement
from benchmarks.evidence.distillation_speed_table import (
    AS_PUBLISHED,
    OURS,
    THEIRS,
    parts,
    rate,
    reached,
    text,
    times,
    whole_s,
)
from benchmarks.peers import torchdistill_loop as loop
from benchmarks.peers.distillation_protocol import milestones
from pipeline.learning.losses import kd_loss
from pipeline.learning.models.cifar import build_cifar_model
from pipeline.recipe import AugmentConfig, DataConfig
from pipeline.stages.data import prepare_data
from targets.base import read_json

NETWORKS = "pipeline.learning.models.cifar:build_cifar_model"
PARTS = {"train": 90, "test": 30}


def curve(*top1s: float, seconds: float = 10.0, images_per_s: float = 100.0) -> list[dict[str, Any]]:
    """Epochs of 500 images: 5 s of steps and 5 s of validation each, unless told otherwise."""
    told = {"seconds": seconds, "images_per_s": images_per_s, "shown_fraction": 1.0}
    return [{"epoch": number, "validation_top1": top1, **told} for number, top1 in enumerate(top1s, 1)]


def document() -> dict[str, Any]:
    ours = {"before_s": 6.0, "teacher_s": 4.0, "num_views": 1, "precision": "bf16", "top1_test": 0.5}
    theirs = {"before_s": 5.0, "threads": 2, "workers": 2, "versions": {"torch": "2"}, "top1_test": 0.5}
    ranges = {
        "data": 1.0,
        "forward": 1.5,
        "teacher": 0.5,
        "loss": 0.5,
        "backward": 4.0,
        "optimizer": 0.5,
        "validation": 3.0,
    }
    return {
        "utc": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "a cpu", "cpus_online": "0-1"},
        "data": {"name": "x", "num_train": 500, "num_validation": 100, "num_test": 100},
        "teacher_top1": 0.6,
        "workers": {"workers": 2, "step_s": {"0": [2.0, 1.5], "2": [1.0, 1.1]}},
        "block": {"images": 1280, "warm_steps": 3},
        "rounds": [{THEIRS: speed, "teacher": 4 * speed, "student": 6 * speed} for speed in (50.0, 25.0, 50.0)],
        "arms": {
            THEIRS: {**theirs, "epochs": curve(0.3, 0.55, 0.5, seconds=100.0)},
            AS_PUBLISHED: {**ours, "epochs": curve(0.3, 0.4, 0.497)},
            OURS: {**ours, "epochs": curve(0.3, 0.498)},
        },
        "parts": {"ranges": {name: {"seconds": s, "calls": 9} for name, s in ranges.items()}, "seconds": 13.0},
    }


def test_the_time_is_that_from_the_start_of_the_process_to_the_first_epoch_that_is_accurate_enough() -> None:
    arm = {"before_s": 7.0, "epochs": curve(0.1, 0.5, 0.4, 0.9)}

    found = reached(arm, 0.5)

    assert found is not None
    assert (found.epoch, found.seconds) == (2, 27.0)
    assert reached(arm, 0.91) is None


def test_all_are_held_to_the_last_epoch_of_the_published_loop_within_the_margin_and_that_loop_too() -> None:
    arms = document()["arms"]

    found = times(arms)

    assert whole_s(arms[THEIRS]) == 305.0
    assert found[THEIRS] is not None
    assert (found[THEIRS].epoch, found[THEIRS].seconds) == (2, 205.0)  # 0.55 is more than 0.5, with which it ends
    assert found[OURS] is not None
    assert (found[OURS].epoch, found[OURS].seconds) == (2, 26.0)
    assert found[AS_PUBLISHED] is None  # 0.3 points short


@given(st.floats(1.0, 1e4), st.floats(1.0, 1e4), st.integers(1, 50), st.integers(1, 50))
def test_the_rate_is_all_images_shown_over_all_the_time_that_teacher_and_student_took(
    teacher: float, student: float, num_views: int, more: int
) -> None:
    num_epochs, num_images = num_views + more, 1000
    seconds = num_views * num_images / teacher + num_epochs * num_images / student

    assert rate(teacher, student, num_views, num_epochs) == pytest.approx(num_epochs * num_images / seconds)


def test_the_parts_are_the_whole_of_our_time() -> None:
    told = document()

    found = parts(told)

    assert sum(found.values()) == pytest.approx(6.0 + 2 * 10.0)
    assert found["validation"] == pytest.approx(10.0)
    assert found["backward"] == pytest.approx(10.0 * 4 / 10)  # of 10 s that the profiler saw outside of validation
    assert found["rest of the step"] == pytest.approx(10.0 * 2 / 10)


def test_the_tables_say_how_many_times_as_fast_and_where_the_accuracy_was_not_reached() -> None:
    printed = text(document())

    assert f"| {OURS} | 2 | 49.80 | 50.00 | 26 s, epoch 2 | 11.7 | 7.9 |" in printed
    assert f"| {AS_PUBLISHED} | 3 | 49.70 | 50.00 | never |  |  |" in printed
    assert f"| {THEIRS} | 3 | 50.00 | 50.00 | 205 s, epoch 2 | 1.5 | 1.0 |" in printed
    assert "| ours, the student's steps alone | 300 | 6.00 |" in printed
    assert "| ours, a view of its own every epoch | 120 | 2.40 |" in printed


def test_a_measurement_of_other_epochs_does_not_go_on_from_the_checkpoint_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    names: list[str] = []

    def loop_of(self: Measurement, data_dir: Path, *options: str, name: str = "loop") -> dict[str, Any]:
        names.append(name)
        return {"top1_test": 0.5}

    monkeypatch.setattr(Measurement, "_loop", loop_of)
    for epochs in (12, 6, 12):
        given = ["--data", "npz:x.npz", "--out", "x.json", "--epochs", str(epochs), "--kept", str(tmp_path)]
        measurement = Measurement(speed._arguments([*given, "--teacher", str(tmp_path / "teacher.safetensors")]))
        measurement._data_dir = tmp_path
        measurement._theirs(0)

    of_twelve, of_six, of_twelve_again = (name for name in names if name != "loop")
    assert of_twelve == of_twelve_again != of_six


@pytest.mark.parametrize("source", ["npz:/home/someone/cifar10.npz", "npz:cifar10.npz", "torchvision:cifar10"])
def test_data_are_named_without_the_path_where_they_lie(source: str) -> None:
    assert speed._data_name(source) == "cifar10"


# --- the published loop ------------------------------------------------------------------------------------------------


def test_the_milestones_are_the_published_ones_and_scale_with_the_epochs() -> None:
    assert milestones(240) == [150, 180, 210]
    assert milestones(12) == [8, 9, 11]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of noise, 8 x 8 pixels, three classes."""
    folder = tmp_path_factory.mktemp("speed")
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for part, n in PARTS.items()}
    arrays |= {f"y_{part}": np.arange(n) % 3 for part, n in PARTS.items()}
    np.savez(folder / "noise.npz", **arrays)
    config = DataConfig(
        source=f"npz:{folder / 'noise.npz'}", validation=0.1, calibration=8, augment=AugmentConfig(crop=4)
    )
    prepare_data(config, 0, folder / "data")
    torch.manual_seed(1)
    save_file(build_cifar_model("resnet8", {}, channels=3, num_classes=3).state_dict(), folder / "teacher.safetensors")
    return folder / "data"


def arguments(data_dir: Path, folder: Path, *more: str) -> list[str]:
    nets = ["--networks", NETWORKS, "--teacher", "resnet8", "--student", "resnet8", "--workers", "0"]
    weights = ["--teacher-weights", str(data_dir.parent / "teacher.safetensors")]
    weights += ["--student-weights", str(folder / "student.safetensors")]
    return [*nets, *weights, "--data", str(data_dir), "--out", str(folder / "out.json"), *more]


def test_the_published_loss_is_the_one_that_our_recipe_minimises(data_dir: Path, tmp_path: Path) -> None:
    box = box_of(data_dir, tmp_path)
    x_NCHW = torch.randn(6, 3, 8, 8)
    labels_N = torch.arange(6) % 3
    box.pre_epoch_process(epoch=0)

    theirs = box.forward_process(x_NCHW, labels_N, {})

    with torch.no_grad():
        student_NK, teacher_NK = box.student_model(x_NCHW), box.teacher_model(x_NCHW)
    ours = kd_loss(student_NK, teacher_NK, labels_N, temperature=4.0, weight=0.9)
    assert float(theirs.detach()) == pytest.approx(float(ours), rel=1e-5)
    assert not box.teacher_model.training


def box_of(data_dir: Path, folder: Path) -> Any:
    given = loop._arguments(arguments(data_dir, folder, "--epochs", "2"))
    assert isinstance(given, argparse.Namespace)
    info = read_json(data_dir / "data.json")
    return loop._box(loop._network(given, "resnet8", info), loop._student(given, info), given, info)


def test_both_begin_with_the_same_weights_and_a_killed_loop_ends_with_those_of_a_whole_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    loop.main(arguments(data_dir, whole, "--epochs", "3"))
    save_file(load_file(whole / "student.safetensors"), killed / "student.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "accuracy", interrupts_in_call(2))
        with pytest.raises(KeyboardInterrupt):
            loop.main(arguments(data_dir, killed, "--epochs", "3"))

    loop.main(arguments(data_dir, killed, "--epochs", "3"))

    begun, ended, gone_on = (
        load_file(path)
        for path in (whole / "student.safetensors", whole / "out.safetensors", killed / "out.safetensors")
    )
    assert all(torch.equal(gone_on[name], ended[name]) for name in ended)
    assert not torch.equal(begun["fc.weight"], ended["fc.weight"])
    told = json.loads((killed / "out.json").read_text())
    assert [epoch["epoch"] for epoch in told["epochs"]] == [1, 2, 3]


def interrupts_in_call(number: int) -> Any:
    """`accuracy`, ending the process as Ctrl-C would when it is asked for the `number`th time."""
    real, calls = loop.accuracy, iter(range(1, 10))

    def asked(model: Any, batches: Any) -> float:
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(model, batches)

    return asked
