from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.errors import ModelError
from targets.lint import RULES, Finding, lint

U8, S8 = np.uint8(0), np.int8(0)
Nodes = list[onnx.NodeProto]


def save(path: Path, nodes: Nodes, **constants: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def pair(source: str, to: str, *, scale: str = "s", zero: str = "u8") -> Nodes:
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{to}_q"], name=f"q_{to}"),
        helper.make_node("DequantizeLinear", [f"{to}_q", scale, zero], [to], name=f"dq_{to}"),
    ]


def conv(x: str, y: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, "w"], [y], name="conv")


BASE: dict[str, Any] = {"s": np.float32(0.1), "u8": U8, "s8": S8, "w_q": np.ones((4, 4, 1, 1), np.int8)}
WEIGHT = [helper.make_node("DequantizeLinear", ["w_q", "s", "s8"], ["w"], name="dq_w")]


def graph_of(code: str) -> tuple[Nodes, dict[str, Any]]:
    """A graph with exactly one thing wrong."""
    start, end = [*WEIGHT, *pair("x", "a")], pair("c", "y")
    if code == "":
        return [*start, conv("a", "c"), *end], BASE
    if code == "not-quantized":
        return [conv("x", "y")], {"w": np.ones((4, 4, 1, 1), np.float32)}
    if code == "computed-scale":
        computed = helper.make_node("Mul", ["s", "s"], ["s2"])
        return [*WEIGHT, computed, *pair("x", "a", scale="s2"), conv("a", "c"), *end], BASE
    if code == "per-channel-activation":
        wide = BASE | {"s4": np.full(4, 0.1, np.float32), "z4": np.zeros(4, np.uint8)}
        return [*WEIGHT, *pair("x", "a", scale="s4", zero="z4"), conv("a", "c"), *end], wide
    if code == "batchnorm-after-convolution":
        ones = {name: np.ones(4, np.float32) for name in ("g", "b", "m", "v")}
        norm = helper.make_node("BatchNormalization", ["c0", "g", "b", "m", "v"], ["c"], name="bn")
        return [*start, conv("a", "c0"), norm, *end], BASE | ones
    if code == "mixed-types":
        return [*start, conv("a", "c"), *pair("c", "y", zero="s8")], BASE
    if code == "weight-only":
        return [*WEIGHT, conv("x", "y")], BASE
    if code == "float-weight":
        return [*pair("x", "a"), conv("a", "c"), *end], BASE | {"w": np.ones((4, 4, 1, 1), np.float32)}
    if code == "asymmetric-weight":
        return [*start, conv("a", "c"), *end], BASE | {"s8": np.int8(3)}
    if code == "no-output-quantizer":
        return [*start, conv("a", "y")], BASE
    gemm_weight = BASE | {"w_q": np.ones((64, 5), np.int8), "b": np.ones(5, np.float32)}
    if code == "distant-dequantize":
        flatten = helper.make_node("Flatten", ["a"], ["f"])
        return [*start, flatten, helper.make_node("Gemm", ["f", "w"], ["y"], name="gemm")], gemm_weight
    flatten = helper.make_node("Flatten", ["x"], ["f"])
    return [*WEIGHT, flatten, *pair("f", "a"), helper.make_node("Gemm", ["a", "w", "b"], ["y"])], gemm_weight


GENERAL = [
    "not-quantized",
    "computed-scale",
    "per-channel-activation",
    "weight-only",
    "float-weight",
    "asymmetric-weight",
]
ONNXRUNTIME = [
    "batchnorm-after-convolution",
    "mixed-types",
    "no-output-quantizer",
    "distant-dequantize",
    "float-bias",
]


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


@pytest.mark.parametrize("code", GENERAL + ONNXRUNTIME)
def test_onnx_runtime_finds_exactly_what_is_wrong(code: str, tmp_path: Path) -> None:
    nodes, constants = graph_of(code)

    assert set(codes(lint(save(tmp_path / "m.onnx", nodes, **constants), "onnxruntime"))) == {code}


@pytest.mark.parametrize("code", GENERAL + ONNXRUNTIME)
def test_openvino_is_told_only_what_holds_for_all_runtimes(code: str, tmp_path: Path) -> None:
    nodes, constants = graph_of(code)

    assert set(codes(lint(save(tmp_path / "m.onnx", nodes, **constants), "openvino"))) == {code} & set(GENERAL)


@pytest.mark.parametrize("dialect", sorted(RULES))
def test_a_clean_graph_has_no_finding(dialect: str, tmp_path: Path) -> None:
    nodes, constants = graph_of("")

    assert lint(save(tmp_path / "m.onnx", nodes, **constants), dialect) == []


@pytest.mark.parametrize("dialect", sorted(RULES))
def test_a_pooled_integer_activation_is_still_one(dialect: str, tmp_path: Path) -> None:
    pool = helper.make_node("MaxPool", ["a"], ["m"], kernel_shape=[2, 2])
    nodes = [*WEIGHT, *pair("x", "a"), pool, conv("m", "c"), *pair("c", "y")]

    assert "weight-only" not in codes(lint(save(tmp_path / "m.onnx", nodes, **BASE), dialect))


def test_errors_stand_before_warnings_and_name_the_node(tmp_path: Path) -> None:
    nodes, constants = graph_of("mixed-types")
    constants = constants | {"s8": np.int8(3)}

    findings = lint(save(tmp_path / "m.onnx", nodes, **constants), "onnxruntime")

    assert [(f.severity, f.node) for f in findings] == [("error", "conv"), ("warning", "dq_w")]


def test_what_cannot_be_linted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no graph at all")

    with pytest.raises(ModelError, match="not an ONNX file"):
        lint(tmp_path / "m.onnx", "openvino")
    with pytest.raises(ModelError, match="Did you mean 'openvino'"):
        lint(tmp_path / "m.onnx", "openvin")
