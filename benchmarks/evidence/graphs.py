"""Small ONNX graphs for evidence about the harness, and anybody's ONNX as a float model to compile: no weights mean anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from targets.base import Exported, TensorSpec
from targets.errors import ModelError

OPSET, IR_VERSION = 17, 9
SIDE, CHANNELS, NUM_LAYERS = 56, 64, 8  # 0.9 GMAC in 3 x 3 convolutions: some milliseconds on one core


def relu(path: Path) -> Path:
    """One Relu over eight numbers: as good as nothing to compute, so that what is left of a run is the way there and back."""
    return _save(path, [helper.make_node("Relu", ["x"], ["y"])], ("x", ["N", 8]), ("y", ["N", 8]), [])


def convolutions(path: Path, seed: int = 0) -> Path:
    """A plain net of convolutions with seeded weights."""
    generator = np.random.default_rng(seed)
    nodes, weights, name, channels = [], [], "image", 3
    for i in range(NUM_LAYERS):
        shape = (CHANNELS, channels, 3, 3)
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(generator.normal(scale=scale, size=shape).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [name, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        name, channels = f"r{i}", CHANNELS
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["features"]))
    return _save(path, nodes, ("image", ["N", 3, SIDE, SIDE]), ("features", ["N", CHANNELS, 1, 1]), weights)


def exported_of(model: Path, out_dir: Path) -> Exported:
    """A float ONNX with one batch axis as `Target.compile` takes it; the file stays where it is.

    Raises ModelError for a graph whose inputs have no shape beside the batch.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    inside = {weight.name for weight in graph.initializer}
    inputs = tuple(_spec(value) for value in graph.input if value.name not in inside)
    if not inputs or any(None in spec.shape[1:] for spec in inputs):
        raise ModelError(f"{model}: an input has a free axis beside the batch. Export it with a fixed size.")
    outputs = tuple(_spec(value) for value in graph.output)
    out_dir.mkdir(parents=True, exist_ok=True)
    exported = Exported(
        name=model.stem, onnx_path=str(model.resolve()), inputs=inputs, outputs=outputs, directory=out_dir
    )
    exported.save()
    return exported


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)


def _save(
    path: Path,
    nodes: Sequence[Any],
    taken: tuple[str, Sequence[str | int]],
    given: tuple[str, Sequence[str | int]],
    weights: Sequence[Any],
) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (taken, given)]
    graph = helper.make_graph(list(nodes), path.stem, values[:1], values[1:], list(weights))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION), str(path)
    )
    return path
