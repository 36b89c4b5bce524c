"""Schemes on a torch model and on an ONNX graph: signs, and which branch of an addition carries a quantizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pipeline import scheme_choice
from pipeline.graphs.branches import Branch, depths, main_branch
from pipeline.graphs.rewrites import quantizer_of
from pipeline.learning.fake_quantize import (
    insert_fake_quantizers,
    load_quantized,
    pin_kernels,
    quantize_graph,
    save_quantized,
    strip_fake_quantizers,
)
from pipeline.scheme_choice import own_scheme
from pipeline.schemes import SCHEMES, dialect_of, scheme_of
from pipeline.stages.export import export_quantized
from targets import make_target
from targets.base import Exported, Preprocessing
from targets.errors import RecipeError
from targets.lint import Platform, read

pytestmark = pytest.mark.integration

node = helper.make_node


class Blocks(nn.Module):
    """Two residual blocks: one with an identity shortcut, one whose shortcut has a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.shortcut(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Depthwise(nn.Module):
    """A pointwise convolution, a depthwise one, and one with two outputs a channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point = nn.Conv2d(3, 4, 1)
        self.depthwise, self.twice = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.depthwise(self.point(x)))
        return y


@pytest.fixture(scope="module")
def x() -> Tensor:
    pin_kernels("torch")
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(x: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Each scheme, trained form -> saved -> loaded -> stripped -> exported in the plainest dialect."""
    found = {}
    for scheme in SCHEMES:
        directory = tmp_path_factory.mktemp(scheme)
        quantized = insert_fake_quantizers(Blocks(), [x], x[:1], scheme)
        save_quantized(quantized, directory, example=x[:1], scheme=scheme)
        loaded = load_quantized(Blocks(), directory)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), quantized(x), rtol=0, atol=0)
        found[scheme] = export_quantized(
            _FromPixels(strip_fake_quantizers(loaded, x[:1])),
            name="blocks",
            scheme=scheme,
            dialect="portable",
            example_shape=(3, 8, 8),
            preprocessing=Preprocessing(),
            out_dir=tmp_path_factory.mktemp("exported"),
            pixels_NCHW=np.zeros((1, 3, 8, 8), np.uint8),
        )
    return found


class _FromPixels(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        y: Tensor = self.net(pixels.float() / 64 - 2)
        return y


def additions(graph: ir.Model) -> list[list[str]]:
    """For each residual addition, what feeds its two inputs."""
    return [
        [
            str(producer.op_type)
            for value in n.inputs
            if value is not None and (producer := value.producer()) is not None
        ]
        for n in graph.graph
        if n.op_type == "Add" and all(v is not None and v.producer() is not None for v in n.inputs)
    ]


def activation_types(graph: ir.Model) -> set[str]:
    return {str(q.dtype) for n in graph.graph if n.op_type == "QuantizeLinear" and (q := quantizer_of(n)) is not None}


@pytest.mark.parametrize(
    ("scheme", "types", "branches"),
    [
        ("cpu-int8", {"int8", "uint8"}, {"DequantizeLinear"}),
        ("cpu-int8-w7", {"int8", "uint8"}, {"DequantizeLinear"}),
        ("portable", {"int8"}, {"DequantizeLinear"}),
        ("tensorrt-int8", {"int8"}, {"Conv", "DequantizeLinear"}),
    ],
)
def test_a_trained_scheme_stands_in_the_exported_graph(
    scheme: str, types: set[str], branches: set[str], exported: dict[str, Exported]
) -> None:
    graph = ir.load(exported[scheme].model_path)
    found = additions(graph)

    assert activation_types(graph) == types
    assert len(found) == 2
    assert all(set(one) == branches for one in found)
    assert all(one.count("Conv") <= 1 for one in found)


def test_the_deeper_branch_of_a_shortcut_with_a_convolution_is_freed(exported: dict[str, Exported]) -> None:
    graph = ir.load(exported["tensorrt-int8"].model_path)
    last = [n for n in graph.graph if n.op_type == "Add" and len(n.predecessors()) == 2][-1]
    freed = next(value.producer() for value in last.inputs if value is not None and value.producer().op_type == "Conv")  # type: ignore[union-attr]

    assert freed is not None
    weight = freed.inputs[1].producer().inputs[0].const_value  # type: ignore[union-attr]
    assert weight.shape == (6, 6, 3, 3)  # type: ignore[union-attr]  # b2, not the 1x1 of the shortcut


def onnx_blocks() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"w0": (4, 3, 3, 3), "w1": (4, 4, 3, 3), "w2": (4, 4, 3, 3), "head": (4, 5)}
    constants = {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1] * 4),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"], name="first", pads=[1] * 4),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1] * 4),
        node("Add", ["c2", "r0"], ["a"]),
        node("Relu", ["a"], ["r2"]),
        node("GlobalAveragePool", ["r2"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("scheme", "types", "branches"),
    [
        ("cpu-int8", {"int8", "uint8"}, ["DequantizeLinear", "DequantizeLinear"]),
        ("cpu-int8-w7", {"int8", "uint8"}, ["DequantizeLinear", "DequantizeLinear"]),
        ("portable", {"int8"}, ["DequantizeLinear", "DequantizeLinear"]),
        ("tensorrt-int8", {"int8"}, ["Conv", "DequantizeLinear"]),
    ],
)
def test_the_same_schemes_on_an_onnx_graph(scheme: str, types: set[str], branches: list[str], x: Tensor) -> None:
    samples = [{"x": x[i : i + 1].numpy()} for i in range(len(x))]

    graph = ir.from_proto(quantize_graph(onnx_blocks(), samples, scheme))

    assert activation_types(graph) == types
    assert additions(graph) == [branches]


def test_a_signed_range_reaches_as_far_as_the_unsigned_one_did(x: Tensor) -> None:
    samples = [{"x": x[i : i + 1].numpy()} for i in range(len(x))]
    reach = {}
    for scheme in ("cpu-int8", "portable"):
        graph = ir.from_proto(quantize_graph(onnx_blocks(), samples, scheme))
        first = next(n for n in graph.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "r1")
        quantizer = quantizer_of(first)
        assert quantizer is not None
        reach[scheme] = float(quantizer.scale) * (127 if quantizer.dtype == np.int8 else 255)

    assert reach["portable"] == pytest.approx(reach["cpu-int8"], rel=1e-6)


def weight_peaks(path: Path) -> list[int]:
    """The largest weight of each product, as an integer, however the graph stores it."""
    graph = read(path)
    weights = [weight for node in graph.products() if (weight := graph.weight(node)) is not None]
    integers = [found for weight in weights if (found := graph.weight_integers(weight)) is not None]
    return [int(np.abs(one.astype(np.int32)).max()) for one in integers]


def test_seven_bits_are_kept_by_training_and_by_the_exported_graph(x: Tensor, exported: dict[str, Exported]) -> None:
    quantized = insert_fake_quantizers(Blocks(), [x], x[:1], "cpu-int8-w7")
    for weight in (p for name, p in quantized.named_parameters() if name.endswith("weight")):
        weight.data *= 3  # as a training may do: beyond the range that calibration found
    stripped = strip_fake_quantizers(quantized, x[:1])

    assert weight_peaks(exported["cpu-int8-w7"].model_path) == [63] * 7
    assert max(weight_peaks(exported["cpu-int8"].model_path)) > 120
    with torch.no_grad():  # a rounding of float32 may fall on the other side: one step of the last activation
        torch.testing.assert_close(stripped(x), quantized(x), rtol=0, atol=float(quantized(x).abs().max()) / 50)
    peaks = {layer: peak for layer, peak in trained_peaks(stripped).items() if layer != "stem"}
    assert peaks == pytest.approx(dict.fromkeys(peaks, 63.0), abs=1e-3)
    assert len(peaks) == 6


def test_a_depthwise_convolution_keeps_eight_bits(x: Tensor) -> None:
    """No kernel adds two of its products in 16 bits, but with several outputs a channel it is another kernel."""
    stripped = strip_fake_quantizers(insert_fake_quantizers(Depthwise(), [x], x[:1], "cpu-int8-w7"), x[:1])

    assert [round(peak) for peak in trained_peaks(stripped).values()] == [63, 127, 63]


def trained_peaks(stripped: nn.Module) -> dict[str, float]:
    """The largest weight of each layer, in steps of its scale."""
    peaks = {}
    for name, module in stripped.named_modules():
        if "pre_hooks" in name and hasattr(module, "scale"):
            layer = name.split(".")[2].partition("/")[0]
            weight = stripped.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            peaks[layer] = float((weight.detach().flatten(1) / module.scale.view(-1, 1)).abs().max())
    return peaks


def test_seven_bits_reach_as_far_as_eight_in_an_onnx_graph(x: Tensor, tmp_path: Path) -> None:
    samples = [{"x": x[i : i + 1].numpy()} for i in range(len(x))]
    scale = {}
    for scheme in ("cpu-int8", "cpu-int8-w7"):
        proto = quantize_graph(onnx_blocks(), samples, scheme)
        (scale[scheme],) = [numpy_helper.to_array(one) for one in proto.graph.initializer if one.name == "scale_w2_1"]
        onnx.save(proto, tmp_path / f"{scheme}.onnx")

    np.testing.assert_allclose(scale["cpu-int8-w7"] / scale["cpu-int8"], 2, rtol=1e-6)
    assert all(60 < peak <= 64 for peak in weight_peaks(tmp_path / "cpu-int8-w7.onnx"))
    assert max(weight_peaks(tmp_path / "cpu-int8.onnx")) > 120


@pytest.mark.parametrize(
    ("target", "vnni", "here", "scheme"),
    [
        ("onnxruntime-cpu", False, True, "cpu-int8-w7"),
        ("openvino-cpu", False, True, "cpu-int8-w7"),
        ("onnxruntime-cpu", True, True, "cpu-int8"),
        ("onnxruntime-cpu", False, False, "cpu-int8"),  # a board: nobody knows its CPU yet
        ("executorch", False, True, "cpu-int8"),
        ("tensorrt", False, True, "tensorrt-int8"),
    ],
)
def test_a_cpu_that_would_overflow_gets_seven_bits_unasked(
    target: str, vnni: bool, here: bool, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheme_choice, "Platform", partial(Platform, machine="x86_64", vnni=vnni))

    assert own_scheme(make_target(target, {}), here=here) == scheme


def test_a_scheme_that_nobody_trains_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'tensorrt-int8'"):
        scheme_of("tensorrt-int")


def test_the_portable_scheme_has_one_dialect_for_all_and_the_others_that_of_their_runtime() -> None:
    assert {dialect_of("portable", dialect) for dialect in ("openvino", "onnxruntime", "tensorrt")} == {"portable"}
    assert dialect_of("cpu-int8", "onnxruntime") == "onnxruntime"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=2, max_size=2))
def test_the_main_branch_is_the_deepest_that_can_be_fused(drawn: list[tuple[bool, int]]) -> None:
    branches = [Branch(quantizer=f"q{i}", source=f"s{i}", fusible=fusible) for i, (fusible, _) in enumerate(drawn)]
    depth = {f"s{i}": level for i, (_, level) in enumerate(drawn)}

    main = main_branch(branches, depth)

    fusible = [branch for branch in branches if branch.fusible]
    assert (main is None) == (not fusible)
    assert main is None or all(depth[main.source] >= depth[branch.source] for branch in fusible)


def test_an_addition_of_one_quantized_input_has_no_main_branch() -> None:
    assert main_branch([Branch(quantizer="q", source="s", fusible=True)], {"s": 1}) is None


def test_depth_counts_the_longest_way() -> None:
    assert depths({"a": [], "b": ["a"], "c": ["a", "b"]}) == {"a": 0, "b": 1, "c": 2}


def test_a_scheme_survives_its_file(exported: dict[str, Exported]) -> None:
    for scheme, one in exported.items():
        assert Exported.load(Path(one.directory)).scheme == scheme
