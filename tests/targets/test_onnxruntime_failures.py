"""What ONNX Runtime refuses only when it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.base import Exported, TensorSpec
from targets.errors import TargetError
from targets.onnxruntime import OnnxRuntimeCpu


def gathers_beyond_its_end(directory: Path) -> Exported:
    """A graph that every checker takes and no input lets run: it asks a table of 2 rows for row 10."""
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "ten"], ["index"]),
        helper.make_node("Gather", ["table", "index"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [
            numpy_helper.from_array(np.array([10]), "ten"),
            numpy_helper.from_array(np.zeros((2, 3), np.float32), "table"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    return Exported(
        name="gather",
        onnx_path="model.onnx",
        inputs=(TensorSpec(name="x", shape=(1,), dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=(1, 3), dtype="float32"),),
        directory=directory,
    )


def test_a_graph_that_loads_but_does_not_run_is_a_target_error(tmp_path: Path) -> None:
    target = OnnxRuntimeCpu()
    (tmp_path / "out").mkdir()
    compiled = target.compile(gathers_beyond_its_end(tmp_path), tmp_path / "out", "fp32")

    with pytest.raises(TargetError, match="loads but does not run"):
        target.placement(compiled)
