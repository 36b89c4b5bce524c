"""Each rewrite keeps what the graph computes, judged by ONNX Runtime with every optimization off."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.graphs import moves, rewrites
from pipeline.graphs.dialects import DIALECTS, apply_dialect
from targets.errors import ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(scale=4.0, size=(2, 4, 6, 6)).astype(np.float32)
node = helper.make_node


def graph(nodes: list[onnx.NodeProto], **constants: Any) -> ir.Model:
    """A graph of opset 17 from "x" (N, 4, 6, 6) to "y"."""
    proto = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def pair(source: str, to: str, scale: str = "s", zero: str = "zero") -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", [source, scale, zero], [f"{to}_q"]),
        node("DequantizeLinear", [f"{to}_q", scale, zero], [to]),
    ]


def run(model: ir.Model, x: Any = X) -> Any:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def ops(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


def check_exact(model: ir.Model, rewrite: Any) -> int:
    """Same outputs bit for bit, a valid graph, and nothing left to do the second time. Returns the changes."""
    before = run(model)
    num_changed = int(rewrite(model))
    np.testing.assert_array_equal(run(model), before)
    assert rewrite(model) == 0
    return num_changed


def test_constants_are_computed_and_quantizers_of_them_are_kept() -> None:
    model = graph(
        [
            node("Add", ["a", "a"], ["b"]),
            node("Mul", ["b", "a"], ["c"]),
            node("DequantizeLinear", ["w_q", "s", "zero"], ["w"]),
            node("Mul", ["x", "c"], ["d"]),
            node("Add", ["d", "w"], ["y"]),
        ],
        a=np.float32(3.0),
        w_q=np.int8(5),
        s=np.float32(0.5),
        zero=np.int8(0),
    )

    assert check_exact(model, rewrites.fold_constants) == 2
    assert ops(model) == {"Mul": 1, "Add": 1, "DequantizeLinear": 1}


@pytest.mark.parametrize("attributes", [{}, {"pads": [1, 0, 1, 0]}, {"auto_pad": "VALID"}])
def test_zero_padding_becomes_the_convolutions_own(attributes: dict[str, Any]) -> None:
    model = graph(
        [node("Pad", ["x", "pads"], ["p"]), node("Conv", ["p", "w"], ["y"], **attributes)],
        pads=np.array([0, 0, 0, 1, 0, 0, 1, 2], np.int64),
        w=RNG.normal(size=(3, 4, 3, 3)).astype(np.float32),
    )

    assert check_exact(model, rewrites.fold_padding) == 1
    assert ops(model) == {"Conv": 1}


@pytest.mark.parametrize(
    ("pads", "mode", "fill"),
    [
        ([0, 1, 0, 0, 0, 0, 0, 0], "constant", 0.0),
        ([0, 0, 1, 1, 0, 0, 1, 1], "constant", 1.0),
        ([0, 0, 1, 1, 0, 0, 1, 1], "edge", 0.0),
    ],
)
def test_padding_that_a_convolution_cannot_do_stays(pads: list[int], mode: str, fill: float) -> None:
    num_channels = 4 + pads[1] + pads[5]
    model = graph(
        [node("Pad", ["x", "pads", "fill"], ["p"], mode=mode), node("Conv", ["p", "w"], ["y"])],
        pads=np.array(pads, np.int64),
        fill=np.float32(fill),
        w=np.ones((3, num_channels, 3, 3), np.float32),
    )

    assert rewrites.fold_padding(model) == 0


def test_weights_become_integers_per_channel() -> None:
    weight = RNG.normal(size=(3, 4, 3, 3)).astype(np.float32)
    model = graph(
        [
            node("QuantizeLinear", ["w", "ws", "wz"], ["w_q"], axis=0),
            node("DequantizeLinear", ["w_q", "ws", "wz"], ["w_dq"], axis=0),
            node("Conv", ["x", "w_dq"], ["y"]),
        ],
        w=weight,
        ws=np.array([0.01, 0.02, 0.5], np.float32),
        wz=np.zeros(3, np.int8),
    )

    assert check_exact(model, rewrites.integer_weights) == 1
    rewrites.tidy(model)
    assert {v.const_value.dtype.name for v in model.graph.initializers.values()} == {"INT8", "FLOAT"}  # type: ignore[union-attr]
    assert "w" not in model.graph.initializers


@settings(deadline=None, max_examples=40)
@given(scale=st.floats(0.01, 0.1), zero=st.sampled_from([0, 3, 128]), bounded=st.booleans())
def test_dropping_an_activation_never_changes_an_integer(scale: float, zero: int, bounded: bool) -> None:
    """Whatever scale and zero point: it is dropped only where saturation does the same."""
    activation = node("Clip", ["x", "low", "high"], ["r"]) if bounded else node("Relu", ["x"], ["r"])
    model = graph(
        [activation, *pair("r", "y")],
        low=np.float32(0.0),
        high=np.float32(6.0),
        s=np.float32(scale),
        zero=np.uint8(zero),
    )

    num_dropped = check_exact(model, rewrites.drop_redundant_activations)

    assert num_dropped == int(zero == 0 and (not bounded or np.rint(np.float32(6.0) / np.float32(scale)) >= 255))


def test_an_activation_that_someone_reads_as_float_stays() -> None:
    model = graph(
        [node("Relu", ["x"], ["r"]), *pair("r", "d"), node("Add", ["r", "d"], ["y"])],
        s=np.float32(0.1),
        zero=np.uint8(0),
    )

    assert rewrites.drop_redundant_activations(model) == 0


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.03, 0.2))
def test_a_clip_inside_the_range_gets_a_quantizer_in_front_exactly(scale: float) -> None:
    model = graph(
        [node("Conv", ["x", "w"], ["c"]), node("Clip", ["c", "low", "high"], ["r"]), *pair("r", "y")],
        w=np.ones((2, 4, 1, 1), np.float32),
        low=np.float32(0.0),
        high=np.float32(6.0),
        s=np.float32(scale),
        zero=np.uint8(0),
    )

    assert check_exact(model, rewrites.quantize_before_clip) == 1
    assert [n.op_type for n in model.graph][:3] == ["Conv", "QuantizeLinear", "DequantizeLinear"]


@settings(deadline=None, max_examples=25)
@given(scale=st.floats(1e-3, 1.0))
def test_signed_activations_become_unsigned_with_the_same_steps(scale: float) -> None:
    model = graph(pair("x", "y"), s=np.float32(scale), zero=np.int8(0))

    assert check_exact(model, rewrites.unsigned_activations) == 1
    assert {q.zero_point.item() for n in model.graph if (q := rewrites.quantizer_of(n))} == {128}


def test_a_reader_of_the_integers_themselves_keeps_their_type() -> None:
    model = graph(
        [node("QuantizeLinear", ["x", "s", "zero"], ["q"]), node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)],
        s=np.float32(0.1),
        zero=np.int8(0),
    )

    assert rewrites.unsigned_activations(model) == 0


@pytest.mark.parametrize("op", ["Flatten", "Transpose"])
def test_dequantize_sinks_behind_moves_and_other_readers_keep_theirs(op: str) -> None:
    attributes = {"axis": 1} if op == "Flatten" else {"perm": [0, 2, 3, 1]}
    model = graph(
        [
            *pair("x", "d"),
            node(op, ["d"], ["f"], **attributes),
            node("ReduceSum", ["d"], ["r"]),
            node("Add", ["f", "r"], ["y"]),
        ],
        s=np.float32(0.1),
        zero=np.uint8(100),
    )

    assert check_exact(model, moves.sink_dequantize) == 1
    assert ops(model)["DequantizeLinear"] == 2


@pytest.mark.parametrize(("scale", "zero", "joined"), [(0.1, 3, 1), (0.2, 3, 0), (0.1, 4, 0)])
def test_a_concat_joins_integers_of_one_scale_and_zero_point_only(scale: float, zero: int, joined: int) -> None:
    model = graph(
        [
            *pair("x", "a"),
            node("Neg", ["x"], ["n"]),
            *pair("n", "b", "t", "other"),
            node("Concat", ["a", "b"], ["y"], axis=1),
        ],
        s=np.float32(0.1),
        zero=np.uint8(3),
        t=np.float32(scale),
        other=np.uint8(zero),
    )

    assert check_exact(model, moves.join_integers) == joined
    assert ops(model)["DequantizeLinear"] == 2 - joined


def gemm(bias: Any, **attributes: Any) -> ir.Model:
    return graph(
        [
            node("GlobalAveragePool", ["x"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            *pair("f", "d"),
            node("DequantizeLinear", ["w_q", "ws"], ["w"], axis=1),
            node("Gemm", ["d", "w", "b"], ["y"], **attributes),
        ],
        s=np.float32(0.05),
        zero=np.uint8(128),
        w_q=RNG.integers(-127, 128, (4, 3)).astype(np.int8),
        ws=np.array([0.01, 0.02, 0.03], np.float32),
        b=bias,
    )


def test_an_integer_bias_moves_outputs_by_half_an_accumulator_step_at_most() -> None:
    model = gemm(RNG.normal(size=3).astype(np.float32))
    before = run(model)

    assert rewrites.integer_bias(model) == 1
    assert rewrites.integer_bias(model) == 0

    half_step = np.array([0.01, 0.02, 0.03]) * 0.05 / 2
    assert np.all(np.abs(run(model) - before) <= half_step + 1e-6)


@pytest.mark.parametrize("bias", [np.full(3, 1e9, np.float32), np.full(3, -1e30, np.float32)])
def test_a_bias_that_no_int32_holds_stays_a_float(bias: Any) -> None:
    assert rewrites.integer_bias(gemm(bias)) == 0


def test_a_scaled_bias_stays_a_float() -> None:
    assert rewrites.integer_bias(gemm(np.ones(3, np.float32), beta=0.5)) == 0


def test_a_graph_output_keeps_its_name_and_type() -> None:
    model = graph([*pair("x", "d"), node("Flatten", ["d"], ["y"])], s=np.float32(0.1), zero=np.uint8(0))

    moves.sink_dequantize(model)

    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("y", ir.DataType.FLOAT)]


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_a_dialect_applied_twice_changes_nothing_the_second_time(dialect: str) -> None:
    model = gemm(np.ones(3, np.float32))
    apply_dialect(model, dialect)

    assert apply_dialect(model, dialect) == 0


def test_an_unknown_dialect_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="Did you mean 'openvino'"):
        apply_dialect(gemm(np.ones(3, np.float32)), "opnvino")


@pytest.mark.parametrize(("shape", "num_changed"), [((1, 3), 1), ((1,), 1), ((2, 3), 0)])
def test_a_gemms_bias_of_any_rank_is_integers_where_there_is_one_a_channel(
    shape: tuple[int, ...], num_changed: int
) -> None:
    model = graph(
        [
            node("Reshape", ["x", "rows"], ["r"]),
            *pair("r", "a"),
            node("DequantizeLinear", ["w_q", "scales", "zeros"], ["w"], axis=0),
            node("Gemm", ["a", "w", "b"], ["y"], transB=1),
        ],
        rows=np.array([-1, 144]),
        s=np.float32(0.1),
        zero=np.int8(0),
        w_q=RNG.integers(-127, 128, (3, 144)).astype(np.int8),
        scales=np.array([0.01, 0.02, 0.03], np.float32),
        zeros=np.zeros(3, np.int8),
        b=RNG.normal(size=shape).astype(np.float32),
    )
    before = run(model)

    assert rewrites.integer_bias(model) == num_changed
    np.testing.assert_allclose(run(model), before, atol=0.1 * 0.03)
