"""BatchNorm behind integer weights goes into their scales; the integers stay, but for their sign."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.graphs.batchnorm import fold_batchnorm
from pipeline.graphs.proof import answers_of

node = helper.make_node
SAMPLES = [{"x": np.random.default_rng(3).normal(size=(1, 4, 5, 5)).astype(np.float32)}]


def build(
    *,
    seed: int = 0,
    op: str = "Conv",
    bias: bool = True,
    per_channel: bool = True,
    lowest: int = -127,
    read_twice: bool = False,
    training: bool = False,
) -> ir.Model:
    """x -> Conv or ConvTranspose with integer weights -> BatchNorm with some negative gammas -> y."""
    rng = np.random.default_rng(seed)
    gamma = rng.normal(size=3).astype(np.float32)
    gamma[0] = -abs(gamma[0])
    constants: dict[str, Any] = {
        "w_q": rng.integers(-127, 128, (3, 4, 3, 3) if op == "Conv" else (4, 3, 3, 3)).astype(np.int8),
        "w_s": rng.uniform(0.001, 0.1, 3).astype(np.float32) if per_channel else np.float32(0.02),
        "w_z": np.zeros(3, np.int8) if per_channel else np.int8(0),
        "gamma": gamma,
        "beta": rng.normal(size=3).astype(np.float32),
        "mean": rng.normal(size=3).astype(np.float32),
        "var": rng.uniform(0.1, 3.0, 3).astype(np.float32),
        "b": rng.normal(size=3).astype(np.float32),
    }
    channel_axis = 0 if op == "Conv" else 1
    constants["w_q"].reshape(-1)[0] = lowest
    axis = {"axis": channel_axis} if per_channel else {}
    nodes = [
        node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], **axis),
        node(op, ["x", "w", "b"] if bias else ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], training_mode=int(training)),
        node("Add", ["n", "c"], ["y"]) if read_twice else node("Relu", ["n"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    bias=st.booleans(),
    per_channel=st.booleans(),
)
def test_folding_keeps_the_answers_and_the_integers_but_for_their_sign(
    seed: int, op: str, bias: bool, per_channel: bool
) -> None:
    model = build(seed=seed, op=op, bias=bias, per_channel=per_channel)
    before = answers_of(model, SAMPLES)["y"][0]
    integers = model.graph.initializers["w_q"].const_value.numpy()  # type: ignore[union-attr]

    assert fold_batchnorm(model) == 1
    assert fold_batchnorm(model) == 0

    after = answers_of(model, SAMPLES)["y"][0]
    dequantize = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    folded, scale = (dequantize.inputs[i].const_value.numpy() for i in (0, 1))  # type: ignore[union-attr]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    np.testing.assert_array_equal(np.abs(folded.astype(int)), np.abs(integers.astype(int)))
    assert np.all(scale >= 0)
    assert not any(n.op_type == "BatchNormalization" for n in model.graph)


@pytest.mark.parametrize("options", [{"lowest": -128}, {"read_twice": True}], ids=str)
def test_what_cannot_be_folded_exactly_stays(options: dict[str, Any]) -> None:
    """-128 has no opposite in int8 and that channel's gamma is negative; a result that is read twice has no one place."""
    model = build(**options)
    before = answers_of(model, SAMPLES)["y"][0]

    assert fold_batchnorm(model) == 0
    np.testing.assert_array_equal(answers_of(model, SAMPLES)["y"][0], before)
