"""Every rule for ONNX Runtime: a graph with the fault, one without, and both on the real runtime."""

from __future__ import annotations

import platform
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper

from targets.lint import RULES, Platform

Case = dict[str, Any]
RNG = np.random.default_rng(2)
ARM, OLD = Platform(machine="aarch64", vnni=None), Platform(machine="x86_64", vnni=False)


def pair(to: str, source: str, scale: str, zero: str = "mid") -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


X, XU, X8 = pair("a", "x", "sx"), pair("a", "x", "sx", "u8"), pair("a", "x", "sx", "s8")
Y, YU = pair("y", "c", "sy"), pair("y", "c", "sy", "u8")
W = "w = DequantizeLinear <axis = 0> (w_q, sw, zw) "
CONV = "c = Conv(a, w) "
GOOD: Case = {"body": X + W + CONV + Y}

ROW = {"x": "float[1,16] x", "w_q": RNG.integers(-60, 61, (16, 16)).astype(np.int8)}
GEMM: Case = {"body": X + W + "y = Gemm <transB = 1> (a, w)", **ROW}
WIDE = {"s4": np.linspace(0.01, 0.1, 16, dtype=np.float32), "z4": np.zeros(16, np.int8)}
FLOATS = RNG.normal(size=(16, 16, 1, 1)).astype(np.float32)
BN = {"one": np.ones(16, np.float32)}
NORM = "c = BatchNormalization(c0, one, one, one, one) "
DEAD = np.r_[0, np.full(15, 0.01)].astype(np.float32)
TALL = {"x": "float[1,64] x", "opset": 21, "w_q": RNG.integers(-60, 61, (64, 16)).astype(np.int8)}
BLOCKS = RNG.uniform(0.001, 0.02, (2, 16)).astype(np.float32)
INT4 = {
    "w4": numpy_helper.from_array(RNG.integers(-7, 8, (16, 16, 1, 1)).astype(ml_dtypes.int4)),
    "z4": numpy_helper.from_array(np.zeros(16, ml_dtypes.int4)),
}
HALF = {"sh": np.float16(0.1), "w_q": RNG.integers(-60, 61, (16, 16, 1, 1)).astype(np.int8)}
HALF_BODY = (
    "h = Cast <to = 10> (x) " + pair("a", "h", "sh") + "w = DequantizeLinear(w_q, sh, s8) " + CONV
    + pair("yh", "c", "sh") + "y = Cast <to = 1> (yh)"
)  # fmt: skip
SCOPE = "then_branch = t () => (float[1] r) { r = Constant <value_float = 1.0> () }"
TWO_READERS = W + CONV + pair("e", "c", "sy") + "f = Add(a, e) " + pair("y", "f", "sy")
BRANCH = {"x": "float[1,4,2,2] x", "w_q": ROW["w_q"]}

CASES: dict[str, tuple[Case, Case]] = {
    "O01": ({"body": "y = Conv(x, wf)", "wf": FLOATS}, GOOD),
    "O02": (GOOD | {"opset": 40}, GOOD | {"opset": 21}),
    "O03": (
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = acme.Gelu(d)", "domains": ("acme",)},
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = com.microsoft.Gelu(d)", "domains": ("com.microsoft",)},
    ),
    "O04": (GOOD | {"sx": np.float32(0)}, GOOD),
    "O05": (GOOD | {"sw": DEAD}, GOOD),
    "O06": (
        {"body": "r = ReduceMax <keepdims = 0> (x) sr = Abs(r) " + pair("a", "x", "sr") + W + CONV + Y},
        {"body": "sr = Mul(sx, sy) " + pair("a", "x", "sr") + W + CONV + Y},
    ),
    "O07": (GOOD | {"sw": np.full(3, 0.1, np.float32), "zw": np.zeros(3, np.int8)}, GOOD),
    "O08": (
        {"body": X8.replace("Linear(", "Linear <axis = 1> (").replace("sx, s8", "s4, z4") + W + CONV + Y, **WIDE},
        {"body": X8 + W + CONV + Y},
    ),
    "O09": (
        GEMM | {"body": X + W.replace("axis = 0", "axis = 1") + "y = Gemm <transB = 1> (a, w)"},
        GEMM | {"body": X + W.replace("axis = 0", "axis = 1") + "y = Gemm(a, w)"},
    ),
    "O10": (
        {"body": X + "w = DequantizeLinear <axis = 0> (w4, sw, z4) " + CONV + Y, "opset": 21, **INT4},
        GOOD | {"opset": 21},
    ),
    "O11": (
        {"body": X + "w = DequantizeLinear <axis = 0, block_size = 32> (w_q, b) y = MatMul(a, w)", "b": BLOCKS, **TALL},
        {"body": X + "w = DequantizeLinear <axis = 1> (w_q, sw, zw) y = MatMul(a, w)", **TALL},
    ),
    "O12": ({"body": HALF_BODY, "opset": 19, **HALF}, GOOD),
    "O13": ({"body": X + W + "c0 = Conv(a, w) " + NORM + Y, **BN}, GOOD),
    "O14": ({"body": X8 + TWO_READERS}, {"body": X + TWO_READERS}),
    "O15": (
        {"body": X + W + CONV + pair("y", "c", "sy", "s8"), "platform": ARM},
        {"body": X8 + W + CONV + pair("y", "c", "sy", "s8"), "platform": ARM},
    ),
    "O16": (
        {"body": X + W + "c0 = Conv(a, w) c = Relu(c0) " + Y},
        {"body": XU + W + "c0 = Conv(a, w) c = Relu(c0) " + YU},
    ),
    "O17": (
        {"body": X + "j = Concat <axis = 1> (a, a) " + W + "c = Conv(j, w) " + Y, "x": "float[1,8,8,8] x"},
        {
            "body": X + "j = Concat <axis = 1> (a, a) " + pair("k", "j", "sx") + W + "c = Conv(k, w) " + Y,
            "x": "float[1,8,8,8] x",
        },
    ),
    "O18": ({"body": W + "c = Conv(x, w) " + Y}, GOOD),
    "O19": (
        {"body": X + "y = MatMul(a, wf)", "x": "float[1,16] x", "wf": FLOATS[..., 0, 0]},
        {"body": X + "w = DequantizeLinear <axis = 1> (w_q, sw, zw) y = MatMul(a, w)", **ROW},
    ),
    "O20": (GOOD | {"zw": np.full(16, 3, np.int8)}, GOOD),
    "O21": (
        {"body": X + "f = Flatten(a) " + W + "y = Gemm <transB = 1> (f, w)", **BRANCH},
        {
            "body": "a_q = QuantizeLinear(x, sx, mid) f_q = Flatten(a_q) f = DequantizeLinear(f_q, sx, mid) "
            + W + "y = Gemm <transB = 1> (f, w)",
            **BRANCH,
        },
    ),
    "O22": ({"body": X + W + "y = Conv(a, w)"}, GOOD),
    "O23": (
        GEMM | {"body": X + W + "y = Gemm <transB = 1> (a, w, b)", "b": np.ones(16, np.float32)},
        GEMM
        | {
            "body": X + W + "b = DequantizeLinear <axis = 0> (b_q, sb) y = Gemm <transB = 1> (a, w, b)",
            "b_q": np.ones(16, np.int32),
            "sb": (np.float32(0.05) * np.linspace(0.002, 0.02, 16)).astype(np.float32),
        },
    ),
    "O24": ({"body": X + W.replace("axis = 0", "axis = 1") + "c = ConvTranspose(a, w) " + Y}, GOOD),
    "O25": (
        GOOD | {"w_q": np.full((16, 16, 1, 1), -65, np.int8), "platform": OLD},
        GOOD | {"w_q": np.full((16, 16, 1, 1), -64, np.int8), "platform": OLD},
    ),
    "O26": (GOOD | {"x": "float[N,16,H,8] x"}, GOOD | {"x": "float[N,16,8,8] x"}),
    "O27": (
        {"body": "a_q = QuantizeLinear(x, sx) a = DequantizeLinear(a_q, sx) " + W + CONV + YU},
        {"body": XU + W + CONV + YU},
    ),
    "O28": (
        {"body": f"{GOOD['body']} z = If <{SCOPE}, {SCOPE.replace('then', 'else')}> (yes)", "y": "float y, float[1] z"}
        | {"yes": np.bool_(True)},
        GOOD,
    ),
}  # fmt: skip

# What the faulty graph does on the runtime; the other one runs in INT8.
OUTCOMES = dict.fromkeys(
    ["O01", "O08", "O10", "O12", "O13", "O14", "O16", "O17", "O18", "O19", "O21", "O22", "O23", "O24"], "float"
)
OUTCOMES |= dict.fromkeys(["O02", "O03", "O07"], "refused") | dict.fromkeys(["O09", "O11"], "wrong")
OUTCOMES |= dict.fromkeys(["O05", "O06", "O20", "O27"], "int8")


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="int8 becomes uint8 on x86 only")


@pytest.mark.parametrize("code", CASES)
def test_the_fault_is_found_and_nothing_else(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.codes(bad, "onnxruntime") == {code}
    assert bench.codes(good, "onnxruntime") == set()


@pytest.mark.parametrize("code", [pytest.param(code, marks=X86) if code == "O14" else code for code in OUTCOMES])
def test_the_runtime_itself_says_so(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.outcome(bad, "onnxruntime-cpu") == OUTCOMES[code]
    assert bench.outcome(good, "onnxruntime-cpu") == "int8"


@X86
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("signed throughout", X8 + W + CONV + pair("y", "c", "sy", "s8")),
        ("unsigned in, signed out", X + W + CONV + pair("y", "c", "sy", "s8")),
        ("signed in, unsigned out", X8 + W + CONV + Y),
        ("a Reshape behind DequantizeLinear", X + "r = Reshape(a, shape) " + W + "c = Conv(r, w) " + Y),
        ("a MaxPool behind DequantizeLinear", X + "r = MaxPool <kernel_shape = [2, 2]> (a) " + W + "c = Conv(r, w) " + Y),
        ("a float bias on a convolution", X + W + "c = Conv(a, w, one) " + Y),
        ("Concat of different scales with a quantizer behind", X + pair("b", "x", "sy") + "j = Concat <axis = 2> (a, b) "
         + pair("k", "j", "sy") + W + "c = Conv(k, w) " + Y),
    ],
)  # fmt: skip
def test_what_looks_like_a_fault_and_runs_in_int8(name: str, body: str, bench: Any) -> None:
    case = {"body": body, "shape": np.array([1, 16, 8, 8]), **BN}

    assert bench.codes(case, "onnxruntime") == set(), name
    assert bench.outcome(case, "onnxruntime-cpu") == "int8", name


@X86
@pytest.mark.parametrize(
    ("code", "case"),
    [
        ("O08", {"body": X.replace("Linear(", "Linear <axis = 1> (").replace("sx, mid", "s4, z8") + W + CONV + Y}),
        ("O11", {"body": X + "w = DequantizeLinear <axis = 0, block_size = 32> (w_q, b) y = Gemm(a, w)", **TALL}),
        ("O16", {"body": XU + W + "c0 = Conv(a, w) c = Clip(c0, zero, six) " + YU}),
        ("O16", GEMM | {"body": X + W + "c = Gemm <transB = 1> (a, w) r = Relu(c) " + pair("y", "r", "sy")}),
        ("O17", {"body": X + "m = Mul(a, a) " + W + "c = Conv(m, w) " + Y}),
        ("O17", {"body": X + "m = GlobalAveragePool(a) " + W + "c = Conv(m, w) " + Y}),
        ("O22", {"body": X + W + "d = Conv(a, w) c = HardSwish(d) " + Y}),
        ("O22", {"body": X + W + CONV + Y + pair("z", "c", "sx"), "y": "float y, float z"}),
        ("O22", GEMM | {"body": X + W + "c = Gemm <transB = 1> (a, w) z = Sigmoid(c) " + Y, "y": "float y, float z"}),
    ],
)
def test_the_same_fault_in_another_form(code: str, case: Case, bench: Any) -> None:
    case = {"zero": np.float32(0), "six": np.float32(6), "b": BLOCKS, "z8": np.zeros(16, np.uint8), **WIDE, **case}

    assert bench.codes(case, "onnxruntime") == {code}
    assert bench.outcome(case, "onnxruntime-cpu") in ("float", "refused")


def test_a_convolution_left_in_float_between_quantizers_is_quantized_by_the_runtime_itself(bench: Any) -> None:
    case = {"body": X + "c = Conv(a, wf) " + Y, "wf": FLOATS}

    (finding,) = bench.lint(case, "onnxruntime")

    assert finding.code == "O19"
    assert "by itself" in finding.message
    assert bench.outcome(case, "onnxruntime-cpu") == "int8"


def test_every_rule_has_its_two_graphs_and_every_tried_one_its_outcome() -> None:
    assert [rule.code for rule in RULES["onnxruntime"]] == list(CASES)
    assert {rule.code for rule in RULES["onnxruntime"] if rule.evidence == "tried"} == set(OUTCOMES)
