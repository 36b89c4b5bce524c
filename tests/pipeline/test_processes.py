"""Trainings and a whole run in real processes, which talk to each other over the loopback, against those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import PreparedData
from pipeline.how import How
from pipeline.launch import process_index
from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation
from pipeline.learning.losses import cross_entropy
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.training import Trained, train
from pipeline.processes import learn, led_by_first
from pipeline.progress import Quiet
from pipeline.recipe import DataConfig, DistillConfig, TrainConfig
from pipeline.stages.data import prepare_data
from targets.errors import ModelError

pytestmark = pytest.mark.system

SEED = 5
# float32 rounds at 6e-8; what is added in another order differs by that, and a few steps let it grow.
BOUND = 2e-5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    directory = tmp_path_factory.mktemp("data")
    prepare_data(DataConfig(source="digits", test=0.5, calibration=32), SEED, directory)
    return PreparedData(directory, "")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A third of the labels."""
    directory = tmp_path_factory.mktemp("few")
    prepare_data(DataConfig(source="digits", test=0.5, calibration=32, labelled_share=0.33), SEED, directory)
    return PreparedData(directory, "")


HOW: dict[str, Any] = {"seed": SEED, "progress": Quiet()}
TEACHING = TrainConfig(epochs=2, batch_size=47, lr=0.2, precision="fp32")
DISTILLING = DistillConfig(
    model="m",
    losses=[
        {"name": "kd", "weight": 0.5},
        {"name": "dist", "weight": 0.1, "standardize": True},
        {"name": "features", "weight": 0.1, "student_layer": "3", "teacher_layer": "3"},
    ],
    temperature_curriculum={"schedule": "learned", "reversal_epochs": 1, "span": 5},
    weight_curriculum={"per_sample": "superloss"},
    # In random order: rounding cannot move a sample across the cut between what is shown and what is not.
    curriculum={
        "difficulty": "el2n",
        "rescore_every": 1,
        "order": "random",
        "start_fraction": 0.6,
        "epoch_length": "all",
    },
    train={"epochs": 3, "batch_size": 47, "lr": 0.1, "precision": "fp32", "ema_decay": 0.5, "grad_clip": 1.0},
)


# The same, of what needs no label.
DISTILLING_FEW = DistillConfig.model_validate(
    {
        **DISTILLING.model_dump(),
        "weight_curriculum": {"per_sample": "confidence"},
        "curriculum": {"difficulty": "kl", "rescore_every": 1, "order": "random", "start_fraction": 0.6},
        "teacher_wrong": "drop",
    }
)


class Breaking(Distillation):
    """Is stopped in the middle of its second epoch."""

    broken_by: Callable[[], None] | None = None

    def begin_step(self, epochs_done: float) -> None:
        if epochs_done > 1.2 and self.broken_by is not None:
            self.broken_by()
        super().begin_step(epochs_done)


def on_labels(student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
    return cross_entropy(student_NK, labels_N)


def net(width: int, seed: int) -> nn.Module:
    """With BatchNorm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * width, 10),
    )


def distilled(directory: Path, checkpoint_dir: Path, *, broken_by: Callable[[], None] | None = None) -> Trained:
    """Everything that couples the samples of a batch, a temperature and a projector that learn, and a last batch of odd size."""
    data = Data.load(PreparedData(directory, ""))
    teacher = net(8, seed=1)
    train(
        teacher, data.labelled(), on_labels, TEACHING, checkpoint_dir=checkpoint_dir / "teacher", label="teacher", **HOW
    )
    student = net(4, seed=0)
    features = FeatureLoss(
        student, teacher, student_layer="3", teacher_layer="3", example_NCHW=torch.zeros(2, 1, *data.image_size)
    )
    config = DISTILLING if data.num_labelled == data.num_train else DISTILLING_FEW
    assert config.curriculum is not None
    assert config.train is not None
    samples = SampleCurriculum(config.curriculum, data, teacher, seed=SEED, batch_size=config.train.batch_size)
    objective = Breaking(config, config.train, samples=samples, features=[features])
    objective.broken_by = broken_by
    student_dir = checkpoint_dir / "student"
    return train(
        student,
        data,
        objective,
        config.train,
        teacher=teacher,
        checkpoint_dir=student_dir,
        label="student",
        **HOW,
    )


PROGRAM = """
import os, sys, torch
from pathlib import Path
sys.path.append({folder!r})
import distributed_program as program

def fails():
    raise RuntimeError("broken on purpose")

def killed():
    os.kill(os.getpid(), 9)

broken_by = {broken}.get(int(os.environ["RANK"]))
trained = program.distilled(Path({data!r}), Path({checkpoint!r}), broken_by=broken_by)
if os.environ["RANK"] == "0":
    tops = [[e.train_top1, e.validation_top1] for e in trained.epochs]
    torch.save([trained.last, trained.best, [e.loss for e in trained.epochs], tops], {out!r})
"""


def environment(index: int, num: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def in_processes(num: int, data: Path, checkpoint: Path, tmp_path: Path, broken: str = "{}") -> list[tuple[int, str]]:
    """The training of `distilled` in `num` processes; how each ended and what it said. What came of it lies in result.pt."""
    (tmp_path / "distributed_program.py").write_text(Path(__file__).read_text())
    out = tmp_path / "result.pt"
    out.unlink(missing_ok=True)
    code = PROGRAM.format(folder=str(tmp_path), data=str(data), checkpoint=str(checkpoint), out=str(out), broken=broken)
    return [(returncode, err) for returncode, _, err in start(num, code)]


def start(num: int, code: str, **env: str) -> list[tuple[int, str, str]]:
    """Run `code` in `num` processes; how each ended, and what it said on both streams."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **environment(index, num, port), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num)
    ]
    said = [process.communicate(timeout=180) for process in started]
    return [(process.returncode, *streams) for process, streams in zip(started, said, strict=True)]


def result(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[list[float]]]:
    last, best, losses, tops = torch.load(tmp_path / "result.pt", weights_only=True)
    return last, best, losses, tops


def assert_same_but_for_rounding(found: Any, alone: Trained) -> None:
    last, best, losses, tops = found
    for ours, theirs in ((last, alone.last), (best, alone.best)):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=BOUND, atol=BOUND, msg=name)
    assert losses == pytest.approx([epoch.loss for epoch in alone.epochs], rel=BOUND)
    assert tops == [[epoch.train_top1, epoch.validation_top1] for epoch in alone.epochs]


@pytest.mark.parametrize("num", [2, 3])
def test_a_training_in_several_processes_ends_with_the_weights_of_one(
    prepared: PreparedData, tmp_path: Path, num: int
) -> None:
    ended = in_processes(num, prepared.dir, tmp_path / "several", tmp_path)

    assert ended == [(0, "")] * num
    assert_same_but_for_rounding(result(tmp_path), distilled(prepared.dir, tmp_path / "one"))


def test_so_does_one_on_samples_of_which_most_have_no_label(few: PreparedData, tmp_path: Path) -> None:
    ended = in_processes(2, few.dir, tmp_path / "several", tmp_path)

    assert ended == [(0, "")] * 2
    assert_same_but_for_rounding(result(tmp_path), distilled(few.dir, tmp_path / "one"))


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_killed_training_is_gone_on_with_by_another_number_of_processes(
    prepared: PreparedData, tmp_path: Path, first: int, then: int
) -> None:
    killed = in_processes(first, prepared.dir, tmp_path / "t", tmp_path, broken="{0: killed, 1: killed}")
    assert [code for code, _ in killed] == [-9] * first
    assert [path.name for path in (tmp_path / "t" / "student").iterdir()] == ["training.pt"]

    ended = in_processes(then, prepared.dir, tmp_path / "t", tmp_path)

    assert ended == [(0, "")] * then
    assert_same_but_for_rounding(result(tmp_path), distilled(prepared.dir, tmp_path / "one"))


@pytest.mark.parametrize(("index", "end"), [(0, "fails"), (1, "killed")])
def test_a_process_that_ends_does_not_leave_the_others_waiting(
    prepared: PreparedData, tmp_path: Path, index: int, end: str
) -> None:
    ended = in_processes(2, prepared.dir, tmp_path / "t", tmp_path, broken=f"{{{index}: {end}}}")

    assert "broken on purpose" in ended[index][1] or ended[index][0] == -9
    assert ended[1 - index][0] == 1
    assert "TrainingError: The processes of this training have lost each other" in ended[1 - index][1]


LED = """
import os, sys
from pathlib import Path
sys.path.append({folder!r})
import distributed_program as program
from pipeline import processes
processes.PATIENCE_S = 1.0
print(program.led(Path({out!r})))
"""


def stage(failing: str, out_dir: Path, how: How) -> None:
    if str(process_index()) == failing:
        raise ModelError("only here")
    (out_dir / "done").write_text(str(process_index()))


@led_by_first
def led(out_dir: Path) -> str:
    learn(partial(stage, os.environ["FAILING"]), out_dir, How())
    return (out_dir / "done").read_text()


@pytest.mark.parametrize("failing", ["none", "1"])
def test_helpers_run_a_stage_aside_and_one_that_fails_alone_says_so(tmp_path: Path, failing: str) -> None:
    (tmp_path / "distributed_program.py").write_text(Path(__file__).read_text())
    (tmp_path / "stage").mkdir()
    code = LED.format(folder=str(tmp_path), out=str(tmp_path / "stage"))

    (first, out_1, err_1), (second, out_2, err_2) = start(2, code, FAILING=failing)

    if failing == "none":
        assert (first, out_1, err_1) == (second, out_2, err_2) == (0, "0\n", "")
    else:
        assert err_2.startswith("edgestill: process 2 of 2 cannot go on: only here")
        assert "lost each other" in err_1
        assert (first, second) == (1, 1)


LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
]


def launched(*argv: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of two processes on CPUs."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH, str(free_port()), "-m", "pipeline", *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_a_recipe_run_by_accelerate_launch_in_two_processes_comes_to_what_one_comes_to(
    edgestill: Any, tiny_recipe: Any, tmp_path: Path
) -> None:
    # Few steps: later on a ReLU's input that is zero but for rounding parts any two trainings that round differently.
    model = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
    learn = {**model, "train": {"epochs": 2, "lr": 0.03, "batch_size": 64, "precision": "fp32"}}
    recipe = tiny_recipe(teacher={**learn, "keep_checkpoints": 1}, distill=learn)

    ended = launched("run", recipe, "--runs", tmp_path / "two", "--json")

    assert ended.returncode == 0, ended.stderr
    assert Path(json.loads(ended.stdout)["report"]).is_file()
    assert not list((tmp_path / "two").rglob(".checkpoint"))
    assert edgestill("run", recipe, "--runs", tmp_path / "one", "--until", "quantize").code == 0
    (teacher,) = (tmp_path / "one" / "tiny").glob("teacher-????????")
    assert (tmp_path / "two" / "tiny" / teacher.name).is_dir()  # how many processes learn is no part of a stage's key
    for label in ("teacher", "distill"):
        two, one = (load_file(_stage(tmp_path / runs, label) / "model.safetensors") for runs in ("two", "one"))
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=BOUND, atol=BOUND, msg=f"{label} {name}")
    two, one = (
        json.loads((_stage(tmp_path / runs, "quantize") / "quantize.json").read_text()) for runs in ("two", "one")
    )
    assert two["training"]["epochs"][0]["loss"] == pytest.approx(one["training"]["epochs"][0]["loss"], rel=1e-3)


def test_two_processes_read_the_soft_labels_that_one_of_them_wrote_of_a_student(
    edgestill: Any, tiny_recipe: Any, tmp_path: Path
) -> None:
    model = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}}
    slow = {"epochs": 1, "lr": 0.01, "batch_size": 64, "precision": "fp32"}  # so that its student beats it
    fast = {"epochs": 2, "lr": 0.03, "batch_size": 64, "precision": "fp32"}
    distill = {**model, "train": fast, "kd_weight": 0.1, "rounds": 2, "views": 2, "teacher_forward": "cached"}
    recipe = tiny_recipe(teacher={**model, "train": slow}, distill=distill)

    ended = launched("run", recipe, "--runs", tmp_path / "two", "--until", "distill")

    assert ended.returncode == 0, ended.stderr
    assert edgestill("run", recipe, "--runs", tmp_path / "one", "--until", "distill").code == 0
    two, one = (_stage(tmp_path / runs, "distill") for runs in ("two", "one"))
    told = [json.loads((stage / "distill.json").read_text())["rounds"] for stage in (two, one)]
    assert [[one["soft_labels_from"] for one in rounds] for rounds in told] == [["teacher", "student of round 1"]] * 2
    ours, theirs = (load_file(stage / "last.safetensors") for stage in (two, one))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=BOUND, atol=BOUND, msg=name)


def _stage(runs: Path, label: str) -> Path:
    (found,) = (runs / "tiny").glob(f"{label}-*")
    return found


def test_a_recipe_that_two_processes_cannot_run_is_refused_once(tiny_recipe: Any, tmp_path: Path) -> None:
    teacher = {"model": "resnet8", "args": {"widths": [4, 4, 8, 8]}, "train": {"epochs": 1, "lr": 1e30}}

    ended = launched("run", tiny_recipe(teacher=teacher), "--runs", tmp_path / "runs")

    assert ended.returncode != 0
    assert ended.stderr.count("the loss is nan") == 1
