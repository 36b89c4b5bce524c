from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.differences import OutputDifference, differences
from pipeline.graphs.files import import_onnx
from pipeline.graphs.proof import node_by_node
from pipeline.stages.quantize_onnx import quantize_onnx
from targets import make_target
from targets.errors import DataError, EdgestillError, ModelError, RecipeError

pytestmark = pytest.mark.integration

Sample = dict[str, Any]
node = helper.make_node


def build(path: Path, *, nhwc: bool = False, opset: int = 17) -> Path:
    """Two inputs and two outputs: Conv, BatchNorm, Relu, Conv on "image"; the pooled maps and "extra" meet in a Gemm."""
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "w1": rng.normal(scale=0.3, size=(8, 3, 3, 3)),
        "gamma": rng.normal(size=8),  # some negative
        "beta": rng.normal(size=8),
        "mean": rng.normal(size=8),
        "var": rng.uniform(0.5, 2.0, size=8),
        "w2": rng.normal(scale=0.3, size=(8, 8, 3, 3)),
        "head": rng.normal(scale=0.3, size=(8, 5)),
        "bias": rng.normal(size=5),
    }
    nodes = [
        node("Conv", ["nchw", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c1", "gamma", "beta", "mean", "var"], ["b1"]),
        node("Relu", ["b1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c2"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Add", ["flat", "extra"], ["sum"]),
        node("Gemm", ["sum", "head", "bias"], ["logits"]),
        node("Sigmoid", ["flat"], ["gates"]),
    ]
    first = node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]) if nhwc else node("Identity", ["image"], ["nchw"])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [first, *nodes],
        "two",
        [
            info("image", TensorProto.FLOAT, ["N", 8, 8, 3] if nhwc else ["N", 3, 8, 8]),
            info("extra", TensorProto.FLOAT, ["N", 8]),
        ],
        [info("logits", TensorProto.FLOAT, ["N", 5]), info("gates", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def samples(num: int, *, nhwc: bool = False, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    shape = (1, 8, 8, 3) if nhwc else (1, 3, 8, 8)
    return [
        {"image": rng.normal(size=shape).astype(np.float32), "extra": rng.normal(size=(1, 8)).astype(np.float32)}
        for _ in range(num)
    ]


def compared(float_path: Path, int8_path: Path, given: list[Sample]) -> tuple[OutputDifference, ...]:
    return differences("int8", "float", node_by_node(float_path, given), node_by_node(int8_path, given))


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
@pytest.mark.parametrize("nhwc", [False, True])
def test_several_inputs_and_outputs_of_either_layout_stay_close_and_run_in_int8(
    name: str, nhwc: bool, tmp_path: Path
) -> None:
    target = make_target(name, {})
    model_path = build(tmp_path / "m.onnx", nhwc=nhwc)
    exported = quantize_onnx(
        model_path,
        samples(16, nhwc=nhwc),
        scheme=target.scheme,
        dialect=target.dialect,
        out_dir=tmp_path / "int8",
    )

    moved = compared(model_path, exported.model_path, samples(8, nhwc=nhwc, seed=1))
    placement = target.placement(target.compile(exported, tmp_path / "c", "int8"))

    assert [(d.name, d.num_samples) for d in moved] == [("logits", 8), ("gates", 8)]
    assert all(d.cosine_min > 0.99 and d.max_abs_delta > 0 for d in moved)
    assert placement.int8_share >= 0.95
    assert [spec.name for spec in exported.inputs] == ["image", "extra"]
    assert all(spec.shape[0] is None for spec in (*exported.inputs, *exported.outputs))


def test_an_old_operator_set_is_raised(tmp_path: Path) -> None:
    model_path = build(tmp_path / "old.onnx", opset=9)

    exported = quantize_onnx(model_path, samples(4), scheme="cpu-int8", dialect="openvino", out_dir=tmp_path / "int8")

    assert all(d.cosine_min > 0.98 for d in compared(model_path, exported.model_path, samples(4)))


def refuse(act: Callable[[], object], kind: type[EdgestillError], message: str) -> None:
    with pytest.raises(kind, match=message) as refusal:
        act()
    assert len(str(refusal.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({}, "lacks input 'image'"),
        ({"image": np.zeros((1, 3, 9, 9), np.float32)}, r"the graph takes float32\[None, 3, 8, 8\]"),
        ({"image": np.zeros((1, 3, 8, 8), np.float64)}, "'image' is float64"),
        ({"image": np.full((1, 3, 8, 8), np.nan, np.float32)}, "no numbers"),
    ],
)
def test_a_calibration_sample_that_does_not_fit_is_named(damage: Sample, message: str, tmp_path: Path) -> None:
    bad = {"extra": np.zeros((1, 8), np.float32)} | damage
    path = build(tmp_path / "m.onnx")

    refuse(
        lambda: quantize_onnx(path, [bad], scheme="cpu-int8", dialect="openvino", out_dir=tmp_path / "o"),
        DataError,
        f"sample 0.*{message}",
    )


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    good, out_dir = build(tmp_path / "m.onnx"), tmp_path / "o"
    quantized = quantize_onnx(good, samples(2), scheme="cpu-int8", dialect="openvino", out_dir=tmp_path / "q")

    def attempt(path: Path, scheme: str = "cpu-int8", dialect: str = "openvino", num: int = 2) -> Callable[[], object]:
        return lambda: quantize_onnx(path, samples(num), scheme=scheme, dialect=dialect, out_dir=out_dir)

    refuse(attempt(tmp_path / "absent.onnx"), ModelError, "there is no file")
    refuse(attempt(quantized.model_path), ModelError, "quantized already")
    refuse(attempt(good, scheme="int4"), RecipeError, "scheme 'int4'")
    refuse(attempt(good, dialect="onnxruntim"), ModelError, "Did you mean 'onnxruntime'")
    refuse(attempt(good, num=0), DataError, "no sample")
    assert not out_dir.exists()


def test_a_branch_that_no_sample_reaches_is_quantized_around_when_it_is_kept_in_float(tmp_path: Path) -> None:
    model_path = build(tmp_path / "m.onnx")
    unlit = [{**sample, "image": np.zeros_like(sample["image"])} for sample in samples(4)]
    given: dict[str, Any] = {"scheme": "cpu-int8", "dialect": "onnxruntime", "out_dir": tmp_path / "int8"}

    with pytest.raises(DataError, match=r"'Conv_\w+' \(Conv\): 'image' is zero .* --keep-float") as refusal:
        quantize_onnx(model_path, unlit, **given)
    named = str(refusal.value).split("'")[1]
    exported = quantize_onnx(model_path, unlit, **given, keep_float=(named,))

    assert exported.model_path.is_file()


def test_bytes_that_are_no_onnx_are_refused(tmp_path: Path) -> None:
    whole = build(tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "damaged.onnx"
    for damaged in (b"", b"\x00\xff" * 100, b"not a graph", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        refuse(lambda: import_onnx(path, name="d", out_dir=tmp_path / "o"), ModelError, "ONNX")


def test_an_input_that_is_no_plain_tensor_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [node("Identity", ["words"], ["y"])],
        "g",
        [helper.make_tensor_value_info("words", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "s.onnx")

    refuse(lambda: import_onnx(tmp_path / "s.onnx", name="s", out_dir=tmp_path / "o"), ModelError, "'words' is")
