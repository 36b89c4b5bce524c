"""Normalisation in the graph, predictions over batches, and counting."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.learning.models import Normalized, accuracy, count_macs, count_parameters, predict
from targets.errors import ModelError


@dataclass(frozen=True)
class Labelled:
    x_NCHW: torch.Tensor
    labels_N: torch.Tensor


def batches() -> list[Labelled]:
    generator = torch.Generator().manual_seed(0)
    return [
        Labelled(torch.randn(n, 2, 1, 1, generator=generator), torch.randint(2, (n,), generator=generator))
        for n in (5, 3)
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalized_is_the_three_step_form(dtype: torch.dtype) -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    x_NCHW = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)

    found = Normalized(nn.Identity(), mean, std)(x_NCHW.to(dtype))

    expected = (x_NCHW.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.0,)), ((0.5,), (float("nan"),)), ((0.5, 0.5), (0.2,))])
def test_normalisation_without_a_spread_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="std"):
        Normalized(nn.Identity(), mean, std)


def test_predict_concatenates_evaluated_logits_and_restores_each_modules_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Dropout(0.9)).train()
    model[1].eval()

    logits_NK = predict(model, batches())

    norm = model[1]
    expected = torch.cat([batch.x_NCHW.flatten(1) for batch in batches()]) / torch.sqrt(1 + torch.tensor(norm.eps))
    torch.testing.assert_close(logits_NK, expected)
    assert not logits_NK.requires_grad
    assert [module.training for module in model] == [True, False, True]


def test_the_mode_is_restored_when_the_model_fails() -> None:
    model = nn.Linear(7, 2).train()

    with pytest.raises(RuntimeError):
        predict(model, batches())

    assert model.training


def test_predictions_serve_as_soft_labels_in_a_loss() -> None:
    logits_NK = predict(nn.Flatten(), batches())

    weight = torch.ones(2, requires_grad=True)
    (logits_NK * weight).sum().backward()

    torch.testing.assert_close(weight.grad, logits_NK.sum(0))


def test_accuracy_is_the_share_of_right_predictions() -> None:
    x_N2, labels_N = torch.cat([b.x_NCHW.flatten(1) for b in batches()]), torch.cat([b.labels_N for b in batches()])
    num_right = sum(int(row[1] > row[0]) == label for row, label in zip(x_N2.tolist(), labels_N.tolist(), strict=True))

    assert accuracy(nn.Flatten(), batches()) == num_right / 8


def test_parameters_are_counted_once_and_buffers_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight

    assert count_parameters(model) == 9 + 3 + 3 + 6


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10), 8 * 10 * 10 * 3 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (4, 9, 9), 8 * 4 * 4 * 1 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5), 4 * 5 * 5 * 3 * 4),
        (nn.Conv1d(2, 3, 5), (2, 20), 3 * 16 * 2 * 5),
        (nn.Linear(7, 5), (7,), 35),
        (nn.Linear(7, 5), (11, 7), 11 * 35),
    ],
)
def test_macs_are_those_counted_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(layer, shape) == macs


def test_counting_leaves_no_hook_and_no_statistics_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)).train()

    assert count_macs(model, (1, 3, 3)) == count_macs(model, (1, 3, 3)) == 9 * (2 + 4)

    assert model.training
    assert int(model[1].num_batches_tracked) == 0
