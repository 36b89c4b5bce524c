"""HardSwish that an optimizer wrote out becomes one operator again, and only that."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from pipeline.graphs.hard_swish import fuse_hard_swish
from pipeline.graphs.proof import answers_of

node = helper.make_node
SAMPLES = [{"x": np.linspace(-6, 6, 48, dtype=np.float32).reshape(1, 3, 4, 4)}]


def build(nodes: list[onnx.NodeProto], *, opset: int = 17) -> ir.Model:
    info = helper.make_tensor_value_info
    shape = ["N", 3, 4, 4]
    graph = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, shape)])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def gate(**attributes: Any) -> onnx.NodeProto:
    return node("HardSigmoid", ["x"], ["g"], **({"alpha": 1 / 6, "beta": 0.5} | attributes))


@pytest.mark.parametrize("inputs", [["x", "g"], ["g", "x"]])
def test_the_two_halves_become_one_with_the_same_answers_and_output_name(inputs: list[str]) -> None:
    model = build([gate(), node("Mul", inputs, ["y"], name="product")])
    before = answers_of(model, SAMPLES)["y"][0]

    assert fuse_hard_swish(model) == 1
    assert fuse_hard_swish(model) == 0

    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [(n.op_type, n.name) for n in model.graph] == [("HardSwish", "product")]
    np.testing.assert_allclose(answers_of(model, SAMPLES)["y"][0], before, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [gate(alpha=0.2), node("Mul", ["x", "g"], ["y"])],
        [gate(beta=0.4), node("Mul", ["x", "g"], ["y"])],
        [gate(), node("Neg", ["x"], ["n"]), node("Mul", ["n", "g"], ["y"])],
        [gate(), node("Mul", ["x", "g"], ["m"]), node("Add", ["m", "g"], ["y"])],
        [gate(), node("Mul", ["g", "g"], ["y"])],
        [gate(), node("Add", ["x", "g"], ["y"])],
    ],
    ids=["another slope", "another middle", "another factor", "a gate that is read twice", "its own square", "a sum"],
)
def test_what_is_no_hard_swish_stays(nodes: list[onnx.NodeProto]) -> None:
    assert fuse_hard_swish(build(nodes)) == 0


def test_an_operator_set_without_it_is_left_alone() -> None:
    assert fuse_hard_swish(build([gate(), node("Mul", ["x", "g"], ["y"])], opset=13)) == 0
