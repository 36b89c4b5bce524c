"""Equalization keeps what a model computes, and makes equal the ranges that two layers give one channel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.graphs.equalization import balance, ranges
from pipeline.graphs.equalization import equalize as equalize_graph
from pipeline.learning.models import fold_batchnorm
from pipeline.learning.models.equalization import equalize
from targets.errors import ModelError

node = helper.make_node


def uneven(rng: np.random.Generator, *shape: int) -> Any:
    """Weights whose rows and columns differ by orders of magnitude."""
    rows, columns = (10.0 ** rng.uniform(-2, 2, size) for size in shape[:2])
    wide = (1,) * (len(shape) - 2)
    return rng.normal(size=shape) * rows.reshape(-1, 1, *wide) * columns.reshape(1, -1, *wide)


# --- the sweeps --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 6), min_size=3, max_size=5))
def test_after_the_sweeps_each_channel_has_one_range_in_both_layers(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    layers = [ranges(uneven(rng, o, i, 4), 1) for i, o in pairwise(sizes)]
    pairs = [(first, first + 1) for first in range(len(layers) - 1)]

    scales = balance(layers, pairs)

    for (first, second), scale_C in zip(pairs, scales, strict=True):
        layers[first] /= scale_C.reshape(1, -1, 1)
        layers[second] *= scale_C.reshape(1, 1, -1)
    for first, second in pairs:
        np.testing.assert_allclose(layers[first].max(axis=2)[0], layers[second].max(axis=1)[0], rtol=1e-4)


def test_one_pair_is_scaled_by_equation_11() -> None:
    first, second = np.array([[[8.0], [1.0]]]), np.array([[[2.0, 4.0]]])

    (scale_C,) = balance([first, second], [(0, 1)])

    np.testing.assert_allclose(scale_C, [np.sqrt(8 * 2) / 2, np.sqrt(1 * 4) / 4])


def test_dead_channels_are_not_scaled() -> None:
    first = np.array([[[8.0], [0.0], [1.0], [1e-9]]])  # the last one is rounding noise beside 8
    second = np.array([[[2.0, 4.0, 0.0, 2.0]]])

    (scale_C,) = balance([first, second], [(0, 1)])

    np.testing.assert_array_equal(scale_C[1:], 1.0)
    assert scale_C[0] == pytest.approx(2.0)


# --- ONNX --------------------------------------------------------------------------------------------------------------


def graph(nodes: Sequence[onnx.NodeProto], shape: Sequence[int], constants: dict[str, Any], *outputs: str) -> ir.Model:
    """A float64 graph from "x" to "y", so that what a rewrite changes cannot hide behind rounding."""
    proto = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in ("y", *outputs)],
        [numpy_helper.from_array(np.asarray(array, np.float64), name) for name, array in constants.items()],
    )
    return ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def run_graph(model: ir.Model, x: Any) -> list[Any]:
    outputs: list[Any] = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return outputs


def weights_of(model: ir.Model) -> dict[str, Any]:
    return {str(name): value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}


def check_graph(model: ir.Model, shape: Sequence[int], num_changed: int) -> None:
    """The same outputs to 1e-9, so many pairs changed, none the second time."""
    x = np.random.default_rng(7).normal(size=shape)
    before = run_graph(model, x)

    assert equalize_graph(model) == num_changed

    for old, new in zip(before, run_graph(model, x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-9, atol=1e-9 * np.abs(old).max())
    after = weights_of(model)
    assert equalize_graph(model) == 0
    assert all(np.array_equal(array, after[name]) for name, array in weights_of(model).items())


BETWEEN = {
    "nothing": [],
    "Relu": [("Relu", [], {})],
    "LeakyRelu": [("LeakyRelu", [], {"alpha": 0.1})],
    "PRelu": [("PRelu", ["slope"], {})],
    "MaxPool": [("Relu", [], {}), ("MaxPool", [], {"kernel_shape": [2, 2]})],
    "AveragePool": [("AveragePool", [], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}), ("Relu", [], {})],
}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    between=st.sampled_from(sorted(BETWEEN)),
    groups=st.sampled_from([1, 2, 4]),
    biased=st.booleans(),
)
def test_convolutions_of_a_graph_in_any_grouping_are_equalized(
    seed: int, between: str, groups: int, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    constants = {"w1": uneven(rng, 4, 3, 3, 3), "w2": uneven(rng, 8, 4 // groups, 1, 1), "w3": uneven(rng, 2, 8, 1, 1)}
    constants |= {"b1": rng.normal(size=4), "b2": rng.normal(size=8), "slope": rng.uniform(size=(4, 1, 1))}
    bias = (["b1"], ["b2"]) if biased else ([], [])
    nodes = [node("Conv", ["x", "w1", *bias[0]], ["t0"], pads=[1] * 4)]
    for number, (op_type, more, attributes) in enumerate(BETWEEN[between]):
        nodes.append(node(op_type, [f"t{number}", *more], [f"t{number + 1}"], **attributes))
    nodes += [
        node("Conv", [f"t{len(nodes) - 1}", "w2", *bias[1]], ["u"], group=groups),
        node("Conv", ["u", "w3"], ["y"]),
    ]

    check_graph(graph(nodes, [2, 3, 6, 6], constants), [2, 3, 6, 6], num_changed=2)


@pytest.mark.parametrize("second", ["Gemm", "GemmT", "MatMul"])
def test_a_flatten_between_convolution_and_product_is_seen_through(second: str) -> None:
    rng = np.random.default_rng(0)
    matrix = uneven(rng, 36, 5)
    constants = {
        "w1": uneven(rng, 4, 3, 1, 1),
        "b1": rng.normal(size=4),
        "m": matrix.T if second == "GemmT" else matrix,
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Flatten", ["b"], ["c"], axis=1),
        node(
            "MatMul" if second == "MatMul" else "Gemm",
            ["c", "m"],
            ["y"],
            **({"transB": 1} if second == "GemmT" else {}),
        ),
    ]

    check_graph(graph(nodes, [2, 3, 3, 3], constants), [2, 3, 3, 3], num_changed=1)


def test_matrix_products_with_a_bias_added_behind_are_equalized() -> None:
    rng = np.random.default_rng(0)
    constants = {"m1": uneven(rng, 3, 6), "b1": rng.normal(size=6), "m2": uneven(rng, 6, 4), "m3": uneven(rng, 4, 2)}
    nodes = [
        node("MatMul", ["x", "m1"], ["a"]),
        node("Add", ["b1", "a"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Gemm", ["c", "m2"], ["d"], alpha=2.0),
        node("Gemm", ["d", "m3"], ["y"]),
    ]

    check_graph(graph(nodes, [5, 3], constants), [5, 3], num_changed=2)


@pytest.mark.parametrize("why", ["Clip", "Sigmoid", "branch", "output", "shared weight", "shared bias", "two readers"])
def test_a_graph_stays_where_scaling_would_change_it_or_somebody_else(why: str) -> None:
    rng = np.random.default_rng(0)
    constants = {"w1": uneven(rng, 3, 3, 1, 1), "w2": uneven(rng, 3, 3, 1, 1), "b": rng.normal(size=3)}
    constants |= {"low": 0.0, "high": 6.0} if why == "Clip" else {}
    middle = node("Clip", ["a", "low", "high"], ["c"]) if why == "Clip" else node("Relu", ["a"], ["c"])
    middle = node("Sigmoid", ["a"], ["c"]) if why == "Sigmoid" else middle
    second = "w1" if why == "shared weight" else "w2"
    nodes = [
        node("Conv", ["x", "w1", "b"], ["a"]),
        middle,
        node("Conv", ["c", second, *(["b"] if why == "shared bias" else [])], ["d"]),
        node("Add", ["d", {"branch": "c", "two readers": "e"}.get(why, "d")], ["y"]),
    ]
    if why == "two readers":
        nodes.insert(2, node("Conv", ["c", "w2"], ["e"]))
    model = graph(nodes, [2, 3, 4, 4], constants, *(["a"] if why == "output" else []))
    before = weights_of(model)

    assert equalize_graph(model) == 0

    assert all(np.array_equal(array, before[name]) for name, array in weights_of(model).items())


def test_a_product_whose_channels_are_the_last_axis_is_not_paired_with_a_convolution() -> None:
    rng = np.random.default_rng(0)
    nodes = [node("MatMul", ["x", "m"], ["a"]), node("Relu", ["a"], ["c"]), node("Conv", ["c", "w"], ["y"])]

    check_graph(graph(nodes, [2, 4, 4], {"m": uneven(rng, 4, 4), "w": uneven(rng, 4, 4, 1)}), [2, 4, 4], num_changed=0)


# --- torch -------------------------------------------------------------------------------------------------------------


def make_uneven(model: nn.Module, seed: int) -> nn.Module:
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                layer.weight.copy_(torch.from_numpy(uneven(rng, *layer.weight.shape)))
    return model.double().eval()


def check_module(model: nn.Module, x: Tensor, num_changed: int) -> nn.Module:
    equalized, changed = equalize(model)

    assert changed == num_changed
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(equalized(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert equalize(equalized)[1] == 0
    return equalized


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    act=st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.Identity(), nn.Sequential(nn.ReLU())]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_convolutions_of_a_module_in_any_grouping_are_equalized(
    seed: int, act: nn.Module, groups: int, bias: bool
) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias),
        copy.deepcopy(act),
        nn.Conv2d(4, 8, 3, groups=groups, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5, bias=bias),
        nn.Dropout(),
        nn.Linear(5, 2),
    )
    model = make_uneven(net, seed)

    equalized = check_module(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), num_changed=3)

    first, second = equalized.get_submodule("0"), equalized.get_submodule("2")
    rows = first.weight.detach().abs().amax((1, 2, 3))
    columns = second.weight.detach().abs().view(groups, -1, 4 // groups, 9).amax((1, 3)).view(-1)
    torch.testing.assert_close(rows, columns, rtol=1e-4, atol=0.0)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.second(x).relu(), 1), 1))


def test_activations_written_as_functions_are_seen_through() -> None:
    check_module(make_uneven(Functional(), 0), torch.randn(2, 3, 5, 5, dtype=torch.float64), num_changed=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(self.two(torch.relu(self.one(x))) + x)


def test_a_residual_branch_keeps_the_layer_that_it_reads() -> None:
    model = make_uneven(Residual(), 0)

    equalized = check_module(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), num_changed=1)

    assert torch.equal(equalized.get_submodule("stem").weight, model.get_submodule("stem").weight)
    assert not torch.equal(equalized.get_submodule("one").weight, model.get_submodule("one").weight)


class TwiceCalled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(torch.relu(self.one(torch.relu(self.stem(x))))))


class ReadOutside(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(torch.relu(self.stem(x)))) + self.stem.weight.sum()


class Clipped(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.one(F.silu(self.stem(x))))


class Tied(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("kind", [TwiceCalled, ReadOutside, Clipped, Tied])
def test_a_module_stays_where_scaling_would_change_it_or_somebody_else(kind: type[nn.Module]) -> None:
    model = make_uneven(kind(), 0)
    x = torch.randn(2, 4 if kind is Tied else 3, 5, 5, dtype=torch.float64)

    equalized = check_module(model, x, num_changed=0)

    assert all(torch.equal(a, b) for a, b in zip(equalized.parameters(), model.parameters(), strict=True))


def test_a_linear_layer_whose_channels_are_the_last_axis_is_not_paired_with_a_convolution() -> None:
    model = make_uneven(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1)), 0)

    check_module(model, torch.randn(2, 4, 4, dtype=torch.float64), num_changed=0)


def test_the_model_itself_is_left_as_it_was() -> None:
    model = make_uneven(Residual(), 0)
    before = copy.deepcopy(model.state_dict())

    equalize(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folded_mobilenet_is_equalized_where_its_bottlenecks_are_linear() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)),
    )

    check_module(fold_batchnorm(make_uneven(net, 0)), torch.randn(2, 3, 6, 6, dtype=torch.float64), num_changed=1)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) if x.sum() > 0 else x
        return y


def test_a_model_that_cannot_be_traced_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"(?s)Deciding: its layers cannot be equalized.*Take decisions"):
        equalize(Deciding())
