"""Layer times of TensorRT on the stand-ins, which report as IProfiler is called back; on a GPU this was not run."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import targets.cuda
from targets.base import Exported, LayerTimer
from targets.errors import TargetError
from targets.tensorrt import TensorRt
from targets.tensorrt_inspector import Product, layer_times

STANDINS = Path(__file__).parent / "standins"
CONV_MACS, HEAD_MACS = 8 * 8 * 8 * 3 * 3 * 3, 8 * 5
MakeExported = Callable[..., Exported]


@pytest.fixture
def trt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in package, whose contexts report each layer of their engine with 2 ms, the first run with 500 ms."""
    path = tmp_path / "libcudart.so.12"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, STANDINS / "cudart.c"], check=True)
    monkeypatch.setattr(targets.cuda, "candidates", lambda: iter([str(path)]))
    spec = importlib.util.spec_from_file_location("tensorrt", STANDINS / "tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for name in ("targets.tensorrt_listeners", "targets.tensorrt_profiler"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    module.settings.cudart = library
    module.IProfiler = type("IProfiler", (), {})  # type: ignore[attr-defined]
    plain: Callable[..., bool] = module.IExecutionContext.execute_async_v3
    num_runs = [0]

    def reporting(context: Any, stream_handle: int) -> bool:
        done = plain(context, stream_handle)
        num_runs[0] += 1
        if (profiler := getattr(context, "profiler", None)) is not None:
            compute = (node for node in context._engine._model.graph.node if node.op_type in ("Conv", "Gemm", "Relu"))
            for node in compute:
                profiler.report_layer_time(node.name or node.output[0], 500.0 if num_runs[0] == 1 else 2.0)
        return done

    monkeypatch.setattr(module.IExecutionContext, "execute_async_v3", reporting)
    return module


@pytest.mark.usefixtures("trt")
def test_an_engines_layers_are_timed_over_the_runs_since_start(
    make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = TensorRt()
    assert isinstance(target, LayerTimer)
    exported = dataclasses.replace(make_exported(quantized=True), scheme="tensorrt-int8")
    session = target.load_profiled(target.compile(exported, tmp_path / "c", "int8"))

    for _ in range(2):
        session.run({"image": pixels[:1]})
    session.start()
    for _ in range(3):
        session.run({"image": pixels[:1]})

    timed = session.layer_times()
    assert {layer.time_us for layer in timed} == {2000.0}
    by_name = {layer.name: layer for layer in timed}
    assert (by_name["conv"].macs, by_name["conv"].precision, by_name["conv"].op) == (
        CONV_MACS,
        "int8",
        "CaskConvolution",
    )
    assert by_name["head"].macs == HEAD_MACS
    assert by_name["head"].kernel == "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n"
    assert sum(layer.macs for layer in timed) == CONV_MACS + HEAD_MACS


@pytest.mark.usefixtures("trt")
def test_a_profiled_session_captures_no_graph_that_would_hide_the_layers(
    make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=True)
    session = target.load_profiled(target.compile(make_exported(), tmp_path / "c", "fp32"))
    session.start()

    session.run({"image": pixels[:1]})

    assert len(session.layer_times()) > 2


@pytest.mark.usefixtures("trt")
def test_an_engine_of_another_machine_is_not_profiled(make_exported: MakeExported, tmp_path: Path) -> None:
    target = TensorRt()
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")
    elsewhere = dataclasses.replace(compiled, built_for={**compiled.built_for, "sm": "1.0"})

    with pytest.raises(TargetError):
        target.load_profiled(elsewhere)


CONVOLUTION = {
    "Name": "conv + relu",
    "LayerType": "CaskConvolution",
    "Inputs": [{"Datatype": "Int8"}],
    "Weights": {"Type": "Int8"},
    "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: other]",
}
REFORMAT = {"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [{"Datatype": "Float"}]}


def test_two_products_that_one_layer_runs_are_counted_there_together() -> None:
    products = [Product("conv", "[ONNX Layer: conv]", 100), Product("other", "[ONNX Layer: other]", 20)]

    (timed,) = layer_times({"conv + relu": 5.0}, [CONVOLUTION], products, "m")

    assert (timed.macs, timed.precision, timed.time_us) == (120, "int8", 5.0)


def test_a_layer_that_moves_data_has_no_products_and_the_type_of_its_input() -> None:
    (timed,) = layer_times({"Reformatting CopyNode": 5.0}, [CONVOLUTION, REFORMAT], [], "m")

    assert (timed.macs, timed.precision, timed.op) == (0, "fp32", "Reformat")


def test_a_layer_that_the_inspector_does_not_know_is_told_as_unknown() -> None:
    (timed,) = layer_times({"new": 5.0}, [CONVOLUTION], [], "m")

    assert (timed.op, timed.precision, timed.macs) == ("unknown", "unknown", 0)
