"""ExecuTorch: a small net through compile, load and run, against ONNX Runtime on the same graph; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from targets import executorch as module
from targets.base import CompiledModel, Exported, Placement, TensorSpec
from targets.errors import IntegrityError, TargetError
from targets.executorch import PROGRAM_FILE, ExecuTorch
from targets.executorch_inspector import read_program

needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None, reason="executorch is not installed: pip install 'edgestill[executorch]'"
)


def needs_exporter(test: Callable[..., None]) -> Any:
    """A `system` test: importing ExecuTorch's exporter and using it once takes half a minute."""
    return pytest.mark.system(needs_executorch(test))


CONV_MACS, POINT_MACS, HEAD_MACS = 8 * 8 * 8 * 3 * 9, 8 * 8 * 8 * 8, 5 * 16
RNG = np.random.default_rng(0)
K3, K1 = RNG.integers(-127, 128, (8, 3, 3, 3)), RNG.integers(-127, 128, (8, 8, 1, 1))
HEAD = RNG.integers(-127, 128, (16, 5))
CONSTANTS: dict[str, Any] = {
    "k": np.float32(1 / 64),
    "zero": np.float32(0),
    "six": np.float32(6),
    "b": RNG.normal(size=8).astype(np.float32),
    "hb": RNG.normal(size=5).astype(np.float32),
    "s3": np.full(8, 0.004, np.float32),
    "s1": np.linspace(0.002, 0.01, 8, dtype=np.float32),
    "sh": np.full(5, 0.01, np.float32),
    "z8": np.zeros(8, np.int8),
    "z5": np.zeros(5, np.int8),
    "sx": np.float32(4 / 255),
    "sr": np.float32(0.02),
    "sd": np.float32(0.05),
    "s8": np.int8(0),
    "u8": np.uint8(0),
    "k3_q": K3.astype(np.int8),
    "k1_q": K1.astype(np.int8),
    "head_q": HEAD.astype(np.int8),
}
CONSTANTS |= {
    "k3": (K3 * CONSTANTS["s3"][:, None, None, None]).astype(np.float32),
    "k1": (K1 * CONSTANTS["s1"][:, None, None, None]).astype(np.float32),
    "head": (HEAD * CONSTANTS["sh"]).astype(np.float32),
}


def pair(to: str, source: str, scale: str, zero: str) -> str:
    return f"{to}_q = QuantizeLinear({source}, {scale}, {zero}) {to} = DequantizeLinear({to}_q, {scale}, {zero}) "


# A stem, a convolution of one pixel beside it, an addition, a concatenation, a pool: what our students are made of.
START = "p = Cast <to = 1> (image) x = Mul(p, k) "
STEM = "c = Conv <pads = [1, 1, 1, 1]> ({x}, {k3}, b) r = Relu(c) "
POINT = "d = Conv ({r}, {k1}, b) "
JOIN = "s = Add({d}, {r}) t = Clip(s, zero, six) "
END = "j = Concat <axis = 1> ({t}, {r}) m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> ({j}) "
LAST = "g = GlobalAveragePool({m}) f = Flatten({g}) h = MatMul(f, {head}) logits = Add(h, hb)"
FLOAT = (START + STEM + POINT + JOIN + END + LAST).format_map(
    {name: name for name in ["x", "k3", "r", "k1", "d", "t", "j", "m", "g", "head"]}
)
QUANTIZED = (
    START
    + pair("xq", "x", "sx", "u8")
    + "w3 = DequantizeLinear <axis = 0> (k3_q, s3, z8) w1 = DequantizeLinear <axis = 0> (k1_q, s1, z8) "
    + "wh = DequantizeLinear <axis = 1> (head_q, sh, z5) "
    + STEM.format(x="xq", k3="w3")
    + pair("rq", "r", "sr", "u8")
    + POINT.format(r="rq", k1="w1")
    + pair("dq", "d", "sd", "s8")
    + JOIN.format(d="dq", r="rq")
    + pair("tq", "t", "sr", "u8")
    + END.format(t="tq", r="rq", j="j")
    + pair("mq", "m", "sr", "u8")
    + "g = GlobalAveragePool(mq) "
    + pair("gq", "g", "sr", "u8")
    + "f = Flatten(gq) h = MatMul(f, wh) logits = Add(h, hb)"
)
OUTPUT = "float[N,5] logits"


def graph(body: str, y: str = OUTPUT, x: str = "uint8[N,3,8,8] image", **constants: Any) -> onnx.ModelProto:
    made = parser.parse_graph(f"g ({x}) => ({y}) {{ {body} }}")
    used = {name for node in made.node for name in node.input}
    known = CONSTANTS | constants
    made.initializer.extend(
        numpy_helper.from_array(np.asarray(known[name]), name) for name in sorted(used & known.keys())
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def export(directory: Path, proto: onnx.ModelProto, *, scheme: str | None = None) -> Exported:
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, directory / "model.onnx")
    return Exported(
        name="small",
        onnx_path="model.onnx",
        inputs=(TensorSpec(name="image", shape=(None, 3, 8, 8), dtype="uint8", layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(None, 5), dtype="float32"),),
        scheme=scheme,
        directory=directory,
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompiledModel]:
    """Each precision, compiled once: the exporter takes its seconds."""
    folder = tmp_path_factory.mktemp("programs")
    target = ExecuTorch()
    exported = dict.fromkeys(target.float_precisions(), export(folder / "float", graph(FLOAT)))
    exported["int8"] = export(folder / "quantized", graph(QUANTIZED), scheme="cpu-int8")
    return {name: target.compile(one, folder / name, name) for name, one in exported.items()}


def images(count: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, (count, 1, 3, 8, 8)).astype(np.uint8)


def on_onnx_runtime(proto: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    """Every optimization off: each operator as ONNX defines it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def on_executorch(compiled: CompiledModel, xs: Any) -> Any:
    session = ExecuTorch().load(compiled)
    return np.concatenate([session.run({"image": x})["logits"].copy() for x in xs])


@needs_exporter
def test_a_float_program_gives_onnx_runtimes_numbers(programs: dict[str, CompiledModel]) -> None:
    xs = images(8)

    answers = on_executorch(programs["fp32"], xs)

    np.testing.assert_allclose(answers, on_onnx_runtime(graph(FLOAT), {"image": xs[:, 0]}), atol=1e-4)


@needs_exporter
def test_an_int8_program_gives_the_numbers_of_its_graph_within_a_few_steps(programs: dict[str, CompiledModel]) -> None:
    xs = images(32)

    answers = on_executorch(programs["int8"], xs)

    expected = on_onnx_runtime(graph(QUANTIZED), {"image": xs[:, 0]})
    # One step of the pooled features (0.02) through a row of the head is at most 0.02 * 1.27 for each of 16 features.
    assert np.abs(answers - expected).max() <= 0.02 * 1.27 * 16 / 4
    assert np.abs(answers - expected).mean() <= 0.01 * np.ptp(expected)
    floats = on_onnx_runtime(graph(FLOAT), {"image": xs[:, 0]})
    assert np.abs(answers - floats).mean() > 3 * np.abs(answers - expected).mean()


@needs_exporter
def test_placement_says_what_xnnpack_ran_in_int8_and_that_the_head_stayed_in_float(
    programs: dict[str, CompiledModel],
) -> None:
    placement = ExecuTorch().placement(programs["int8"])

    assert [(layer.precision, layer.macs) for layer in placement.layers] == [
        ("int8", CONV_MACS),
        ("int8", POINT_MACS),
        ("fp32", HEAD_MACS),
    ]
    assert placement.int8_share == (CONV_MACS + POINT_MACS) / (CONV_MACS + POINT_MACS + HEAD_MACS)
    assert Placement.from_json(placement.to_json()) == placement


@needs_exporter
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_float_program_runs_all_products_in_its_precision(
    precision: str, programs: dict[str, CompiledModel], tmp_path: Path
) -> None:
    if precision not in ExecuTorch().float_precisions():
        with pytest.raises(TargetError, match="precision 'fp16'"):
            ExecuTorch().compile(export(tmp_path, graph(FLOAT)), tmp_path / "c", precision)
        return
    placement = ExecuTorch().placement(programs[precision])

    assert [(layer.precision, layer.macs) for layer in placement.layers] == [
        (precision, macs) for macs in (CONV_MACS, POINT_MACS, HEAD_MACS)
    ]


@needs_exporter
def test_a_float16_program_takes_and_gives_the_same_types(programs: dict[str, CompiledModel]) -> None:
    if "fp16" not in programs:
        pytest.skip("this CPU has no float16 kernels in XNNPACK")
    xs = images(8)

    answers = on_executorch(programs["fp16"], xs)

    assert answers.dtype == np.float32
    expected = on_onnx_runtime(graph(FLOAT), {"image": xs[:, 0]})
    assert 0 < np.abs(answers - expected).max() < 0.01 * np.ptp(expected)


@needs_exporter
def test_nothing_but_the_cast_of_the_pixels_runs_outside_of_the_delegate(programs: dict[str, CompiledModel]) -> None:
    program = read_program((programs["int8"].directory / PROGRAM_FILE).read_bytes())

    assert [instruction.kernel for instruction in program] == ["_to_dim_order_copy", ""]


@needs_exporter
def test_the_result_is_a_view_that_the_next_run_overwrites(programs: dict[str, CompiledModel]) -> None:
    session = ExecuTorch().load(programs["int8"])
    a, b = images(2)

    first = session.run({"image": a})["logits"]
    kept = first.copy()
    second = session.run({"image": b})["logits"]

    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, second)
    np.testing.assert_array_equal(session.run({"image": a})["logits"], kept)


@needs_exporter
def test_a_result_outlives_its_session(programs: dict[str, CompiledModel]) -> None:
    (x,) = images(1)
    kept = ExecuTorch().load(programs["fp32"]).run({"image": x})["logits"]
    expected = on_onnx_runtime(graph(FLOAT), {"image": x})

    for _ in range(8):
        ExecuTorch().load(programs["fp32"]).run({"image": 255 - x})

    np.testing.assert_allclose(kept, expected, atol=1e-4)


@needs_exporter
def test_the_timed_layers_hold_the_products_of_the_placement_once_each(programs: dict[str, CompiledModel]) -> None:
    session = ExecuTorch().load_profiled(programs["int8"])
    session.run({"image": images(1)[0]})
    session.start()
    for x in images(3):
        session.run({"image": x})

    layers = session.layer_times()

    products = [(layer.name, layer.op, layer.precision, layer.macs) for layer in layers if layer.macs]
    placed = ExecuTorch().placement(programs["int8"]).layers
    assert products == [(layer.name, layer.op, layer.precision, layer.macs) for layer in placed]
    assert len({layer.name for layer in layers}) == len(layers) > len(products)
    assert all(layer.time_us >= 0 for layer in layers)


@needs_exporter
def test_a_program_survives_the_way_over_json_and_a_flipped_byte_is_noticed(
    programs: dict[str, CompiledModel],
) -> None:
    compiled = programs["fp32"]
    path = compiled.directory / PROGRAM_FILE
    good = path.read_bytes()

    assert CompiledModel.load(compiled.directory) == compiled
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=PROGRAM_FILE):
        CompiledModel.load(compiled.directory)
    path.write_bytes(good)


@needs_exporter
@pytest.mark.parametrize("damage", ["short", "zeros", "inside", "empty"])
def test_a_damaged_program_is_refused_in_words(damage: str, programs: dict[str, CompiledModel], tmp_path: Path) -> None:
    good = (programs["fp32"].directory / PROGRAM_FILE).read_bytes()
    bad = {
        "short": good[: len(good) // 2],
        "zeros": bytes(len(good)),
        "inside": good[:64] + bytes(byte ^ 255 for byte in good[64:512]) + good[512:],
        "empty": b"",
    }[damage]
    (tmp_path / PROGRAM_FILE).write_bytes(bad)

    with pytest.raises(TargetError, match=r"no program that ExecuTorch 1\.\S+ can load: .+\. Copy or compile"):
        ExecuTorch().load(replace(programs["fp32"], directory=tmp_path))


@needs_exporter
def test_a_batch_or_an_input_that_was_not_compiled_is_refused(programs: dict[str, CompiledModel]) -> None:
    with pytest.raises(TargetError, match="batch=4"):
        ExecuTorch().load(programs["fp32"], batch=4)
    with pytest.raises(TargetError, match="input 'image' got float32"):
        ExecuTorch().load(programs["fp32"]).run({"image": images(1)[0].astype(np.float32)})


@needs_exporter
def test_another_number_of_threads_beside_an_open_session_is_refused(programs: dict[str, CompiledModel]) -> None:
    session = ExecuTorch().load(programs["fp32"])

    with pytest.raises(TargetError, match="one pool of threads"):
        ExecuTorch(num_threads=2).load(programs["fp32"])

    del session
    assert ExecuTorch(num_threads=2).load(programs["fp32"]).run({"image": images(1)[0]})["logits"].shape == (1, 5)
    ExecuTorch().load(programs["fp32"])


@needs_exporter
def test_a_session_that_only_a_cycle_of_references_holds_is_not_open(programs: dict[str, CompiledModel]) -> None:
    held: list[object] = [ExecuTorch().load(programs["fp32"])]
    held.append(held)  # as a kept exception does, whose traceback holds the frame of the session
    del held

    ExecuTorch(num_threads=2).load(programs["fp32"])
    ExecuTorch().load(programs["fp32"])


SMALL = "x = Cast <to = 1> (image) "
TURNED = "w = DequantizeLinear <axis = 0> (k1_q, s1, z8) "
REFUSED = {
    "an operator that is not known": ("logits = Gather <axis = 1> (x, one)", "(Gather) has no counterpart"),
    "a foreign operator": ("logits = acme.Magic(x)", "(Magic) has no counterpart"),
    "channels with a scale each": (
        "q = QuantizeLinear <axis = 1> (x, three, zeros) logits = DequantizeLinear <axis = 1> (q, three, zeros)",
        "3 scales",
    ),
    "sixteen bits": ("q = QuantizeLinear(x, sx, u16) logits = DequantizeLinear(q, sx, u16)", "to uint16"),
    "a scale of the run": (
        "a = ReduceMax <keepdims = 0> (x) q = QuantizeLinear(x, a, u8) logits = DequantizeLinear(q, a, u8)",
        "(ReduceMax)",
    ),
    "a step that the run computes": (
        "a = ReduceMean <keepdims = 0> (x) q = QuantizeLinear(x, a, u8) logits = DequantizeLinear(q, a, u8)",
        "computes its scale",
    ),
    "three axes": ("y = Unsqueeze(x, one) logits = Conv(y, cube)", "3 axes"),
    "backwards": ("logits = Slice(x, minus, far, one, minus)", "slices backwards"),
}


@needs_executorch
@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_xnnpack_does_not_take_is_refused_with_the_node(name: str, tmp_path: Path) -> None:
    body, words = REFUSED[name]
    proto = graph(
        SMALL + body,
        y="float logits",
        one=np.array([1]),
        three=np.ones(3, np.float32),
        zeros=np.zeros(3, np.uint8),
        u16=np.uint16(0),
        cube=np.ones((1, 1, 1, 1, 1), np.float32),
        minus=np.array([-1]),
        far=np.array([-99]),
    )

    with pytest.raises(TargetError, match=r"node '\w+'") as refusal:
        ExecuTorch().compile(export(tmp_path, proto), tmp_path / "c", "fp32")

    assert words in str(refusal.value)
    assert not (tmp_path / "c" / "compiled.json").exists()


@needs_executorch
def test_an_integer_output_and_a_file_that_is_no_graph_are_refused(tmp_path: Path) -> None:
    exported = export(tmp_path, graph("logits = Identity(image)", y="uint8[N,3,8,8] logits"))

    with pytest.raises(TargetError, match="output 'logits' is not float"):
        ExecuTorch().compile(exported, tmp_path / "c", "fp32")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(TargetError, match="cannot be read as ONNX"):
        ExecuTorch().compile(exported, tmp_path / "c", "fp32")


@needs_exporter
def test_an_operator_that_we_read_otherwise_than_onnx_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.executorch_operators import OPERATORS

    monkeypatch.setitem(OPERATORS, "GlobalAveragePool", lambda call: call.x.amax((2, 3), keepdim=True))

    with pytest.raises(TargetError, match="answers otherwise than the graph"):
        ExecuTorch().compile(export(tmp_path, graph(FLOAT)), tmp_path / "c", "fp32")


@needs_executorch
def test_a_constant_that_float16_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALF_FLAGS", (set(),))
    exported = export(tmp_path, graph(FLOAT, hb=np.array([1e6, 0, 0, 0, 0], np.float32)))

    with pytest.raises(TargetError, match=r"constant 'hb' is too large for float16. Compile it as fp32"):
        ExecuTorch().compile(exported, tmp_path / "c", "fp16")


@needs_exporter
def test_two_quantized_matrices_that_the_run_computes_are_multiplied_as_floats(tmp_path: Path) -> None:
    """ExecuTorch 1.5 multiplies the integers of a plain `mm`. Powers of two as scales: nothing rounds."""
    proto = graph(
        "p = Cast <to = 1> (image) f = Reshape(p, rows) "
        + pair("a", "f", "two", "s8")
        + "t = Transpose(a) c = MatMul(a, t) "
        + pair("logits", "c", "wide", "s8"),
        y="float logits",
        rows=np.array([6, 32]),
        two=np.float32(2),
        wide=np.float32(8192),
    )
    x = images(1)[0]

    compiled = ExecuTorch().compile(export(tmp_path, proto, scheme="cpu-int8"), tmp_path / "c", "int8")

    np.testing.assert_array_equal(on_executorch(compiled, [x]), on_onnx_runtime(proto, {"image": x}))
