"""Real TensorRT engines on a real GPU: run with `pytest -m gpu` where both are. Nothing here has run in CI.

TensorRT compares with plain NumPy: FP32 products may run in TF32 (10 bits of mantissa), hence the tolerances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.base import CompiledModel, Exported
from targets.cuda import open_cuda
from targets.errors import TargetError
from targets.tensorrt import TensorRt

CONV_MACS, HEAD_MACS = 8 * 8 * 8 * 3 * 3 * 3, 8 * 5
MakeExported = Callable[..., Exported]


def absent() -> str:
    """Why no engine can be built here, or nothing."""
    if missing := TensorRt().missing():
        return f"TensorRT or CUDA is absent: {missing}"
    try:
        open_cuda().compute_capability()
    except TargetError as error:
        return f"no GPU: {error}"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(absent()), reason=absent() or "a GPU is here")]


def signed(exported: Exported) -> Exported:
    """The tiny quantized graph as TensorRT wants it: int8 with zero point 0, the scale of half the range."""
    model = onnx.load(exported.model_path)
    for constant in model.graph.initializer:
        if constant.name == "u8_zero":
            constant.CopyFrom(numpy_helper.from_array(np.int8(0), "u8_zero"))
        elif constant.name in ("x_scale", "y_scale"):
            step = numpy_helper.to_array(constant) * np.float32(255 / 127)
            constant.CopyFrom(numpy_helper.from_array(step.astype(np.float32), constant.name))
    # The Mul of the pixels must keep its own factor.
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1 / 255), "pixel"))
    next(node for node in model.graph.node if node.op_type == "Mul").input[1] = "pixel"
    onnx.save(model, exported.model_path)
    return dataclasses.replace(exported, scheme="tensorrt-int8")


def halved(exported: Exported) -> Exported:
    """The tiny float graph in float16 between its inputs and outputs."""
    model = onnx.load(exported.model_path)
    for i, constant in enumerate(model.graph.initializer):
        values = numpy_helper.to_array(constant)
        if values.dtype == np.float32:
            model.graph.initializer[i].CopyFrom(numpy_helper.from_array(values.astype(np.float16), constant.name))
    for node in model.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT16
        if "logits" in node.output:
            node.output[0] = "logits_half"
    model.graph.node.append(helper.make_node("Cast", ["logits_half"], ["logits"], to=TensorProto.FLOAT))
    onnx.save(model, exported.directory / "half.onnx")
    return dataclasses.replace(exported, half_path="half.onnx")


def logits_of(target: TensorRt, compiled: CompiledModel, pixels: Any) -> Any:
    session = target.load(compiled)
    return np.concatenate([session.run({"image": pixels[i : i + 1]})["logits"].copy() for i in range(len(pixels))])


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-3), ("fp16", 2e-2)])
def test_a_float_engine_gives_the_numbers_of_plain_numpy(
    precision: str,
    tolerance: float,
    cuda_graph: bool,
    make_exported: MakeExported,
    pixels: Any,
    expected_logits: Any,
    tmp_path: Path,
) -> None:
    target = TensorRt(cuda_graph=cuda_graph)
    compiled = target.compile(halved(make_exported()), tmp_path / "c", precision)

    np.testing.assert_allclose(logits_of(target, compiled, pixels), expected_logits, atol=tolerance)
    assert {layer.precision for layer in target.placement(compiled).layers} == {precision}


def test_an_int8_engine_stays_within_its_quantization_steps_and_says_int8(
    make_exported: MakeExported, pixels: Any, expected_logits: Any, tmp_path: Path
) -> None:
    target = TensorRt()
    compiled = target.compile(signed(make_exported(quantized=True)), tmp_path / "c", "int8")

    # As on the CPU targets, with steps of twice the width: signed integers have half the levels for what is never negative.
    tolerance = 2 * 2 * 0.01 * 8 * 1.27 + 0.02
    np.testing.assert_allclose(logits_of(target, compiled, pixels), expected_logits, atol=tolerance)
    layers = {layer.name: layer for layer in target.placement(compiled).layers}
    assert sorted(layer.macs for layer in layers.values()) == [HEAD_MACS, CONV_MACS]
    assert layers["conv"].precision == "int8"


def test_a_second_build_reads_the_timing_cache(make_exported: MakeExported, tmp_path: Path) -> None:
    exported, target = make_exported(), TensorRt(timing_cache=str(tmp_path / "timing.cache"))
    target.compile(exported, tmp_path / "a", "fp32")
    first = (tmp_path / "timing.cache").stat().st_size
    target.compile(exported, tmp_path / "b", "fp32")

    assert first > 0
    assert (tmp_path / "timing.cache").stat().st_size >= first


def test_an_engine_of_another_sm_is_refused(make_exported: MakeExported, tmp_path: Path) -> None:
    target = TensorRt()
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")
    elsewhere = dataclasses.replace(compiled, built_for={**compiled.built_for, "sm": "1.0"})

    with pytest.raises(TargetError, match=r"built for SM 1\.0"):
        target.load(elsewhere)


def test_an_operator_that_tensorrt_lacks_is_named(make_exported: MakeExported, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["image"], ["logits"], name="odd", domain="nobody")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)

    with pytest.raises(TargetError, match="Unheard"):
        TensorRt().compile(make_exported(proto=proto), tmp_path / "c", "fp32")
