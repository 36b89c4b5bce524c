"""What holds for the linter whatever the runtime: its findings, its limits, its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from targets.errors import ModelError
from targets.lint import RULES, Finding, Platform, lint
from targets.lint.__main__ import tables
from targets.lint.rule import SEVERITIES, has_vnni

ROOT = Path(__file__).resolve().parents[3]
FAULTY = (
    "a_q = QuantizeLinear(x, sx, mid) a = DequantizeLinear(a_q, sx, mid) w = DequantizeLinear <axis = 1> (w_q, sw, zw) "
    "c = Conv(a, w) r = Relu(c) y_q = QuantizeLinear(r, sy) y = DequantizeLinear(y_q, sy)"
)
each_dialect = pytest.mark.parametrize("dialect", sorted(RULES))


def test_codes_are_unique_and_every_rule_says_what_is_wrong_and_what_to_do() -> None:
    rules = [rule for table in RULES.values() for rule in table]

    assert len({rule.code for rule in rules}) == len(rules)
    assert all(rule.title and rule.advice.endswith((".", "`.")) and rule.severity in SEVERITIES for rule in rules)


def test_the_page_lists_exactly_the_rules() -> None:
    page = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")

    assert page.split("<!-- rules: python -m targets.lint -->\n")[1].split("<!-- end -->")[0].strip() == tables()


@each_dialect
def test_a_finding_is_plain_json_and_names_a_node_and_a_remedy(dialect: str, bench: Any) -> None:
    findings: list[Finding] = bench.lint({"body": FAULTY, "sx": np.float32(0)}, dialect)

    assert findings
    for finding in findings:
        assert json.loads(json.dumps(asdict(finding), allow_nan=False)) == asdict(finding)
        assert finding.node
        assert finding.message
        assert finding.advice


@each_dialect
def test_errors_stand_before_warnings_and_warnings_before_notes(dialect: str, bench: Any) -> None:
    case = {"body": FAULTY + " z = Conv(y, wf)", "y": "float z", "x": "float[N,16,H,8] x", "wf": np.ones((3, 16, 1, 1))}
    findings = bench.lint(case, dialect)
    order = [SEVERITIES.index(finding.severity) for finding in findings]

    assert {"error", "warning"} <= {finding.severity for finding in findings}
    assert all(a <= b for a, b in pairwise(order))


def test_a_node_is_named_by_its_name_or_by_what_it_makes(bench: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(FAULTY)
    next(node for node in model.graph.node if node.op_type == "Conv").name = "stem"
    onnx.save(model, bench.tmp_path / "named.onnx")

    nodes = {f.code: f.node for f in lint(bench.tmp_path / "named.onnx", "tensorrt", Platform())}

    assert (nodes["Q07"], nodes["Q03"]) == ("stem", "y_q")


@each_dialect
def test_linting_changes_no_file(dialect: str, bench: Any) -> None:
    path = bench.save({"body": FAULTY})
    before = path.read_bytes()

    lint(path, dialect)

    assert path.read_bytes() == before
    assert list(bench.tmp_path.iterdir()) == [path]


def test_what_cannot_be_linted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no graph at all")

    with pytest.raises(ModelError, match="not an ONNX file"):
        lint(tmp_path / "m.onnx", "openvino")
    with pytest.raises(ModelError, match="not an ONNX file"):
        lint(tmp_path / "absent.onnx", "openvino")
    with pytest.raises(ModelError, match="Did you mean 'openvino'"):
        lint(tmp_path / "m.onnx", "openvin")


@each_dialect
def test_weights_beside_the_file_are_read_and_missed(dialect: str, bench: Any, make_model: Callable[..., Any]) -> None:
    path = bench.tmp_path / "model.onnx"
    model = make_model(FAULTY, w_q=np.full((16, 16, 1, 1), -128, np.int8))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    old = Platform(machine="x86_64", vnni=False)

    codes = {"onnxruntime": "O25", "openvino": "V17", "tensorrt": "Q19", "executorch": "X12"}
    assert codes[dialect] in {finding.code for finding in lint(path, dialect, old)}
    (bench.tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"constant '\w+' cannot be read"):
        lint(path, dialect, old)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags : fpu avx2 avx_vnni\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("Features : asimd asimddp\n", None),
        (None, None),
    ],
)
def test_vnni_is_read_from_the_kernel_and_unreadable_is_none(
    cpuinfo: str | None, expected: bool | None, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)

    assert has_vnni(tmp_path / "cpuinfo") is expected


@pytest.mark.parametrize(
    ("platform", "saturates"),
    [
        (Platform(machine="x86_64", vnni=False), True),
        (Platform(machine="AMD64", vnni=False), True),
        (Platform(machine="x86_64", vnni=True), False),
        (Platform(machine="x86_64", vnni=None), False),
        (Platform(machine="aarch64", vnni=False), False),
    ],
)
def test_only_an_x86_without_vnni_saturates(platform: Platform, saturates: bool) -> None:
    assert platform.saturates is saturates


# Inputs that an operator takes at least and at most, of those that rules look at.
OPERATORS = {
    "Add": (2, 2), "AveragePool": (1, 1), "BatchNormalization": (5, 5), "Cast": (1, 1), "Clip": (1, 3),
    "Concat": (1, 3), "Conv": (2, 3), "ConvTranspose": (2, 3), "DequantizeLinear": (2, 3), "DynamicQuantizeLinear": (1, 1),
    "Flatten": (1, 1), "Gemm": (2, 3), "GlobalAveragePool": (1, 1), "HardSwish": (1, 1), "Identity": (1, 1),
    "MatMul": (2, 2), "MaxPool": (1, 1), "Mul": (2, 2), "QLinearConv": (8, 9), "QuantizeLinear": (2, 3), "Relu": (1, 1),
    "Reshape": (2, 2), "Resize": (1, 4), "Softmax": (1, 1), "Transpose": (1, 1),
}  # fmt: skip
SMALL = st.integers(-3, 5)
ATTRIBUTES = {
    "antialias": st.integers(0, 1), "axis": SMALL, "block_size": st.integers(0, 4), "dilations": st.lists(SMALL, min_size=2, max_size=2),
    "group": st.integers(1, 16), "output_dtype": st.integers(0, 30), "perm": st.permutations([0, 1, 2, 3]),
    "to": st.integers(1, 30), "transB": st.integers(0, 1),
}  # fmt: skip
ARRAYS = [
    np.float32(0.1), np.float32(0), np.float32("nan"), np.float32(-1), np.zeros(0, np.float32), np.full(4, 0.1, np.float32),
    np.float16(0.1), np.int8(0), np.uint8(128), np.uint8(0), np.zeros(4, np.int8), np.uint16(0), np.int32(7),
    np.full((4, 4, 1, 1), -128, np.int8), np.ones((4, 4, 1, 1), np.float32), np.ones((4, 4), np.int8), np.ones(4, np.int32),
    np.array([2**40], np.int64), np.array([1, 4], np.int64),
]  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Any operators on any tensors: most would not run, which a linter is asked about all the same."""
    constants = [numpy_helper.from_array(np.asarray(array), f"k{i}") for i, array in enumerate(ARRAYS)]
    names, nodes = ["x", *(tensor.name for tensor in constants)], []
    for i in range(draw(st.integers(1, 8))):
        op_type = draw(st.sampled_from(sorted(OPERATORS)))
        least, most = OPERATORS[op_type]
        inputs = draw(st.lists(st.sampled_from(names + names[-1:] * 9), min_size=least, max_size=most))
        attributes = {name: draw(values) for name, values in ATTRIBUTES.items() if draw(st.booleans())}
        nodes.append(helper.make_node(op_type, inputs, [f"t{i}"], **attributes))
        names.append(f"t{i}")
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 4, 4])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", draw(st.integers(10, 25)))], ir_version=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=graphs(), vnni=st.sampled_from([True, False, None]), machine=st.sampled_from(["x86_64", "aarch64"]))
def test_no_graph_is_too_strange(model: onnx.ModelProto, vnni: bool | None, machine: str, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")

    for dialect, rules in RULES.items():
        findings = lint(tmp_path / "m.onnx", dialect, Platform(machine=machine, vnni=vnni))
        assert {finding.code for finding in findings} <= {rule.code for rule in rules}
        assert all(finding.node and finding.message and finding.advice for finding in findings)
