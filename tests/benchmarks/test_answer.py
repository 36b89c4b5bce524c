"""Samples of any form through a compiled model, as the device program does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.device.answer import answer
from targets import make_target
from targets.base import Exported, TensorSpec
from targets.errors import DataError


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """Two inputs, two outputs: their sum and their product; names that no file may have."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["a/x", "b/x"], ["sum/y"]), helper.make_node("Mul", ["a/x", "b/x"], ["product/y"])],
        "two",
        [info("a/x", TensorProto.FLOAT, ["N", 3]), info("b/x", TensorProto.FLOAT, ["N", 3])],
        [info("sum/y", TensorProto.FLOAT, ["N", 3]), info("product/y", TensorProto.FLOAT, ["N", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    specs = {
        name: TensorSpec(name=name, shape=(None, 3), dtype="float32") for name in ("a/x", "b/x", "sum/y", "product/y")
    }
    exported = Exported(
        name="two",
        onnx_path="model.onnx",
        inputs=(specs["a/x"], specs["b/x"]),
        outputs=(specs["sum/y"], specs["product/y"]),
        directory=tmp_path,
    )
    make_target("onnxruntime-cpu", {}).compile(exported, tmp_path / "compiled", "fp32")
    return tmp_path / "compiled"


def test_every_output_of_every_sample_comes_back_under_its_numbers(compiled: Path, tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4, 1, 3)).astype(np.float32)
    np.savez(
        tmp_path / "in.npz",
        allow_pickle=False,
        **{f"0_{s}": a[s] for s in range(4)},
        **{f"1_{s}": b[s] for s in range(4)},
    )

    told = answer(compiled, tmp_path / "in.npz", tmp_path / "out.npz")

    assert told == {"inputs": ["a/x", "b/x"], "outputs": ["sum/y", "product/y"], "num_samples": 4}
    with np.load(tmp_path / "out.npz") as archive:
        for sample in range(4):
            np.testing.assert_array_equal(archive[f"0_{sample}"], a[sample] + b[sample])
            np.testing.assert_array_equal(archive[f"1_{sample}"], a[sample] * b[sample])


def test_an_archive_of_something_else_is_refused(compiled: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros(3), y=np.zeros(3))

    with pytest.raises(DataError, match="was not written for this model"):
        answer(compiled, tmp_path / "in.npz", tmp_path / "out.npz")
