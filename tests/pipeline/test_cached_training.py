"""A training that reads its teacher's answers from disk against one that asks it in every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import PreparedData
from pipeline.learning import soft_labels as asking
from pipeline.learning.curriculum import SampleCurriculum
from pipeline.learning.data import Data
from pipeline.learning.distillation import Distillation
from pipeline.learning.label_cache import LabelCache
from pipeline.learning.soft_labels import cache_soft_labels, labels_of, transform_digest, view_logits, weights_digest
from pipeline.learning.training import Trained, train
from pipeline.learning.views import view_seeds
from pipeline.progress import Quiet
from pipeline.recipe import AugmentConfig, CurriculumConfig, DataConfig, DistillConfig, TrainConfig
from pipeline.stages.data import prepare_data
from targets.errors import RecipeError

pytestmark = pytest.mark.integration

SEED = 5
VIEWS = view_seeds(SEED, 2)
TEMPERATURE = 4.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    directory = tmp_path_factory.mktemp("data")
    config = DataConfig(source="digits", test=0.5, calibration=32, augment=AugmentConfig(crop=1))
    prepare_data(config, SEED, directory)
    return Data.load(PreparedData(directory, ""))


def small_net(width: int, seed: int = 0) -> nn.Sequential:
    """With BatchNorm and dropout: in training mode a teacher would answer otherwise."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, 2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, 10))


def teacher() -> nn.Sequential:
    """Logits of some size, as a trained one has."""
    net = small_net(8, seed=1)
    with torch.no_grad():
        net[-1].weight.mul_(20)
    return net.train()


def cache_of(
    data: Data, directory: Path, *, dtype: str = "fp32", top_k: int | None = None, **config: Any
) -> LabelCache:
    net = teacher()
    of = labels_of(net, data, "digest of the data", VIEWS, dtype=dtype, top_k=top_k)
    return cache_soft_labels(net, data, of, directory, TrainConfig(**{"precision": "fp32", **config}), Quiet())


@dataclass
class Heard:
    """What the loss was given and what it said, step by step."""

    losses: list[float] = field(default_factory=list)
    teacher_NK: list[Tensor] = field(default_factory=list)
    student_NK: list[Tensor] = field(default_factory=list)


class Hears(Distillation):
    """The recipe's own objective, listened to."""

    heard: Heard

    def forward(self, student_NK: Tensor, teacher_NK: Tensor | None, labels_N: Tensor) -> Tensor:
        loss = super().forward(student_NK, teacher_NK, labels_N)
        assert teacher_NK is not None
        self.heard.losses.append(float(loss.detach()))
        self.heard.teacher_NK.append(teacher_NK)
        self.heard.student_NK.append(student_NK.detach())
        return loss


class Interrupts(Quiet):
    """Ends the process, as Ctrl-C would, when the line of an epoch has been said."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def say(self, line: str) -> None:
        if line.startswith(f"net {self.epoch}/"):
            raise KeyboardInterrupt


def run(
    data: Data,
    directory: Path,
    labels: LabelCache | None,
    progress: Quiet | None = None,
    *,
    epoch_length: str = "shown",
    **config: Any,
) -> tuple[Trained, Heard]:
    """Four epochs on a curriculum that shows a part; the teacher in person where there are no labels."""
    training = TrainConfig(**{"epochs": 4, "batch_size": 100, "precision": "fp32", "lr": 0.05, **config})
    pacing = CurriculumConfig(start_fraction=0.3, full_at=0.75, pacing="linear", epoch_length=epoch_length)
    whole = DistillConfig(model="m", train=training, curriculum=pacing, temperature=TEMPERATURE)
    samples = SampleCurriculum(pacing, data, teacher(), seed=SEED, batch_size=training.batch_size)
    objective = Hears(whole, training, samples=samples)
    heard = objective.heard = Heard()
    trained = train(
        small_net(4),
        data,
        objective,
        training,
        seed=SEED,
        checkpoint_dir=directory,
        progress=progress or Quiet(),
        label="net",
        teacher=teacher() if labels is None else None,
        labels=labels,
        view_seeds=VIEWS,
    )
    return trained, heard


# --- the same losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch_length", ["shown", "all"])
def test_cached_in_float32_a_training_has_the_losses_of_one_that_asks_its_teacher(
    data: Data, tmp_path: Path, epoch_length: str
) -> None:
    asked, by_asking = run(data, tmp_path / "online", None, epoch_length=epoch_length)
    read, by_reading = run(data, tmp_path / "cached", cache_of(data, tmp_path / "cache"), epoch_length=epoch_length)

    images = [epoch.num_images for epoch in read.epochs]
    whole = [data.num_train - 1, data.num_train]  # one sample that is left over is no batch
    assert images[0] in (whole if epoch_length == "all" else [round(0.3 * data.num_train)])
    assert images[-1] == data.num_train
    assert [epoch.shown_fraction for epoch in read.epochs] == [epoch.shown_fraction for epoch in asked.epochs]
    assert read.epochs[0].shown_fraction == pytest.approx(0.3, abs=1e-3)
    for online_NK, cached_NK in zip(by_asking.teacher_NK, by_reading.teacher_NK, strict=True):
        torch.testing.assert_close(
            cached_NK, online_NK, rtol=1e-5, atol=1e-4
        )  # batches of another size round otherwise
    assert by_reading.losses == pytest.approx(by_asking.losses, rel=1e-4)
    assert max(float(one.abs().max()) for one in by_asking.teacher_NK) > 5


def test_cached_in_float16_the_losses_are_within_what_its_rounding_may_move(data: Data, tmp_path: Path) -> None:
    still = {"lr": 1e-9}  # so that the student is the same in both
    _, by_asking = run(data, tmp_path / "online", None, **still)
    _, by_reading = run(data, tmp_path / "cached", cache_of(data, tmp_path / "cache", dtype="fp16"), **still)

    differences = []
    for step, (t_NK, s_NK) in enumerate(zip(by_asking.teacher_NK, by_asking.student_NK, strict=True)):
        # d/dz_j of T^2 KL is T p_j (ln p_j / q_j - KL): to first order at most 2 T |dz| max |ln p / q|, at weight 0.9.
        apart = ((t_NK / TEMPERATURE).log_softmax(1) - (s_NK / TEMPERATURE).log_softmax(1)).abs().max()
        may_move = 0.9 * 2 * TEMPERATURE * float(t_NK.abs().max()) / 2048 * float(apart)
        differences.append(abs(by_reading.losses[step] - by_asking.losses[step]))
        assert differences[-1] <= 1.1 * may_move + 1e-5
    assert max(differences) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_cache_holds_what_a_teacher_that_is_asked_in_that_precision_says(
    data: Data, tmp_path: Path, precision: str, channels_last: bool
) -> None:
    config = {"precision": precision, "channels_last": channels_last}
    _, by_asking = run(data, tmp_path / "online", None, epochs=1, **config)
    _, by_reading = run(data, tmp_path / "cached", cache_of(data, tmp_path / "cache", **config), epochs=1, **config)

    close = {"rtol": 1e-5, "atol": 1e-4} if precision == "fp32" else {"rtol": 2**-6, "atol": 0.2}
    for online_NK, cached_NK in zip(by_asking.teacher_NK, by_reading.teacher_NK, strict=True):
        torch.testing.assert_close(cached_NK, online_NK, **close)


@pytest.mark.parametrize(("dtype", "top_k"), [("fp32", None), ("fp16", 3)])
def test_a_killed_training_that_reads_its_labels_goes_on_bit_for_bit(
    data: Data, tmp_path: Path, dtype: str, top_k: int | None
) -> None:
    labels = cache_of(data, tmp_path / "cache", dtype=dtype, top_k=top_k)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "broken", labels, Interrupts(3))

    again = cache_of(data, tmp_path / "cache", dtype=dtype, top_k=top_k)
    resumed, heard = run(data, tmp_path / "broken", again)

    whole, all_heard = run(data, tmp_path / "whole", labels)
    assert [key for key in whole.last if not torch.equal(whole.last[key], resumed.last[key])] == []
    assert heard.losses == all_heard.losses[-len(heard.losses) :]
    assert 0 < len(heard.losses) < len(all_heard.losses)


# --- which view --------------------------------------------------------------------------------------------------------


class Watches(nn.Module):
    """A teacher that keeps a checksum of every image it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x_NCHW: Tensor) -> Tensor:
        weights = torch.arange(1, x_NCHW[0].numel() + 1, dtype=torch.float64)
        self.seen += (x_NCHW.double().flatten(1) @ weights).tolist()
        return torch.zeros(len(x_NCHW), 10)


@pytest.mark.parametrize(("seeds", "repeats"), [(VIEWS, True), (None, False)])
def test_epochs_show_the_views_in_turn_and_without_any_each_one_of_its_own(
    data: Data, tmp_path: Path, seeds: tuple[int, ...] | None, repeats: bool
) -> None:
    watches = Watches()
    train(
        small_net(4),
        data,
        lambda student_NK, teacher_NK, labels_N: student_NK.square().mean(),
        TrainConfig(epochs=4, batch_size=400, precision="fp32"),
        seed=SEED,
        checkpoint_dir=tmp_path,
        progress=Quiet(),
        label="net",
        teacher=watches,
        view_seeds=seeds,
    )

    num_train = data.num_train
    first, second, third, fourth = (sorted(watches.seen[at * num_train : (at + 1) * num_train]) for at in range(4))
    assert first != second
    assert (first == third, second == fourth) == (repeats, repeats)


def test_the_views_that_a_cache_holds_are_those_that_its_training_shows(data: Data, tmp_path: Path) -> None:
    other = view_seeds(SEED + 1, 2)
    net = teacher()
    of = labels_of(net, data, "", other, dtype="fp32", top_k=None)
    labels = cache_soft_labels(net, data, of, tmp_path / "cache", TrainConfig(precision="fp32"), Quiet())
    shown: list[int | None] = []
    of_an_epoch = Data.train_batches

    def noted(self: Data, *, view_seed: int | None = None, **asked: Any) -> Any:
        shown.append(view_seed)
        return of_an_epoch(self, view_seed=view_seed, **asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Data, "train_batches", noted)
        run(data, tmp_path / "t", labels)

    assert shown == [*other, *other]


# --- asking the teacher ------------------------------------------------------------------------------------------------


def test_the_teacher_is_asked_in_evaluation_mode_and_left_in_the_mode_it_had(data: Data, tmp_path: Path) -> None:
    net = teacher()
    asked = torch.cat(list(view_logits(net, data, VIEWS[1], bf16=False)))

    (batch,) = data.view_batches([torch.arange(data.num_train)], VIEWS[1])
    with torch.no_grad():
        torch.testing.assert_close(asked, teacher().eval()(batch.x_NCHW))
    assert net.training
    assert net[1].training


def test_a_killed_build_asks_again_only_for_the_views_it_lacks(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = asking.view_logits

    def noted(model: nn.Module, data: Data, view_seed: int, *, bf16: bool) -> Iterator[Tensor]:
        asked.append(view_seed)
        for number, logits_NK in enumerate(ask(model, data, view_seed, bf16=bf16)):
            if len(asked) == 2 and number == 1:
                raise KeyboardInterrupt
            yield logits_NK

    monkeypatch.setattr(asking, "view_logits", noted)
    with pytest.raises(KeyboardInterrupt):
        cache_of(data, tmp_path / "broken")
    resumed = cache_of(data, tmp_path / "broken")
    cache_of(data, tmp_path / "broken")

    assert asked == [VIEWS[0], VIEWS[1], VIEWS[1]]
    whole = cache_of(data, tmp_path / "whole")
    everything = torch.arange(data.num_train)
    assert all(torch.equal(resumed.logits(view, everything), whole.logits(view, everything)) for view in (0, 1))


def test_the_precision_that_was_found_faster_is_written_down_and_kept(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = cache_of(data, tmp_path / "measured", precision="auto").info["precision"]
    assert measured in ("fp32", "bf16")

    monkeypatch.setattr(asking, "_precision", lambda *_arguments: "bf16")
    assert cache_of(data, tmp_path / "other", precision="auto").info["precision"] == "bf16"
    assert cache_of(data, tmp_path / "measured", precision="auto").info["precision"] == measured


def test_a_top_k_that_leaves_nothing_out_is_refused(data: Data) -> None:
    with pytest.raises(RecipeError, match=r"distill\.cache\.top_k=10: the data have 10 classes"):
        labels_of(teacher(), data, "", VIEWS, dtype="fp16", top_k=10)


# --- digests -----------------------------------------------------------------------------------------------------------


def test_a_teachers_digest_is_of_its_weights_whatever_their_layout() -> None:
    net = teacher()
    digest = weights_digest(net)

    assert weights_digest(net.to(memory_format=torch.channels_last)) == digest == weights_digest(teacher().eval())
    with torch.no_grad():
        net[1].running_mean[0] += 1e-6
    assert weights_digest(net) != digest


def test_the_transforms_digest_is_of_all_that_changes_an_image(data: Data) -> None:
    digest = transform_digest(data)

    changes: list[dict[str, Any]] = [
        {"augment": {**data.augment, "flip": True}},
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"image_size": (9, 8)},
    ]
    assert len({transform_digest(replace(data, **change)) for change in changes} - {digest}) == len(changes)
