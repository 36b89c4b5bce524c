"""A target that is not on this machine: refused before anything is trained, or served with a kit that a device can run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from benchmarks.device.preprocess import load_evaluation, to_input
from pipeline.recipe import load_recipe
from pipeline.run import check_targets
from pipeline.stages.kit import write_evaluation
from targets.base import Exported, Preprocessing, TensorSpec, read_json, write_json
from targets.errors import TargetError


def test_a_runtime_that_is_not_here_is_refused_before_anything_is_trained(tiny_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(tiny_recipe(targets=[{"name": "tensorrt"}]))

    with pytest.raises(TargetError, match=r"'tensorrt' is not installed on local(?s:.*)device: kit"):
        check_targets(recipe.targets)


def check_signed(path: Path) -> None:
    """What TensorRT takes: int8 with zero point 0 throughout, and a float bias."""
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zero_points = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    biases = [
        constants[node.input[2]] for node in graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) > 2
    ]
    assert zero_points
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zero_points)
    assert biases
    assert all(bias.dtype == np.float32 for bias in biases)


@pytest.mark.system
def test_a_recipes_kit_holds_what_a_first_run_needs_and_a_device_runs_it(
    finished: Any, edgestill: Callable[..., Any], tmp_path: Path
) -> None:
    """The signed graph for TensorRT is run here by ONNX Runtime, in the packed program, as a board would."""
    recipe = yaml.safe_load(finished.recipe.read_text())
    recipe["targets"] = [{"name": "tensorrt", "device": "kit"}]
    recipe["quantize"] = {"method": "ptq"}
    finished.recipe.write_text(yaml.safe_dump(recipe))

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")
    result = json.loads(ended.out)

    assert ended.code == 0
    assert (result["shipped"], result["bundles"]) == ({}, {})
    folder = Path(result["kits"]["tensorrt"])
    int8, floats = (Exported.load(folder / "kit" / name) for name in ("int8", "float"))
    assert (int8.scheme, int8.dialect, floats.scheme) == ("tensorrt-int8", "tensorrt", None)
    assert all(one.half_model_path is not None and one.half_model_path.is_file() for one in (int8, floats))
    expected = read_json(folder / "kit" / "expected.json")
    assert expected["n"] == read_json(finished.stage("data") / "data.json")["num_test"]

    check_signed(int8.model_path)

    write_json(folder / "kit" / "kit.json", {**read_json(folder / "kit" / "kit.json"), "min_int8_share": 0.0})
    argv = [sys.executable, "-I", str(folder / "edgestill-device.pyz"), "first-run", str(folder / "kit")]
    argv += ["--target", "onnxruntime-cpu", "--launches", "1", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["check"]: check for check in read_json(tmp_path / "result.json")["checks"]}
    assert checks["accuracy"]["passed"] is True


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("normalised", [True, False])
def test_samples_go_back_to_the_pixels_that_they_came_from(layout: str, normalised: bool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 6)).astype(np.uint8)
    values = {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)} if normalised else {}
    pre = Preprocessing(crop=(8, 6), **values)  # type: ignore[arg-type]
    shape = (1, 3, 8, 6) if layout == "NCHW" else (1, 8, 6, 3)
    spec = TensorSpec(name="x", shape=shape, dtype="float32" if normalised else "uint8", layout=layout)
    samples = [{"x": to_input(pixels[i : i + 1], pre, spec)} for i in range(len(pixels))]

    write_evaluation(tmp_path / "evaluation", samples, spec, pre)

    evaluation = load_evaluation(tmp_path / "evaluation")
    np.testing.assert_array_equal(np.concatenate(list(evaluation.pixels(2))), pixels)
    assert evaluation.labels is None
