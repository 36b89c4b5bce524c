from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pipeline.graphs.files import import_onnx, read_graph, write_graph
from pipeline.learning.fake_quantize import insert_fake_quantizers, pin_kernels, strip_fake_quantizers
from pipeline.learning.models import Normalized
from pipeline.stages.export import export_float, export_quantized
from targets import make_target
from targets.base import Exported, Preprocessing
from targets.errors import ModelError
from targets.lint import Platform, lint

pytestmark = pytest.mark.integration

SHAPE = (3, 16, 16)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


class Residual(nn.Module):
    """Strided stem, ReLU6, depthwise, a signed residual sum, pool, head: every pattern that dialects must get right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 7)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x_NCHW))
        x = self.project(nn.functional.relu6(self.depthwise(x))) + x
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        logits_NK: Tensor = self.head(torch.flatten(pooled, 1))
        return logits_NK


@pytest.fixture(scope="module")
def pixels() -> Any:
    return np.random.default_rng(0).integers(0, 256, (16, *SHAPE)).astype(np.uint8)


@pytest.fixture(scope="module")
def stripped(pixels: Any) -> nn.Module:
    pin_kernels("torch")
    x = Normalized(nn.Identity(), MEAN, STD)(torch.tensor(pixels))
    quantized = insert_fake_quantizers(Residual(), [x], x[:1])
    return Normalized(strip_fake_quantizers(quantized, x[:1]), MEAN, STD)


@pytest.fixture(scope="module")
def exported(stripped: nn.Module, pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """One trained scheme in each dialect."""
    return {
        dialect: export_quantized(
            stripped,
            name="residual",
            scheme="cpu-int8",
            dialect=dialect,
            example_shape=SHAPE,
            preprocessing=Preprocessing(crop=SHAPE[1:]),
            out_dir=tmp_path_factory.mktemp(dialect),
            pixels_NCHW=pixels[:4],
        )
        for dialect in ("openvino", "onnxruntime")
    }


def plain_run(path: Path, x: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]


def test_a_float_export_takes_pixels_of_any_batch_and_answers_as_torch(pixels: Any, tmp_path: Path) -> None:
    model = Normalized(Residual(), MEAN, STD).eval()
    float_export = export_float(
        model, name="r", example_shape=SHAPE, preprocessing=Preprocessing(mode="RGB"), out_dir=tmp_path
    )

    with torch.no_grad():
        np.testing.assert_allclose(plain_run(float_export.model_path, pixels), model(torch.tensor(pixels)), atol=1e-5)
    assert float_export.scheme is None
    assert [(s.name, s.shape, s.dtype, s.layout) for s in float_export.inputs] == [
        ("image", (None, *SHAPE), "uint8", "NCHW")
    ]
    assert [(s.name, s.shape, s.dtype) for s in float_export.outputs] == [("logits", (None, 7), "float32")]
    assert Exported.load(tmp_path) == float_export


def test_the_exported_integers_answer_as_the_trained_model(
    exported: dict[str, Exported], stripped: nn.Module, pixels: Any
) -> None:
    with torch.no_grad():
        expected = stripped(torch.tensor(pixels)).numpy()

    np.testing.assert_allclose(plain_run(exported["openvino"].model_path, pixels), expected, atol=1e-4)


def test_dialects_differ_by_the_rounding_of_the_bias_only(exported: dict[str, Exported], pixels: Any) -> None:
    """An accumulator's half step may tip an activation by one of its own steps; the logits span 1.0 and more."""
    openvino, onnxruntime = (plain_run(exported[d].model_path, pixels) for d in ("openvino", "onnxruntime"))

    assert np.abs(openvino - onnxruntime).max() < 0.01 * np.ptp(openvino)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_every_product_runs_in_int8_on_its_runtime(
    name: str, exported: dict[str, Exported], pixels: Any, exact_int8: Callable[[Path, str], bool], tmp_path: Path
) -> None:
    target = make_target(name, {})
    compiled = target.compile(exported[target.dialect], tmp_path, "int8")
    placement = target.placement(compiled)

    assert [layer.precision for layer in placement.layers] == ["int8"] * 4
    assert sum(layer.macs for layer in placement.layers) == 64 * 16 * 27 + 64 * 16 * 9 + 64 * 16 * 16 + 16 * 7
    logits = target.load(compiled, batch=16).run({"image": pixels})["logits"]
    agreement = np.mean(logits.argmax(1) == plain_run(exported[target.dialect].model_path, pixels).argmax(1))
    assert agreement >= 15 / 16 or not exact_int8(exported[target.dialect].model_path, target.dialect)


@pytest.mark.parametrize("dialect", ["openvino", "onnxruntime"])
def test_the_linter_finds_nothing_in_our_own_exports(dialect: str, exported: dict[str, Exported]) -> None:
    assert lint(exported[dialect].model_path, dialect, Platform(machine="x86_64", vnni=True)) == []


def test_what_each_rewrite_moved_is_written_beside_the_graph(exported: dict[str, Exported]) -> None:
    proofs = json.loads((exported["onnxruntime"].directory / "rewrites.json").read_text())

    assert {proof["rewrite"] for proof in proofs if not proof["exact"]} == {"integer_bias"}
    assert all(proof["max_abs_delta"] == 0.0 for proof in proofs if proof["exact"])
    assert all(proof["num_changes"] > 0 for proof in proofs)


def test_onnx_runtimes_dialect_is_unsigned_throughout(exported: dict[str, Exported]) -> None:
    ranges = json.loads((exported["onnxruntime"].directory / "ranges.json").read_text())

    assert {r["dtype"] for r in ranges.values()} == {"uint8", "int8", "int32"}  # activations, weights, biases
    assert all(r["axis"] is None for r in ranges.values() if r["dtype"] == "uint8")


def test_ranges_hold_every_quantizer_of_the_graph(exported: dict[str, Exported]) -> None:
    graph = onnx.load(exported["openvino"].model_path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ranges = json.loads((exported["openvino"].directory / "ranges.json").read_text())
    scales = {
        (n.input[0], tuple(constants[n.input[1]].reshape(-1).tolist()))
        for n in graph.node
        if n.op_type == "QuantizeLinear" or (n.op_type == "DequantizeLinear" and n.input[0] in constants)
    }

    assert {(name, tuple(r["scale"])) for name, r in ranges.items()} == scales
    assert len(ranges) == 4 + sum(n.op_type == "QuantizeLinear" for n in graph.node)


def test_a_float_model_is_no_quantized_export(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no quantizer"):
        export_quantized(
            Normalized(Residual(), MEAN, STD),
            name="r",
            scheme="cpu-int8",
            dialect="openvino",
            example_shape=SHAPE,
            preprocessing=Preprocessing(),
            out_dir=tmp_path,
            pixels_NCHW=np.zeros((1, *SHAPE), np.uint8),
        )


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be exported for \[1, 4, 4\]"):
        export_float(Residual(), name="r", example_shape=(1, 4, 4), preprocessing=Preprocessing(), out_dir=tmp_path)


def test_weights_beside_the_file_are_read_and_their_absence_is_named(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    proto = onnx.load(exported["openvino"].model_path)
    path = tmp_path / "apart.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="apart.data", size_threshold=0)

    taken = import_onnx(path, name="apart", out_dir=tmp_path / "taken")
    x = np.zeros((1, *SHAPE), np.uint8)
    np.testing.assert_array_equal(plain_run(taken.model_path, x), plain_run(exported["openvino"].model_path, x))

    (tmp_path / "apart.data").unlink()
    with pytest.raises(ModelError, match=r"apart\.data"):
        read_graph(path)


def test_large_graphs_keep_their_weights_beside_the_file(
    exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.graphs.files.INLINE_BYTES", 100)
    model = read_graph(exported["openvino"].model_path)

    write_graph(model, tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx.data").stat().st_size > 100
    x = np.zeros((1, *SHAPE), np.uint8)
    np.testing.assert_array_equal(plain_run(tmp_path / "model.onnx", x), plain_run(exported["openvino"].model_path, x))
