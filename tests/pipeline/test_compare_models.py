"""`edgestill compare` from the files to the verdict; how a verdict is reached is in tests/benchmarks/test_compare.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.bench import Arm
from benchmarks.device.record import Latency, Launch, Record, Turns, validate
from benchmarks.records import write_records
from pipeline.compare_models import compare_models, selftest_model
from targets import make_target
from targets.base import CompiledModel
from targets.errors import DataError, EdgestillError, ModelError, RecipeError

# near: the fixture of the module has gone the whole way, process by process.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("near")]

Measure = Callable[..., None]


def build(path: Path) -> Path:
    """One convolution."""
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32), "w")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["out"])],
        "one",
        [info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [info("out", TensorProto.FLOAT, ["N", 8, 6, 6])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, really measured: one launch each, which proves nothing and shows the way."""
    folder = tmp_path_factory.mktemp("compare")
    found = compare_models(
        build(folder / "a.onnx"), build(folder / "b.onnx"), out_dir=folder / "out", preset="smoke", launches=1
    )
    assert found.verdict == "cannot tell"
    return folder


@pytest.fixture
def measured_as(measured: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Replace the measurement by the record of the real one, with ten launches of the p25s that A and B are given."""
    real = validate(json.loads((measured / "out" / "records.json").read_text())["A"])

    def install(p25s_us: Sequence[float] = (100.0, 100.0), valid: bool = True) -> None:
        def measure(_: object, *arms: Arm, pairs: int | None, **__: object) -> list[Record]:
            return [
                _record(real, p25_us, pairs or 10, valid, place)
                for place, (_, p25_us) in enumerate(zip(arms, p25s_us, strict=True))
            ]

        monkeypatch.setattr("pipeline.compare_models.measure_by_turns", measure)

    return install


def _record(real: Record, p25_us: float, pairs: int, valid: bool, place: int) -> Record:
    first = real.launches[0]
    all_of_them = tuple(_launch(first, i, p25_us * (1 + i * 1e-6), place) for i in range(pairs))
    return replace(real, run_id=f"{p25_us}", launches=all_of_them, validity=replace(real.validity, ok=valid))


def _launch(real: Launch, i: int, p25: float, place: int) -> Launch:
    latency = Latency(min=p25, p25=p25, p50=p25, p90=None, p99=None, p999=None, mean=p25, sd=0.0)
    turns = Turns(queries=(10, 10, 10), p25_us=(p25, 2 * p25, p25), dropped=6, slice_s=0.05)
    return replace(real, i=i, order=2 * i + place, lat_us=latency, turns=turns)


def test_two_files_are_measured_in_one_session_and_everything_is_kept(measured: Path) -> None:
    records = json.loads((measured / "out" / "records.json").read_text())
    report = json.loads((measured / "out" / "report.json").read_text())

    assert (list(records), report["verb"], report["exit_code"]) == (["A", "B"], "compare", 0)
    assert [one["metric"] for one in report["differences"]] == ["p25", "peak RSS", "load", "size"]
    assert {one["b"] for one in report["differences"] if one["metric"] == "size"} != {None}
    turns = [launch["turns"] for one in records.values() for launch in one["launches"]]
    assert (report["by_turns"], [len(one["queries"]) >= 8 for one in turns]) == (True, [True, True])
    assert len({len(one["p25_us"]) for one in turns}) == len({str(one["cpus"]) for one in turns}) == 1
    assert all(sum(one["turns"]["queries"]) == one["n"] for each in records.values() for one in each["launches"])
    samples = [measured / "out" / launch["samples_file"] for one in records.values() for launch in one["launches"]]
    assert all(np.load(path).size >= 64 for path in samples)


def test_a_slower_b_ends_with_exit_4_and_leaves_a_whole_directory(
    edgestill: Any, measured: Path, measured_as: Measure, tmp_path: Path
) -> None:
    measured_as([100.0, 104.0])

    ended = edgestill(
        "compare", measured / "a.onnx", measured / "b.onnx", "--out", tmp_path / "o", "--junit", tmp_path / "junit.xml"
    )

    assert ended.code == 4
    assert "p25: B is slower than A, +4.0%" in ended.out
    assert '<failure message="p25: B is slower than A' in (tmp_path / "junit.xml").read_text()
    assert json.loads((tmp_path / "o" / "report.json").read_text())["exit_code"] == 4


def test_strict_refuses_what_was_disturbed(measured: Path, measured_as: Measure, tmp_path: Path) -> None:
    measured_as([100.0, 100.0], valid=False)

    told, strict = (
        compare_models(measured / "a.onnx", measured / "b.onnx", out_dir=tmp_path / str(strict), strict=strict)
        for strict in (False, True)
    )

    assert told.failure is None
    assert len(told.warnings) == 2
    assert strict.failure is not None
    assert strict.failure.exit_code == 7


def test_a_compiled_directory_brings_its_own_target(measured: Path, measured_as: Measure, tmp_path: Path) -> None:
    from pipeline.own_graph import import_fixed

    exported = import_fixed(measured / "a.onnx", tmp_path / "exported")
    make_target("openvino-cpu", {"num_threads": 2}).compile(exported, tmp_path / "compiled", "fp32")
    measured_as([100.0, 100.0])

    found = compare_models(tmp_path / "compiled", measured / "b.onnx", out_dir=tmp_path / "out")

    assert f"(fp32, {CompiledModel.load(tmp_path / 'compiled').toolchain})" in found.a["label"]
    assert "(fp32, onnxruntime-cpu)" in found.b["label"]


def test_arms_of_one_recorded_session_are_pairs_and_two_sessions_are_not(
    measured: Path, measured_as: Measure, tmp_path: Path
) -> None:
    measured_as([100.0, 104.0])
    compare_models(measured / "a.onnx", measured / "b.onnx", out_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")

    together = compare_models(Path(f"{tmp_path}/one:A"), Path(f"{tmp_path}/one:B"))
    apart = compare_models(Path(f"{tmp_path}/one:A"), Path(f"{tmp_path}/other:B"))

    assert (together.interleaved, together.verdict) == (True, "slower")
    assert (apart.interleaved, apart.verdict) == (False, "cannot tell")


def test_a_record_file_by_itself_is_a_recorded_run(measured: Path, measured_as: Measure, tmp_path: Path) -> None:
    records = json.loads((measured / "out" / "records.json").read_text())
    for name in "AB":
        (tmp_path / f"{name}.json").write_text(json.dumps(records[name]))

    found = compare_models(tmp_path / "A.json", tmp_path / "B.json")

    assert not found.interleaved
    assert found.num_pairs == 1


def test_selftest_measures_one_model_and_tells_its_rates(
    edgestill: Any, measured: Path, measured_as: Measure, tmp_path: Path
) -> None:
    measured_as()
    model = measured / "a.onnx"

    ended = edgestill("compare", model, model, "--selftest", "--launches", 40, "--out", tmp_path / "o", "--json")

    document = json.loads(ended.out)
    assert (ended.code, document["num_measured"]) == (0, 40)
    assert document["false_alarms"]["windows"] == 21
    assert len(json.loads((tmp_path / "o" / "records.json").read_text())["A"]["launches"]) == 40


def test_what_cannot_be_compared_is_refused_in_words(edgestill: Any, measured: Path, tmp_path: Path) -> None:
    model, run = measured / "a.onnx", measured / "out"
    refusals: list[tuple[Callable[[], object], type[EdgestillError], str]] = [
        (lambda: compare_models(model, Path(f"{run}:A")), RecipeError, "one is a recorded run, the other a model"),
        (lambda: compare_models(run, Path(f"{run}:A")), RecipeError, "2 of the records there are meant"),
        (lambda: compare_models(Path(f"{run}:C"), run), RecipeError, "0 of the records there are meant"),
        (lambda: compare_models(model, Path("absent")), ModelError, "absent"),
        (lambda: compare_models(model, tmp_path), ModelError, "neither a compiled directory nor a bundle"),
        (lambda: compare_models(model, model, metrics=["p98"]), RecipeError, "--metric p98"),
        (lambda: compare_models(model, model, preset="long"), RecipeError, "--preset long"),
        (lambda: selftest_model(model, preset="long"), RecipeError, "--preset long"),
        (lambda: selftest_model(model, launches=19), RecipeError, "19 pairs are no comparison of 20"),
    ]
    for act, kind, message in refusals:
        with pytest.raises(kind, match=message):
            act()

    assert edgestill("compare", model, measured / "b.onnx", "--selftest").code == 2
    for option in (["--junit", tmp_path / "j.xml"], ["--metric", "p25"], ["--max-p99-ms", "5"], ["--strict"]):
        refused = edgestill("compare", model, model, "--selftest", *option)
        assert (refused.code, f"leave out {option[0]}" in refused.err) == (2, True)
    late = edgestill("compare", model, model, "--junit", tmp_path / "missing" / "j.xml", "--out", tmp_path / "o")
    assert (late.code, "there is no folder" in late.err, (tmp_path / "o").exists()) == (2, True, False)


def test_records_beside_each_other_are_read_with_their_placements(measured: Path, tmp_path: Path) -> None:
    from benchmarks.records import load_all, load_records

    a, b = load_records(measured / "out")
    write_records(tmp_path, {"again": a.record})

    assert (a.arm, b.arm, a.placement is not None) == ("A", "B", True)
    assert [stored.arm for stored in load_all([measured / "out", tmp_path])] == ["A", "B"]


def test_two_different_records_of_one_id_are_not_silently_one(measured: Path, tmp_path: Path) -> None:
    from benchmarks.records import load_all, load_records

    a, _ = load_records(measured / "out")
    write_records(tmp_path, {"A": replace(a.record, utc="2020-01-01T00:00:00+00:00")})

    with pytest.raises(DataError, match="two different records of one id"):
        load_all([measured / "out", tmp_path])


def test_what_was_measured_goes_into_a_history_and_onto_a_page(edgestill: Any, measured: Path, tmp_path: Path) -> None:
    db, out = tmp_path / "h.db", tmp_path / "page"
    ended = [
        edgestill("history", "add", measured / "out", "--db", db),
        edgestill("history", "show", "--db", db, "--page", tmp_path / "history.html"),
        edgestill("history", "check", "--db", db, "--json"),
        edgestill("report", measured / "out", "--out", out, "--history", db, "--title", "two models"),
    ]

    assert [one.code for one in ended] == [0, 0, 0, 0]
    assert json.loads(ended[2].out)["exit_code"] == 0
    assert "two models" in (out / "index.html").read_text()
    assert (tmp_path / "history.html").is_file()
    assert edgestill("history", "accept", "--note", "why", "--db", db).code == 2  # nothing is open
    assert edgestill("report", tmp_path / "absent").code == 2
