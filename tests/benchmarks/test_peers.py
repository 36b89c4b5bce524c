"""Other quantizers beside ours: the same images, a row for each of them whatever happens, ratios that pair by round."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.preprocess import load_evaluation
from benchmarks.device.record import Record
from benchmarks.peers import candidates, comparison, environments, quantizers
from benchmarks.peers.__main__ import main
from benchmarks.peers.candidates import Candidate, make_peer
from benchmarks.peers.comparison import compare, entry_of, float_entries
from benchmarks.peers.environments import PEERS, Peer, python_of
from benchmarks.peers.images import Images, labels_of, prepare_images
from benchmarks.peers.kept import kept
from benchmarks.peers.ratios import faster, not_slower, paired_ratio
from benchmarks.peers.rounds import joined
from benchmarks.peers.table import table
from benchmarks.peers.trial import Trial, accuracy, agreement, cosines, local_bench, specs_of, try_graph
from targets.base import LayerPlacement, Placement, Preprocessing, TensorSpec
from targets.errors import DataError, ModelError, TargetError

pytestmark = pytest.mark.integration

HERE = Path(environments.__file__).parent
ROOT = HERE.parents[1]
DOCUMENT = ROOT / "docs" / "peers.md"
SIDE = 8
SPEC = TensorSpec(name="image", shape=(None, 3, SIDE, SIDE), dtype="float32")
PREPROCESSING = Preprocessing(resize=SIDE, crop=(SIDE, SIDE), mean=(100.0,) * 3, std=(50.0,) * 3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of one grey value each, 10, 20, ..., named by class 0 to 5."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(6):
        Image.new("RGB", (SIDE, SIDE), (10 * (i + 1),) * 3).save(folder / f"{i:04}_grey.png")
    return folder


@pytest.fixture(scope="module")
def images(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    return prepare_images(photographs, SPEC, PREPROCESSING, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def convolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, ReLU, mean over the image: logits of four classes."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weights, "weights")],
    )
    path = tmp_path_factory.mktemp("floats") / "convolution.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


# Images


def test_every_other_image_calibrates_and_the_others_are_held_out(images: Images) -> None:
    with np.load(images.calibration) as archive:
        calibration_NCHW = archive["image"]
    held_out = load_evaluation(images.evaluation_dir)

    assert calibration_NCHW[:, 0, 0, 0].tolist() == pytest.approx([(grey - 100) / 50 for grey in (10, 30, 50)])
    assert np.concatenate(list(held_out.pixels(2)))[:, 0, 0, 0].tolist() == [20, 40, 60]
    assert (images.num_calibration, images.num_held_out, calibration_NCHW.dtype) == (3, 3, np.float32)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 3, 5]


def test_names_without_a_class_give_no_labels() -> None:
    assert labels_of([Path("0001_cat.jpg"), Path("dog.jpg")]) is None


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 images"):
        prepare_images(tmp_path / "nowhere", SPEC, PREPROCESSING, tmp_path)


# Ratios


def test_what_slows_a_whole_round_cancels() -> None:
    assert paired_ratio([20.0, 200.0, 22.0], [10.0, 100.0, 11.0]).value == pytest.approx(2.0)
    assert paired_ratio([20.0, 200.0, 2000.0], [10.0, 10.0, 1000.0]).value == pytest.approx(2.0)


def test_a_ratio_is_the_median_over_the_rounds_with_its_interval() -> None:
    ratio = paired_ratio([2.0, 2.2, 1.8, 2.0, 9.0, 2.1], [1.0] * 6)

    assert ratio.value == pytest.approx(np.sqrt(2.0 * 2.1))  # of an even number: the geometric mean of the middle two
    assert ratio.ci95 == pytest.approx((1.8, 9.0))
    assert paired_ratio([2.0] * 5, [1.0] * 5).ci95 is None


@pytest.mark.parametrize(("slow", "quick"), [([1.0, 2.0], [1.0]), ([], [])])
def test_launches_that_do_not_pair_up_are_refused(slow: list[float], quick: list[float]) -> None:
    with pytest.raises(ValueError, match="do not pair up"):
        paired_ratio(slow, quick)


@pytest.mark.parametrize(("loss", "num_rounds", "holds"), [(1.01, 10, True), (1.04, 10, False), (1.04, 3, False)])
def test_slower_is_significant_and_above_two_percent(loss: float, num_rounds: int, holds: bool) -> None:
    theirs = np.random.default_rng(0).normal(10.0, 0.01, num_rounds)

    assert not_slower(list(theirs * loss), list(theirs)) is holds


def test_one_slow_round_of_ten_is_not_slower() -> None:
    assert not_slower([1.0] * 9 + [5.0], [1.0] * 10)


def test_faster_needs_the_exact_test_from_seven_pairs_on() -> None:
    theirs = [10.0, 10.1, 9.9, 10.0, 10.2, 10.1, 9.8, 10.0]

    assert faster([value * 0.9 for value in theirs], theirs)
    assert not faster(theirs, theirs)
    assert not faster([9.0, 9.0, 9.0, 9.0, 11.0, 11.0, 11.0, 11.0], theirs)
    assert faster([9.0, 9.0, 11.0], [10.0] * 3)  # three pairs: the median alone


# What is kept


def test_work_is_done_once_for_one_key_and_again_for_another(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(len(made))
        return {"value": made[-1]}

    answers = [kept(tmp_path / "a" / "one.json", {"key": key}, make) for key in ("x", "x", "y")]
    (tmp_path / "a" / "one.json").write_text("{")
    answers.append(kept(tmp_path / "a" / "one.json", {"key": "y"}, make))

    assert [answer["value"] for answer in answers] == [0, 0, 1, 2]


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    answers = iter([{"error": "no network"}, {"error": None}, {"error": None, "again": True}])

    found = [kept(tmp_path / "one.json", {}, lambda: next(answers)) for _ in range(3)]

    assert found == [{"error": "no network"}, {"error": None}, {"error": None}]


def test_rounds_become_one_record_over_all_launches(compiled: Any, tmp_path: Path) -> None:
    (record,) = measure_arms(_Fake(), [Arm("one", compiled.directory)], preset="smoke", launches=1, out_dir=tmp_path)
    rounds = [_with_p25(record, value) for value in (3.0, 1.0, 2.0)]

    whole = joined(rounds)

    assert [launch.lat_us.p25 for launch in whole.launches] == [3.0, 1.0, 2.0]
    assert [launch.i for launch in whole.launches] == [0, 1, 2]
    assert (whole.summary.p25_us, whole.summary.ci95) == (2.0, None)


# Candidates


def test_a_peer_that_is_not_installed_is_a_candidate_with_the_command(images: Images, convolution: Path) -> None:
    candidate = make_peer(PEERS["olive"], convolution, images, Path("nowhere"), Path("unused"))

    assert candidate.model is None
    assert candidate.error is not None
    assert "python -m benchmarks.peers --install nowhere" in candidate.error


def test_a_peer_that_raises_is_a_candidate_with_its_words(images: Images, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")

    candidate = make_peer(PEERS["onnxruntime_defaults"], tmp_path / "broken.onnx", images, None, tmp_path / "out")

    assert candidate.model is None
    assert candidate.error is not None
    assert re.match(r"\w+: .*pars", candidate.error)
    assert "onnxruntime" in candidate.versions


def test_a_peer_that_dies_without_an_answer_says_how_it_ended(
    images: Images, convolution: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quantizers.py").write_text("import os; os._exit(9)")
    monkeypatch.setattr(candidates, "HERE", tmp_path)

    candidate = make_peer(Peer(name="dying", quantizer="none"), convolution, images, None, tmp_path / "out")

    assert candidate.error == "ended with 9 and without an answer"


def test_onnx_runtimes_defaults_leave_a_graph_that_the_target_places(
    images: Images, convolution: Path, tmp_path: Path
) -> None:
    candidate = make_peer(PEERS["onnxruntime_defaults"], convolution, images, None, tmp_path / "out")

    assert candidate.error is None
    assert candidate.path is not None
    with local_bench(1) as bench:
        trial = _try(bench, candidate.path, convolution, images, tmp_path / "trial", precision="int8")
    assert trial.outputs["logits"].shape == (3, 4)
    assert trial.convolutions[1] == 1
    assert trial.num_bytes == candidate.path.stat().st_size


def test_a_quantizer_needs_nothing_of_ours(tmp_path: Path) -> None:
    argv = [sys.executable, "-I", quantizers.__file__, "no_such_quantizer", "a", "b", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, check=False, cwd=tmp_path)

    answer = json.loads((tmp_path / "answer.json").read_text())
    assert (done.returncode, answer["file"]) == (1, None)
    assert not re.search(r"^(import|from) (benchmarks|targets|pipeline)", Path(quantizers.__file__).read_text(), re.M)


def test_every_peer_names_a_quantizer_that_exists() -> None:
    assert {peer.quantizer for peer in PEERS.values()} == set(quantizers.QUANTIZERS)


@pytest.mark.parametrize("name", sorted({peer.environment for peer in PEERS.values() if peer.environment}))
def test_an_environments_packages_are_pinned_hashed_and_without_addresses(name: str) -> None:
    wanted = re.findall(r"^([a-z-]+)(?:\[\w+\])?==(\S+)", (HERE / f"{name}.in").read_text(), re.M)
    lock = (HERE / f"{name}.lock").read_text()
    pins = re.findall(r"^([a-z][\w.-]*)(?:\[\w+\])?==(\S+)(.*(?:\n    --hash=sha256:[0-9a-f]{64}.*)+)", lock, re.M)

    assert len(pins) == len(re.findall(r"^[a-z]", lock, re.M)) > 20
    assert {(package, version) for package, version in wanted} <= {(package, version) for package, version, _ in pins}
    assert "://" not in lock


def test_our_own_interpreter_runs_the_peers_that_are_ours_too() -> None:
    assert python_of(PEERS["nncf_onnx"], None) == Path(sys.executable)


# Trials


def test_a_float_graph_answers_as_onnx_runtime_does(images: Images, convolution: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    with local_bench(1) as bench:
        trial = _try(bench, convolution, convolution, images, tmp_path / "trial", precision="fp32")

    held_out_NCHW = np.load(images.evaluation_dir / "x-000.npy")
    x_NCHW = (held_out_NCHW.astype(np.float32) - 100) / 50
    session = ort.InferenceSession(str(convolution), providers=["CPUExecutionProvider"])
    assert trial.outputs["logits"] == pytest.approx(session.run(None, {"image": x_NCHW})[0], abs=1e-5)
    assert (trial.convolutions, trial.placement.int8_share) == ((0, 1), 0.0)


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as ONNX"):
        specs_of(tmp_path / "absent.onnx")


def test_agreement_and_accuracy_are_counted_on_the_same_samples() -> None:
    labels_N = np.array([0, 1, 2, 0])
    floats_NK = np.eye(3)[[0, 1, 2, 1]]
    int8_NK = np.eye(3)[[0, 1, 0, 1]]

    told = accuracy(floats_NK, int8_NK, labels_N)

    assert agreement(floats_NK, int8_NK)["value"] == 0.75
    assert (told["float"]["value"], told["int8"]["value"], told["difference"]) == (0.75, 0.5, -0.25)
    assert told["mcnemar_p"] == 1.0  # one discordant sample says nothing


def test_cosines_are_per_output_and_a_vector_of_zeros_has_none() -> None:
    floats = {"a": np.array([[1.0, 0.0], [1.0, 1.0]]), "b": np.array([[1.0], [1.0]])}
    others = {"a": np.array([[1.0, 1.0], [2.0, 2.0]]), "b": np.array([[0.0], [3.0]])}

    found = cosines(floats, others)

    assert found["a"] == pytest.approx({"mean": (1 + 0.5**0.5) / 2, "min": 0.5**0.5})
    assert found["b"] == pytest.approx({"mean": 0.5, "min": 0.0})


# Rows


def test_a_graph_that_a_runtime_refuses_is_a_row_and_the_others_are_measured(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_record: Record
) -> None:
    measured = _fake_comparison(monkeypatch, one_record, refused="bad.onnx")
    entries = [
        *float_entries("onnxruntime-cpu", ("fp32",), Path("float.onnx")),
        entry_of(_candidate("Refused", "bad.onnx"), "onnxruntime-cpu"),
        entry_of(_candidate("Failed", None, "ValueError: no"), "onnxruntime-cpu"),
        entry_of(_candidate("Good", "good.onnx"), "onnxruntime-cpu"),
    ]

    found = _compare(entries, images, tmp_path)

    assert measured == ["onnxruntime-cpu fp32", "onnxruntime-cpu Good"]
    assert [row.error for row in found.rows] == [None, "refused: bad.onnx", "ValueError: no", None]
    good = found.row("onnxruntime-cpu", "Good")
    assert (good.num_int8_convolutions, good.num_convolutions, good.int8_share) == (1, 2, 0.25)
    assert good.agreement is not None
    assert good.agreement["value"] == 1.0
    assert good.faster_than_fp32 is not None
    assert good.faster_than_fp32.value == pytest.approx(2.0)


def test_a_float_graph_that_does_not_run_ends_the_comparison(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_record: Record
) -> None:
    _fake_comparison(monkeypatch, one_record, refused="float.onnx")

    with pytest.raises(TargetError, match=re.escape("refused: float.onnx")):
        _compare(float_entries("onnxruntime-cpu", ("fp32",), Path("float.onnx")), images, tmp_path)


def test_the_table_has_a_line_a_row_and_says_who_gave_no_result() -> None:
    row = {
        "target": "onnxruntime-cpu",
        "name": "Good",
        "error": None,
        "num_int8_convolutions": 19,
        "num_convolutions": 20,
        "int8_share": 0.97,
        "p50_us": 1500.0,
        "p50_ci95_us": [1400.0, 1600.0],
        "faster_than_fp32": {"value": 2.5, "ci95": None, "num_pairs": 3},
        "agreement": None,
        "cosines": {"a": {"mean": 0.9, "min": 0.1}, "b": {"mean": 0.8, "min": 0.7}},
        "num_bytes": 2**20,
        "valid": False,
    }
    document = {
        "rows": [row, {**row, "name": "Bad", "error": "ValueError: a | b", "valid": None}],
        "machine": {"hard": {"cpu": "a CPU", "cpus_allowed": [0, 1]}},
        "images": {"calibration": 100, "held_out": 90},
        "versions": {"onnx": "1.23"},
        "quantizers": [{"name": "Old", "versions": {"onnx": "1.21"}}],
        "utc": "2026-01-02T03:04:05",
        "model": "net.onnx",
        "threads": 2,
        "rounds": 3,
        "preset": "smoke",
    }

    lines = table(document).splitlines()

    assert lines[2] == ("| onnxruntime-cpu | Good | 19 of 20 | 97% | 1.50 (1.40 to 1.60) | 2.50 | - | 0.8000 | 1.0 |")
    assert "| Bad | no result: ValueError: a / b |" in lines[3]
    assert {line.count("|") for line in lines[:4]} == {10}
    assert "onnx 1.23, onnx of Old 1.21" in lines[5]
    assert lines[5].endswith("were disturbed: onnxruntime-cpu Good.")


# The command


@pytest.mark.parametrize("argv", [[], ["model.onnx", "--images", "x"]])
def test_what_is_needed_is_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)

    assert "absent: " in capsys.readouterr().err


def test_a_model_that_images_cannot_feed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "flat",
        value,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")

    code = main([str(tmp_path / "m.onnx"), "--images", "x", "--mean", "0", "--std", "1", "--out", "o.json"])

    assert (code, "four axes" in capsys.readouterr().err) == (2, True)


# Fakes


class _Fake:
    """A device whose every launch takes a microsecond, 200 times."""

    name, python = "fake", sys.executable

    def run(self, argv: Sequence[str], *, timeout_s: float = 0.0) -> Any:
        from benchmarks.devices import Completed

        command, *rest = argv[3:]
        if command == "environment":
            return Completed(0, json.dumps({"hard": {}, "soft": {}, "hard_sha256": "0", "flags": []}), "")
        if command == "throughput":
            return Completed(0, json.dumps({"fps": 1.0, "batch": 1, "n": 1}), "")
        np.save(rest[rest.index("--out") + 1], np.full(200, 1000, dtype=np.int64))
        return Completed(0, json.dumps(LAUNCH), "")

    def put(self, path: Path) -> str:
        return str(path)

    def get(self, remote: str, path: Path) -> None:
        assert Path(remote) == path

    def scratch(self, directory: Path) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        return str(directory)

    def measuring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def facts(self) -> Mapping[str, Any]:
        return {}


LAUNCH: dict[str, Any] = {
    "load_ms": 50.0,
    "first_ms": 1.0,
    "warmup_s": 0.5,
    "overhead_us": 0.05,
    "n": 200,
    "lat_us": {"min": 1.0, "p25": 1.0, "p50": 1.0, "p90": None, "p99": None, "p999": None, "mean": 1.0, "sd": 0.0},
    "wall_s": 1.0,
    "cpu_s": 1.0,
    "nivcsw": 0,
    "majflt": 0,
    "memory": {"vmhwm_mib": 64.0, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None},
    "energy": {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None},
    "telemetry": {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": 0.5},
    "disturbances": [],
    "flags": [],
}


@pytest.fixture
def one_record(compiled: Any, tmp_path: Path) -> Record:
    (record,) = measure_arms(
        _Fake(), [Arm("one", compiled.directory)], preset="smoke", launches=1, out_dir=tmp_path / "one"
    )
    return record


def _with_p25(record: Record, p25_us: float) -> Record:
    launch = record.launches[0]
    latency = replace(launch.lat_us, min=0.5, p25=p25_us, p50=p25_us)
    return replace(record, launches=(replace(launch, lat_us=latency),))


def _candidate(name: str, model: str | None, error: str | None = None) -> Candidate:
    return Candidate(name=name, model=model, error=error, seconds=0.0)


def _try(bench: Any, model: Path, floats: Path, images: Images, out_dir: Path, *, precision: str) -> Trial:
    return try_graph(
        bench,
        model,
        floats,
        target="onnxruntime-cpu",
        precision=precision,
        preprocessing=PREPROCESSING,
        images=images,
        out_dir=out_dir,
    )


def _fake_comparison(monkeypatch: pytest.MonkeyPatch, record: Record, *, refused: str) -> list[str]:
    """Trials without a runtime, FP32 at 2 us and the others at 1; the arms that were measured are listed."""
    measured: list[str] = []
    layers = (
        LayerPlacement(name="a", op="QLinearConv", precision="int8", macs=1),
        LayerPlacement(name="b", op="FusedConv", precision="fp32", macs=3),
    )

    def fake_try(bench: Any, model: Path, *_: Any, **__: Any) -> Trial:
        if model.name == refused:
            raise TargetError(f"refused: {refused}")
        return Trial(
            compiled_dir=model,
            placement=Placement(layers=layers, source="test"),
            num_bytes=7,
            outputs={"logits": np.eye(3)},
        )

    def fake_rounds(arms: Sequence[Arm], **_: Any) -> dict[str, Record]:
        measured.extend(arm.name for arm in arms)
        return {arm.name: joined([_with_p25(record, 2.0 if "fp32" in arm.name else 1.0)]) for arm in arms}

    monkeypatch.setattr(comparison, "try_graph", fake_try)
    monkeypatch.setattr(comparison, "measure_rounds", fake_rounds)
    return measured


def _silent(line: str) -> None:
    return None


def _compare(entries: Sequence[Any], images: Images, tmp_path: Path) -> comparison.Comparison:
    bench: Any = None
    return compare(
        bench,
        entries,
        Path("float.onnx"),
        images,
        PREPROCESSING,
        preset="smoke",
        rounds=1,
        work_dir=tmp_path,
        sources={},
        say=_silent,
    )
