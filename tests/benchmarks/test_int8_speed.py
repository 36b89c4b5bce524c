"""The goals of INT8 on the CPU targets, from rows; benchmark_app in pairs; nets with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.evidence import benchmark_app, models
from benchmarks.evidence.benchmark_app import app_medians
from benchmarks.evidence.goals import OPENVINO, ORT, ORT_DEFAULTS, Goal, Measured, goals_of, ships
from benchmarks.evidence.int8_speed import main, text
from benchmarks.peers.candidates import OURS
from benchmarks.peers.comparison import Comparison, Row
from targets.base import write_json
from targets.errors import MeasurementError

ROUNDS = 8


def row(target: str, name: str, us: float = 0.0, **values: Any) -> Row:
    """A row whose launches take about `us`, each round slowed by a factor of its own, the same for every row."""
    factors = np.random.default_rng(0).uniform(1.0, 3.0, ROUNDS)
    launches = tuple({"p25_us": us * float(factor)} for factor in factors)
    told: dict[str, Any] = {"precision": "int8", "error": None, "p25_us": us, "int8_share": 1.0, "launches": launches}
    return Row(target=target, name=name, **{**told, **values})


def floats(target: str, us: float, bf16_us: float | None = None) -> list[Row]:
    rows = [row(target, "fp32", us, precision="fp32", int8_share=0.0)]
    return rows + ([] if bf16_us is None else [row(target, "bf16", bf16_us, precision="bf16", int8_share=0.0)])


def measured(
    rows: Sequence[Row], ours_ms: Sequence[float] = (1.0,) * 8, nncf_ms: Sequence[float] = (1.0,) * 8
) -> Measured:
    return Measured(comparison=Comparison(rows=tuple(rows), machine={}), app_ours_ms=ours_ms, app_nncf_ms=nncf_ms)


def speed_rows(ours_us: float, **ours: Any) -> list[Row]:
    convolutions = {"num_convolutions": 20, "num_int8_convolutions": 20}
    return [
        *floats(ORT, 2700.0),
        row(ORT, OURS, ours_us, **{**convolutions, **ours}),
        row(ORT, ORT_DEFAULTS, 3000.0),
        *floats(OPENVINO, 2000.0),
        row(OPENVINO, OURS, 700.0),
    ]


def met(goals: Sequence[Goal]) -> dict[str, bool]:
    return {goal.what: goal.met for goal in goals}


def test_a_speed_goal_is_met_at_its_ratio_and_not_below() -> None:
    reached = goals_of({"resnet18": measured(speed_rows(999.0))})
    missed = goals_of({"resnet18": measured(speed_rows(1001.0))})

    fp32, defaults = f"times as fast as FP32 on {ORT}", f"times as fast as {ORT_DEFAULTS}"
    assert (met(reached)[fp32], met(reached)[defaults]) == (True, True)
    assert (met(missed)[fp32], met(missed)[defaults]) == (False, False)
    assert [goal.reached for goal in reached if goal.what == fp32] == ["2.70 (2.70 to 2.70)"]


def test_the_moonshot_compares_both_runtimes() -> None:
    what = f"{ORT} over {OPENVINO}, both ours (moonshot)"

    assert met(goals_of({"resnet18": measured(speed_rows(1040.0))}))[what]
    assert not met(goals_of({"resnet18": measured(speed_rows(1060.0))}))[what]


@pytest.mark.parametrize(("in_int8", "in_all", "whole"), [(20, 20, True), (19, 20, False), (9, 9, False)])
def test_every_convolution_of_the_net_must_be_in_int8(in_int8: int, in_all: int, whole: bool) -> None:
    rows = speed_rows(999.0, num_int8_convolutions=in_int8, num_convolutions=in_all)

    goals = goals_of({"resnet18": measured(rows)})

    assert met(goals)[f"convolutions in INT8 on {ORT}"] is whole


def test_a_graph_that_was_not_made_meets_nothing_and_says_why() -> None:
    rows = speed_rows(999.0, error="ModelError: no", launches=(), num_int8_convolutions=None, num_convolutions=None)

    goals = goals_of({"resnet18": measured(rows, (), ())})

    assert [goal.met for goal in goals] == [False] * 5
    assert [goal.reached for goal in goals[:4]] == ["ModelError: no"] * 4
    assert goals[4].reached == "no pair was measured"


@pytest.mark.parametrize(
    ("share", "same", "p", "expected"),
    [(0.95, 0.97, 0.05, [True, True, True]), (0.94, 0.96, 0.04, [False, False, False])],
)
def test_real_weights_keep_their_answers(share: float, same: float, p: float, expected: list[bool]) -> None:
    told: Mapping[str, Any] = {
        "int8_share": share,
        "agreement": {"value": same, "n": 100},
        "accuracy": {"difference": 0.0, "mcnemar_p": p},
    }
    rows = [row(target, OURS, 1.0, **told) for target in (ORT, OPENVINO)]

    goals = goals_of({"efficientnet_lite0": measured(rows)})

    assert [goal.met for goal in goals] == [*expected, *expected, True]


def test_float_must_ship_on_onnx_runtime_and_int8_on_openvino() -> None:
    slow_on_ort = [*floats(ORT, 100.0), row(ORT, OURS, 300.0, int8_share=0.3)]
    quick_on_openvino = [*floats(OPENVINO, 100.0, 80.0), row(OPENVINO, OURS, 70.0)]
    slower_than_bf16 = [*floats(OPENVINO, 100.0, 60.0), row(OPENVINO, OURS, 70.0)]

    good = goals_of({"mobilenetv3_small_100": measured([*slow_on_ort, *quick_on_openvino])})
    bad = goals_of({"mobilenetv3_small_100": measured([*slow_on_ort, *slower_than_bf16])})

    assert [goal.met for goal in good] == [True, True, True]
    assert [goal.met for goal in bad] == [True, False, True]
    assert good[0].reached == "float (30% of MACs in INT8, 0.33 times as fast as fp32)"


def test_int8_that_is_faster_but_not_in_int8_does_not_ship() -> None:
    (fp32,) = floats(ORT, 100.0)

    assert ships(row(ORT, OURS, 50.0), fp32) == "int8"
    assert ships(row(ORT, OURS, 50.0, int8_share=0.94), fp32) == "float"
    assert ships(row(ORT, OURS, error="no"), fp32) == "float"


@pytest.mark.parametrize(("ours_ms", "holds"), [(1.00, True), (1.01, True), (1.05, False)])
def test_ours_holds_up_against_nncf_within_two_percent(ours_ms: float, holds: bool) -> None:
    rows = [row(target, OURS, 1.0) for target in (ORT, OPENVINO)]

    goals = goals_of({"efficientnet_lite0": measured(rows, [ours_ms] * ROUNDS, [1.0] * ROUNDS)})

    assert goals[-1].met is holds
    assert goals[-1].reached == f"{1 / ours_ms:.3f} times as fast, 8 pairs"


# benchmark_app


@pytest.fixture
def fake_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark_app that writes its arguments and a latency of as many milliseconds as its model's name has letters."""
    program = tmp_path / "bin" / "benchmark_app"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "argv = sys.argv[1:]\n"
        "value = lambda option: argv[argv.index(option) + 1]\n"
        "model = pathlib.Path(value('-m'))\n"
        "if model.stem == 'broken': sys.exit('no such layer')\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(argv) + chr(10))\n"
        "report = {'execution_results': {'latency (ms)': f'{len(model.stem):.2f}'}}\n"
        "pathlib.Path(value('-report_folder'), 'benchmark_report.json').write_text(json.dumps(report))\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(benchmark_app.sys, "executable", str(program.with_name("python")))
    for name in ("ours", "theirs", "broken"):
        for suffix in (".xml", ".bin"):
            (tmp_path / f"{name}{suffix}").write_text(name)
    return tmp_path


def _medians(folder: Path, names: Sequence[str], rounds: int) -> list[list[float]]:
    paths = [folder / f"{name}.xml" for name in names]
    return app_medians(paths, rounds=rounds, seconds=1, num_threads=2, shape=(1, 3, 8, 8), out_dir=folder / "app")


def test_each_round_runs_both_models_and_a_round_that_is_done_stays_done(fake_app: Path) -> None:
    first = _medians(fake_app, ["ours", "theirs"], 2)
    again = _medians(fake_app, ["ours", "theirs"], 3)

    calls = [json.loads(line) for line in (fake_app / "calls").read_text().splitlines()]
    assert (first, again) == ([[4.0] * 2, [6.0] * 2], [[4.0] * 3, [6.0] * 3])
    assert len(calls) == 6
    assert all(" ".join(call).count("-hint none -nthreads 2 -nstreams 1") == 1 for call in calls)
    rounds = [{Path(call[1]).stem for call in calls[i : i + 2]} for i in (0, 2, 4)]
    assert rounds == [{"ours", "theirs"}] * 3


def test_a_benchmark_app_that_fails_is_named_with_its_words(fake_app: Path) -> None:
    with pytest.raises(MeasurementError, match=r"broken\.xml ended with 1"):
        _medians(fake_app, ["broken"], 1)


# The nets


def test_batchnorm_statistics_become_the_plain_average_over_the_photographs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    x_NCHW = np.arange(4 * models.BATCH, dtype=np.float32).reshape(-1, 1, 2, 1)

    models.calibrate_batchnorm(model, x_NCHW)

    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean == pytest.approx(x_NCHW.mean())
    assert torch.equal(norm.weight, torch.ones(1))


def test_the_published_net_is_described_as_such_and_the_others_as_random(tmp_path: Path) -> None:
    weights = {name: models.described(name, tmp_path).weights for name in models.MODELS}

    assert {name for name, kind in weights.items() if kind == "published"} == {"efficientnet_lite0"}
    assert set(weights) == {"resnet18", "mobilenet_v2", "mobilenetv3_small_100", "efficientnet_lite0"}


def test_models_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "resnet18.onnx").write_bytes(b"there")

    written = models.write_models(["resnet18"], tmp_path, Path("no.whl"), Path("no.whl"), tmp_path)

    assert written["resnet18"].path.read_bytes() == b"there"


# The command


def test_what_is_needed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--images", "x"])

    assert "absent: weights, architecture, out" in capsys.readouterr().err


def test_a_stored_result_is_shown_with_its_goals_and_the_meaning_of_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {
        "model": "resnet18",
        "weights": "random",
        "rows": [],
        "images": {"calibration": 100, "held_out": 100},
        "quantizers": [],
        "machine": {"hard": {"cpu": "a CPU", "cpus_allowed": [0, 1]}},
    }
    goal = {"model": "resnet18", "what": "speed", "goal": ">= 2", "reached": "1.9", "met": False}
    document = {"goals": [goal], "models": [one], "versions": {}, "utc": "2026-01-01", "threads": 2, "rounds": 8}
    write_json(tmp_path / "one.json", {**document, "preset": "ci"})

    code = main(["--show", str(tmp_path / "one.json")])

    out = capsys.readouterr().out
    assert code == 0
    assert "| resnet18 | speed | >= 2 | 1.9 | not met |" in out
    assert "random weights: agreement and accuracy mean nothing" in out
    assert out.strip() == text({**document, "preset": "ci"}).strip()
