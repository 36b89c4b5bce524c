"""Every rule for TensorRT: a graph with the fault and one without. No engine is built: there is no builder here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from targets.lint import RULES, Platform

Case = dict[str, Any]
RNG = np.random.default_rng(2)


def pair(to: str, source: str, scale: str = "sx", zero: str = "s8") -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


X, Y = pair("a", "x"), pair("y", "c", "sy")
W = "w = DequantizeLinear <axis = 0> (w_q, sw, zw) "
CONV = "c = Conv(a, w) "
GOOD: Case = {"body": X + W + CONV + Y}

ROW = {"x": "float[1,16] x", "w_q": RNG.integers(-60, 61, (16, 16)).astype(np.int8)}
FLOATS = RNG.normal(size=(16, 16, 1, 1)).astype(np.float32)
WIDE = {"s4": np.linspace(0.01, 0.1, 16, dtype=np.float32), "z4": np.zeros(16, np.int8)}
ONES = np.ones(16, np.float32)
V = "v = DequantizeLinear <axis = 0> (w_q, sw, zw) "
SLICE = "z = Slice(y, begin, end) "
CUT = {"begin": np.zeros(1, np.int64), "end": np.full(1, 2**63 - 1, np.int64)}
HALF = {
    "x": "float16[1,16,8,8] x",
    "y": "float16 y",
    "wh": helper.make_tensor("wh", TensorProto.FLOAT16, [16, 16, 1, 1], FLOATS.ravel()),
    "sx": np.float16(0.05),
    "sy": np.float16(0.2),
    "sw": np.full(16, 0.01, np.float16),
}
SCOPE = "then_branch = t () => (float[1] r) { r = Constant <value_float = 1.0> () }"


def gemm(axis: int, attributes: str = "") -> Case:
    return {"body": X + W.replace("axis = 0", f"axis = {axis}") + f"y = Gemm {attributes} (a, w)", **ROW}


CASES: dict[str, tuple[Case, Case]] = {
    "Q01": (
        {"body": pair("a", "x", "sx", "off") + W + CONV + pair("y", "c", "sy", "s8"), "off": np.int8(3)},
        GOOD,
    ),
    "Q02": ({"body": pair("a", "x", "sx", "u8") + W + CONV + Y}, GOOD),
    "Q03": (
        {"body": "a_q = QuantizeLinear(x, sx) a = DequantizeLinear(a_q, sx) " + W + CONV + Y},
        {
            "body": "a_q = QuantizeLinear <output_dtype = 3> (x, sx) a = DequantizeLinear(a_q, sx) " + W + CONV + Y,
            "opset": 21,
            "platform": Platform(tensorrt=(11, 0)),
        },
    ),
    "Q04": (GOOD | {"sw": np.r_[0, ONES[1:]].astype(np.float32)}, GOOD),
    "Q05": (GOOD | {"zw": np.zeros(4, np.int8)}, GOOD),
    "Q06": (
        {"body": pair("a", "x", "s4", "z4").replace("Linear(", "Linear <axis = 1> (") + W + CONV + Y, **WIDE},
        GOOD,
    ),
    "Q07": (gemm(0), gemm(1)),
    "Q08": (
        {
            "body": X + W + "b = DequantizeLinear(b_q, sb) c = Conv(a, w, b) " + Y,
            "b_q": np.ones(16, np.int32),
            "sb": np.float32(0.01),
        },
        {"body": X + W + "c = Conv(a, w, b) " + Y, "b": ONES},
    ),
    "Q09": (
        {
            "body": "x_q = QuantizeLinear(x, sx, s8) y_q = QLinearConv(x_q, sx, s8, w_q, sw, zw, sy, s8) "
            "y = DequantizeLinear(y_q, sy, s8)"
        },
        GOOD,
    ),
    "Q10": (GOOD | {"opset": 21}, GOOD | {"opset": 20}),
    "Q12": ({"body": W + "c = Conv(x, w) " + Y}, GOOD),
    "Q13": (
        {"body": X + W + CONV + pair("d", "c") + "e = Add(d, a) " + pair("y", "e", "sy")},
        {"body": X + W + CONV + "e = Add(c, a) " + pair("y", "e", "sy")},
    ),
    "Q14": (
        {"body": X + W + CONV + "e = Add(c, x) " + pair("y", "e", "sy")},
        {"body": X + W + CONV + "e = Add(c, a) " + pair("y", "e", "sy")},
    ),
    "Q15": (
        {"body": X + W + CONV + pair("d", "c") + "e = Relu(d) " + pair("y", "e", "sy")},
        {"body": X + W + CONV + "e = Relu(c) " + pair("y", "e", "sy")},
    ),
    "Q16": (
        {"body": X + "y = GlobalAveragePool(a)"},
        {"body": X + "c = GlobalAveragePool(a) " + Y},
    ),
    "Q17": (
        {
            "body": X + pair("b", "x", "sy") + W + V + CONV + "d = Conv(b, v) " + Y + pair("z", "d"),
            "y": "float y, float z",
        },
        {
            "body": X + pair("b", "x", "sx") + W + V + CONV + "d = Conv(b, v) " + Y + pair("z", "d"),
            "y": "float y, float z",
        },
    ),
    "Q18": (
        GOOD | {"x": "float[1,3,8,8] x", "w_q": RNG.integers(-60, 61, (16, 3, 1, 1)).astype(np.int8)},
        GOOD,
    ),
    "Q19": (
        GOOD | {"w_q": np.full((16, 16, 1, 1), -128, np.int8)},
        GOOD | {"w_q": np.full((16, 16, 1, 1), -127, np.int8)},
    ),
    "Q20": (
        {"body": X + W + CONV + pair("d", "c", "sy") + "e = Relu(d) y = Conv(e, wf)", "wf": FLOATS},
        {"body": X + W + CONV + pair("d", "c", "sy") + "e = Relu(d) y = Conv(e, wh)", "opset": 19, **HALF},
    ),
    "Q21": (
        {"body": GOOD["body"] + SLICE, "y": "float z", **CUT},
        {"body": GOOD["body"] + SLICE, "y": "float z", **CUT, "end": np.full(1, 2**31 - 1, np.int64)},
    ),
    "Q22": (
        {"body": X + "c = MaxPool <kernel_shape = [2, 2], dilations = [2, 2]> (a) " + Y},
        {"body": X + "c = MaxPool <kernel_shape = [2, 2], dilations = [1, 1]> (a) " + Y},
    ),
    "Q23": ({"body": "y = Relu(x)"}, GOOD),
    "Q24": (GOOD | {"x": "float[N,16,H,8] x"}, GOOD | {"x": "float[N,16,8,8] x"}),
    "Q25": (
        {"body": f"{GOOD['body']} z = If <{SCOPE}, {SCOPE.replace('then', 'else')}> (yes)", "y": "float y, float[1] z"}
        | {"yes": np.bool_(True)},
        GOOD,
    ),
}

# What cannot but be found with the fault: Q/DQ behind a convolution stands between it and its Relu.
COMPANIONS = {"Q20": {"Q15"}}

# Other forms of the same faults, and what only looks like one.
FORMS: list[tuple[str, Case, set[str]]] = [
    ("float weights behind Q and DQ", {
        "body": X + "w_q = QuantizeLinear <axis = 0> (wf, sw, zw) " + W + CONV + Y, "wf": FLOATS / 100
    }, set()),
    ("uint8 with zero point 128", {"body": pair("a", "x", "sx", "mid") + W + CONV + Y}, {"Q01", "Q02"}),
    ("uint8 by output_dtype alone", {
        "body": "q = QuantizeLinear <output_dtype = 2> (x, sx) a = DequantizeLinear(q, sx) " + W + CONV + Y, "opset": 21,
        "platform": Platform(tensorrt=(11, 0))
    }, {"Q02"}),
    ("a negative scale", GOOD | {"sx": np.float32(-1)}, {"Q04"}),
    ("a scale that is NaN", GOOD | {"sy": np.float32("nan")}, {"Q04"}),
    ("an empty scale", GOOD | {"sx": np.zeros(0, np.float32)}, {"Q04", "Q05"}),
    ("a scale through Cast, Identity and Constant", {
        "body": "k = Constant <value_float = 0.05> () i = Identity(k) st = Cast <to = 1> (i) " + pair("a", "x", "st") + W + CONV + Y
    }, set()),
    ("three scales for sixteen channels", GOOD | {"sw": ONES[:3], "zw": np.zeros(3, np.int8)}, {"Q05"}),
    ("Gemm with transB along 1", gemm(1, "<transB = 1>"), {"Q07"}),
    ("Gemm with transB along 0", gemm(0, "<transB = 1>"), set()),
    ("Gemm along the last axis, counted from the end", gemm(-1), set()),
    ("MatMul along the first axis", gemm(0) | {"body": X + W + "y = MatMul(a, w)"}, {"Q07"}),
    ("MatMul of a transposed weight", gemm(0) | {"body": X + W + "t = Transpose <perm = [1, 0]> (w) y = MatMul(a, t)"}, set()),
    ("ConvTranspose along 1", GOOD | {"body": X + W.replace("= 0", "= 1") + "c = ConvTranspose(a, w) " + Y}, set()),
    ("Conv along 1", GOOD | {"body": X + W.replace("= 0", "= 1") + CONV + Y}, {"Q07"}),
    ("only the activation", {"body": X + "c = Conv(a, wf) " + Y, "wf": FLOATS}, {"Q12"}),
    ("a bias added to the activation", {
        "body": X + W + CONV + "e = Add(c, b) " + pair("y", "e", "sy"), "b": ONES.reshape(1, 16, 1, 1)
    }, set()),
    ("an identity branch behind MaxPool", {
        "body": X + "m = MaxPool <kernel_shape = [1, 1]> (a) " + W + CONV + "e = Add(c, m) " + pair("y", "e", "sy")
    }, set()),
    ("Q/DQ before BatchNorm", {
        "body": X + W + CONV + pair("d", "c") + "e = BatchNormalization(d, o, o, o, o) " + pair("y", "e", "sy"), "o": ONES
    }, {"Q15"}),
    ("HardSwish of integers", {"body": X + "y = HardSwish(a)"}, {"Q16"}),
    ("two quantizers of one scale", {"body": X + pair("b", "x") + "c = Mul(a, b) " + Y}, set()),
    ("depthwise, 16 channels", {
        "body": X + W + "c = Conv <group = 16> (a, w) " + Y, "w_q": np.ones((16, 1, 3, 3), np.int8)
    }, set()),
    ("weight -128 that Q makes", {
        "body": X + "w_q = QuantizeLinear <axis = 0> (wf, sw, zw) " + W + CONV + Y, "wf": -100 * np.abs(FLOATS)
    }, {"Q19"}),
    ("an INT64 Constant", {
        "body": GOOD["body"] + "end = Constant <value_ints = [9223372036854775807]> () " + SLICE, "y": "float z", "begin": CUT["begin"]
    }, {"Q21"}),
    ("MaxPool with indices", {"body": X + "c, i = MaxPool <kernel_shape = [2, 2]> (a) " + Y}, {"Q22"}),
    ("antialiased Resize", {
        "body": X + 'c = Resize <antialias = 1, mode = "linear"> (a, , r) ' + Y, "opset": 19, "r": np.float32([1, 1, 0.5, 0.5])
    }, {"Q22"}),
    ("DynamicQuantizeLinear", {"body": "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)"}, {"Q02", "Q04", "Q09"}),
]  # fmt: skip


@pytest.mark.parametrize("code", CASES)
def test_the_fault_is_found_and_nothing_else(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.codes(bad, "tensorrt") == {code} | COMPANIONS.get(code, set())
    assert bench.codes(good, "tensorrt") == COMPANIONS.get(code, set())


@pytest.mark.parametrize(("name", "case", "expected"), FORMS, ids=[name for name, *_ in FORMS])
def test_the_same_fault_in_another_form(name: str, case: Case, expected: set[str], bench: Any) -> None:
    assert bench.codes(case, "tensorrt") == expected, name


def test_every_rule_has_its_two_graphs() -> None:
    assert [rule.code for rule in RULES["tensorrt"]] == list(CASES)


@pytest.mark.parametrize(
    ("version", "newest"), [((8, 6), 17), ((10, 1), 20), ((10, 3), 20), ((10, 13), 20), ((10, 16), 24), ((11, 4), 25)]
)
def test_the_newest_opset_is_that_of_the_version(version: tuple[int, int], newest: int, bench: Any) -> None:
    at = {"platform": Platform(tensorrt=version)}

    assert bench.codes(GOOD | at | {"opset": newest}, "tensorrt") == set()
    assert bench.codes(GOOD | at | {"opset": newest + 1}, "tensorrt") == {"Q10"}


def test_a_scale_that_is_computed_is_a_warning_and_a_scale_of_zero_an_error(bench: Any) -> None:
    computed = {"body": "r = ReduceMax <keepdims = 0> (x) sr = Abs(r) " + pair("a", "x", "sr") + W + CONV + Y}

    assert {(f.code, f.severity) for f in bench.lint(computed, "tensorrt")} == {("Q04", "warning")}
    assert {(f.code, f.severity) for f in bench.lint(GOOD | {"sx": np.float32(0)}, "tensorrt")} == {("Q04", "error")}
