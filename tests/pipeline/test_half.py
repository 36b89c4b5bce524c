"""A float32 graph and its float16 twin: same doors, half between, close answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.graphs.half import HALF_QDQ_OPSET, to_half
from pipeline.graphs.proof import answers_of
from targets.errors import ModelError

node = helper.make_node


def build(*, quantized: bool = True, weight_scale: float = 0.01, pixels: bool = True, weight: float = 1.0) -> ir.Model:
    """Pixels (or floats) -> Cast, Mul -> Q/DQ -> Conv with integer or float weights, Relu -> Q/DQ -> pool -> y."""
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "unit": np.float32(1 / 255),
        "s": np.float32(0.01),
        "z": np.int8(0),
        "w_q": rng.integers(-127, 128, (5, 3, 3, 3)).astype(np.int8),
        "w_s": np.full(5, weight_scale, np.float32),
        "w_f": (weight * rng.normal(size=(5, 3, 3, 3))).astype(np.float32),
        "b": rng.normal(size=5).astype(np.float32),
    }
    x = "pixels" if pixels else "image"
    nodes = [node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT)] if pixels else []
    nodes += [node("Mul", [x, "unit"], ["m"])]
    if quantized:
        nodes += [
            node("QuantizeLinear", ["m", "s", "z"], ["mq"]),
            node("DequantizeLinear", ["mq", "s", "z"], ["md"]),
            node("DequantizeLinear", ["w_q", "w_s"], ["w"], axis=0),
        ]
    nodes += [
        node("Conv", ["md", "w", "b"] if quantized else ["m", "w_f", "b"], ["c"], name="conv"),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["y"]),
    ]
    kind = TensorProto.UINT8 if pixels else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("image", kind, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def sample(pixels: bool) -> list[dict[str, Any]]:
    x = np.random.default_rng(1).integers(0, 256, (1, 3, 8, 8))
    return [{"image": x.astype(np.uint8 if pixels else np.float32)}]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("pixels", [True, False])
def test_the_twin_has_the_same_doors_and_close_answers(quantized: bool, pixels: bool) -> None:
    model = build(quantized=quantized, pixels=pixels)

    half = to_half(model)

    proto = ir.to_proto(half)
    onnx.checker.check_model(proto, full_check=True)
    assert [(v.name, v.dtype) for v in half.graph.inputs] == [(v.name, v.dtype) for v in model.graph.inputs]
    assert [(v.name, v.dtype) for v in half.graph.outputs] == [("y", ir.DataType.FLOAT)]
    expected, got = (answers_of(one, sample(pixels))["y"][0] for one in (model, half))
    np.testing.assert_allclose(got, expected, atol=0.01 * np.ptp(expected))
    assert model.graph.initializers["unit"].dtype == ir.DataType.FLOAT  # the given graph is left as it was


def test_every_tensor_between_the_doors_is_half() -> None:
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(to_half(build())))

    floats = [v.name for v in proto.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    constants = {t.name: t.data_type for t in proto.graph.initializer}
    assert floats == []
    assert TensorProto.FLOAT not in constants.values()


def test_quantizers_bring_their_operator_set_and_a_float_graph_keeps_its_own() -> None:
    assert to_half(build(quantized=True)).graph.opset_imports[""] == HALF_QDQ_OPSET
    assert to_half(build(quantized=False)).graph.opset_imports[""] == 17


def test_a_scale_too_small_for_half_does_not_become_zero() -> None:
    half = to_half(build(weight_scale=1e-9))

    assert np.all(half.graph.initializers["w_s"].const_value.numpy() > 0)  # type: ignore[union-attr]


def test_a_weight_beyond_half_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'w_f' holds .*65504"):
        to_half(build(quantized=False, weight=1e6))
