"""The feature loss: what the hooks read, which projector the shapes ask for, and its value and gradients in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.learning.losses.features import FeatureLoss
from targets.errors import RecipeError

X_NCHW = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(width: int, stride: int = 1) -> nn.Sequential:
    """Layers 0 convolution, 1 ReLU in place, 2 pooling, 3 flatten, 4 head."""
    torch.manual_seed(width)
    layers = [nn.Conv2d(2, width, 3, stride, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, 5)).double()


class Tokens(nn.Module):
    """Embeds patches into (N, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.embed(x_NCHW.reshape(len(x_NCHW), -1, 16)).mean(1)


def loss_of(student: nn.Module, teacher: nn.Module, student_layer: str, teacher_layer: str) -> FeatureLoss:
    feature = FeatureLoss(
        student, teacher, student_layer=student_layer, teacher_layer=teacher_layer, example_NCHW=X_NCHW
    )
    return feature.double()


def passed(feature: FeatureLoss, student: nn.Module, teacher: nn.Module) -> Tensor:
    feature.listen()
    student(X_NCHW)
    with torch.no_grad():
        teacher(X_NCHW)
    value: Tensor = feature()
    return value


def test_the_loss_is_the_mean_square_between_the_projected_and_the_teachers_maps() -> None:
    student, teacher = net(3, stride=1), net(6, stride=2)
    feature = loss_of(student, teacher, "0", "0")

    found_N = passed(feature, student, teacher)

    maps, wanted = student[0](X_NCHW).detach().numpy(), teacher[0](X_NCHW).detach().numpy()
    pooled = maps.reshape(3, 3, 4, 2, 4, 2).mean((3, 5))  # 8x8 to the teacher's 4x4
    weight, bias = (p.detach().numpy() for p in feature.projector.parameters())
    projected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], pooled) + bias[None, :, None, None]
    np.testing.assert_allclose(found_N.detach(), ((projected - wanted) ** 2).mean((1, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "projector"),
    [
        (net(3), net(6), ("0", "0"), nn.Conv2d),
        (net(6), net(6), ("0", "0"), nn.Identity),
        (net(3), net(6), ("3", "3"), nn.Linear),
        (net(3), net(6), ("0", "3"), nn.Linear),  # a map against a vector: the map is averaged
        (Tokens(3).double(), Tokens(6).double(), ("embed", "embed"), nn.Linear),
        (net(3), Tokens(6).double(), ("0", "embed"), nn.Linear),
    ],
    ids=["maps", "same width", "vectors", "map to vector", "tokens", "map to tokens"],
)
def test_the_projector_is_what_the_shapes_ask_for(
    student: nn.Module, teacher: nn.Module, layers: tuple[str, str], projector: type[nn.Module]
) -> None:
    feature = loss_of(student, teacher, *layers)

    assert type(feature.projector) is projector
    assert passed(feature, student, teacher).shape == (3,)


def test_student_and_projector_learn_from_it_and_the_teacher_does_not() -> None:
    student, teacher = net(3), net(6)
    feature = loss_of(student, teacher, "0", "0")

    passed(feature, student, teacher).mean().backward()

    assert student[0].weight.grad is not None
    assert all(p.grad is not None for p in feature.projector.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_agree_with_finite_differences() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale_C, self.body = torch.ones(2, 1, 1, dtype=torch.float64), net(2)

        def forward(self, x_NCHW: Tensor) -> Tensor:
            out_NK: Tensor = self.body(x_NCHW * self.scale_C)
            return out_NK

    student, teacher = Scaled(), net(3)
    feature = loss_of(student, teacher, "body.0", "0")

    def of_scale(scale_C: Tensor) -> Tensor:
        student.scale_C = scale_C
        return passed(feature, student, teacher)

    assert torch.autograd.gradcheck(of_scale, torch.tensor([[[0.7]], [[1.3]]], dtype=torch.float64, requires_grad=True))


def test_a_relu_in_place_after_the_layer_does_not_write_over_what_was_read() -> None:
    student, teacher = net(3), net(3)
    student.load_state_dict(teacher.state_dict())
    feature = loss_of(
        student, teacher, "0", "1"
    )  # before the ReLU against after it: the negative part is the difference

    found_N = passed(feature, student, teacher)

    negative = student[0](X_NCHW).detach().clamp_max(0)
    torch.testing.assert_close(found_N.detach(), negative.square().mean((1, 2, 3)))


def test_a_copy_of_the_student_is_read_in_its_place() -> None:
    student, teacher = net(3), net(6)
    feature = loss_of(student, teacher, "0", "0")

    feature.listen()
    copy.deepcopy(student)(X_NCHW)
    teacher(X_NCHW)

    assert feature().shape == (3,)


def test_nothing_is_held_of_a_pass_that_was_not_listened_to_and_hooks_go() -> None:
    student, teacher = net(3), net(6)
    feature = loss_of(student, teacher, "0", "0")

    student(X_NCHW)
    teacher(X_NCHW)

    with pytest.raises(RecipeError):
        feature()
    feature.remove()
    assert not student[0]._forward_hooks
    assert not teacher[0]._forward_hooks


def test_a_wrong_layer_name_lists_the_layers_that_exist() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer1 = nn.Conv2d(2, 3, 3), net(3)

    with pytest.raises(RecipeError, match=r"teacher_layer=layr1.*did you mean 'layer1'") as refused:
        loss_of(net(3), Named().double(), "0", "layr1")

    assert "Its layers: stem, layer1, layer1.0, layer1.1, layer1.2, layer1.3, layer1.4." in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_layer_that_gives_no_features_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.net = net(3)

        def forward(self, x_NCHW: Tensor) -> Tensor:
            out_NK: Tensor = self.net(x_NCHW)
            return out_NK

    with pytest.raises(RecipeError, match="student_layer=unused gives no tensor"):
        loss_of(Twice(), net(3), "unused", "0")
