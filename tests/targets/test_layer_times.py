"""What the runtimes' own profilers say of each layer. Structure only: no test here looks at how long anything took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from targets import make_target
from targets.base import Clocked, CompiledModel, Exported, LayerTime, LayerTimer, Target, TensorSpec
from targets.onnxruntime_profile import node_times
from targets.openvino import mean_since

MakeExported = Callable[..., Exported]
each_target = pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])


def layers_of(target: Target, compiled: CompiledModel, pixels: Any, *, num_warm: int = 1) -> tuple[LayerTime, ...]:
    assert isinstance(target, LayerTimer)
    session = target.load_profiled(compiled, batch=1)
    for _ in range(num_warm):
        session.run({"image": pixels[:1]})
    session.start()
    for _ in range(3):
        session.run({"image": pixels[:1]})
    return session.layer_times()


@each_target
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_timed_layers_hold_every_product_of_the_placement(
    name: str, precision: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    compiled = target.compile(make_exported(quantized=precision == "int8"), tmp_path / "c", precision)

    timed = layers_of(target, compiled, pixels)

    products = sorted((layer.name, layer.op, layer.precision, layer.macs) for layer in timed if layer.macs)
    placed = target.placement(compiled).layers
    assert products == sorted((layer.name, layer.op, layer.precision, layer.macs) for layer in placed)
    assert len(products) == 2


@each_target
def test_every_run_has_a_time_by_the_runtimes_own_clock(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    assert isinstance(target, Clocked)
    session = target.load_clocked(target.compile(make_exported(), tmp_path / "c", "fp32"))

    answers = [session.run({"image": pixels[:1]})["logits"].copy() for _ in range(3)]
    times_us = session.run_times_us()

    assert len(times_us) == 3
    assert min(times_us) > 0
    assert np.array_equal(answers[0], answers[2])


@each_target
def test_layers_without_products_are_there_too(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    compiled = target.compile(make_exported(quantized=True), tmp_path / "c", "int8")

    timed = layers_of(target, compiled, pixels)

    without = [layer for layer in timed if not layer.macs]
    assert without
    assert all(layer.precision not in ("", "none", "unknown") for layer in without)


@each_target
def test_every_layer_stands_once_however_often_it_ran(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")

    timed = layers_of(target, compiled, pixels, num_warm=4)

    names = [layer.name for layer in timed]
    assert len(names) == len(set(names))
    assert all(layer.time_us >= 0 for layer in timed)


@each_target
def test_a_profiled_session_answers_as_a_plain_one(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    assert isinstance(target, LayerTimer)
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")
    plain = target.load(compiled).run({"image": pixels[:1]})["logits"].copy()

    profiled = target.load_profiled(compiled).run({"image": pixels[:1]})["logits"]

    np.testing.assert_array_equal(profiled, plain)


@each_target
def test_a_session_that_is_dropped_before_it_tells_leaves_nothing_behind(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    target = make_target(name, {})
    assert isinstance(target, LayerTimer)
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")

    session = target.load_profiled(compiled)
    session.run({"image": pixels[:1]})
    del session

    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]


def test_openvinos_mean_of_the_timed_runs_comes_out_of_two_running_averages() -> None:
    # 2 slow runs of 100 us, then 8 of 10 us: averages 100 after 2 and 28 after 10.
    assert mean_since(100.0, 2, 28.0, 10) == 10.0
    assert mean_since(0.0, 0, 28.0, 10) == 28.0


def test_openvinos_mean_is_never_below_zero_where_whole_units_were_cut_off() -> None:
    assert mean_since(1.0, 9, 0.0, 10) == 0.0


def run_event(ts: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 90, "args": {}}


def node_event(name: str, ts: int, dur: int, op: str = "Relu", index: str = "0") -> dict[str, Any]:
    described = [{"float": [1]}]
    arguments = {"op_name": op, "node_index": index, "input_type_shape": described, "output_type_shape": described}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": arguments}


def times_of(events: list[dict[str, Any]], num_warm: int) -> list[tuple[str, float]]:
    return [(node[0], time_us) for node, _, time_us in node_times(events, num_warm)]


def test_onnx_runtimes_warm_up_runs_are_dropped_and_the_median_is_taken() -> None:
    events = []
    for i, dur in enumerate([90, 80, 5, 50, 7]):
        events += [run_event(100 * i), node_event("relu", 100 * i, dur)]

    assert times_of(events, num_warm=2) == [("relu", 7.0)]


def test_a_loop_counts_without_what_its_body_runs_and_the_body_is_summed_up_over_a_run() -> None:
    events = [
        run_event(0),
        node_event("loop", 0, 60, op="Loop"),
        node_event("body", 5, 20, index="1"),
        node_event("body", 30, 25, index="1"),
        node_event("after", 60, 9, index="2"),
    ]

    assert times_of(events, num_warm=0) == [("loop", 15.0), ("body", 45.0), ("after", 9.0)]


def test_two_nodes_of_one_name_are_two_layers() -> None:
    events = [run_event(0), node_event("same", 0, 3, index="4"), node_event("same", 3, 8, index="5")]

    assert times_of(events, num_warm=0) == [("same", 3.0), ("same", 8.0)]


def test_a_branch_that_half_of_the_runs_take_counts_in_all_of_them() -> None:
    events = [run_event(0), node_event("then", 0, 10), run_event(100), run_event(200), node_event("then", 200, 10)]

    assert times_of(events, num_warm=0) == [("then", 10.0)]
    assert times_of(events[:4], num_warm=0) == [("then", 0.0)]


def float_model(tmp_path: Path, nodes: list[onnx.NodeProto], output: TensorSpec) -> Exported:
    """(1, 64) floats in; a constant weight `w` (64, 64) and a zero `z` to take."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    kind = TensorProto.FLOAT if output.dtype == "float32" else TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info(output.name, kind, output.shape)],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32(0), "z")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    taken = (TensorSpec(name="x", shape=(1, 64), dtype="float32"),)
    return Exported(name="floats", onnx_path="m.onnx", inputs=taken, outputs=(output,), directory=tmp_path)


def timed_once(name: str, exported: Exported, out_dir: Path) -> tuple[LayerTime, ...]:
    target = make_target(name, {})
    assert isinstance(target, LayerTimer)
    session = target.load_profiled(target.compile(exported, out_dir, "fp32"))
    session.start()
    session.run({"x": np.ones((1, 64), np.float32)})
    return session.layer_times()


def test_onnx_nodes_without_names_are_timed_and_counted(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Erf", ["b"], ["y"])]
    output = TensorSpec(name="y", shape=(1, 64), dtype="float32")

    timed = timed_once("onnxruntime-cpu", float_model(tmp_path, nodes, output), tmp_path / "c")

    assert [layer.macs for layer in timed] == [4096, 4096, 0]


def test_products_in_a_branch_that_only_this_input_takes_are_counted(tmp_path: Path) -> None:
    value, node = helper.make_tensor_value_info, helper.make_node
    then = helper.make_graph([node("MatMul", ["x", "w"], ["a"])], "then", [], [value("a", TensorProto.FLOAT, [1, 64])])
    other = helper.make_graph([node("Neg", ["x"], ["b"])], "else", [], [value("b", TensorProto.FLOAT, [1, 64])])
    nodes = [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "z"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=then, else_branch=other),
    ]
    output = TensorSpec(name="y", shape=(1, 64), dtype="float32")

    timed = timed_once("onnxruntime-cpu", float_model(tmp_path, nodes, output), tmp_path / "c")

    assert [(layer.op, layer.macs) for layer in timed if layer.macs] == [("MatMul", 4096)]


@each_target
def test_an_output_whose_size_only_the_run_knows_hides_no_product(name: str, tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("NonZero", ["a"], ["y"])]
    exported = float_model(tmp_path, nodes, TensorSpec(name="y", shape=(2, None), dtype="int64"))
    target = make_target(name, {})

    timed = timed_once(name, exported, tmp_path / "c")

    assert [layer.macs for layer in timed if layer.macs] == [4096]
    assert [layer.macs for layer in target.placement(CompiledModel.load(tmp_path / "c")).layers] == [4096]
