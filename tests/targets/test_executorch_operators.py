"""The torch form of an ONNX graph that ExecuTorch compiles: each operator, and Q/DQ, against ONNX Runtime. Compiles nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser
from torch import Tensor

from targets.errors import TargetError
from targets.executorch_graph import OnnxModule
from targets.executorch_operators import OPERATORS

Constants = dict[str, Any]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 7, 6)).astype(np.float32)
ROWS = RNG.normal(size=(3, 5)).astype(np.float32)


def floats(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


K, DEEP, BACK = floats(6, 4, 3, 3), floats(4, 1, 3, 3), floats(4, 5, 3, 3)
CHANNELS = {name: np.abs(floats(4)) + 0.5 for name in ("s", "o", "m", "v")}

# operator -> (body, constants) of graphs that take x or rows and give y
CASES: dict[str, list[tuple[str, Constants]]] = {
    "Abs": [("y = Abs(x)", {})],
    "Add": [("y = Add(x, c)", {"c": floats(4, 1, 1)})],
    "AveragePool": [
        ("y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 0]> (x)", {}),
        ("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)", {}),
        ("y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", {}),
    ],
    "BatchNormalization": [("y = BatchNormalization <epsilon = 0.01> (x, s, o, m, v)", CHANNELS)],
    "Cast": [("h = Cast <to = 10> (x) y = Cast <to = 1> (h)", {})],
    "Clip": [
        ("y = Clip(x, low, high)", {"low": np.float32(0), "high": np.float32(0.5)}),
        ("y = Clip(x, low)", {"low": np.float32(0)}),
        ("y = Clip(x, , high)", {"high": np.float32(0.3)}),
        ("y = Clip(x, low)", {"low": np.float32(-0.3)}),
    ],
    "Concat": [("y = Concat <axis = -3> (x, x)", {})],
    "Conv": [
        ("y = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, k, b)", {"k": K, "b": floats(6)}),
        ("y = Conv <pads = [0, 1, 2, 0], dilations = [2, 1]> (x, k)", {"k": K}),
        ("y = Conv <group = 4> (x, k)", {"k": DEEP}),
    ],
    "ConvTranspose": [
        ("y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]> (x, k)", {"k": BACK})
    ],
    "Div": [("y = Div(x, c)", {"c": np.float32(3)})],
    "Dropout": [("y = Dropout(x)", {})],
    "Elu": [("y = Elu <alpha = 0.5> (x)", {})],
    "Erf": [("y = Erf(x)", {})],
    "Exp": [("y = Exp(x)", {})],
    "Flatten": [("y = Flatten(x)", {}), ("y = Flatten <axis = 2> (x)", {}), ("y = Flatten <axis = 0> (x)", {})],
    "Gemm": [
        ("y = Gemm <transB = 1> (rows, w, b)", {"w": floats(4, 5), "b": floats(4)}),
        ("y = Gemm <alpha = 0.5, beta = 2.0> (rows, w, b)", {"w": floats(5, 4), "b": floats(3, 4)}),
        ("t = Transpose(rows) y = Gemm <transA = 1> (t, w)", {"w": floats(5, 4)}),
        ("t = Transpose(rows) y = Gemm(rows, t, b)", {"b": floats(3)}),
        ("y = Gemm <transB = 1, alpha = 2.0> (rows, rows)", {}),
    ],
    "GlobalAveragePool": [("y = GlobalAveragePool(x)", {})],
    "HardSigmoid": [("y = HardSigmoid(x)", {}), ("y = HardSigmoid <alpha = 0.5, beta = 0.1> (x)", {})],
    "HardSwish": [("y = HardSwish(x)", {})],
    "Identity": [("y = Identity(x)", {})],
    "LeakyRelu": [("y = LeakyRelu <alpha = 0.2> (x)", {})],
    "MatMul": [
        ("y = MatMul(x, w)", {"w": floats(6, 3)}),
        ("t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul(x, t)", {}),
        ("t = Transpose(rows) y = MatMul(rows, t)", {}),
        ("z = Transpose(rows) t = MatMul(rows, z) u = Unsqueeze(t, n) y = MatMul(u, t)", {"n": np.array([0])}),
        ("y = MatMul(w, x)", {"w": floats(3, 7)}),
    ],
    "MaxPool": [
        ("y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 0]> (x)", {}),
        ("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], pads = [0, 0, 1, 1]> (x)", {}),
        ("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)", {}),
    ],
    "Mul": [("y = Mul(x, x)", {})],
    "Neg": [("y = Neg(x)", {})],
    "Pad": [
        ("y = Pad(x, p)", {"p": np.array([0, 0, 1, 0, 0, 0, 2, 1])}),
        ("y = Pad(x, p, c)", {"p": np.array([0, 1, 0, 0, 0, 0, 0, 3]), "c": np.float32(2)}),
    ],
    "Pow": [("y = Pow(x, c)", {"c": np.float32(2)})],
    "ReduceMean": [("y = ReduceMean <axes = [2, 3]> (x)", {}), ("y = ReduceMean <axes = [-1], keepdims = 0> (x)", {})],
    "Relu": [("y = Relu(x)", {})],
    "Reshape": [
        ("y = Reshape(x, s)", {"s": np.array([0, -1, 6])}),
        (
            "a = Shape(x) n = Gather(a, first) z = Unsqueeze(n, first) s = Concat <axis = 0> (z, rest) y = Reshape(x, s)",
            {"first": np.array(0), "rest": np.array([-1])},
        ),
    ],
    "Sigmoid": [("y = Sigmoid(x)", {})],
    "Slice": [
        ("y = Slice(x, a, b, c, d)", {"a": [1], "b": [2**60], "c": [2], "d": [2]}),
        ("y = Slice(x, a, b, c)", {"a": [-3, 0], "b": [-1, 2], "c": [-1, 1]}),
    ],
    "Softmax": [("y = Softmax <axis = 1> (x)", {}), ("y = Softmax(x)", {})],
    "Split": [
        ("a, b = Split <axis = 1> (x, n) y = Concat <axis = 1> (b, a)", {"n": np.array([1, 3])}),
        ("a, b = Split <axis = 3> (x) y = Concat <axis = 3> (b, a)", {}),
    ],
    "Sqrt": [("a = Abs(x) y = Sqrt(a)", {})],
    "Squeeze": [
        ("p = GlobalAveragePool(x) y = Squeeze(p, n)", {"n": np.array([-1, 2])}),
        ("p = GlobalAveragePool(x) y = Squeeze(p)", {}),
    ],
    "Sub": [("y = Sub(c, x)", {"c": np.float32(1)})],
    "Tanh": [("y = Tanh(x)", {})],
    "Transpose": [("y = Transpose <perm = [0, 2, 3, 1]> (x)", {}), ("y = Transpose(x)", {})],
    "Unsqueeze": [("y = Unsqueeze(x, n)", {"n": np.array([0, -1])})],
}
ALL = [(name, body, constants) for name, cases in CASES.items() for body, constants in cases]


def model(
    body: str, constants: Constants, x: str = "float[2,4,7,6] x, float[3,5] rows", opset: int = 17
) -> onnx.ModelProto:
    graph = parser.parse_graph(f"g ({x}) => (float y) {{ {body} }}")
    graph.output[0].type.tensor_type.ClearField("shape")  # the parser takes a type without brackets for a scalar
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def on_torch(proto: onnx.ModelProto, *inputs: Any) -> Any:
    with torch.no_grad():
        (y,) = OnnxModule(proto).eval()(*map(torch.from_numpy, inputs))
    assert isinstance(y, Tensor)
    return y.numpy()


def on_onnx_runtime(proto: onnx.ModelProto, *inputs: Any) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((value.name for value in proto.graph.input), inputs, strict=True))
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(("name", "body", "constants"), ALL, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(ALL)])
def test_an_operator_computes_what_onnx_says(name: str, body: str, constants: Constants) -> None:
    proto = model(body, constants)

    answer, expected = on_torch(proto, X, ROWS), on_onnx_runtime(proto, X, ROWS)

    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=1e-3 if name == "Cast" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, 2, -1])
def test_softmax_of_an_old_opset_takes_all_axes_from_its_own_on_as_one(axis: int | None) -> None:
    proto = model(f"y = Softmax {'' if axis is None else f'<axis = {axis}>'} (x)", {})
    proto.opset_import[0].version = 11

    np.testing.assert_allclose(on_torch(proto, X, ROWS), on_onnx_runtime(proto, X, ROWS), rtol=1e-5)


def test_every_operator_has_its_graph() -> None:
    assert CASES.keys() == OPERATORS.keys()


ZEROS = {"u8": np.uint8(0), "mid": np.uint8(128), "s8": np.int8(0)}
MOVES = [
    "{y} = MaxPool <kernel_shape = [2, 2], strides = [1, 1], pads = [1, 1, 0, 0]> ({x})",
    "{y} = Transpose <perm = [0, 1, 3, 2]> ({x})",
    "{y} = Concat <axis = 1> ({x}, {x})",
    "{y} = Slice({x}, one, far, one)",
    "{y} = Relu({x})",
]


def pair(to: str, source: str, scale: str, zero: str) -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.tuples(st.sampled_from(MOVES), st.booleans(), st.sampled_from(sorted(ZEROS))), max_size=5),
    zero=st.sampled_from(sorted(ZEROS)),
)
def test_integers_of_any_type_go_through_moves_as_they_are(steps: list[tuple[str, bool, str]], zero: str) -> None:
    """Powers of two as scales: nothing rounds, so every value must be the same, bit for bit."""
    # Each slice takes one of the four channels, and torch pools no empty image.
    assume(sum("Slice" in move for move, *_ in steps) < 4)
    body, name = pair("v0", "x", "s0", zero), "v0"
    for i, (move, quantized, kind) in enumerate(steps):
        body += move.format(x=name, y=f"m{i}") + " "
        body += pair(f"v{i + 1}", f"m{i}", f"s{1 + i % 2}", kind) if quantized else ""
        name = f"v{i + 1}" if quantized else f"m{i}"
    constants = ZEROS | {"s0": np.float32(2**-5), "s1": np.float32(2**-6), "s2": np.float32(2**-4)}
    constants |= {"one": np.array([1]), "far": np.array([99])}
    proto = model(f"{body} y = Identity({name})", constants, x="float[2,4,7,6] x")

    np.testing.assert_array_equal(on_torch(proto, X), on_onnx_runtime(proto, X))


@pytest.mark.parametrize(
    "quantizer", ["(x, s, u8)", "(x, s, mid)", "(x, s, s8)", "(x, s)", "<output_dtype = 3> (x, s)"]
)
@pytest.mark.parametrize("between", ["", "q = MaxPool <kernel_shape = [2, 2]> (p) "])
def test_without_a_zero_point_it_is_that_of_the_type_which_the_integers_have(quantizer: str, between: str) -> None:
    body = f"{'p' if between else 'q'} = QuantizeLinear {quantizer} {between}y = DequantizeLinear(q, s)"
    proto = model(body, ZEROS | {"s": np.float32(2**-5)}, x="float[2,4,7,6] x", opset=21)

    np.testing.assert_array_equal(on_torch(proto, X), on_onnx_runtime(proto, X))


WEIGHT = "w = DequantizeLinear <axis = {axis}> (w_q, sw, zw) "


@pytest.mark.parametrize(
    ("body", "integers"),
    [
        (WEIGHT.format(axis=0) + "c = Conv(a, w) r = Relu(c) " + pair("y", "r", "s", "u8"), True),
        (WEIGHT.format(axis=0) + "c = Conv(a, w) " + pair("y", "c", "s", "mid"), True),
        (WEIGHT.format(axis=0) + "y = Conv(a, w)", False),
        (WEIGHT.format(axis=0) + "c = Conv(a, w) d = Sigmoid(c) " + pair("y", "d", "s", "u8"), False),
        (WEIGHT.format(axis=0) + "c = Conv(x, w) " + pair("y", "c", "s", "u8"), False),
        (WEIGHT.format(axis=1) + "c = Conv(a, w) " + pair("y", "c", "s", "u8"), False),
        (WEIGHT.format(axis=0).replace("zw", "odd") + "c = Conv(a, w) " + pair("y", "c", "s", "u8"), False),
        (WEIGHT.format(axis=0).replace("w_q", "low") + "c = Conv(a, w) " + pair("y", "c", "s", "u8"), False),
        (
            WEIGHT.format(axis=0) + "c = Conv(a, w) " + pair("d", "c", "s", "u8") + "y = Add(d, c)",
            False,
        ),
        ("w = DequantizeLinear(w_q, s, s8) c = Conv(a, w) " + pair("y", "c", "s", "u8"), True),
        (WEIGHT.format(axis=0) + "c = Conv(a, w) d = Clip(c, s, sz) " + pair("y", "d", "s", "u8"), True),
        (WEIGHT.format(axis=0) + "c = Conv(a, w) d = Clip(c, s) " + pair("y", "d", "s", "u8"), False),
        (WEIGHT.format(axis=0) + "c = Conv(a, w) d = Relu(c) e = Clip(d, s, sz) " + pair("y", "e", "s", "u8"), False),
        ("w = DequantizeLinear <axis = 0> (w_q, sw, zw) y = Add(a, w)", False),
    ],
    ids=[
        *("relu", "plain", "output", "sigmoid", "float x", "axis", "zero", "lowest", "two readers", "per tensor"),
        *("two bounds", "one bound", "two clamps", "no product"),
    ],
)
def test_weights_stay_integers_exactly_where_xnnpack_can_use_them(body: str, integers: bool) -> None:
    weights = RNG.integers(-127, 128, (4, 4, 1, 1)).astype(np.int8)
    constants = ZEROS | {
        "s": np.float32(0.05),
        "sz": np.float32(6),
        "w_q": weights,
        "low": np.where(weights == weights.min(), -128, weights).astype(np.int8),
        "sw": np.linspace(0.01, 0.02, 4, dtype=np.float32),
        "zw": np.zeros(4, np.int8),
        "odd": np.ones(4, np.int8),
    }
    x = X[:1, :, :4, :4].repeat(4, 0)
    proto = model(pair("a", "x", "s", "u8") + body, constants, x="float[4,4,4,4] x")
    module = OnnxModule(proto).eval()

    (y,) = module(torch.from_numpy(x))

    kept = [buffer for buffer in module.buffers() if buffer.dtype == torch.int8]
    assert bool(kept) == integers
    delta = np.abs(y.numpy() - on_onnx_runtime(proto, x))
    assert delta.max() <= 0.051  # a step, where torch multiplies by 1 / scale and lands on the other side of a half
    assert (delta > 1e-5).mean() < 0.02


def test_products_that_share_a_bias_have_one_each() -> None:
    """XNNPACK's serializer would round it once, for the first of them."""
    body = "c = Conv(x, k, b) d = Conv(c, k, b) y = Add(c, d)"
    module = OnnxModule(model(body, {"k": floats(4, 4, 1, 1), "b": floats(4)}, x="float[2,4,7,6] x")).eval()

    module(torch.from_numpy(X))

    assert sorted(tuple(buffer.shape) for buffer in module.buffers()) == [(4,), (4,), (4, 4, 1, 1), (4, 4, 1, 1)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('y = Conv <auto_pad = "SAME_UPPER"> (x, k)', "auto_pad=SAME_UPPER"),
        ("flat = Reshape(x, s) y = MaxPool <kernel_shape = [2], strides = [2]> (flat)", "pools over 1 axes"),
        ("y = AveragePool <kernel_shape = [2, 2], pads = [1, 0, 0, 0]> (x)", "pools in another way"),
        ('y = Pad <mode = "reflect"> (x, p)', "pads by mirroring"),
        ("y = Reshape(x, rows)", "computes input 1 in the run"),
        ("y = Cast <to = 7> (x)", "casts to another type"),
        ("y = Conv(x, x)", "weights that the run computes"),
    ],
)
def test_what_torch_or_xnnpack_cannot_do_is_refused_with_the_node(body: str, words: str) -> None:
    constants: Constants = {"k": K, "p": np.array([0, 0, 1, 0, 0, 0, 1, 0]), "s": np.array([2, 4, 42])}

    with pytest.raises(TargetError, match=r"node 'y' \(\w+\)") as refusal:
        on_torch(model(body, constants), X, ROWS)

    assert words in str(refusal.value)
