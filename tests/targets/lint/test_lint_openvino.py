"""Every rule for OpenVINO: a graph with the fault, one without, and both on the real runtime."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper

from targets.lint import RULES, Platform

pytestmark = pytest.mark.integration

Case = dict[str, Any]
RNG = np.random.default_rng(2)
OLD = Platform(machine="x86_64", vnni=False)


def pair(to: str, source: str, scale: str, zero: str = "mid") -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


X, Y = pair("a", "x", "sx"), pair("y", "c", "sy")
W = "w = DequantizeLinear <axis = 0> (w_q, sw, zw) "
CONV = "c = Conv(a, w) "
GOOD: Case = {"body": X + W + CONV + Y}

FLOATS = RNG.normal(size=(16, 16, 1, 1)).astype(np.float32)
DEAD = np.r_[0, np.full(15, 0.01)].astype(np.float32)
WIDE = {"s4": np.linspace(0.01, 0.1, 16, dtype=np.float32), "z4": np.zeros(16, np.int8)}
PER_CHANNEL = pair("a", "x", "s4", "z4").replace("Linear(", "Linear <axis = 1> (")
DEPTHWISE = RNG.integers(-60, 61, (16, 1, 3, 3)).astype(np.int8)
INT4 = {
    "w4": numpy_helper.from_array(RNG.integers(-7, 8, (16, 16, 1, 1)).astype(ml_dtypes.int4)),
    "z4": numpy_helper.from_array(np.zeros(16, ml_dtypes.int4)),
}
HALVES = {"x": "float[1,8,8,8] x"}
SCOPE = "then_branch = t () => (float[1] r) { r = Constant <value_float = 1.0> () }"

CASES: dict[str, tuple[Case, Case]] = {
    "V01": ({"body": "y = Conv(x, wf)", "wf": FLOATS}, GOOD),
    "V02": (
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = acme.Gelu(d)", "domains": ("acme",)},
        {"body": X + W + CONV + pair("d", "c", "sy") + "y = com.microsoft.Gelu(d)", "domains": ("com.microsoft",)},
    ),
    "V03": (GOOD | {"sx": np.float32("nan")}, GOOD),
    "V04": (GOOD | {"sw": DEAD}, GOOD),
    "V05": (
        {"body": "r = ReduceMax <keepdims = 0> (x) sr = Abs(r) " + pair("a", "x", "sr") + W + CONV + Y},
        {"body": "sr = Mul(sx, sy) " + pair("a", "x", "sr") + W + CONV + Y},
    ),
    "V06": (GOOD | {"sw": np.full(3, 0.1, np.float32), "zw": np.zeros(3, np.int8)}, GOOD),
    "V07": (
        {"body": PER_CHANNEL + W + CONV + Y, **WIDE},
        {"body": PER_CHANNEL + W + "c = Conv <group = 16> (a, w) " + Y, "w_q": DEPTHWISE, **WIDE},
    ),
    "V08": (GOOD | {"body": X + W.replace("axis = 0", "axis = 1") + CONV + Y}, GOOD),
    "V09": (
        {"body": X + "w = DequantizeLinear <axis = 0> (w4, sw, z4) " + CONV + Y, "opset": 21, **INT4},
        GOOD | {"opset": 21},
    ),
    "V10": (
        {
            "body": "a_q = QuantizeLinear(x, sx, mid) y_q = QLinearConv(a_q, sx, mid, w_q, sw, zw, sy, mid) "
            "y = DequantizeLinear(y_q, sy, mid)"
        },
        {
            "body": "a_q = QuantizeLinear(x, sx, mid) y_q = QLinearMatMul(a_q, sx, mid, w_q, sx, s8, sy, mid) "
            "y = DequantizeLinear(y_q, sy, mid)",
            "x": "float[1,16] x",
            "w_q": RNG.integers(-60, 61, (16, 16)).astype(np.int8),
        },
    ),
    "V11": (GOOD | {"zw": np.full(16, 3, np.int8)}, GOOD),
    "V12": (
        {"body": X + pair("b", "x", "sy") + "j = Concat <axis = 1> (a, b) " + W + "c = Conv(j, w) " + Y, **HALVES},
        {"body": X + pair("b", "x", "sx") + "j = Concat <axis = 1> (a, b) " + W + "c = Conv(j, w) " + Y, **HALVES},
    ),
    "V13": (
        {"body": X + "r = Relu(a) " + W + "c = Conv(r, w) " + Y},
        {"body": X + "r = Relu(a) " + pair("k", "r", "sx") + W + "c = Conv(k, w) " + Y},
    ),
    "V14": ({"body": W + "c = Conv(x, w) " + Y}, GOOD),
    "V15": ({"body": X + "c = Conv(a, wf) " + Y, "wf": FLOATS}, GOOD),
    "V16": ({"body": X + W.replace("axis = 0", "axis = 1") + "c = ConvTranspose(a, w) " + Y}, GOOD),
    "V17": (
        GOOD | {"w_q": np.full((16, 16, 1, 1), -65, np.int8), "platform": OLD},
        GOOD | {"w_q": np.full((16, 16, 1, 1), -64, np.int8), "platform": OLD},
    ),
    "V18": (GOOD | {"x": "float[N,16,H,8] x"}, GOOD | {"x": "float[N,16,8,8] x"}),
    "V19": (
        {"body": "a_q = QuantizeLinear(x, sx) a = DequantizeLinear(a_q, sx) " + W + CONV + Y},
        {"body": pair("a", "x", "sx", "u8") + W + CONV + Y},
    ),
    "V20": (
        {"body": f"{GOOD['body']} z = If <{SCOPE}, {SCOPE.replace('then', 'else')}> (yes)", "y": "float y, float[1] z"}
        | {"yes": np.bool_(True)},
        GOOD,
    ),
}

# What the faulty graph does on the runtime; the other one runs in INT8. V17 has a test of its own.
OUTCOMES = dict.fromkeys(["V01", "V05", "V07", "V08", "V09", "V10", "V11", "V12", "V13", "V14", "V15", "V16"], "float")
OUTCOMES |= dict.fromkeys(["V02", "V06"], "refused") | dict.fromkeys(["V04", "V19"], "int8")

SATURATE = """
import sys, numpy, openvino
answer = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
print(answer({"x": numpy.ones((1, 16, 8, 8), numpy.float32)})[0].flat[0])
"""


@pytest.mark.parametrize("code", CASES)
def test_the_fault_is_found_and_nothing_else(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.codes(bad, "openvino") == {code}
    assert bench.codes(good, "openvino") == set()


@pytest.mark.parametrize("code", OUTCOMES)
def test_the_runtime_itself_says_so(code: str, bench: Any) -> None:
    bad, good = CASES[code]

    assert bench.outcome(bad, "openvino-cpu") == OUTCOMES[code]
    assert bench.outcome(good, "openvino-cpu") == "int8"


def test_every_rule_has_its_two_graphs_and_every_tried_one_its_outcome() -> None:
    assert [rule.code for rule in RULES["openvino"]] == list(CASES)
    assert {rule.code for rule in RULES["openvino"] if rule.evidence == "tried"} == {*OUTCOMES, "V17"}


@pytest.mark.parametrize(
    ("name", "body", "changed"),
    [
        ("BatchNorm behind a convolution", "c0 = Conv(a, w) c = BatchNormalization(c0, o, o, o, o) " + Y, {}),
        ("Relu before a quantizer that does not saturate", "c0 = Conv(a, w) c = Relu(c0) " + Y, {}),
        ("a float result", "y = Conv(a, w)", {}),
        ("another integer type", CONV + pair("y", "c", "sy", "s8"), {}),
        ("a float bias", "c = Conv(a, w, o) " + Y, {}),
        ("an opset of the far future", CONV + Y, {"opset": 40}),
    ],
)
def test_what_onnx_runtime_minds_openvino_runs_in_int8(name: str, body: str, changed: Case, bench: Any) -> None:
    case = {"body": X + W + body, "o": np.ones(16, np.float32), **changed}

    assert bench.codes(case, "openvino") == set(), name
    if "opset" not in changed:  # there the plain run, by ONNX Runtime, is refused
        assert bench.outcome(case, "openvino-cpu") == "int8", name


def test_a_matrix_product_with_scales_along_its_inputs_answers_wrong(bench: Any) -> None:
    weight = {"x": "float[1,16] x", "w_q": RNG.integers(-60, 61, (16, 16)).astype(np.int8)}
    along_inputs = {"body": X + W + "y = MatMul(a, w)", **weight}
    along_outputs = {"body": X + W.replace("axis = 0", "axis = 1") + "y = MatMul(a, w)", **weight}

    assert (bench.codes(along_inputs, "openvino"), bench.outcome(along_inputs, "openvino-cpu")) == ({"V08"}, "wrong")
    assert (bench.codes(along_outputs, "openvino"), bench.outcome(along_outputs, "openvino-cpu")) == (set(), "int8")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN saturates on x86 only")
@pytest.mark.parametrize(("weight", "fits"), [(127, False), (65, False), (64, True)])
def test_without_vnni_weights_beyond_64_overflow(weight: int, fits: bool, bench: Any) -> None:
    """oneDNN, told to use AVX2 only: 16 products of 255 * weight, two at a time in 16 bits, which end at 32767."""
    case = {
        "body": pair("a", "x", "s1", "u8") + "w = DequantizeLinear(w_q, s1, s8) y = Conv(a, w)",
        "s1": np.float32(1 / 255),
        "w_q": np.full((16, 16, 1, 1), weight, np.int8),
    }
    expected = 16 * weight / 255 if fits else 8 * 32767 / 255**2
    assert answer_on_avx2(bench.save(case)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN saturates on x86 only")
@pytest.mark.parametrize(("outputs", "told"), [(16, set()), (32, {"V17"})])
def test_a_depthwise_convolution_overflows_only_with_several_outputs_a_channel(
    outputs: int, told: set[str], bench: Any
) -> None:
    """9 products of 255 * 127; with two outputs a channel another kernel adds two at a time in 16 bits, and one alone."""
    case = {
        "body": pair("a", "x", "s1", "u8") + "w = DequantizeLinear(w_q, s1, s8) c = Conv <group = 16> (a, w) " + Y,
        "s1": np.float32(1 / 255),
        "w_q": np.full((outputs, 1, 3, 3), 127, np.int8),
        "platform": Platform(machine="x86_64", vnni=False),
    }

    assert bench.codes(case, "openvino") == told
    case["body"] = case["body"].replace("c = Conv", "y = Conv").removesuffix(Y)
    overflown = 4 * 32767 + 127 * 255
    expected = (overflown if told else 9 * 127 * 255) / 255**2
    assert answer_on_avx2(bench.save(case)) == pytest.approx(expected, rel=1e-5)


def answer_on_avx2(path: Path) -> float:
    """What OpenVINO answers to ones where oneDNN is told to use AVX2 only."""
    done = subprocess.run(
        [sys.executable, "-c", SATURATE, path],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
