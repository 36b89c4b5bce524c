"""A compiled model and an evaluation set, small enough to be made anew for a test session."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets import make_target
from targets.base import CompiledModel, Exported, Preprocessing, TensorSpec, write_json

SIDE, NUM_CLASSES = 4, 3


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """logits = pixels @ weights, any batch of uint8 images of 4 x 4."""
    directory = tmp_path_factory.mktemp("exported")
    weights_PK = np.random.default_rng(0).standard_normal((SIDE * SIDE, NUM_CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", NUM_CLASSES])],
        [numpy_helper.from_array(weights_PK, "weights")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), directory / "model.onnx"
    )
    described = Exported(
        name="linear",
        onnx_path="model.onnx",
        inputs=(TensorSpec(name="image", shape=(None, 1, SIDE, SIDE), dtype="uint8", layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(None, NUM_CLASSES), dtype="float32"),),
        preprocessing=Preprocessing(mode="L"),
        directory=directory,
    )
    described.save()
    return described


@pytest.fixture(scope="session")
def compiled(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return make_target("onnxruntime-cpu", {}).compile(exported, tmp_path_factory.mktemp("compiled"), "fp32")


@pytest.fixture(scope="session")
def evaluation_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples, of which the first two are there as PNG too."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("evaluation")
    x_NCHW = np.random.default_rng(1).integers(0, 256, (7, 1, SIDE, SIDE), dtype=np.uint8)
    np.save(directory / "x-000.npy", x_NCHW)
    np.save(directory / "y.npy", np.zeros(7, dtype=np.int64))
    encoded = [f"encoded/{i:04}.png" for i in range(2)]
    (directory / "encoded").mkdir()
    for i, name in enumerate(encoded):
        Image.fromarray(x_NCHW[i, 0]).save(directory / name)
    spec = {
        "num_samples": 7,
        "classes": ["a", "b", "c"],
        "preprocessing": {"mode": "L", "resize": None, "crop": None, "mean": None, "std": None},
        "shards": ["x-000.npy"],
        "encoded": encoded,
        "encoded_index": [0, 1],
    }
    write_json(directory / "spec.json", spec)
    return directory
