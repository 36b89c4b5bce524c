"""One thread for the suite, the command line as a function, and one tiny finished run that many tests look at."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch and by every process that a test starts; imports nothing

import gc
import io
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import yaml

from pipeline.progress import Quiet

hypothesis.settings.register_profile("house", deadline=None)  # a test on a busy machine is slow, not wrong
hypothesis.settings.load_profile("house")

TINY: dict[str, Any] = {
    "model": "resnet8",
    "args": {"widths": [4, 4, 8, 8]},
    "train": {"epochs": 3, "lr": 0.1, "precision": "fp32"},
}
TINY_RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "calibration": 64, "augment": {"crop": 0}},
    "teacher": {**TINY, "train": {**TINY["train"], "batch_size": 32}},
    "distill": {**TINY, "kd_weight": 0.9, "curriculum": {"order": "easy_first"}},
    "quantize": {"method": "qat", "train": {"epochs": 1}},
    "targets": [{"name": "onnxruntime-cpu"}],
    "bench": {"preset": "smoke", "launches": 1},
}


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection that looks at all of it takes half a second, and some tests ask for one."""
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """A test of the finished run waits until it is built."""
    if "built" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.integration)


class Listening(Quiet):
    """Keeps the lines that were said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Run:
    """A finished run: its recipe, the folder of runs, and how the command ended that built it."""

    recipe: Path
    runs: Path
    ended: Ended

    @property
    def dir(self) -> Path:
        return self.runs / "tiny"

    def stage(self, label: str) -> Path:
        (found,) = self.dir.glob(f"{label}-????????")
        return found

    @property
    def scheme(self) -> str:
        """What this machine's CPU wanted; a board gets the same student where this is asked for by name."""
        (found,) = self.dir.glob("quantize-*-????????")
        return found.name.removeprefix("quantize-")[:-9]


def command(*argv: object) -> Ended:
    """`edgestill argv...` in this process."""
    from pipeline.cli import main

    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["edgestill", *map(str, argv)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def edgestill() -> Callable[..., Ended]:
    return command


# What measures is left to processes of its own.
QUIET_COMMANDS = ("probe", "environment", "compile", "placement", "evaluate", "answer")


@pytest.fixture
def exact_int8() -> Callable[[Path, str], bool]:
    """Whether this CPU adds INT8 products without loss. Where it does not (x86 without VNNI), the linter must say so of the graph."""
    from targets.lint import Platform, lint

    def holds(graph: Path, dialect: str) -> bool:
        if not Platform().saturates:
            return True
        assert {"O25", "V17"} & {finding.code for finding in lint(graph, dialect)}
        return False

    return holds


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device program answers in this process: to start Python and a runtime for each command takes most of a second."""
    from benchmarks.device.__main__ import main as device_program
    from benchmarks.devices import Completed, Local

    start = Local.run

    def run(device: Local, argv: Sequence[str], **options: Any) -> Completed:
        _, isolated, program, command, *_ = [*argv, "", "", ""]
        if isolated != "-I" or not program.endswith(".pyz") or command not in QUIET_COMMANDS:
            return start(device, argv, **options)
        out = io.StringIO()
        with redirect_stdout(out):
            code = device_program(argv[3:])
        return Completed(code, out.getvalue(), "")

    monkeypatch.setattr(Local, "run", run)


@pytest.fixture
def listening() -> Listening:
    return Listening()


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny recipe with some of its sections replaced."""

    def write(**changed: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY_RECIPE, **changed}))
        return path

    return write


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny recipe, run to its end through the command line. Look, do not touch: `finished` is a copy to change."""
    root = tmp_path_factory.mktemp("built")
    recipe = root / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY_RECIPE))
    return Run(recipe, root / "runs", command("run", recipe, "--runs", root / "runs", "--json"))


@pytest.fixture
def finished(built: Run, tmp_path: Path) -> Run:
    """A copy of the finished run (modification times kept, so that it counts as finished)."""
    shutil.copytree(built.runs, tmp_path / "runs", symlinks=True)
    shutil.copy(built.recipe, tmp_path / "tiny.yaml")
    return Run(tmp_path / "tiny.yaml", tmp_path / "runs", built.ended)
