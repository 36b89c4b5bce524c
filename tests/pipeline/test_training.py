"""The epoch loop against a loop written by hand, and what a killed training leaves."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.artifacts import PreparedData
from pipeline.learning import precision as precision_of_training
from pipeline.learning import training
from pipeline.learning.data import Data
from pipeline.learning.losses import cross_entropy
from pipeline.learning.training import Trained, train
from pipeline.progress import Progress, Quiet
from pipeline.recipe import DataConfig, TrainConfig
from pipeline.stages.data import prepare_data
from targets.base import read_json, write_json
from targets.errors import TrainingError

pytestmark = pytest.mark.integration

SEED = 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    directory = tmp_path_factory.mktemp("data")
    prepare_data(DataConfig(source="digits", test=0.5, calibration=32), SEED, directory)
    return PreparedData(directory, "")


@pytest.fixture(scope="module")
def data(prepared: PreparedData) -> Data:
    return Data.load(prepared)


def small_net(channels: int = 4) -> nn.Module:
    """With BatchNorm (buffers) and dropout (randomness of the epoch)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(channels * 16, 10),
    )


def plain(student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
    return cross_entropy(student_NK, labels_N, label_smoothing=smoothing)


def run(
    data: Data,
    directory: Path,
    loss: Any = plain,
    *,
    net: nn.Module | None = None,
    progress: Progress | None = None,
    **config: Any,
) -> Trained:
    return train(
        small_net() if net is None else net,
        data,
        loss,
        TrainConfig(**{"epochs": 2, "precision": "fp32", "lr": 0.05, **config}),
        seed=SEED,
        checkpoint_dir=directory,
        progress=progress or Quiet(),
        label="net",
    )


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- the step, by hand -------------------------------------------------------------------------------------------------


class ByHand:
    """The same training in plain tensor arithmetic: SGD with Nesterov's momentum or AdamW, from their papers."""

    def __init__(self, net: nn.Module, config: TrainConfig) -> None:
        self.net, self.config = net, config
        self.first = [torch.zeros_like(p) for p in net.parameters()]
        self.second = [torch.zeros_like(p) for p in net.parameters()]
        self.average: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, x_NCHW: Tensor, labels_N: Tensor, rate: float) -> None:
        log_p_NK = torch.log_softmax(self.net(x_NCHW), 1)
        s, num_classes = self.config.label_smoothing, log_p_NK.shape[1]
        wanted_NK = torch.full_like(log_p_NK, s / num_classes)
        wanted_NK[torch.arange(len(labels_N)), labels_N] += 1 - s
        gradients = torch.autograd.grad(-(wanted_NK * log_p_NK).sum(1).mean(), list(self.net.parameters()))
        if self.config.grad_clip is not None:
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
            gradients = tuple(g * min(1.0, self.config.grad_clip / (norm + 1e-6)) for g in gradients)
        self.steps += 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.net.parameters(), gradients, strict=True)):
                decay = self.config.weight_decay if p.ndim > 1 else 0.0  # norms and biases are left alone
                getattr(self, self.config.optimizer)(i, p, g, rate, decay)
            self._average()

    def sgd(self, i: int, p: Tensor, g: Tensor, rate: float, decay: float) -> None:
        g = g + decay * p
        mu = self.config.momentum
        self.first[i] = mu * self.first[i] + g
        p -= rate * (g + mu * self.first[i] if self.config.nesterov and mu else self.first[i])

    def adamw(self, i: int, p: Tensor, g: Tensor, rate: float, decay: float) -> None:
        p *= 1 - rate * decay
        self.first[i] = 0.9 * self.first[i] + 0.1 * g
        self.second[i] = 0.999 * self.second[i] + 0.001 * g * g
        corrected = self.second[i] / (1 - 0.999**self.steps)
        p -= rate * self.first[i] / (1 - 0.9**self.steps) / (corrected.sqrt() + 1e-8)

    def _average(self) -> None:
        now = {name: value.clone() for name, value in self.net.state_dict().items() if value.is_floating_point()}
        d = self.config.ema_decay
        if not self.average or d is None:
            self.average = now
        else:
            self.average = {name: d * self.average[name] + (1 - d) * value for name, value in now.items()}


@pytest.mark.parametrize(
    "config",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"weight_decay": 0.05},
        {"nesterov": False, "weight_decay": 0.05},
        {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.5},
        {"grad_clip": 0.1},
        {"label_smoothing": 0.2},
        {"ema_decay": 0.9},
        {"schedule": "step", "milestones": (1,), "gamma": 0.1},
        {"warmup_epochs": 1.0},
    ],
    ids=lambda config: ",".join(config),
)
def test_a_training_is_that_of_a_loop_written_by_hand(data: Data, tmp_path: Path, config: dict[str, Any]) -> None:
    config = {"schedule": "constant", "channels_last": False, "batch_size": 256, **config}
    whole = TrainConfig(**{"epochs": 2, "precision": "fp32", "lr": 0.05, **config})
    by_hand = ByHand(small_net(), whole)
    for epoch in range(2):
        torch.manual_seed((SEED << 16) + epoch)
        by_hand.net.train()
        batches = list(data.train_batches(epoch=epoch, seed=SEED, batch_size=256))
        for step, batch in enumerate(batches):
            rate = whole.lr * (whole.gamma if whole.milestones and epoch >= 1 else 1.0)
            if epoch < whole.warmup_epochs:
                rate *= step / len(batches) + 1e-3
            by_hand.step(batch.x_NCHW, batch.labels_N, rate)

    last = run(data, tmp_path, partial(plain, smoothing=whole.label_smoothing), **config).last

    for name, expected in by_hand.average.items():
        torch.testing.assert_close(last[name], expected, rtol=2e-4, atol=2e-6, msg=name)


# --- what is kept ------------------------------------------------------------------------------------------------------


class TurnsBad:
    """A loss that is climbed instead of descended after so many steps."""

    def __init__(self, after_steps: int) -> None:
        self.steps, self.after_steps = 0, after_steps

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        self.steps += 1
        loss = plain(student_NK, teacher_NK, labels_N)
        return loss if self.steps <= self.after_steps else -loss


def test_the_best_epoch_by_validation_ends_in_the_model_and_the_last_is_reported_too(
    data: Data, tmp_path: Path
) -> None:
    net = small_net()
    num_batches = data.num_train_batches(128)

    trained = run(data, tmp_path / "a", TurnsBad(2 * num_batches), net=net, epochs=4, schedule="constant")

    tops = [epoch.validation_top1 or 0.0 for epoch in trained.epochs]
    assert trained.best_epoch == 1 + tops.index(max(tops)) < 4
    assert (
        trained.summary()["validation_top1_best"] == max(tops) > tops[-1] == trained.summary()["validation_top1_last"]
    )
    assert_same_bits(net.state_dict(), trained.best)
    assert any(not torch.equal(trained.best[name], trained.last[name]) for name in trained.best)
    shorter = run(data, tmp_path / "b", epochs=trained.best_epoch, schedule="constant")
    assert_same_bits(shorter.last, trained.best)


def test_without_a_validation_split_nothing_is_chosen_and_the_last_epoch_ships(tmp_path: Path) -> None:
    prepare_data(DataConfig(source="digits", validation=0, test=0.5), SEED, tmp_path / "data")
    whole = Data.load(PreparedData(tmp_path / "data", ""))

    trained = run(whole, tmp_path / "t", TurnsBad(2), epochs=3)

    assert [epoch.validation_top1 for epoch in trained.epochs] == [None] * 3
    assert trained.best_epoch == 3
    assert_same_bits(trained.best, trained.last)


def test_what_a_curriculum_hides_is_not_visited(data: Data, tmp_path: Path) -> None:
    net_shown: list[int] = []

    def counted(student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        net_shown.append(len(labels_N))
        return plain(student_NK, teacher_NK, labels_N)

    trained = train(
        small_net(),
        data,
        counted,
        TrainConfig(epochs=1, precision="fp32"),
        seed=SEED,
        checkpoint_dir=tmp_path,
        progress=Quiet(),
        label="net",
        shown=lambda progress: torch.arange(100),
    )

    assert sum(net_shown) == 100
    assert trained.epochs[0].shown_fraction == pytest.approx(100 / data.num_train)


# --- NaN ---------------------------------------------------------------------------------------------------------------


class TurnsNan(TurnsBad):
    def __call__(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        self.steps += 1
        return plain(student_NK, teacher_NK, labels_N) * (1.0 if self.steps <= self.after_steps else math.nan)


def test_a_loss_that_is_no_number_stops_and_the_last_good_checkpoint_goes_on(
    data: Data, tmp_path: Path, listening: Any
) -> None:
    num_batches = data.num_train_batches(128)

    with pytest.raises(TrainingError, match=r"net: the loss is nan in epoch 2, step 3") as refused:
        run(data, tmp_path / "t", TurnsNan(num_batches + 2), epochs=3)

    assert refused.value.exit_code == 3
    assert len(str(refused.value).splitlines()) <= 3
    trained = run(data, tmp_path / "t", epochs=3, progress=listening)
    assert listening.lines[0] == "going on after epoch 1 of 3"
    assert_same_bits(trained.last, run(data, tmp_path / "unbroken", epochs=3).last)


# --- killed ------------------------------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from pipeline.artifacts import PreparedData
from pipeline.learning.data import Data
sys.path.append({folder!r})
import test_training_program as program

def loud(student_NK, teacher_NK, labels_N):
    print("step", flush=True)
    return program.plain(student_NK, teacher_NK, labels_N)

program.run(Data.load(PreparedData(Path({data!r}), "")), Path({checkpoint!r}), loud, **{config!r})
"""


@pytest.mark.system
def test_a_training_killed_in_the_middle_ends_with_the_weights_of_an_unkilled_one(
    prepared: PreparedData, data: Data, tmp_path: Path, listening: Any
) -> None:
    config: dict[str, Any] = {"epochs": 4, "ema_decay": 0.95, "momentum": 0.9, "grad_clip": 1.0}
    (tmp_path / "test_training_program.py").write_text(Path(__file__).read_text())
    code = KILLED.format(
        folder=str(tmp_path), data=str(prepared.dir), checkpoint=str(tmp_path / "killed"), config=config
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(2 * data.num_train_batches(128) + 2):  # into the third epoch
        assert process.stdout.readline() == "step\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL

    resumed = run(data, tmp_path / "killed", progress=listening, **config)

    unkilled = run(data, tmp_path / "unkilled", **config)
    assert listening.lines[0] == "going on after epoch 2 of 4"
    assert_same_bits(resumed.last, unkilled.last)
    assert_same_bits(resumed.best, unkilled.best)
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in unkilled.epochs]


class Interrupts(Quiet):
    """Ends the process, as Ctrl-C would, when the line of an epoch has been said."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def say(self, line: str) -> None:
        if line.startswith(f"net {self.epoch}/"):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "adamw", "lr": 0.003},
        {"schedule": "step", "milestones": (1, 2), "warmup_epochs": 0.5},
        {"precision": "bf16"},
        {"ema_decay": 0.9, "channels_last": False},
    ],
    ids=lambda config: ",".join(config),
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interrupted_training_goes_on_bit_for_bit(
    data: Data, tmp_path: Path, config: dict[str, Any], epoch: int
) -> None:
    config = {"epochs": 3, "batch_size": 256, **config}
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", progress=Interrupts(epoch), **config)

    resumed = run(data, tmp_path / "broken", **config)

    assert_same_bits(resumed.last, run(data, tmp_path / "whole", **config).last)


@pytest.mark.parametrize("left", [0, 1, 1000, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named_and_the_training_begins_again(
    data: Data, tmp_path: Path, listening: Any, left: float
) -> None:
    whole = run(data, tmp_path / "t", batch_size=256)
    path = tmp_path / "t" / "training.pt"
    content = path.read_bytes()
    path.write_bytes(content[: left if isinstance(left, int) else round(left * len(content))])

    again = run(data, tmp_path / "t", batch_size=256, progress=listening)

    assert f"{path} is truncated or altered" in listening.lines[0]
    assert "begins again" in listening.lines[0]
    assert_same_bits(again.last, whole.last)


# --- precision and memory format ---------------------------------------------------------------------------------------


@contextmanager
def faster(monkeypatch: pytest.MonkeyPatch, precision: str) -> Iterator[None]:
    """A machine on which `precision` is the faster one."""

    def seconds(*args: object, bf16: bool) -> float:
        return 1.0 if bf16 == (precision == "bf16") else 2.0

    with monkeypatch.context() as patch:
        patch.setattr(precision_of_training, "_step_seconds", seconds)
        patch.setattr(precision_of_training, "has_bf16_kernels", lambda device: True)
        yield


@contextmanager
def without_bf16_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU for which oneDNN has none."""
    with monkeypatch.context() as patch:
        for module in (precision_of_training, training):
            patch.setattr(module, "has_bf16_kernels", lambda device: False)
        yield


def test_where_no_kernel_computes_in_bf16_auto_takes_fp32_and_tries_nothing(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> float:
        raise AssertionError("a step was timed")

    monkeypatch.setattr(precision_of_training, "_step_seconds", never)
    with without_bf16_kernels(monkeypatch):
        assert run(data, tmp_path, precision="auto", epochs=1).precision == "fp32"

    assert read_json(tmp_path / "decided.json")["precision"] == "fp32"


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("fp32", False), ("auto", False)])
def test_bf16_that_was_asked_for_and_has_no_kernel_is_warned_of(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: Any, precision: str, warned: bool
) -> None:
    with without_bf16_kernels(monkeypatch):
        run(data, tmp_path, precision=precision, epochs=1, progress=listening)

    assert any("has no BF16 kernels" in line and "precision: auto" in line for line in listening.lines) is warned


@pytest.mark.parametrize(("first", "later"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_the_precision_that_auto_chose_is_kept_when_the_training_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, later: str
) -> None:
    with faster(monkeypatch, first), pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "t", precision="auto", progress=Interrupts(1))
    with faster(monkeypatch, later):
        resumed = run(data, tmp_path / "t", precision="auto")

    assert resumed.precision == first
    assert_same_bits(resumed.last, run(data, tmp_path / "said", precision=first).last)


def test_measuring_the_precision_leaves_no_trace_in_the_weights(data: Data, tmp_path: Path) -> None:
    measured = run(data, tmp_path / "auto", precision="auto", epochs=1)

    assert_same_bits(measured.last, run(data, tmp_path / "said", precision=measured.precision, epochs=1).last)


def test_bf16_is_not_fp32(data: Data, tmp_path: Path) -> None:
    weights = [run(data, tmp_path / name, precision=name, epochs=1).last["0.weight"] for name in ("bf16", "fp32")]

    assert not torch.equal(*weights)


def test_a_decided_precision_on_disk_is_taken_without_measuring(data: Data, tmp_path: Path) -> None:
    write_json(tmp_path / "decided.json", {"precision": "bf16", "step_seconds": {}})

    assert run(data, tmp_path, precision="auto", epochs=1).precision == "bf16"


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("stride", "expected"), [(1, True), (2, False)])
def test_only_a_net_that_survives_it_is_trained_in_channels_last_however_it_comes(
    data: Data, tmp_path: Path, stride: int, expected: bool, before: torch.memory_format
) -> None:
    layers = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=stride)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(memory_format=before)

    run(data, tmp_path, net=net, epochs=1)

    assert layers[1].weight.is_contiguous(memory_format=torch.channels_last) is expected
    assert layers[1].weight.is_contiguous() is not expected


@pytest.mark.parametrize("at", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_a_flipped_bit_in_a_checkpoint_never_changes_what_a_training_ends_with(
    data: Data, tmp_path: Path, at: float
) -> None:
    config = {"epochs": 2, "batch_size": 256}
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "t", progress=Interrupts(1), **config)
    path = tmp_path / "t" / "training.pt"
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0x40
    path.write_bytes(content)

    again = run(data, tmp_path / "t", **config)

    assert_same_bits(again.last, run(data, tmp_path / "whole", **config).last)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_decided_precision_that_is_cut_short_is_measured_again(data: Data, tmp_path: Path, content: str) -> None:
    (tmp_path / "decided.json").write_text(content)

    assert run(data, tmp_path, precision="auto", epochs=1).precision in ("fp32", "bf16")


def test_a_profiler_finds_each_part_of_an_epoch_by_its_name(data: Data, tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(data, tmp_path, epochs=2, batch_size=256)

    counts = {event.key: event.count for event in profiled.key_averages() if event.key.startswith("edgestill.")}
    num_steps = 2 * data.num_train_batches(256)
    assert counts == {
        **{f"edgestill.{part}": num_steps for part in ("data", "forward", "teacher", "loss", "backward", "optimizer")},
        "edgestill.validation": 2,
    }
