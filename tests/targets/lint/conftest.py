"""Small graphs written as ONNX's own text, the linter on them, and the same graphs on the real runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from targets import make_target
from targets.base import Exported, TensorSpec
from targets.errors import TargetError
from targets.lint import Finding, Platform, lint

Case = dict[str, Any]
RNG = np.random.default_rng(0)
VNNI = Platform(machine="x86_64", vnni=True)

SEEN: dict[tuple[bytes, str], str] = {}  # the sound graph is the same for many rules

# What bodies may name: scales sx and sy, zero points, weights of 16 channels with a scale each.
CONSTANTS: Case = {
    "sx": np.float32(0.05),
    "sy": np.float32(0.2),
    "s8": np.int8(0),
    "u8": np.uint8(0),
    "mid": np.uint8(128),
    "w_q": RNG.integers(-60, 61, (16, 16, 1, 1)).astype(np.int8),
    "sw": np.linspace(0.002, 0.02, 16, dtype=np.float32),
    "zw": np.zeros(16, np.int8),
}


def model(
    body: str,
    *,
    opset: int = 17,
    x: str = "float[1,16,8,8] x",
    y: str = "float y",
    domains: tuple[str, ...] = (),
    **constants: Any,
) -> onnx.ModelProto:
    graph = parser.parse_graph(f"g ({x}) => ({y}) {{ {body} }}")
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")  # the parser takes a type without brackets for a scalar
    made = {name for node in graph.node for name in node.output}
    used = {name for node in graph.node for name in node.input} - made
    for name, value in (CONSTANTS | constants).items():
        if name in used:
            tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value))
            tensor.name = name
            graph.initializer.append(tensor)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 19 else 10)


@dataclass(frozen=True)
class Bench:
    """Builds a case, lints it, runs it on a real target."""

    tmp_path: Path

    def save(self, case: Case) -> Path:
        path = self.tmp_path / "model.onnx"
        onnx.save(model(**{key: value for key, value in case.items() if key != "platform"}), path)
        return path

    def lint(self, case: Case, dialect: str) -> list[Finding]:
        return lint(self.save(case), dialect, case.get("platform", VNNI))

    def codes(self, case: Case, dialect: str) -> set[str]:
        return {finding.code for finding in self.lint(case, dialect)}

    def outcome(self, case: Case, target_name: str) -> str:
        """int8: all products; float: at least one is not; wrong: in integers, but off by more than some steps."""
        key = (self.save(case).read_bytes(), target_name)
        if key not in SEEN:
            SEEN[key] = self._run(target_name)
        return SEEN[key]

    def _run(self, target_name: str) -> str:
        path = self.tmp_path / "model.onnx"
        exported = _exported(path)
        target = make_target(target_name, {})
        try:
            compiled = target.compile(exported, self.tmp_path / "compiled", "int8")
            placement = target.placement(compiled)
        except TargetError:
            return "refused"
        if {layer.precision for layer in placement.layers} != {"int8"}:
            return "float"
        feeds = {
            spec.name: np.random.default_rng(1).normal(size=spec.fixed(1)).astype(spec.dtype)
            for spec in exported.inputs
        }
        expected = _plainly(path, feeds)
        answer = target.load(compiled).run(feeds)[exported.outputs[0].name]
        return "int8" if np.abs(answer - expected).max() <= 0.06 * np.ptp(expected) + 1e-6 else "wrong"


def _exported(path: Path) -> Exported:
    """Outputs of free shapes: the runtimes make their own buffers."""
    graph = onnx.load(path).graph
    return Exported(
        name="model",
        onnx_path=path.name,
        inputs=tuple(_spec(value) for value in graph.input),
        outputs=tuple(TensorSpec(name=value.name, shape=(None, None), dtype="float32") for value in graph.output),
        scheme="given",
        directory=path.parent,
    )


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return TensorSpec(name=value.name, shape=tuple(dim.dim_value or None for dim in kind.shape.dim), dtype=dtype)


def _plainly(path: Path, feeds: dict[str, Any]) -> Any:
    """The first output, every optimization off: each Q and DQ as ONNX defines it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def make_model() -> Callable[..., onnx.ModelProto]:
    return model
