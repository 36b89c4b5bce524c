"""Dialects on random Q/DQ graphs: what the graph computes stays, and the proof that says so tells the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.graphs import dialects
from pipeline.graphs.dialects import DIALECTS, apply_dialect
from pipeline.graphs.proof import MOST_MOVED, ROUNDS, _compared, answers_of, apply_proved
from targets.errors import ModelError

pytestmark = pytest.mark.integration

node = helper.make_node
ZEROS = {"zero_u8": np.uint8(0), "zero_s8": np.int8(0), "zero_u128": np.uint8(128)}
SAMPLES = [{"x": x} for x in np.random.default_rng(7).normal(scale=2.0, size=(2, 1, 4, 6, 6)).astype(np.float32)]


@dataclass
class Net:
    """A graph that grows node by node; `open` are quantized tensors (name, channels) that later nodes may read."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=lambda: dict(ZEROS))
    open: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def quantized(self, source: str, channels: int, zero: str, scale: float) -> None:
        q, dq, s = self.name("q"), self.name("dq"), self.name("s")
        self.constants[s] = np.float32(scale)
        self.nodes += [node("QuantizeLinear", [source, s, zero], [q]), node("DequantizeLinear", [q, s, zero], [dq])]
        self.open.append((dq, channels))

    def convolution(self, x: str, channels: int) -> str:
        """Four outputs; integers in -127..127 by channel, and a bias."""
        w_q, w_s, w, b, c = (self.name(kind) for kind in ("wq", "ws", "w", "b", "c"))
        self.constants[w_q] = self.rng.integers(-127, 128, (4, channels, 1, 1)).astype(np.int8)
        self.constants[w_s] = self.rng.uniform(1e-3, 2e-2, 4).astype(np.float32)
        self.constants[b] = self.rng.normal(size=4).astype(np.float32)
        self.nodes += [
            node("DequantizeLinear", [w_q, w_s], [w], axis=0),
            node("Conv", [x, w, b], [c], name=c),
        ]
        return c

    def model(self) -> ir.Model:
        pooled, flat = self.name("p"), "y"
        self.nodes += [node("GlobalAveragePool", [self.open[-1][0]], [pooled]), node("Flatten", [pooled], [flat])]
        proto = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()],
        )
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@st.composite
def nets(draw: st.DrawFn) -> ir.Model:
    """Convolutions, residual additions, concatenations and pools, each result quantized in one of the three ways."""
    net = Net(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    net.quantized("x", 4, draw(st.sampled_from(sorted(ZEROS))), 0.05)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "add", "concat", "pool"]))
        x, channels = draw(st.sampled_from(net.open))
        out = net.name(kind)
        if kind == "conv":
            out, channels = net.convolution(x, channels), 4
        elif kind == "add":
            other = next(name for name, size in net.open[::-1] if size == channels)
            net.nodes.append(node("Add", [x, other], [out]))
        elif kind == "concat":
            other, size = draw(st.sampled_from(net.open))
            net.nodes.append(node("Concat", [x, other], [out], axis=1))
            channels += size
        else:
            net.nodes.append(node("MaxPool", [x], [out], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        zero = draw(st.sampled_from(sorted(ZEROS)))
        scale = draw(st.floats(0.01, 0.1))
        if draw(st.booleans()):
            activation = net.name("a")
            bounds = ["low", "high"] if draw(st.booleans()) else None
            net.constants |= {"low": np.float32(0), "high": np.float32(6)}
            net.nodes.append(
                node("Clip", [out, *bounds], [activation]) if bounds else node("Relu", [out], [activation])
            )
            out = activation
        net.quantized(out, channels, zero, scale)
    return net.model()


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@settings(deadline=None, max_examples=12)
@given(model=nets())
def test_every_exact_rewrite_of_a_dialect_leaves_every_answer_bit_for_bit(dialect: str, model: ir.Model) -> None:
    for rewrite in DIALECTS[dialect]:
        before = answers_of(model, SAMPLES)
        rewrite(model)
        if rewrite.__name__ not in ROUNDS:
            np.testing.assert_array_equal(answers_of(model, SAMPLES)["y"], before["y"], err_msg=rewrite.__name__)

    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert apply_dialect(model, dialect) == 0


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@settings(deadline=None, max_examples=6)
@given(model=nets())
def test_the_proof_names_what_changed_and_claims_no_more_than_it_saw(dialect: str, model: ir.Model) -> None:
    before = answers_of(model, SAMPLES)
    proofs = apply_proved(model, dialect, SAMPLES)
    after = answers_of(model, SAMPLES)

    moved = max(float(np.abs(a - b).max()) for a, b in zip(before["y"], after["y"], strict=True))
    assert all(proof.num_changes > 0 for proof in proofs)
    assert all(proof.max_abs_delta == 0.0 for proof in proofs if proof.exact)
    assert moved <= sum(proof.max_abs_delta for proof in proofs) + 1e-6


def test_a_rewrite_that_changes_what_is_computed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubles(model: ir.Model) -> int:
        value = model.graph.initializers["s"]
        value.const_value = ir.tensor(np.float32(2 * value.const_value.numpy()), name="s")  # type: ignore[union-attr]
        return 1

    monkeypatch.setitem(dialects.DIALECTS, "openvino", (doubles,))
    net = Net(np.random.default_rng(0))
    net.constants["s"] = np.float32(0.001)
    net.nodes += [
        node("QuantizeLinear", ["x", "s", "zero_s8"], ["q"]),
        node("DequantizeLinear", ["q", "s", "zero_s8"], ["d"]),
    ]
    net.open.append(("d", 4))

    with pytest.raises(ModelError, match="rewrite doubles for dialect 'openvino'"):
        apply_proved(net.model(), "openvino", SAMPLES)


@pytest.mark.parametrize("gone", [np.nan, np.inf])
def test_an_output_that_is_a_number_no_more_has_moved_infinitely(gone: float) -> None:
    before, after = {"y": [np.ones(3, np.float32)]}, {"y": [np.array([1, gone, 1], np.float32)]}

    proof = _compared("rewrite", 1, before, after)

    assert proof.share_of_range > MOST_MOVED
    assert proof.max_abs_delta == math.inf
    assert _compared("rewrite", 1, after, after).max_abs_delta == 0.0
