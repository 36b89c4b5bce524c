"""Every rule for ExecuTorch's XNNPACK: a graph with the fault, one without, and both on the real runtime where it is there."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper

from targets.lint import RULES

Case = dict[str, Any]
RNG = np.random.default_rng(2)


def pair(to: str, source: str, scale: str, zero: str = "mid") -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


X, Y = pair("a", "x", "sx"), pair("y", "c", "sy")
W = "w = DequantizeLinear <axis = 0> (w_q, sw, zw) "
CONV = "c = Conv(a, w) "
GOOD: Case = {"body": X + W + CONV + Y}

FLOATS = RNG.normal(size=(16, 16, 1, 1)).astype(np.float32)
WIDE = {"s4": np.linspace(0.01, 0.1, 16, dtype=np.float32), "z4": np.zeros(16, np.int8)}
PER_CHANNEL = pair("a", "x", "s4", "z4").replace("Linear(", "Linear <axis = 1> (")
INT4 = {
    "w4": numpy_helper.from_array(RNG.integers(-7, 8, (16, 16, 1, 1)).astype(ml_dtypes.int4)),
    "z4": numpy_helper.from_array(np.zeros(16, ml_dtypes.int4)),
}
BLOCKS = "w = DequantizeLinear <axis = 0, block_size = 8> (w_q, sb) "
SCOPE = "then_branch = t () => (float[1] r) { r = Constant <value_float = 1.0> () }"

CASES: dict[str, tuple[Case, Case]] = {
    "X01": ({"body": "y = Conv(x, wf)", "wf": FLOATS}, GOOD),
    "X02": (
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = acme.Gelu(d)", "domains": ("acme",)},
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = Sigmoid(d)"},
    ),
    "X03": (GOOD | {"sw": np.r_[0, np.full(15, 0.01)].astype(np.float32)}, GOOD),
    "X04": (
        {"body": "r = ReduceMean <keepdims = 0> (x) sr = Abs(r) " + pair("a", "x", "sr") + W + CONV + Y},
        {"body": "sr = Mul(sx, sy) " + pair("a", "x", "sr") + W + CONV + Y},
    ),
    "X05": (GOOD | {"sw": np.full(3, 0.1, np.float32), "zw": np.zeros(3, np.int8)}, GOOD),
    "X06": ({"body": PER_CHANNEL + W + CONV + Y, **WIDE}, GOOD),
    "X07": (GOOD | {"body": X + W.replace("axis = 0", "axis = 1") + CONV + Y}, GOOD),
    "X08": (
        {"body": X + "w = DequantizeLinear <axis = 0> (w4, sw, z4) " + CONV + Y, "opset": 21, **INT4},
        GOOD | {"opset": 21},
    ),
    "X09": (
        {"body": X + BLOCKS + CONV + Y, "opset": 21, "sb": np.full((2, 16, 1, 1), 0.01, np.float32)},
        GOOD | {"opset": 21},
    ),
    "X10": (
        {
            "body": "a_q = QuantizeLinear(x, sx, mid) y_q = QLinearConv(a_q, sx, mid, w_q, sw, zw, sy, mid) "
            "y = DequantizeLinear(y_q, sy, mid)"
        },
        GOOD,
    ),
    "X11": (GOOD | {"zw": np.full(16, 3, np.int8)}, GOOD),
    "X12": (GOOD | {"w_q": np.full((16, 16, 1, 1), -128, np.int8)}, GOOD),
    "X13": (
        {"body": X + W + "y = Conv(a, w)"},
        {"body": X + W + CONV + "r = Clip(c, zero, six) " + pair("y", "r", "sy"), "zero": np.float32(0)}
        | {"six": np.float32(6)},
    ),
    "X14": (
        {"body": X + "r = Sigmoid(a) " + W + "c = Conv(r, w) " + Y},
        {"body": X + "r = Sigmoid(a) " + pair("k", "r", "sx") + W + "c = Conv(k, w) " + Y},
    ),
    "X15": ({"body": W + "c = Conv(x, w) " + Y}, GOOD),
    "X16": ({"body": X + "c = Conv(a, wf) " + Y, "wf": FLOATS}, GOOD),
    "X17": (GOOD | {"x": "float[N,16,H,8] x"}, GOOD | {"x": "float[N,16,8,8] x"}),
    "X18": (
        {"body": "a_q = QuantizeLinear(x, sx) a = DequantizeLinear(a_q, sx) " + W + CONV + Y},
        {"body": pair("a", "x", "sx", "u8") + W + CONV + Y},
    ),
    "X19": (
        {"body": f"{GOOD['body']} z = If <{SCOPE}, {SCOPE.replace('then', 'else')}> (yes)", "y": "float y, float[1] z"}
        | {"yes": np.bool_(True)},
        GOOD,
    ),
}

# What the faulty graph does on the runtime; the other one runs in INT8.
OUTCOMES = dict.fromkeys(["X01", "X07", "X11", "X12", "X13", "X14", "X15", "X16"], "float")
OUTCOMES |= dict.fromkeys(["X02", "X04", "X06", "X10"], "refused")


@pytest.mark.parametrize("code", CASES)
def test_the_fault_is_found_and_nothing_else(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.codes(bad, "executorch") == {code}
    assert bench.codes(good, "executorch") == set()


@pytest.mark.system
@pytest.mark.skipif(
    find_spec("executorch") is None, reason="executorch is not installed: pip install 'edgestill[executorch]'"
)
@pytest.mark.parametrize("code", OUTCOMES)
def test_the_runtime_itself_says_so(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.outcome(bad, "executorch") == OUTCOMES[code]
    assert bench.outcome(good, "executorch") == "int8"


def test_every_rule_has_its_two_graphs_and_every_tried_one_its_outcome() -> None:
    assert [rule.code for rule in RULES["executorch"]] == list(CASES)
    assert {rule.code for rule in RULES["executorch"] if rule.evidence == "tried"} == set(OUTCOMES)
