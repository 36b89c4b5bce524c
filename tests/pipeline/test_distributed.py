"""What several processes put together against what one computes; threads stand for processes (test_processes.py has real ones)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)
from torchvision.ops import StochasticDepth

from pipeline import launch
from pipeline.how import How
from pipeline.learning import distributed
from pipeline.learning.distributed import Share, taking
from pipeline.learning.fake_quantize import insert_fake_quantizers
from pipeline.learning.losses import dist, kd_loss
from pipeline.learning.losses.features import FeatureLoss
from pipeline.learning.whole_batch import whole_batch
from pipeline.processes import learn
from pipeline.run import run_recipe
from targets.errors import RecipeError

DOUBLE = torch.float64


# --- threads in place of processes -------------------------------------------------------------------------------------


@dataclass
class Exchange:
    """all_reduce among threads, which say which process they stand for."""

    num: int
    told: dict[int, Tensor] = field(default_factory=dict)
    who: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num, timeout=30)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.told[self.who.index] = x.clone()
        self.barrier.wait()
        total = sum(self.told[index] for index in range(self.num))
        self.barrier.wait()
        return x.copy_(total)

    def run(self, work: Callable[[int], Any], index: int) -> Any:
        self.who.index = index
        try:
            return work(index)
        except BaseException:
            self.barrier.abort()
            raise


def in_each(num: int, work: Callable[[int], Any]) -> list[Any]:
    """work(index) of `num` processes at the same time; what each returns."""
    exchange = Exchange(num)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(num) as pool:
        patch.setattr(distributed, "all_reduce", exchange.all_reduce)
        return list(pool.map(partial(exchange.run, work), range(num)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- the gradient of a loss on the whole batch -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(total=st.integers(1, 9), num=st.integers(1, 4), seed=st.integers(0, 99))
def test_processes_together_have_the_gradient_of_a_loss_that_couples_the_samples(
    total: int, num: int, seed: int
) -> None:
    x_NI, weight_KI, teacher_NK = random(total, 5, seed=seed), random(4, 5, seed=seed + 1), random(total, 4, seed=seed)

    def gradient(share: Share) -> tuple[float, Tensor]:
        leaf_KI = weight_KI.clone().requires_grad_()
        student_NK = share.gather(x_NI[share.rows] @ leaf_KI.T)
        loss = dist(student_NK, teacher_NK, temperature=2.0, beta=1.0, gamma=1.0).mean()
        loss.backward()
        assert leaf_KI.grad is not None
        return float(loss.detach()), leaf_KI.grad

    parts = in_each(num, lambda index: gradient(Share(total, index, num)))

    loss, expected = gradient(Share(total))
    assert [part for part, _ in parts] == pytest.approx([loss] * num, rel=1e-12)
    torch.testing.assert_close(sum(part for _, part in parts), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=9), num=st.integers(1, 4), seed=st.integers(0, 99))
def test_processes_together_have_the_gradient_where_some_samples_have_no_label(
    labels: list[int], num: int, seed: int
) -> None:
    total, labels_N = len(labels), torch.tensor(labels)
    x_NI, weight_KI, teacher_NK = random(total, 5, seed=seed), random(4, 5, seed=seed + 1), random(total, 4, seed=seed)

    def gradient(share: Share) -> Tensor:
        leaf_KI = weight_KI.clone().requires_grad_()
        student_NK = share.gather(x_NI[share.rows] @ leaf_KI.T)
        told_NK, told_N = share.gather(teacher_NK[share.rows]), share.gather(labels_N[share.rows])
        assert torch.equal(told_N, labels_N)
        kd_loss(student_NK, told_NK, told_N, temperature=2.0, weight=0.5, label_smoothing=0.1).backward()
        assert leaf_KI.grad is not None
        return leaf_KI.grad

    parts = in_each(num, lambda index: gradient(Share(total, index, num)))

    torch.testing.assert_close(sum(parts), gradient(Share(total)), rtol=1e-9, atol=1e-12)


@given(total=st.integers(0, 50), num=st.integers(1, 9))
def test_shares_cover_a_batch_in_its_order_and_differ_by_one_row_at_most(total: int, num: int) -> None:
    shares = [Share(total, index, num) for index in range(num)]

    if total < num:
        assert [share.rows for share in shares] == [slice(0, total)] * num
    else:
        assert [row for share in shares for row in range(total)[share.rows]] == list(range(total))
        sizes = [share.num_rows for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


class Featured:
    """A student and a teacher with a feature loss between them, of the same weights whenever they are made."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        nets = [nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU()) for width in (4, 6)]
        example_NCHW = torch.zeros(2, 3, 6, 6)
        self.loss = FeatureLoss(*nets, student_layer="0", teacher_layer="0", example_NCHW=example_NCHW).double()
        self.student, self.teacher = (net.double() for net in nets)

    def gradients(self, x_NCHW: Tensor, share: Share) -> list[Tensor]:
        """Of the student, of the projector."""
        self.loss.listen()
        with taking(share):
            self.student(x_NCHW[share.rows])
            self.teacher(x_NCHW[share.rows])
            value_N = self.loss()
        parameters = (*self.student.parameters(), *self.loss.parameters())
        return list(torch.autograd.grad(value_N.square().mean(), parameters))


def test_a_feature_loss_sees_the_whole_batch() -> None:
    x_NCHW, featured = random(5, 3, 6, 6), [Featured() for _ in range(3)]

    parts = in_each(2, lambda index: featured[index].gradients(x_NCHW, Share(5, index, 2)))

    alone = featured[2].gradients(x_NCHW, Share(5))
    for one, other, expected in zip(*(part[:2] for part in (*parts, alone)), strict=True):
        close(one + other, expected)
    for one, other, expected in zip(*(part[2:] for part in (*parts, alone)), strict=True):
        close(one, expected)  # the projector's is in full in each
        close(other, expected)


# --- BatchNorm ---------------------------------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.BatchNorm1d(3), ()),
    "tokens": (lambda: nn.BatchNorm1d(3), (4,)),
    "maps": (lambda: nn.BatchNorm2d(3), (4, 5)),
    "no weights": (lambda: nn.BatchNorm2d(3, affine=False), (4, 5)),
    "mean of all batches": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 5)),
    "nothing kept": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 5)),
    "timm's, with its ReLU": (lambda: BatchNormAct2d(3), (4, 5)),
}


@pytest.mark.parametrize("total", [2, 5, 6])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_that_of_the_joined_batch_forwards_backwards_and_in_what_it_keeps(name: str, total: int) -> None:
    make, shape = NORMS[name]
    batches = [3 + 2 * random(total, 3, *shape, seed=seed) for seed in range(2)]
    upstream = random(total, 3, *shape, seed=9)

    def steps(share: Share) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        norm = make().double().train()
        outputs, gradients = [], []
        for batch in batches:
            x = batch[share.rows].clone().requires_grad_()
            with whole_batch(share):
                y = norm(x)
            outputs.append(y.detach())
            gradients.append(torch.autograd.grad((y.square() * upstream[share.rows]).sum(), [x, *norm.parameters()]))
        return outputs, gradients, norm.state_dict()

    num = 2
    parts = in_each(num, lambda index: steps(Share(total, index, num)))

    outputs, gradients, kept = steps(Share(total))
    for batch in range(2):
        close(torch.cat([part[0][batch] for part in parts]), outputs[batch])
        of_x, *of_parameters = gradients[batch]
        close(torch.cat([part[1][batch][0] for part in parts]), of_x)
        for number, expected in enumerate(of_parameters, 1):
            close(sum((part[1][batch][number] for part in parts), torch.zeros(3, dtype=DOUBLE)), expected)
    for _, _, state in parts:
        assert state.keys() == kept.keys()
        for key, expected in kept.items():
            close(state[key].double(), expected.double())


def test_batch_norm_that_evaluates_exchanges_nothing() -> None:
    norm, x = nn.BatchNorm2d(3).double().eval(), random(4, 3, 2, 2)

    with whole_batch(Share(8, 1, 2)):  # nobody would answer
        found = norm(x)

    close(found, norm(x))


class Preactivated(nn.Module):
    """With BatchNorm before convolutions, which cannot be folded, and whose output NNCF quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.layers(x_NCHW)
        return logits_NK


def test_a_quantized_net_has_the_same_gradient_with_batch_norm_behind_its_quantizers() -> None:
    x_NCHW = random(6, 3, 6, 6).float()
    torch.manual_seed(0)
    net = insert_fake_quantizers(Preactivated().eval(), [x_NCHW], x_NCHW[:1]).train()
    nets = [net, copy.deepcopy(net), copy.deepcopy(net)]

    def gradients(net: nn.Module, share: Share) -> list[Tensor]:
        with whole_batch(share):
            logits_NK = share.gather(net(x_NCHW[share.rows]))
        return list(torch.autograd.grad(logits_NK.square().sum(), [p for p in net.parameters() if p.requires_grad]))

    parts = in_each(2, lambda index: gradients(nets[index], Share(6, index, 2)))

    for one, other, expected in zip(*parts, gradients(nets[2], Share(6)), strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-4, atol=1e-6)


# --- what is drawn at random -------------------------------------------------------------------------------------------

DRAWN: dict[str, tuple[nn.Module, tuple[int, ...], torch.memory_format]] = {
    "dropout": (nn.Dropout(0.4), (5, 7), torch.contiguous_format),
    "dropout of channels_last": (nn.Dropout(0.4), (5, 3, 4, 2), torch.channels_last),
    "dropout in place": (nn.Dropout(0.4, inplace=True), (5, 7), torch.contiguous_format),
    "dropout of tokens": (nn.Sequential(nn.Flatten(0, 1), nn.Dropout(0.4)), (5, 3, 6), torch.contiguous_format),
    "dropout of channels": (nn.Dropout2d(0.4), (5, 8, 2, 2), torch.contiguous_format),
    "timm's stochastic depth": (DropPath(0.5), (5, 3, 2, 2), torch.contiguous_format),
    "torchvision's stochastic depth": (StochasticDepth(0.5, "row"), (5, 3, 2, 2), torch.contiguous_format),
    "a batch's stochastic depth": (StochasticDepth(0.5, "batch"), (5, 3, 2, 2), torch.contiguous_format),
}


@pytest.mark.parametrize("name", DRAWN)
def test_processes_draw_what_one_would_draw_for_the_whole_batch(name: str) -> None:
    net, shape, layout = DRAWN[name]
    x = random(*shape) if len(shape) < 4 else random(*shape).to(memory_format=layout)
    net = nn.Sequential(net, nn.Dropout(0.3)).train()  # the generator stands where it would, too

    def output(share: Share) -> Tensor:
        torch.manual_seed(3)
        with whole_batch(share):
            found: Tensor = net(x[share.rows].clone(memory_format=torch.preserve_format))
        return found

    found = torch.cat([output(Share(5, index, 2)) for index in range(2)])

    assert torch.equal(found, output(Share(5)))
    assert not torch.equal(found, x.reshape(found.shape))


def test_what_does_not_train_is_not_drawn() -> None:
    x_NI = random(3, 4)

    with whole_batch(Share(6, 0, 2)):
        assert torch.equal(F.dropout(x_NI, 0.5, training=False), x_NI)


# --- how they were started ---------------------------------------------------------------------------------------------


def test_a_launcher_that_starts_one_process_of_two_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    with pytest.raises(RecipeError, match="started one"):
        run_recipe(Path("recipes/quickstart.yaml"))


def test_of_several_processes_only_the_first_refuses_a_verb_that_has_no_use_for_them(
    edgestill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.setenv("RANK", "0")
    first = edgestill("recipe", "schema")
    monkeypatch.setenv("RANK", "1")
    second = edgestill("recipe", "schema")

    assert "2 processes were started" in first.err
    assert (first.code, second.code) == (2, 2)
    assert (second.out, second.err) == ("", "")


def test_a_stage_learns_in_several_processes_only_under_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(RecipeError, match="only run_recipe knows"):
        learn(lambda out_dir, how: None, tmp_path, How())


def test_a_process_alone_is_the_first_of_one() -> None:
    assert (launch.process_index(), launch.num_processes()) == (0, 1)
