"""BatchNorm folding on whole networks of three libraries, and what it must refuse."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.learning.models import build_model, fold_batchnorm
from pipeline.recipe import ModelConfig
from targets.errors import ModelError

pytestmark = pytest.mark.integration

SIZE = 64
# name -> BatchNorms that must stay, because an addition feeds them (wrn_16_1: or also a shortcut)
NETS = {
    "resnet8": 0,
    "resnet20": 0,
    "wrn_16_1": 7,
    "wrn_16_2": 6,
    "torchvision:resnet18": 0,
    "torchvision:mobilenet_v2": 0,
    "torchvision:mobilenet_v3_small": 0,
    "torchvision:shufflenet_v2_x0_5": 0,
    "timm:mobilenetv3_small_100": 0,
    "timm:efficientnet_lite0": 0,
    "timm:tf_efficientnet_lite0": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers: a second thread only waits, and on a busy machine it waits long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return trained(build_model(ModelConfig(model=name), channels=3, image_size=(SIZE, SIZE), num_classes=10))


def trained(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after a training, gammas of both signs and zero among them."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.copy_(0.3 * torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.2)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, std=0.3, generator=generator)
                norm.weight.data[0] = 0.0
    return model


def num_batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def assert_same(model: nn.Module, folded: nn.Module, x: torch.Tensor, tolerance: float = 1e-6) -> None:
    with torch.no_grad():
        expected, found = copy.deepcopy(model).eval()(x), folded(x)
    assert float((expected - found).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(("name", "num_left"), NETS.items())
def test_whole_networks_are_folded_and_give_the_same_logits(name: str, num_left: int) -> None:
    model = built(name).double()  # in float64 rounding hides nothing

    folded = fold_batchnorm(model)

    assert num_batchnorms(model) > num_left
    assert num_batchnorms(folded) == num_left
    assert type(folded) is type(model)
    assert_same(model, folded, torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), tolerance=1e-10)


def test_the_given_model_is_left_as_it_was() -> None:
    model = built("resnet8").train()
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()

    folded = fold_batchnorm(model)

    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert model.training
    assert not folded.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_folding_again_changes_nothing() -> None:
    once = fold_batchnorm(built("resnet8"))

    twice = fold_batchnorm(once)

    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())


class Chain(nn.Module):
    """Layers one after another, in a module with a forward of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(6, affine=False),
            (2, 4, 9, 9),
        ),
        (nn.Conv1d(4, 6, 5), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv3d(2, 3, 3, bias=False), nn.BatchNorm3d(3, eps=0.1), (2, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Linear(7, 5), nn.BatchNorm1d(5), (3, 7)),
        (nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5), (3, 7)),
    ],
    ids=["grouped dilated", "reflect, no affine", "1d", "3d", "transposed grouped", "linear", "linear without bias"],
)
def test_every_kind_of_layer_is_folded(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = trained(Chain(layer, nn.Dropout(0.5), norm, nn.ReLU()))

    folded = fold_batchnorm(model)

    assert num_batchnorms(folded) == 0
    assert_same(model, folded, torch.randn(shape))


def test_an_outermost_sequential_is_held_by_a_module() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

    folded = fold_batchnorm(model)

    assert not isinstance(folded, nn.Sequential)
    assert_same(model, folded, torch.randn(2, 3, 8, 8))


def test_the_activation_of_timms_batchnorm_is_kept() -> None:
    from timm.layers import BatchNormAct2d

    model = trained(Chain(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.Hardswish)))

    folded = fold_batchnorm(model)

    assert [type(m) for m in folded.modules()].count(nn.Hardswish) == 1
    assert_same(model, folded, torch.randn(2, 3, 8, 8))


def test_a_batchnorm_that_an_addition_feeds_stays_and_is_no_error() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x) + x)

    model = trained(PreActivation())

    folded = fold_batchnorm(model)

    assert num_batchnorms(folded) == 1
    assert_same(model, folded, torch.randn(2, 3, 4, 4), tolerance=0)


class Shared(nn.Module):
    """One convolution or one BatchNorm called twice, a functional one, or one read past its BatchNorm: by `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.other, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed = self.conv(x)
        if self.way == "convolution twice":
            return self.norm(self.conv(fed))
        if self.way == "BatchNorm twice":
            return self.norm(self.other(self.norm(fed)))
        if self.way == "functional":
            return self.norm(nn.functional.conv2d(x, self.conv.weight))
        return self.norm(fed) + fed


@pytest.mark.parametrize("way", ["convolution twice", "BatchNorm twice", "functional"])
def test_a_convolution_fed_batchnorm_that_cannot_go_is_refused_by_name(way: str) -> None:
    with pytest.raises(ModelError, match="'norm' cannot be folded"):
        fold_batchnorm(Shared(way))


def test_a_batchnorm_whose_convolution_a_shortcut_reads_too_stays() -> None:
    model = trained(Shared("read elsewhere"))

    folded = fold_batchnorm(model)

    assert num_batchnorms(folded) == 1
    assert_same(model, folded, torch.randn(2, 3, 4, 4), tolerance=0)


def test_a_batchnorm_without_running_statistics_is_refused() -> None:
    with pytest.raises(ModelError, match="running statistics"):
        fold_batchnorm(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))


def test_a_convolution_that_standardises_its_weight_is_refused() -> None:
    from timm.layers import StdConv2d

    with pytest.raises(ModelError, match="StdConv2d"):
        fold_batchnorm(trained(Chain(StdConv2d(3, 4, 3), nn.BatchNorm2d(4))))


def test_an_unknown_kind_of_batchnorm_is_refused() -> None:
    class Squared(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 2

    with pytest.raises(ModelError, match="Squared"):
        fold_batchnorm(trained(Chain(nn.Conv2d(3, 4, 3), Squared(4))))


def test_a_forward_that_decides_by_value_is_refused_with_the_reason() -> None:
    class Deciding(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="cannot be traced"):
        fold_batchnorm(Deciding(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_default_arguments_of_forward_do_not_stop_the_trace() -> None:
    class WithFeatures(Chain):
        def forward(self, x: torch.Tensor, features: bool = False) -> torch.Tensor:
            return (self.layers(x), x) if features else self.layers(x)

    model = trained(WithFeatures(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

    assert_same(model, fold_batchnorm(model), torch.randn(2, 3, 8, 8))


def test_the_trainable_stay_trainable_and_the_frozen_frozen() -> None:
    model = trained(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model.layers[0].weight.requires_grad_(False)

    folded = fold_batchnorm(model)

    assert [p.requires_grad for p in folded.parameters()] == [False, False, True, True]
