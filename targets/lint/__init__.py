"""A static linter of Q/DQ graphs: what is known to keep a runtime from running INT8, found before anything is compiled.

Reads an ONNX file. Host only: needs onnx. An error is a graph that the runtime refuses or answers wrong, or a layer that
cannot run in INT8 though it was quantized for it; a warning is a layer in float that may be meant so (a last layer,
weights that should only be small), or costs speed; an info is worth knowing. Placement, read from the executed graph,
is the proof.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from targets.errors import ModelError, first_line
from targets.lint import executorch, onnxruntime, openvino, tensorrt
from targets.lint.graph import Graph
from targets.lint.rule import SEVERITIES, Finding, Platform, Rule

RULES: dict[str, tuple[Rule, ...]] = {
    "onnxruntime": onnxruntime.RULES,
    "openvino": openvino.RULES,
    "tensorrt": tensorrt.RULES,
    "executorch": executorch.RULES,
}

__all__ = ["RULES", "Finding", "Platform", "lint"]


def lint(onnx_path: Path, dialect: str, platform: Platform | None = None) -> list[Finding]:
    """All findings for the runtime of `dialect`, errors first; `platform` is this machine where none is given.

    Raises ModelError for what is no ONNX, and for a runtime without rules.
    """
    if dialect not in RULES:
        near = difflib.get_close_matches(dialect, RULES, n=1)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(RULES)}."
        raise ModelError(f"dialect '{dialect}': no rules for it. {advice}")
    graph = read(onnx_path)
    platform = platform or Platform()
    findings = [finding for rule in RULES[dialect] for finding in rule.findings(graph, platform)]
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code, finding.node))


def read(path: Path) -> Graph:
    """The graph of an ONNX file; its external data are read where a rule asks for them. Raises ModelError."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return Graph(onnx.load(str(path), load_external_data=False), path)
    except (OSError, DecodeError, ValueError) as error:
        raise ModelError(
            f"{path} is not an ONNX file that can be read: {first_line(error)}. Export it again."
        ) from None
