"""The share of a processor's peak: operations counted against the layers' own shapes, and what the table says of given figures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence.training_peak import STUDENT, flop, network, peak, share, text


def multiply_adds(name: str) -> tuple[list[int], int]:
    """Of every layer with weights in one forward pass, an image each, and of the first of them: by the shapes that they see."""
    net, found = network(name), []

    def note(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            found.append(layer.weight[0].numel() * out[0].numel())
        elif isinstance(layer, nn.Linear):
            found.append(layer.weight.numel())

    for layer in net.modules():
        layer.register_forward_hook(note)
    net(torch.zeros(2, 3, 32, 32))
    return found, found[0]


def test_an_operation_is_counted_for_each_multiplication_and_each_addition_there_and_back() -> None:
    found, first = multiply_adds(STUDENT)

    assert flop(STUDENT, trained=False) == 2 * sum(found)
    # Back: to the weights and to what came in, but for the image, of which no gradient is asked.
    assert flop(STUDENT, trained=True) == 2 * (3 * sum(found) - first)


def test_the_peak_is_a_number_of_operations_a_second_that_a_processor_can_have() -> None:
    assert 1e8 < peak(torch.device("cpu"), torch.float32) < 1e15


def test_the_share_is_that_of_the_peak_beside_it_and_the_table_gives_medians() -> None:
    def told(images_per_s: float, peak_flop_per_s: float) -> dict[str, object]:
        return {"images_per_s": images_per_s, "peak_flop_per_s": peak_flop_per_s, "precision": "bf16"}

    speeds = ((100.0, 1e12), (200.0, 1e12), (100.0, 2e12))
    document = {
        "machine": {"device": "a GPU"},
        "flop_an_image": {"teacher": 2e9, "student": 1e9},
        "rounds": [{"num_train": 1280, "teacher": told(*one), "student": told(*one)} for one in speeds],
        "batch_size": 64,
        "torch": "2.0",
        "utc": "2026-01-01T00:00:00+00:00",
    }

    assert share(document, "teacher") == pytest.approx([0.2, 0.4, 0.1])
    printed = text(document)
    assert "| resnet32x4, forward | bf16 | 100 | 2.00 | 1 | 20% |" in printed
    assert "| resnet8x4, training step | bf16 | 100 | 1.00 | 1 | 10% |" in printed
