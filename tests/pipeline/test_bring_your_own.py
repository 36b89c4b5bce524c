from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.bench import Arm
from benchmarks.device.evaluate import pixels_of
from benchmarks.device.preprocess import to_input
from benchmarks.device.record import Record, validate
from benchmarks.devices import Local
from pipeline.bring_your_own import _faster, bench_model, compile_model, lint_model, quantize_model
from pipeline.onnx_ladder import Demands
from pipeline.stages.bundle import write_bundle
from pipeline.verb_reports import QuantizeReport
from pipeline.workbench import Workbench, whole_directory
from targets import make_target
from targets.base import CompiledModel, Exported, Placement
from targets.errors import EdgestillError, IntegrityError, MeasurementError, ModelError, RecipeError, TargetError
from targets.lint import Finding

node = helper.make_node
# near: the fixture of the module has gone the whole way, process by process.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("near")]

HOPS = (("INT8 graph", "float graph"), ("INT8, compiled", "INT8 graph"), ("INT8, compiled", "float graph"))
Sizes = Sequence[int | str]


def build(
    path: Path,
    *,
    sizes: Sizes = ("N", 3, 8, 8),
    nhwc: bool = False,
    extra: bool = False,
    transposed: bool = False,
    damage: bool = False,
) -> Path:
    """Conv, Relu, Conv, pooling -> "features"; a Gemm on them (plus "extra", a second input) -> "scores"."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "head": (8, 5), "bias": (5,)}
    constants = {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    if damage:
        constants["w2"] = constants["w2"][:, :7]  # the second convolution's channels do not fit
    nodes = [
        node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]) if nhwc else node("Identity", ["image"], ["x"]),
        node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("ConvTranspose" if transposed else "Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c2"], ["pooled"]),
        node("Flatten", ["pooled"], ["features"]),
        node("Add", ["features", "extra"], ["sum"]) if extra else node("Identity", ["features"], ["sum"]),
        node("Gemm", ["sum", "head", "bias"], ["scores"]),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("image", TensorProto.FLOAT, sizes)]
    inputs += [info("extra", TensorProto.FLOAT, [sizes[0], 8])] if extra else []
    outputs = [info("scores", TensorProto.FLOAT, [sizes[0], 5]), info("features", TensorProto.FLOAT, [sizes[0], 8])]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "own", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_npz(path: Path, num: int = 12, **shapes: tuple[int, ...]) -> Path:
    rng = np.random.default_rng(1)
    np.savez(path, **{name: rng.normal(size=(num, *shape)).astype(np.float32) for name, shape in shapes.items()})
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizeReport:
    """The whole way once, really measured: a folder of 20 images, one of them broken, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (19, 10, 12, 3), dtype=np.uint8)):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    model = build(folder / "model.onnx")
    return quantize_model(
        model,
        folder / "images",
        target="onnxruntime-cpu",
        out_dir=folder / "quantized",
        mean=[127.5],
        std=[127.5],
        launches=1,
    )


@pytest.mark.parametrize(
    ("preset", "flags", "judged"),
    [
        ("ci", ("launch 0: load above 1",), False),
        ("smoke", ("launch 0: load above 1",), True),
        ("smoke", ("not valid: aarch64 emulated on x86_64", "launch 0: load above 1"), False),
    ],
)
@pytest.mark.parametrize(("int8_us", "faster"), [(50.0, "int8"), (100.0, "fp32")])
def test_times_that_prove_nothing_decide_nothing(
    int8_us: float, faster: str, preset: str, flags: tuple[str, ...], judged: bool, quantized: QuantizeReport
) -> None:
    real = validate(json.loads((quantized.out_dir / "bench" / "records.json").read_text())["fp32"])
    disturbed = replace(
        real,
        validity=replace(real.validity, ok=False, flags=flags),
        scenario=replace(real.scenario, preset=preset),
    )

    shipped, why = _faster({"int8": _record(disturbed, int8_us, False), "fp32": _record(disturbed, 70.0, False)})

    assert shipped == (faster if judged else "int8")
    assert ("was not judged" in why) == (not judged)


def test_a_float_precision_that_cannot_be_built_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(bench: Workbench, exported: Exported, precision: str, out_dir: Path) -> Placement:
        if precision in broken:
            raise TargetError("constant 'mask' is too large for it.")
        return Placement(layers=(), source=precision)

    monkeypatch.setattr(Workbench, "compile", compile_)
    floats = Exported(name="m", onnx_path="m.onnx", inputs=(), outputs=())
    bench = Workbench(target="t", options={}, device=Local(), program="", float_precisions=("fp32", "fp16", "bf16"))

    broken = {"fp16"}
    placements, told = bench.compile_floats(floats, tmp_path)

    assert list(placements) == ["fp32", "bf16"]
    assert told == ("fp16 is not among the baselines: constant 'mask' is too large for it.",)
    broken = {"fp32"}
    refuse(lambda: bench.compile_floats(floats, tmp_path), TargetError, "'mask'")


Measure = Callable[[Mapping[str, float]], None]


@pytest.fixture
def measured_as(quantized: QuantizeReport, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Replace the measurement by the record of a real one, with the p25 in microseconds that each precision is given."""
    real = validate(json.loads((quantized.out_dir / "bench" / "records.json").read_text())["fp32"])

    def install(p25_us: Mapping[str, float], valid: bool = True) -> None:
        def measure(_: object, arms: Sequence[Arm], *, out_dir: Path, **__: object) -> list[Record]:
            out_dir.mkdir()
            return [_record(real, p25_us.get(arm.name, 100.0), valid) for arm in arms]

        monkeypatch.setattr("pipeline.bring_your_own.measure_arms", measure)

    return install


def _record(real: Record, p25_us: float, valid: bool) -> Record:
    launch = replace(real.launches[0], lat_us=replace(real.launches[0].lat_us, p25=p25_us))
    summary = replace(real.summary, p25_us=p25_us)
    return replace(real, launches=(launch,), summary=summary, validity=replace(real.validity, ok=valid))


def test_a_folder_of_images_and_a_model_are_enough(quantized: QuantizeReport) -> None:
    out_dir, text = quantized.out_dir, quantized.text()

    assert quantized.failure is None
    assert quantized.placement is not None
    assert quantized.placement.int8_share == 1.0
    assert (quantized.num_calibration, quantized.num_held_out) == (16, 3)
    assert [(one.hop, one.against, one.name) for one in quantized.differences] == [
        (hop, against, name) for hop, against in HOPS for name in ("scores", "features")
    ]
    assert all(one.num_samples == 3 for one in quantized.differences)
    assert [rung["rung"] for rung in quantized.rungs] == ["ptq"]
    assert {proof["rewrite"] for proof in quantized.rewrites} >= {"unsigned_activations", "integer_bias"}
    assert all(one.cosine_min > 0.99 for one in quantized.differences)
    assert [row.precision for row in quantized.rows] == ["int8", "fp32"]
    assert all(row.num_queries > 64 and row.load_ms for row in quantized.rows)
    assert json.loads((out_dir / "report.json").read_text()) == json.loads(json.dumps(quantized.to_json()))
    assert "1 of 20 images could not be read" in text
    assert "broken.png" in text
    assert "smoke" in text
    assert "(pixel - 127.5) / 127.5" in text


def test_what_is_compiled_prepares_and_answers_as_float_does(quantized: QuantizeReport) -> None:
    path = quantized.out_dir.parent / "images" / "0.png"
    compiled = CompiledModel.load(quantized.out_dir / "compiled" / "int8")
    session = make_target(compiled.target, compiled.options).load(compiled)
    floats = ort.InferenceSession(str(quantized.out_dir.parent / "model.onnx"), providers=["CPUExecutionProvider"])
    with Image.open(path) as image:  # 12 x 10 pixels: the shorter side to 8, then the centre
        pixels_HWC = np.asarray(image.resize((9, 8), Image.Resampling.BILINEAR))[:, :8]
    x_NCHW = ((pixels_HWC.transpose(2, 0, 1)[None] - 127.5) / 127.5).astype(np.float32)
    expected = dict(zip(("scores", "features"), floats.run(None, {"image": x_NCHW}), strict=True))

    assert compiled.preprocessing is not None
    pixels_NCHW = pixels_of(path.read_bytes(), compiled.preprocessing)
    answers = session.run({"image": to_input(pixels_NCHW, compiled.preprocessing, session.inputs[0])})

    for name, array in expected.items():
        assert np.abs(answers[name] - array).max() < 0.1 * np.ptp(array)


@pytest.mark.parametrize(
    ("options", "shapes", "int8_us", "ships", "said"),
    [
        (
            {"sizes": ("N", 8, 8, 3), "nhwc": True, "extra": True},
            {"image": (8, 8, 3), "extra": (8,)},
            50.0,
            "int8",
            "INT8 ships: INT8 takes 0.50 of the time of fp32",
        ),
        ({"sizes": ("N", 3, "H", "W")}, {"image": (3, 12, 10)}, 130.0, "fp32", "float ships (fp32): INT8 takes 1.30"),
        ({"sizes": (2, 3, 8, 8)}, {"image": (3, 8, 8)}, 100.0, "fp32", "float ships (fp32): INT8 takes 1.00"),
    ],
    ids=["two inputs, channels last", "free height and width", "a fixed batch"],
)
def test_graphs_of_every_form_are_quantized_and_ship_where_int8_is_faster(
    options: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    int8_us: float,
    ships: str,
    said: str,
    measured_as: Measure,
    tmp_path: Path,
) -> None:
    measured_as({"int8": int8_us, "fp32": 100.0})

    report = quantize_model(
        build(tmp_path / "m.onnx", **options),
        write_npz(tmp_path / "c.npz", **shapes),
        target="onnxruntime-cpu",
        out_dir=tmp_path / "out",
    )

    compiled = CompiledModel.load(tmp_path / "out" / "compiled" / "int8")
    assert (report.ships, report.failure) == (ships, None)
    assert said in report.text()
    assert [spec.name for spec in compiled.inputs] == list(shapes)
    assert all(spec.shape[1:] == shape for spec, shape in zip(compiled.inputs, shapes.values(), strict=True))
    assert all(one.cosine_min > 0.98 for one in report.differences)


def test_too_little_int8_is_a_failure_that_leaves_a_whole_directory(measured_as: Measure, tmp_path: Path) -> None:
    """ONNX Runtime has no integer transposed convolution."""
    measured_as({"int8": 1.0})

    report = quantize_model(
        build(tmp_path / "m.onnx", transposed=True),
        write_npz(tmp_path / "c.npz", image=(3, 8, 8)),
        target="onnxruntime-cpu",
        out_dir=tmp_path / "out",
    )

    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert isinstance(report.failure, TargetError)
    assert report.placement is not None
    assert "placement: " in str(report.failure)
    assert 0.0 < report.placement.int8_share < 0.5
    assert (report.ships, document["exit_code"]) == (None, 5)
    assert "INT8 does not ship" in report.text()


def test_a_linked_folder_takes_the_result_and_stays_linked(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "out", tmp_path / "out"
    real.mkdir(parents=True)
    (real / "report.json").write_text('{"verb": "quantize"}')
    (real / "old").touch()
    link.symlink_to(real)

    with whole_directory(link, "quantize", keep=[]) as partial:
        (partial / "new").touch()

    assert link.is_symlink()
    assert [path.name for path in real.iterdir()] == ["new"]
    assert [path.name for path in real.parent.iterdir()] == ["out"]


def test_where_the_result_cannot_take_its_place_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{"verb": "quantize"}')
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="no"), whole_directory(out, "quantize", keep=[]):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "report.json").is_file()


def refuse(act: Callable[[], object], kind: type[EdgestillError], message: str) -> None:
    with pytest.raises(kind, match=message) as refusal:
        act()
    assert len(str(refusal.value).splitlines()) <= 3


def test_what_cannot_be_begun_is_refused_and_leaves_nothing(quantized: QuantizeReport, tmp_path: Path) -> None:
    model, samples = build(tmp_path / "m.onnx"), write_npz(tmp_path / "c.npz", image=(3, 8, 8))
    wrong = write_npz(tmp_path / "wrong.npz", image=(3, 9, 8))
    (tmp_path / "text.onnx").write_text("not a graph")
    int8, out_dir = quantized.out_dir / "model.onnx", tmp_path / "out"

    def attempt(given: Path, calibration: Path = samples, **options: Any) -> Callable[[], object]:
        wanted: dict[str, Any] = {"target": "onnxruntime-cpu", "out_dir": out_dir} | options
        return lambda: quantize_model(given, calibration, **wanted)

    refuse(attempt(int8), ModelError, "quantized already")
    refuse(attempt(tmp_path / "text.onnx"), ModelError, "not an ONNX file")
    refuse(attempt(tmp_path / "absent.onnx"), ModelError, "there is no file")
    refuse(attempt(build(tmp_path / "d.onnx", damage=True)), ModelError, "cannot run it on 'image' float32")
    refuse(attempt(model, wrong), ModelError, r"cannot run it on 'image' float32\[1, 3, 9, 8\]")
    refuse(attempt(model, target="openvino"), RecipeError, "Did you mean 'openvino-cpu'")
    refuse(attempt(model, preset="quick"), RecipeError, "smoke, ci, release")
    refuse(attempt(model, scheme="tensorrt"), RecipeError, "Did you mean 'tensorrt-int8'")
    refuse(attempt(model, out_dir=tmp_path), RecipeError, "did not write")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "d.onnx", "m.onnx", "text.onnx", "wrong.npz"]


def test_compiling_says_where_each_layer_runs(tmp_path: Path) -> None:
    report = compile_model(build(tmp_path / "m.onnx"), target="openvino-cpu", out_dir=tmp_path / "out")

    assert report.failure is None
    assert (report.precision, report.placement.int8_share) == ("fp32", 0.0)
    assert sorted(layer.macs for layer in report.placement.layers) == [5 * 8, 8 * 8 * 8 * 27, 8 * 8 * 8 * 72]
    assert CompiledModel.load(tmp_path / "out").precision == "fp32"
    assert all(layer.name in report.text() for layer in report.placement.layers)


def test_compiling_refuses_what_the_graph_does_not_allow(tmp_path: Path) -> None:
    free, model = build(tmp_path / "free.onnx", sizes=("N", 3, "H", "W")), build(tmp_path / "m.onnx")
    wanted: dict[str, Any] = {"target": "onnxruntime-cpu", "out_dir": tmp_path / "out"}

    refuse(lambda: compile_model(free, **wanted), ModelError, "make_dynamic_shape_fixed --input_name image")
    refuse(lambda: compile_model(model, precision="int8", **wanted), TargetError, "it is a float graph")
    assert not (tmp_path / "out").exists()


def test_only_what_the_same_verb_wrote_is_replaced(tmp_path: Path) -> None:
    model, out_dir = build(tmp_path / "m.onnx"), tmp_path / "out"
    compile_model(model, target="openvino-cpu", out_dir=out_dir)
    compile_model(model, target="onnxruntime-cpu", out_dir=out_dir)

    assert CompiledModel.load(out_dir).target == "onnxruntime-cpu"
    refuse(lambda: bench_model(model, target="openvino-cpu", out_dir=out_dir), RecipeError, "'edgestill bench' did not")
    assert CompiledModel.load(out_dir).target == "onnxruntime-cpu"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out"]


def test_benching_an_onnx_file_measures_every_float_precision(measured_as: Measure, tmp_path: Path) -> None:
    measured_as({})

    report = bench_model(build(tmp_path / "m.onnx"), target="openvino-cpu", out_dir=tmp_path / "out", preset="smoke")

    assert [row.arm for row in report.rows] == list(make_target("openvino-cpu", {}).float_precisions())
    assert (tmp_path / "out" / "bench" / "records.json").is_file()


def test_a_disturbed_measurement_is_marked_and_a_failure_where_strictness_is_asked_for(
    measured_as: Any, tmp_path: Path
) -> None:
    measured_as({}, valid=False)
    model = build(tmp_path / "m.onnx")

    told, strict = (
        bench_model(model, target="onnxruntime-cpu", out_dir=tmp_path / str(strict), preset="ci", strict=strict)
        for strict in (False, True)
    )

    assert told.failure is None
    assert isinstance(strict.failure, MeasurementError)
    assert "not trustworthy: fp32" in told.text()
    assert (tmp_path / "True" / "report.json").is_file()


def test_a_bundle_is_checked_before_it_is_measured(
    quantized: QuantizeReport, measured_as: Measure, tmp_path: Path
) -> None:
    measured_as({})
    records = json.loads((quantized.out_dir / "bench" / "records.json").read_text())
    bundle = write_bundle(
        tmp_path / "bundle",
        compiled=CompiledModel.load(quantized.out_dir / "compiled" / "int8"),
        record=records["int8"],
        accuracy={},
        provenance={},
        labels=[],
        device_program=quantized.out_dir / "bench" / "edgestill-device.pyz",
    )

    report = bench_model(bundle, target="openvino-cpu", out_dir=tmp_path / "out", preset="smoke")
    (bundle / "MODEL_CARD.md").write_text("changed")

    assert (report.target, [row.arm for row in report.rows]) == ("onnxruntime-cpu", ["int8"])
    refuse(
        lambda: bench_model(bundle, target="openvino-cpu", out_dir=tmp_path / "out"), IntegrityError, "MODEL_CARD.md"
    )
    refuse(
        lambda: bench_model(tmp_path, target="openvino-cpu", out_dir=tmp_path / "o"), ModelError, "neither a compiled"
    )


def test_linting_finds_nothing_in_what_we_quantized_and_refuses_float(
    quantized: QuantizeReport, tmp_path: Path
) -> None:
    good = lint_model(quantized.out_dir / "model.onnx", target="onnxruntime-cpu")
    float_graph = lint_model(build(tmp_path / "m.onnx"), target="onnxruntime-cpu")

    assert (list(good.findings), good.failure) == ([], None)
    assert [finding.code for finding in float_graph.findings] == ["O01"]
    assert isinstance(float_graph.failure, TargetError)
    assert "O01" in float_graph.text()


def test_a_dynamically_quantized_graph_is_int8_and_no_float_model(tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    body = "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast <to = 1> (i) y = Mul(f, s)"
    graph = onnx.parser.parse_graph(f"g (float[N,8] x) => (float[N,4] y) {{ {body} }}")
    graph.initializer.append(numpy_helper.from_array(np.full((8, 4), 3, np.int8), "w"))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)

    report = compile_model(path, target="onnxruntime-cpu", out_dir=tmp_path / "out")

    assert (report.precision, report.placement.int8_share) == ("int8", 1.0)
    calibration = write_npz(tmp_path / "c.npz", x=(8,))
    refuse(
        lambda: quantize_model(path, calibration, target="onnxruntime-cpu", out_dir=tmp_path / "q"),
        ModelError,
        "is quantized already",
    )


def test_compiling_int8_runs_the_linter_first_and_fails_with_its_errors(
    quantized: QuantizeReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Finding(code="O99", severity="error", node="conv1", message="stays in float.", advice="Mend it.")
    monkeypatch.setattr("pipeline.bring_your_own.lint", lambda *_: [found])

    report = compile_model(quantized.out_dir / "model.onnx", target="onnxruntime-cpu", out_dir=tmp_path / "out")

    assert isinstance(report.failure, TargetError)
    assert "O99 at conv1" in str(report.failure)
    assert "Mend it." in report.text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["findings"][0]["code"] == "O99"


def test_a_kit_is_written_in_place_of_a_proof_and_says_so(tmp_path: Path) -> None:
    report = quantize_model(
        build(tmp_path / "m.onnx"),
        write_npz(tmp_path / "c.npz", image=(3, 8, 8)),
        target="tensorrt",
        out_dir=tmp_path / "out",
        kit=True,
    )

    assert (report.failure, report.ships, report.placement, report.rows) == (None, None, None, ())
    assert "nothing was compiled or measured here" in report.text()
    assert (tmp_path / "out" / "edgestill-device.pyz").is_file()
    assert {path.name for path in (tmp_path / "out" / "kit").iterdir()} == {"int8", "float", "kit.json"}  # no images
    assert (tmp_path / "out" / "kit" / "float" / "model.fp16.onnx").is_file()


def test_a_node_that_is_kept_in_float_has_no_quantizer(measured_as: Measure, tmp_path: Path) -> None:
    measured_as({"int8": 1.0})
    model = build(tmp_path / "m.onnx")
    report = quantize_model(
        model,
        write_npz(tmp_path / "c.npz", image=(3, 8, 8)),
        target="openvino-cpu",
        out_dir=tmp_path / "out",
        demands=Demands(keep_float=("Gemm_scores",), min_int8_share=0.5),
    )

    assert report.placement is not None
    assert [layer.precision for layer in report.placement.layers if layer.macs == 5 * 8] == ["fp32"]
    assert report.rungs[0]["left_in_float"] == ["Gemm_scores"]


def test_int8_that_is_too_unlike_float_climbs_and_then_fails_with_exit_3(measured_as: Measure, tmp_path: Path) -> None:
    measured_as({"int8": 1.0})

    report = quantize_model(
        build(tmp_path / "m.onnx"),
        write_npz(tmp_path / "c.npz", image=(3, 8, 8)),
        target="openvino-cpu",
        out_dir=tmp_path / "out",
        demands=Demands(min_cosine=1.0, min_int8_share=0.0),
    )

    assert [rung["rung"] for rung in report.rungs] == ["ptq", "equalized", "mixed"]
    assert report.failure is not None
    assert report.failure.exit_code == 3
    assert report.rungs[-1]["left_in_float"]
    assert report.ships is None
