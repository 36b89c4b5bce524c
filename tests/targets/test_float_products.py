"""No product is silently absent from a placement: recurrent layers, attention, equations, and what was fused away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from targets import make_target
from targets.base import Exported, Placement, TensorSpec
from targets.errors import TargetError
from targets.openvino_products import Executed, Product, hidden

RNG = np.random.default_rng(0)
SEQUENCE, FEATURES, HIDDEN, CLASSES = 6, 8, 4, 3
HEAD = """
    h_q = QuantizeLinear (h, s, zero)
    h_dq = DequantizeLinear (h_q, s, zero)
    head_dq = DequantizeLinear (head_q, s, zero_w)
    logits = MatMul (h_dq, head_dq)
    l_q = QuantizeLinear (logits, s, zero)
    y = DequantizeLinear (l_q, s, zero)
"""
HEAD_MACS = HIDDEN * CLASSES


def placed(target: str, body: str, out_dir: Path, x: str = "float[1,6,8] x", y: str = "float[1,3] y") -> Placement:
    """A graph in ONNX's text, compiled as INT8; every constant that it names has its shape by its name."""
    shapes: dict[str, Any] = {
        **{f"W{n}": (1, n * HIDDEN, FEATURES) for n in (1, 3, 4)},
        **{f"R{n}": (1, n * HIDDEN, HIDDEN) for n in (1, 3, 4)},
        "matrix": (FEATURES, HIDDEN),
        "all": (FEATURES, 3 * HIDDEN),
        "bias": (3 * HIDDEN,),
    }
    constants: dict[str, Any] = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    constants |= {"s": np.float32(0.02), "zero": np.uint8(128), "zero_w": np.int8(0), "first": np.array([0])}
    constants |= {"head_q": RNG.integers(-60, 60, (HIDDEN, CLASSES)).astype(np.int8)}
    graph = parser.parse_graph(f"g ({x}) => ({y}) {{ {body} }}")
    named = {name for node in graph.node for name in node.input}
    graph.initializer.extend(
        numpy_helper.from_array(constants[name], name) for name in sorted(named & constants.keys())
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), out_dir / "model.onnx")
    exported = Exported(
        name="net",
        onnx_path="model.onnx",
        inputs=tuple(TensorSpec(name=v.name, shape=_shape(v), dtype="float32") for v in graph.input),
        outputs=tuple(TensorSpec(name=v.name, shape=_shape(v), dtype="float32") for v in graph.output),
        scheme="as given",
        directory=out_dir,
    )
    made = make_target(target, {})
    return made.placement(made.compile(exported, out_dir / "compiled", "int8"))


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(size.dim_value for size in value.type.tensor_type.shape.dim)


def recurrent(op: str, gates: int) -> str:
    outputs = "all_steps, last, cell" if op == "LSTM" else "all_steps, last"
    return f"""
        steps = Transpose <perm = [1, 0, 2]> (x)
        {outputs} = {op} <hidden_size = {HIDDEN}> (steps, W{gates}, R{gates})
        h = Squeeze (last, first)
        {HEAD}
    """


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_counts_as_float(target: str, op: str, gates: int, tmp_path: Path) -> None:
    recurrent_macs = SEQUENCE * gates * HIDDEN * (FEATURES + HIDDEN)

    placement = placed(target, recurrent(op, gates), tmp_path)

    assert sorted((layer.macs, layer.precision) for layer in placement.layers) == [
        (HEAD_MACS, "int8"),
        (recurrent_macs, "fp32"),
    ]


SELF_ATTENTION = f"""
    q = MatMul (x, matrix)
    k = MatMul (x, matrix)
    turned = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul (q, turned)
    p = Softmax <axis = -1> (scores)
    v = MatMul (p, q)
    h = ReduceMean <axes = [1], keepdims = 0> (v)
    {HEAD}
"""


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_products_that_are_fused_into_attention_count_as_float(target: str, tmp_path: Path) -> None:
    between_activations = 2 * SEQUENCE * SEQUENCE * HIDDEN

    placement = placed(target, SELF_ATTENTION, tmp_path)

    floats = sum(layer.macs for layer in placement.layers if layer.precision == "fp32")
    assert floats in (between_activations + n * SEQUENCE * FEATURES * HIDDEN for n in (1, 2))  # q and k may be one
    assert sum(layer.macs for layer in placement.layers if layer.precision == "int8") == HEAD_MACS


@pytest.mark.parametrize(
    ("attention", "macs"),
    [
        ("Attention <num_heads = 2> (x, all, bias)", SEQUENCE * FEATURES * 3 * HIDDEN + 2 * SEQUENCE**2 * HIDDEN),
        ("MultiHeadAttention <num_heads = 2> (q, q, q)", 2 * SEQUENCE**2 * HIDDEN),
    ],
)
def test_onnx_runtimes_own_attention_is_counted(attention: str, macs: int, tmp_path: Path) -> None:
    body = f"""
        q = MatMul (x, matrix)
        v = com.microsoft.{attention}
        h = ReduceMean <axes = [1], keepdims = 0> (v)
        {HEAD}
    """

    placement = placed("onnxruntime-cpu", body, tmp_path)

    assert macs in {layer.macs for layer in placement.layers if layer.precision == "fp32"}


def test_an_equation_is_refused_where_its_products_cannot_be_counted(tmp_path: Path) -> None:
    body = f'v = Einsum <equation = "nsd,dh->nsh"> (x, matrix) h = ReduceMean <axes = [1], keepdims = 0> (v) {HEAD}'

    with pytest.raises(TargetError, match=r"Einsum.*cannot be counted"):
        placed("onnxruntime-cpu", body, tmp_path)


def test_a_product_that_was_renamed_is_found_by_its_size_and_one_that_was_fused_away_is_hidden() -> None:
    products = [
        Product("a", "MatMul", 10),
        Product("b", "MatMul", 20),
        Product("c", "MatMul", 20),
        Product("d", "x", 5),
    ]
    executed = [Executed(frozenset({"a", "relu"}), 10), Executed(frozenset({"new name"}), 20)]

    assert hidden(products, executed) == [products[2], products[3]]
