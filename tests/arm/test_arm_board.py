"""An ARM64 board through SSH, from a bundle to a measurement: that it works, that it computes the same, and nothing about speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.devices import run_program
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.ssh import Ssh
from targets.base import CompiledModel, read_json
from targets.errors import IntegrityError

pytestmark = pytest.mark.system

BUNDLE = Path(__file__).parents[1] / "fixtures" / "bundle-quickstart"
EMULATED = "not valid: aarch64 emulated on x86_64"


@pytest.fixture
def program(board: Ssh, tmp_path: Path) -> str:
    return board.put(pack_device_program(tmp_path / PROGRAM))


def test_the_board_is_an_arm64_machine_and_says_that_it_is_emulated(board: Ssh) -> None:
    facts = board.facts()

    assert (facts["arch"], facts["emulated_on"]) == ("aarch64", "x86_64")
    assert facts["cpu"] == "ARM implementer 0x41 part 0xd0c"


def test_the_committed_bundle_is_verified_and_answers_on_arm64(board: Ssh, program: str) -> None:
    verified = run_program(board, program, ["verify", board.put(BUNDLE)])

    assert verified["name"] == "student-resnet8"
    assert 0 < verified["max_abs_delta"]["logits"] < 1e-3  # other kernels, other roundings


def test_a_flipped_byte_is_refused_there(board: Ssh, program: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle)
    weights = bytearray((bundle / "model" / "model.onnx").read_bytes())
    weights[len(weights) // 2] ^= 1
    (bundle / "model" / "model.onnx").write_bytes(weights)

    with pytest.raises(Exception, match="has changed: its sha256 differs") as refused:
        run_program(board, program, ["verify", board.put(bundle)])

    assert getattr(refused.value, "exit_code", None) == IntegrityError.exit_code


def test_a_recipe_runs_on_the_board_and_finds_what_this_machine_finds(
    finished: Any, edgestill: Callable[..., Any], board_url: str, board: Ssh, program: str
) -> None:
    here = finished.stage("measure-onnxruntime-cpu")
    logits_here = {path.parent.name: np.load(path) for path in (here / "logits").rglob("logits.npy")}

    changed = ["--set", f"targets.0.device={board_url}", "--set", f"targets.0.scheme={finished.scheme}"]
    ended = edgestill("run", finished.recipe, "--runs", finished.runs, *changed, "--json")

    assert ended.code == 0, ended.err
    built = json.loads(ended.out)["built"]
    assert sorted(label.partition("-")[0] for label in built) == ["bundle", "compile", "measure", "report", "verdict"]
    run = finished.dir
    there = newest(run, "measure-onnxruntime-cpu")
    for arm, logits_NK in logits_here.items():
        on_arm_NK = np.load(there / "logits" / arm / "logits.npy")
        assert (on_arm_NK.argmax(1) == logits_NK.argmax(1)).mean() > 0.99, arm
        assert np.abs(on_arm_NK - logits_NK).max() < 0.1 * np.abs(logits_NK).max(), arm
    assert CompiledModel.load(newest(run, "compile-onnxruntime-cpu") / "student-int8").target == "onnxruntime-cpu"
    for record in read_json(there / "records.json").values():
        assert record["validity"]["ok"] is False
        assert record["validity"]["flags"][0].startswith(EMULATED)
    verdict = read_json(newest(run, "verdict-onnxruntime-cpu") / "verdict.json")
    assert [gate["passed"] for gate in verdict["gates"] if gate["name"] == "faster than float"] == [None]
    page = (run / "report" / "index.html").read_text()
    assert "not valid" in page
    assert "aarch64 emulated on x86_64" in page

    bundle = run / "bundles" / "onnxruntime-cpu"
    assert run_program(board, program, ["verify", board.put(bundle)])["max_abs_delta"]["logits"] < 1.0
    left = board.run(["python3", "-c", LIST], timeout_s=60)
    assert json.loads(left.stdout) == []


# Whatever another session than the present one left on the board: names of files.
LIST = """
import json, os
mine = os.path.basename(os.getcwd())
names = [os.path.join(folder, name) for folder, _, files in os.walk("/tmp/cache/edgestill/sessions") for name in files]
print(json.dumps([name for name in names if mine not in name]))
"""


def newest(run: Path, label: str) -> Path:
    """The stage of that label that was finished last."""
    found = max(run.glob(f"{label}-????????/stage.json"), key=lambda path: read_json(path)["utc"])
    return found.parent
