"""A float graph whose activations have no range is refused by the name of the node, before anything is quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.graphs.activations import check_activations, check_names
from targets.errors import DataError, ModelError

node = helper.make_node


def build(**changed: Any) -> ir.Model:
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "b1": np.zeros(4, np.float32),
        "w2": rng.normal(size=(4, 4, 3, 3)).astype(np.float32),
    } | changed
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], name="stem"),
        node("Relu", ["c"], ["r"], name="relu"),
        node("Conv", ["r", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


SAMPLES = [{"x": x} for x in np.random.default_rng(1).normal(size=(4, 1, 3, 8, 8)).astype(np.float32)]


def test_ordinary_activations_pass_also_with_a_dead_channel() -> None:
    dead = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    dead[2] = 0

    check_activations(build(), SAMPLES)
    check_activations(build(w1=dead), SAMPLES)


def test_a_tensor_that_is_zero_on_every_sample_is_named_with_its_node() -> None:
    with pytest.raises(DataError, match=r"'second' \(Conv\): 'r' is zero on all 4 .* --keep-float"):
        check_activations(build(b1=np.full(4, -1e3, np.float32)), SAMPLES)


def test_a_node_that_is_kept_in_float_may_see_zeros_but_no_nan() -> None:
    unreached = build(b1=np.full(4, -1e3, np.float32))
    broken = build(w1=np.full((4, 3, 3, 3), 1e30, np.float32))

    check_activations(unreached, SAMPLES, keep_float=("second",))
    with pytest.raises(DataError, match=r"'stem' .*NaN or infinity"):
        check_activations(broken, [{"x": np.full((1, 3, 8, 8), 1e30, np.float32)}], keep_float=("stem",))


def test_samples_of_nothing_but_zeros_are_named_too() -> None:
    with pytest.raises(DataError, match=r"'stem' .*'x' is zero on all 1"):
        check_activations(build(), [{"x": np.zeros((1, 3, 8, 8), np.float32)}])


def test_a_result_that_is_no_number_is_named_with_node_and_sample() -> None:
    huge = [SAMPLES[0], {"x": np.full((1, 3, 8, 8), 1e30, np.float32)}]

    with pytest.raises(DataError, match=r"'stem' \(Conv\): 'c' holds NaN or infinity on calibration sample 1"):
        check_activations(build(w1=np.full((4, 3, 3, 3), 1e30, np.float32)), huge)


def test_a_node_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="Did you mean 'second'"):
        check_names(build(), ["secnd"])
