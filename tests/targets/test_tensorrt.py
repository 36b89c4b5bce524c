"""The TensorRT target on stand-ins: engines are run by ONNX Runtime, device memory is malloc'ed, every CUDA call is recorded."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import targets.cuda
from benchmarks.device.evaluate import evaluate
from benchmarks.device.measure import PRESETS, measure_launch
from targets import make_target
from targets.base import CompiledModel, Exported, write_json
from targets.checks import check_batch
from targets.errors import RecipeError, TargetError
from targets.tensorrt import TensorRt
from targets.tensorrt_inspector import products_of

STANDINS = Path(__file__).parent / "standins"
CONV_MACS, HEAD_MACS = 8 * 8 * 8 * 3 * 3 * 3, 8 * 5
COPY_IN, COPY_OUT = "cudaMemcpyAsync:to_device", "cudaMemcpyAsync:to_host"
MakeExported = Callable[..., Exported]


@pytest.fixture(scope="session")
def cudart_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cudart") / "libcudart.so.12"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, STANDINS / "cudart.c"], check=True)
    return path


@pytest.fixture
def cudart(cudart_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    gc.collect()  # what an earlier test has left would be counted here
    library = ctypes.CDLL(str(cudart_path))
    library.standin_log.restype = ctypes.c_char_p
    library.standin_live.restype = ctypes.c_long
    monkeypatch.setattr(targets.cuda, "candidates", lambda: iter([str(cudart_path)]))
    library.standin_clear()
    yield library
    library.standin_fail(b"", 0)


@pytest.fixture
def trt(cudart: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in package, installed as `tensorrt` for one test."""
    spec = importlib.util.spec_from_file_location("tensorrt", STANDINS / "tensorrt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.delitem(sys.modules, "targets.tensorrt_listeners", raising=False)
    spec.loader.exec_module(module)
    module.settings.cudart = cudart
    return module


@pytest.fixture
def quantized(make_exported: MakeExported) -> Exported:
    return with_half(make_exported(quantized=True))


def with_half(exported: Exported) -> Exported:
    """With a second file that stands for the float16 form (its content is the same)."""
    shutil.copy(exported.model_path, exported.directory / "half.onnx")
    scheme = None if exported.scheme is None else "tensorrt-int8"
    return dataclasses.replace(exported, half_path="half.onnx", scheme=scheme)


def calls(cudart: ctypes.CDLL) -> list[str]:
    made = cudart.standin_log().decode().split()
    cudart.standin_clear()
    return made


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_float_engine_gives_the_numbers_of_plain_numpy(
    cuda_graph: bool, make_exported: MakeExported, pixels: Any, expected_logits: Any, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=cuda_graph)
    session = target.load(target.compile(make_exported(), tmp_path / "c", "fp32"))

    for i in range(4):
        logits = session.run({"image": pixels[i : i + 1]})["logits"]
        np.testing.assert_allclose(logits, expected_logits[i : i + 1], atol=1e-4)


@pytest.mark.usefixtures("trt")
def test_a_quantized_engine_stays_within_its_quantization_steps(
    quantized: Exported, pixels: Any, expected_logits: Any, tmp_path: Path
) -> None:
    target = TensorRt()

    logits = target.load(target.compile(quantized, tmp_path / "c", "int8")).run({"image": pixels[:1]})["logits"]

    np.testing.assert_allclose(logits, expected_logits[:1], atol=2 * 0.01 * 8 * 1.27 + 0.01)


@pytest.mark.usefixtures("trt")
def test_one_warm_up_is_captured_and_a_run_is_one_launch(
    quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt()
    compiled = target.compile(quantized, tmp_path / "c", "int8")
    calls(cudart)

    session = target.load(compiled)
    loading = calls(cudart)
    session.run({"image": pixels[:1]})

    begin = loading.index("cudaStreamCreate")
    assert loading[begin:] == [
        "cudaStreamCreate",
        *[COPY_IN, COPY_OUT, "cudaStreamSynchronize"],
        *["cudaStreamBeginCapture", COPY_IN, COPY_OUT, "cudaStreamEndCapture"],
        *["cudaGraphInstantiateWithFlags", "cudaGraphDestroy"],
    ]
    assert calls(cudart) == ["cudaGraphLaunch", "cudaStreamSynchronize"]


@pytest.mark.usefixtures("trt")
def test_without_a_graph_a_run_is_copy_in_execute_copy_out(
    quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=False)
    session = target.load(target.compile(quantized, tmp_path / "c", "int8"))
    calls(cudart)

    session.run({"image": pixels[:1]})

    assert calls(cudart) == [COPY_IN, COPY_OUT, "cudaStreamSynchronize"]


@pytest.mark.usefixtures("trt")
def test_polling_is_set_before_the_device_is_first_used_or_left_alone(
    quantized: Exported, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    calls(cudart)

    TensorRt().load(compiled)
    assert calls(cudart)[0] == "cudaSetDeviceFlags"

    TensorRt(allow_spinning=False).load(compiled)
    assert "cudaSetDeviceFlags" not in calls(cudart)


@pytest.mark.usefixtures("trt")
def test_a_context_that_is_active_already_keeps_its_way_of_waiting(
    quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    cudart.standin_fail(b"cudaSetDeviceFlags", 708)

    assert TensorRt().load(compiled).run({"image": pixels[:1]})["logits"].shape == (1, 5)


@pytest.mark.usefixtures("trt")
def test_a_result_outlives_its_session_and_then_everything_is_given_back(
    make_exported: MakeExported, pixels: Any, expected_logits: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt()
    logits = target.load(target.compile(make_exported(), tmp_path / "c", "fp32")).run({"image": pixels[:1]})["logits"]
    gc.collect()

    np.testing.assert_allclose(logits, expected_logits[:1], atol=1e-4)
    assert cudart.standin_live() == 1

    del logits
    gc.collect()
    assert cudart.standin_live() == 0


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    "function",
    [
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamCreate",
        "cudaStreamSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiateWithFlags",
        "cudaDeviceGetAttribute",
        "cudaGetDeviceProperties",
    ],
)
def test_what_cuda_refuses_is_named_with_its_own_words(
    function: str, quantized: Exported, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt()
    compiled = target.compile(quantized, tmp_path / "c", "int8")
    cudart.standin_fail(function.encode(), 2)

    with pytest.raises(TargetError, match=rf"{function} failed: out of memory \(CUDA error 2\)"):
        target.load(compiled)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("function", [COPY_IN, "cudaGraphLaunch"])
def test_a_run_that_fails_says_so(
    function: str, quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=function == "cudaGraphLaunch")
    session = target.load(target.compile(quantized, tmp_path / "c", "int8"))
    cudart.standin_fail(function.encode(), 7)

    with pytest.raises(TargetError, match=r"failed: some error \(CUDA error 7\)"):
        session.run({"image": pixels[:1]})


def test_a_run_that_tensorrt_refuses_is_no_answer(
    trt: ModuleType, quantized: Exported, pixels: Any, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=False)
    session = target.load(target.compile(quantized, tmp_path / "c", "int8"))
    trt.settings.executes = False

    with pytest.raises(TargetError, match="refuses to execute"):
        session.run({"image": pixels[:1]})


@pytest.mark.usefixtures("trt")
def test_a_run_that_cannot_be_captured_tells_the_option_and_leaves_no_capture_open(
    quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    cudart.standin_fail(b"cudaGraphInstantiateWithFlags", 1)
    with pytest.raises(TargetError, match="Set cuda_graph: false"):
        TensorRt().load(compiled)
    cudart.standin_fail(b"", 0)

    assert TensorRt().load(compiled).run({"image": pixels[:1]})["logits"].shape == (1, 5)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_events_stand_around_all_that_a_run_puts_on_the_stream(
    cuda_graph: bool, quantized: Exported, pixels: Any, cudart: ctypes.CDLL, tmp_path: Path
) -> None:
    target = TensorRt(cuda_graph=cuda_graph)
    session = target.load_clocked(target.compile(quantized, tmp_path / "c", "int8"))
    cudart.standin_clear()

    session.run({"image": pixels[:1]})
    calls = cudart.standin_log().decode().split()

    inside = ["cudaGraphLaunch"] if cuda_graph else [COPY_IN, COPY_OUT]
    record = "cudaEventRecord"
    assert calls == [record, *inside, record, "cudaStreamSynchronize", "cudaEventElapsedTime"]
    assert session.run_times_us()[0] > 0


@pytest.mark.usefixtures("trt")
def test_the_capture_ends_where_the_captured_work_fails(cudart: ctypes.CDLL) -> None:
    cuda = targets.cuda.open_cuda()
    stream = cuda.stream()
    live = cudart.standin_live()

    with pytest.raises(ZeroDivisionError):
        cuda.capture(stream, lambda: 1 // 0)
    cuda.synchronize(stream)  # an open capture would make this fail

    assert cudart.standin_live() == live


@pytest.mark.parametrize("version", ["8.6.2", "10.0.1", "10.2.0.post1", "9.3.0"])
def test_a_version_before_10_3_is_refused_with_what_to_do(
    version: str, trt: ModuleType, quantized: Exported, tmp_path: Path
) -> None:
    trt.__version__ = version

    with pytest.raises(TargetError, match=rf"TensorRT {version} is installed, 10\.3 or newer.*JetPack 6\.1"):
        TensorRt().compile(quantized, tmp_path / "c", "int8")


@pytest.mark.parametrize("version", ["10.3.0", "10.16.2.10", "11.4.0.106", "12.0.0"])
def test_newer_versions_are_taken(version: str, trt: ModuleType, quantized: Exported, tmp_path: Path) -> None:
    trt.__version__ = version

    assert TensorRt().compile(quantized, tmp_path / "c", "int8").toolchain == f"tensorrt {version}"


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_strongly_typed_network_is_asked_for_by_name_whatever_its_number(
    number: int, trt: ModuleType, quantized: Exported, tmp_path: Path
) -> None:
    trt.NetworkDefinitionCreationFlag = type("NetworkDefinitionCreationFlag", (), {"STRONGLY_TYPED": number})

    TensorRt().compile(quantized, tmp_path / "c", "int8")

    assert trt.settings.flags == [1 << number]


def test_where_no_other_kind_of_network_exists_no_flag_is_set(
    trt: ModuleType, quantized: Exported, tmp_path: Path
) -> None:
    trt.BuilderFlag = type("BuilderFlag", (), {"TF32": 6})  # 11: no FP16, INT8, ... any more

    TensorRt().compile(quantized, tmp_path / "c", "int8")

    assert trt.settings.flags == [0]


def test_the_options_reach_the_builder(
    trt: ModuleType, quantized: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TensorRt(workspace_mib=3, optimization_level=5).compile(quantized, tmp_path / "c", "int8")

    config = trt.settings.config
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 3 * 2**20}
    assert config.builder_optimization_level == 5
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert capsys.readouterr().err == "tensorrt: Building engine, 2 steps\n"


@pytest.mark.usefixtures("trt")
def test_an_operator_that_the_parser_lacks_is_named_with_its_node(make_exported: MakeExported, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["image"], ["logits"], name="odd one", domain="nobody")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)]
    exported = make_exported(proto=helper.make_model(graph, opset_imports=opsets, ir_version=8))

    with pytest.raises(TargetError, match=r"model\.onnx: node 0 'odd one' \(Unheard\): no importer") as refusal:
        TensorRt().compile(exported, tmp_path / "c", "fp32")

    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "c" / "compiled.json").exists()


def test_a_build_without_a_result_says_what_the_log_said_last(
    trt: ModuleType, quantized: Exported, tmp_path: Path
) -> None:
    trt.settings.build_fails = "Could not find any implementation for node conv."

    with pytest.raises(
        TargetError, match=r"cannot build half\.onnx: Could not find any .* node conv\. Raise workspace"
    ):
        TensorRt().compile(quantized, tmp_path / "c", "int8")

    assert not (tmp_path / "c" / "compiled.json").exists()


@pytest.mark.usefixtures("trt")
def test_what_is_not_quantized_runs_in_fp16_where_there_is_such_a_graph(quantized: Exported, tmp_path: Path) -> None:
    built_for = TensorRt().compile(quantized, tmp_path / "c", "int8").built_for

    assert (built_for["graph"], built_for["unquantized"]) == ("half.onnx", "fp16")


@pytest.mark.usefixtures("trt")
def test_int8_without_a_float16_graph_says_that_the_rest_is_fp32(
    make_exported: MakeExported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = dataclasses.replace(make_exported(quantized=True), half_note="a scale is below float16's range")

    built_for = TensorRt().compile(exported, tmp_path / "c", "int8").built_for

    assert (built_for["graph"], built_for["unquantized"]) == ("model.onnx", "fp32")
    assert "no float16 graph (a scale is below float16's range)" in capsys.readouterr().err


@pytest.mark.usefixtures("trt")
def test_fp16_needs_a_float16_graph(make_exported: MakeExported, tmp_path: Path) -> None:
    exported = dataclasses.replace(make_exported(), half_note="a weight is beyond 65504")

    with pytest.raises(TargetError, match=r"fp16 needs a graph written in float16.*beyond 65504"):
        TensorRt().compile(exported, tmp_path / "c", "fp16")


@pytest.mark.usefixtures("trt")
def test_the_batch_is_fixed_by_the_engine(make_exported: MakeExported, tmp_path: Path) -> None:
    target = TensorRt()
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")

    assert compiled.inputs[0].shape == (1, 3, 8, 8)
    assert compiled.outputs[0].shape == (1, 5)
    check_batch(compiled.inputs, 1)
    with pytest.raises(TargetError, match="fixed shape"):
        target.load(compiled, batch=4)


@pytest.mark.usefixtures("trt")
def test_the_graphs_own_batch_is_kept(make_exported: MakeExported, pixels: Any, tmp_path: Path) -> None:
    target = TensorRt()
    compiled = target.compile(make_exported(batch=2), tmp_path / "c", "fp32")

    assert target.load(compiled, batch=2).run({"image": pixels[:2]})["logits"].shape == (2, 5)


@pytest.mark.usefixtures("trt")
def test_an_engine_survives_the_way_over_json(quantized: Exported, pixels: Any, tmp_path: Path) -> None:
    compiled = make_target("tensorrt", {"workspace_mib": 2}).compile(quantized, tmp_path / "c", "int8")

    again = CompiledModel.load(tmp_path / "c")

    assert again == compiled
    assert set(again.files) == {"model.engine", "timing.cache", "layers.json", "products.json"}
    make_target(again.target, again.options).load(again).run({"image": pixels[:1]})


@pytest.mark.usefixtures("trt")
def test_the_placement_counts_every_product_and_needs_no_tensorrt(
    quantized: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    monkeypatch.delitem(sys.modules, "tensorrt")

    placement = TensorRt().placement(compiled)

    assert {layer.name: (layer.macs, layer.precision) for layer in placement.layers} == {
        "conv": (CONV_MACS, "int8"),
        "head": (HEAD_MACS, "int8"),
    }
    assert placement.int8_share == 1.0


def test_products_of_every_kind_are_counted_on_the_network(trt: ModuleType, tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "grouped"], ["a"], name="grouped", group=2),
        node("ConvTranspose", ["a", "up"], ["b"], name="up", strides=[2, 2]),
        node("MatMul", ["b", "square"], ["c"], name="product"),
        node("Einsum", ["c", "square"], ["y"], name="odd", equation="nchw,wk->nchk"),
    ]
    shapes = {"grouped": (6, 2, 3, 3), "up": (6, 5, 2, 2), "square": (12, 7)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    network = trt.INetworkDefinition()
    trt.OnnxParser(network, None).parse_from_file(str(tmp_path / "m.onnx"))
    unfixed = [product.macs for product in products_of(trt, network)]
    network.get_input(0).shape = (1, 4, 8, 8)

    found = {product.name: product.macs for product in products_of(trt, network)}

    # (1,4,8,8) -3x3, 2 groups-> (1,6,6,6) -2x2, stride 2-> (1,5,12,12) x (12,7)
    assert found == {
        "grouped": 6 * 6 * 6 * 2 * 3 * 3,
        "up": 6 * 6 * 6 * 5 * 2 * 2,
        "product": 5 * 12 * 12 * 7,
        "odd": None,
    }
    assert unfixed == [None] * 4


@pytest.mark.usefixtures("trt")
def test_the_program_of_the_device_evaluates_and_measures_an_engine(quantized: Exported, tmp_path: Path) -> None:
    evaluation, quick = tmp_path / "evaluation", dataclasses.replace(PRESETS["smoke"], warmup_s=0.01, min_s=0.01)
    evaluation.mkdir()
    np.save(evaluation / "x-000.npy", np.zeros((3, 3, 8, 8), np.uint8))
    spec = {"num_samples": 3, "classes": [], "shards": ["x-000.npy"], "encoded": [], "encoded_index": []}
    write_json(evaluation / "spec.json", {**spec, "preprocessing": {"mode": "RGB"}})
    TensorRt().compile(quantized, tmp_path / "c", "int8")

    answer = evaluate(tmp_path / "c", evaluation, tmp_path / "answers", batch=32)
    launch = measure_launch(
        tmp_path / "c", quick, boundary="runtime", samples_path=tmp_path / "s.npy", evaluation_dir=evaluation
    )

    assert answer == {"outputs": {"logits": "logits.npy"}, "num_samples": 3, "batch": 1}
    assert launch["n"] == len(np.load(tmp_path / "s.npy")) >= 64


@pytest.mark.usefixtures("trt")
def test_a_float_engine_has_no_int8_share(make_exported: MakeExported, tmp_path: Path) -> None:
    placement = TensorRt().placement(TensorRt().compile(make_exported(), tmp_path / "c", "fp32"))

    assert [layer.precision for layer in placement.layers] == ["fp32", "fp32"]


@pytest.mark.usefixtures("trt")
def test_the_key_names_all_that_decides_an_engine(quantized: Exported, tmp_path: Path) -> None:
    def key(target: TensorRt, precision: str = "int8", exported: Exported = quantized) -> str:
        return target.compile(exported, tmp_path / "c", precision).built_for["key"]

    other = dataclasses.replace(quantized, scheme=None)
    model = onnx.load(quantized.model_path)
    model.doc_string = "another digest"
    onnx.save(model, quantized.model_path)

    built_for = TensorRt().compile(quantized, tmp_path / "c", "int8").built_for
    assert {"arch", "runtime", "sm", "gpu", "cuda", "onnx_sha256", "flags", "key"} <= set(built_for)
    assert (built_for["sm"], built_for["gpu"], built_for["cuda"]) == ("8.7", "Orin", "12.6")
    keys = [key(TensorRt()), key(TensorRt(workspace_mib=7)), key(TensorRt(optimization_level=1))]
    assert len({*keys, key(TensorRt(), "fp32", other)}) == 4
    assert key(TensorRt(cuda_graph=False)) == keys[0]  # how it is run is no part of the engine


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("runtime", "10.7.0", "for TensorRT 10.7.0, here is 10.3.0"),
        ("sm", "11.0", "for SM 11.0, here is 8.7"),
        ("gpu", "Thor", "for the GPU Thor, here is Orin"),
        ("arch", "riscv128", "the architecture riscv128"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    fact: str, value: str, words: str, quantized: Exported, tmp_path: Path
) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    elsewhere = dataclasses.replace(compiled, built_for={**compiled.built_for, fact: value})

    with pytest.raises(TargetError, match=words):
        TensorRt().load(elsewhere)


@pytest.mark.usefixtures("trt")
def test_the_timing_cache_lies_beside_the_engine_and_is_used_again(quantized: Exported, tmp_path: Path) -> None:
    for content in (b"timed;", b"timed;timed;"):
        TensorRt().compile(quantized, tmp_path / "c", "int8")
        assert (tmp_path / "c" / "timing.cache").read_bytes() == content


@pytest.mark.usefixtures("trt")
def test_a_timing_cache_of_ones_own_is_read_written_and_shipped(quantized: Exported, tmp_path: Path) -> None:
    path = tmp_path / "caches" / "orin.cache"
    for out in ("a", "b"):
        TensorRt(timing_cache=str(path)).compile(quantized, tmp_path / out, "int8")

    assert path.read_bytes() == (tmp_path / "b" / "timing.cache").read_bytes() == b"timed;timed;"


def test_a_timing_cache_of_another_gpu_is_not_used_and_that_is_said(
    trt: ModuleType, quantized: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.cache"
    path.write_bytes(b"foreign")
    trt.settings.refuses_cache = True

    TensorRt(timing_cache=str(path)).compile(quantized, tmp_path / "c", "int8")

    assert (tmp_path / "c" / "timing.cache").read_bytes() == b"timed;"
    assert "foreign.cache is of another GPU or version" in capsys.readouterr().err


@pytest.mark.usefixtures("trt")
def test_a_quantized_graph_is_not_taken_for_a_float_one(quantized: Exported, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="precision 'fp16'"):
        TensorRt().compile(quantized, tmp_path / "c", "fp16")


def test_an_engine_that_does_not_load_is_refused(trt: ModuleType, quantized: Exported, tmp_path: Path) -> None:
    compiled = TensorRt().compile(quantized, tmp_path / "c", "int8")
    (tmp_path / "c" / "model.engine").write_bytes(b"")

    with pytest.raises(TargetError, match=r"cannot load model\.engine"):
        TensorRt().load(compiled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace_mib": 0}, "1 or more"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"optimization_level": "3"}, "must be int"),
        ({"cuda_graph": 1}, "must be bool"),
        ({"dla": 1}, "option 'dla'"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_target("tensorrt", options)


@pytest.mark.parametrize(("machine", "advice"), [("x86_64", "pip install tensorrt"), ("aarch64", "python3-libnvinfer")])
def test_an_absent_tensorrt_is_told_with_what_installs_it(
    machine: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr("targets.tensorrt.find_spec", lambda name: None)

    assert advice in (TensorRt().missing() or "")


@pytest.mark.usefixtures("trt")
def test_an_absent_cuda_runtime_is_told_without_asking_any_device(
    cudart: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TensorRt().missing() is None
    assert calls(cudart) == []

    monkeypatch.setattr(targets.cuda, "candidates", lambda: iter(["/nowhere/libcudart.so.12"]))

    assert "nvidia" in (TensorRt().missing() or "")
    with pytest.raises(TargetError, match="libcudart, the CUDA runtime, is not found"):
        targets.cuda.open_cuda()


def test_a_cuda_runtime_that_lacks_a_function_is_refused_by_its_name(tmp_path: Path) -> None:
    source, path = tmp_path / "old.c", tmp_path / "libold.so"
    source.write_text("const char *cudaGetErrorString(int code) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)

    with pytest.raises(TargetError, match=r"has no cudaMalloc: it is older than CUDA 11\.4"):
        targets.cuda.Cuda(ctypes.CDLL(str(path)))
