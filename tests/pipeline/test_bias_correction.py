"""After the correction each layer gives, on average, what the float layer gives."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pipeline.graphs.bias_correction import correct_biases as correct_graph
from pipeline.graphs.mixed_precision import quantized_layers
from pipeline.learning.bias_correction import correct_biases, shrunk_mean
from pipeline.learning.fake_quantize import insert_fake_quantizers, pin_kernels, quantize_graph

pytestmark = pytest.mark.integration


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=2, bias=bias)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        logits_NK: Tensor = self.head(x.mean((2, 3)))
        return logits_NK


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 8, 8, generator=generator).abs() for size in (16, 7)]


def off(net: nn.Module) -> nn.Module:
    """The net with coarsely rounded weights: what quantization does, only stronger."""
    coarse = copy.deepcopy(net)
    with torch.no_grad():
        for layer in coarse.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.copy_((layer.weight * 8).round() / 8)
    return coarse


def means(net: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with torch.no_grad():
        net(torch.cat(batches))
    handle.remove()
    (output,) = seen
    return output.double().flatten(2).mean((0, 2)) if output.ndim == 4 else output.double().mean(0)


def test_every_layer_comes_nearer_to_the_float_mean_with_all_before_it_corrected(batches: list[Tensor]) -> None:
    net, coarse = Net(), off(Net())

    assert correct_biases(coarse, net, batches) == 3

    for name in ("first", "second", "head"):
        left, before = (means(one, name, batches) - means(net, name, batches) for one in (coarse, off(net)))
        assert left.abs().max() < 0.1 * before.abs().max()


def test_a_shift_that_all_samples_share_is_taken_whole_and_one_that_they_dispute_is_not() -> None:
    shifts_NC = torch.tensor([[0.5, 1.0, 0.3, 0.0], [0.5, -1.0, 0.1, 0.0]], dtype=torch.float64)

    expected = [0.5, 0.0, 0.2 * (1 - (0.1**2 / 2) / 0.2**2), 0.0]
    torch.testing.assert_close(shrunk_mean(shifts_NC), torch.tensor(expected, dtype=torch.float64))


def test_nothing_but_biases_changes_and_a_layer_without_one_stays(batches: list[Tensor]) -> None:
    net = Net(bias=False)
    coarse = off(net)
    before = {name: tensor.clone() for name, tensor in coarse.state_dict().items()}

    assert correct_biases(coarse, net, batches) == 2

    changed = {name for name, tensor in coarse.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"first.bias", "head.bias"}


class TwiceCalled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(x.new_ones(len(x), 6))


def test_a_layer_that_is_called_twice_has_no_one_mean(batches: list[Tensor]) -> None:
    assert correct_biases(off(TwiceCalled()), TwiceCalled(), batches) == 2


def test_a_fake_quantized_model_keeps_its_modes_and_comes_nearer_to_float(batches: list[Tensor]) -> None:
    pin_kernels("torch")
    net = Net().eval()
    quantized = insert_fake_quantizers(net, batches, batches[0][:1]).train()
    with torch.no_grad():
        quantized.get_parameter("first.bias").add_(0.05)

        correct_biases(quantized, net, batches)

        assert quantized.training
        error = (quantized.eval()(batches[0]) - net(batches[0])).abs().max()
    assert error < 0.02


def chain() -> onnx.ModelProto:
    """A residual graph: stem -> Relu -> one + identity -> Gemm, and a layer without bias before the end."""
    rng = np.random.default_rng(0)
    constants = {
        "w1": (6, 3, 3, 3),
        "b1": (6,),
        "w2": (6, 6, 1, 1),
        "b2": (6,),
        "w3": (6, 4),
        "b3": (1, 4),
        "w4": (4, 4),
    }
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["s"], name="stem", pads=[1] * 4),
        node("Relu", ["s"], ["a"], name="relu"),
        node("Conv", ["a", "w2", "b2"], ["c"], name="one"),
        node("Add", ["c", "a"], ["d"], name="add"),
        node("GlobalAveragePool", ["d"], ["e"], name="pool"),
        node("Flatten", ["e"], ["f"], name="flatten"),
        node("Gemm", ["f", "w3", "b3"], ["g"], name="head"),
        node("Gemm", ["g", "w4"], ["y"], name="last"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, ["N", 4])],
        [onnx.numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def layer_means(model: ir.Model, samples: list[dict[str, Any]]) -> dict[str, Any]:
    proto = ir.to_proto(model)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in "scg")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = [session.run(list("scg"), sample) for sample in samples]
    return {
        name: np.mean([a[i].reshape(*a[i].shape[:2], -1).mean((0, 2)) for a in answers], 0)
        for i, name in enumerate("scg")
    }


def test_each_layer_of_a_residual_graph_comes_nearer_to_the_float_mean() -> None:
    samples = [{"x": x} for x in np.random.default_rng(1).random((16, 1, 3, 8, 8), np.float32)]
    floats, quantized = ir.from_proto(chain()), ir.from_proto(quantize_graph(chain(), samples))
    for layer in quantized_layers(quantized):  # coarser weights: a shift that can be seen
        integers = layer.inputs[1].producer().inputs[0]
        integers.const_value = ir.tensor(integers.const_value.numpy() // 16 * 16, name=integers.name)
    expected, before = layer_means(floats, samples), layer_means(quantized, samples)

    assert correct_graph(quantized, floats, samples) == 3  # the last one has no bias

    after = layer_means(quantized, samples)
    for name in "scg":
        assert np.abs(after[name] - expected[name]).max() < 0.2 * np.abs(before[name] - expected[name]).max()
    onnx.checker.check_model(ir.to_proto(quantized), full_check=True)
    assert [value.name for value in quantized.graph.inputs] == ["x"]
