"""A tiny convolutional net as an ONNX graph, float and quantized, built by hand so that every number is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets.base import Exported, TensorSpec

X_SCALE, Y_SCALE, W_SCALE = 1 / 255, 0.02, 0.01
MakeExported = Callable[..., Exported]


def weights() -> tuple[Any, Any, Any]:
    """Integer convolution weights (8, 3, 3, 3), and a head (5, 8) with its bias (5)."""
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8)
    return kernel, rng.integers(-127, 128, (5, 8)).astype(np.int8), rng.normal(size=5).astype(np.float32)


def tiny_graph(quantized: bool, batch: int | str) -> onnx.ModelProto:
    """uint8 (N, 3, 8, 8) -> Cast, Mul -> Conv 3x3, Relu -> GlobalAveragePool, Flatten -> Gemm -> (N, 5)."""
    kernel, head, bias = weights()
    constants: dict[str, Any] = {
        "x_scale": np.float32(X_SCALE),
        "y_scale": np.float32(Y_SCALE),
        "w_scale": np.full(8, W_SCALE, np.float32),
        "head_scale": np.full(5, W_SCALE, np.float32),
        "u8_zero": np.uint8(0),
        "bias": bias,
    }
    node = helper.make_node
    nodes = [node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT), node("Mul", ["pixels", "x_scale"], ["x"])]
    if quantized:
        constants |= {"kernel_q": kernel, "head_q": head}
        nodes += [
            *_pair("x", "x_scale"),
            node("DequantizeLinear", ["kernel_q", "w_scale"], ["kernel"], axis=0),
            node("DequantizeLinear", ["head_q", "head_scale"], ["head"], axis=0),
            node("Conv", ["x_dq", "kernel"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            *_pair("r", "y_scale"),
            node("GlobalAveragePool", ["r_dq"], ["p"]),
            *_pair("p", "y_scale"),
            node("Flatten", ["p_dq"], ["f"]),
        ]
    else:
        constants |= {"kernel": kernel.astype(np.float32) * W_SCALE, "head": head.astype(np.float32) * W_SCALE}
        nodes += [
            node("Conv", ["x", "kernel"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]),
            node("Flatten", ["p"], ["f"]),
        ]
    nodes.append(node("Gemm", ["f", "head", "bias"], ["logits"], name="head", transB=1))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _pair(name: str, scale: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [name, scale, "u8_zero"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, "u8_zero"], [f"{name}_dq"]),
    ]


@pytest.fixture
def make_exported(tmp_path: Path) -> MakeExported:
    """Write a graph and describe it; keyword `proto` takes another graph than the tiny one."""

    def make(*, quantized: bool = False, batch: int | None = None, proto: onnx.ModelProto | None = None) -> Exported:
        directory = tmp_path / f"exported-{quantized}-{batch}"
        directory.mkdir()
        onnx.save(proto or tiny_graph(quantized, batch or "N"), directory / "model.onnx")
        return Exported(
            name="tiny",
            onnx_path="model.onnx",
            inputs=(TensorSpec(name="image", shape=(batch, 3, 8, 8), dtype="uint8", layout="NCHW"),),
            outputs=(TensorSpec(name="logits", shape=(batch, 5), dtype="float32"),),
            scheme="cpu-int8" if quantized else None,
            directory=directory,
        )

    return make


@pytest.fixture
def pixels() -> Any:
    return np.random.default_rng(1).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8)


@pytest.fixture
def expected_logits(pixels: Any) -> Any:
    """The float net in plain NumPy, float64: shifted products instead of a convolution."""
    kernel, head, bias = weights()
    x = np.pad(pixels.astype(np.float64) * X_SCALE, ((0, 0), (0, 0), (1, 1), (1, 1)))
    maps = np.zeros((4, 8, 8, 8))
    for i in range(3):
        for j in range(3):
            maps += np.einsum("nchw,oc->nohw", x[:, :, i : i + 8, j : j + 8], kernel[:, :, i, j] * W_SCALE)
    return np.maximum(maps, 0).mean((2, 3)) @ (head * W_SCALE).T + bias
