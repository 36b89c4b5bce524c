"""Which opsets the installed ONNX Runtime reads: beyond what every supported release reads, it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from targets.lint.graph import Graph
from targets.lint.rule import Found, Platform

OPSET_READ = 25  # by 1.32, the oldest release that this project installs


def unread_opset(graph: Graph, platform: Platform) -> Iterator[Found]:
    if graph.opset > OPSET_READ and not _reads(graph.opset):
        yield Found(graph.name, f"opset {graph.opset}: the installed ONNX Runtime has no QuantizeLinear of it.")


def _reads(opset: int) -> bool:
    """Ask the installed runtime, with the smallest Q/DQ graph of that opset."""
    try:
        import onnxruntime as ort
    except ImportError:
        return False
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
        ],
        "opset",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [helper.make_tensor("s", TensorProto.FLOAT, [], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # ORT's errors share no base class but Exception
        return False
    return True
