"""Trainings at once: the same weights as one after another, nothing left behind when it is interrupted or killed."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.ablation.processes import _error_of, threads_each
from pipeline.ablation.run import _Ablation
from pipeline.ablation.steps import Training
from pipeline.how import How
from pipeline.recipe import DistillConfig
from pipeline.workspace import Stopped
from targets.errors import EdgestillError, RecipeError, TrainingError

Cli = Callable[..., Any]
# Each starts several programs that import torch.
starts_programs = pytest.mark.system
QUICK = (
    "distill.train.epochs=2",
    "distill.curriculum=null",
    "ablation.temperatures=[4]",
    "ablation.kd_weights=[0.5]",
    "ablation.shift=[]",
)
BROKEN = "ablation.arms={wrong: {losses: [{name: features, student_layer: nowhere, teacher_layer: fc}]}}"
LONG = "distill.train.epochs=500"


def argv_of(recipe: Path, runs: Path, *overrides: str) -> list[str]:
    given = [part for override in (*QUICK, *overrides) for part in ("--set", override)]
    return ["ablate", str(recipe), "--runs", str(runs), "--seeds", "2", *given]


def weights(runs: Path) -> dict[str, bytes]:
    found = (runs / "tiny").glob("ablate-*/last.safetensors")
    return {path.parent.name: path.read_bytes() for path in found}


@starts_programs
def test_two_processes_train_what_one_does_and_one_that_fails_stops_no_other(
    built: Any, edgestill: Cli, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(built.runs, tmp_path / name, symlinks=True)

    one = edgestill(*argv_of(built.recipe, tmp_path / "one"), "--arms", "kd")
    two = edgestill(*argv_of(built.recipe, tmp_path / "two", BROKEN), "--arms", "kd,wrong", "--processes", "2")

    assert one.code == 0, one.err
    assert two.code == 2
    assert "The first, wrong, seed 1: " in two.err
    assert len(weights(tmp_path / "one")) == 2
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    for line in ("kd, seed 1: distill 1/2: loss", "kd, seed 2: distill 2/2: loss", "wrong, seed 2: failed: "):
        assert line in two.err


@pytest.fixture
def at_work(built: Any, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """An ablation in two processes that has begun to train, and the ids of these."""
    shutil.copytree(built.runs, tmp_path / "runs", symlinks=True)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from pipeline.cli import main; sys.argv = ['edgestill', *{argv_of(built.recipe, tmp_path / 'runs', LONG)!r}, "
        "'--processes', '2']; main()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert parent.stderr is not None
    begun: set[str] = set()
    while len(begun) < 2:
        line = parent.stderr.readline()
        assert line, "it ended before two trainings had begun"
        if ": distill 1/500: loss" in line:
            begun.add(line.partition(":")[0])
    children = [
        pid
        for task in Path(f"/proc/{parent.pid}/task").iterdir()
        for pid in map(int, (task / "children").read_text().split())
    ]
    assert len(children) == 2
    yield parent, children
    for pid in (parent.pid, *children):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    parent.communicate()


def ends(pid: int) -> bool:
    """Whether the process is gone within 20 s."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


@starts_programs
def test_ctrl_c_ends_the_processes_and_says_that_nothing_is_lost(
    at_work: tuple[subprocess.Popen[str], list[int]],
) -> None:
    parent, children = at_work

    parent.send_signal(signal.SIGINT)

    _, rest = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert "interrupted: what was finished is kept" in rest
    assert "Traceback" not in rest
    assert all(ends(pid) for pid in children)


@starts_programs
def test_processes_do_not_outlive_an_ablation_that_was_killed(at_work: tuple[subprocess.Popen[str], list[int]]) -> None:
    parent, children = at_work

    parent.kill()

    assert all(ends(pid) for pid in children)


def test_each_process_gets_its_share_of_the_cores_and_never_more_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS")

    assert [threads_each(num) for num in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_each(2) == 1


@pytest.mark.parametrize(
    ("exit_code", "told", "kind", "words"),
    [
        (3, '{"kind": "TrainingError", "message": "the loss is nan"}\n', TrainingError, "the loss is nan"),
        (
            1,
            '{"kind": "ZeroDivisionError", "message": "division by zero"}',
            EdgestillError,
            "ZeroDivisionError: division",
        ),
        (-9, "", EdgestillError, "signal 9"),
        (7, "[]", EdgestillError, "exit code 7"),
        (1, '{"kind": "Path", "message": "x"}', EdgestillError, "Path: x"),
    ],
)
def test_how_a_process_ended_is_told_in_its_own_words_or_ours(
    exit_code: int, told: str, kind: type[EdgestillError], words: str
) -> None:
    error = _error_of(exit_code, told)

    assert type(error) is kind
    assert words in str(error)
    assert _error_of(0, told) is None


@dataclass
class Stages:
    """Those of an ablation, without any work: what `wrong` needs raises, or its training does."""

    error: Exception
    is_shared: bool
    trained: list[str] = field(default_factory=list)
    how: How = field(default_factory=How)

    def shared(self, config: DistillConfig) -> None:
        if self.is_shared and config.temperature == WRONG:
            raise self.error

    def outcome(self, training: Training) -> None:
        if training.config.temperature == WRONG:
            raise self.error
        self.trained.append(training.name)


class FindsNothing:
    def outcome(self, training: Training) -> None:
        raise Stopped("data", "never built")


WRONG = 9.0


@pytest.mark.parametrize(
    ("error", "is_shared", "told"),
    [
        (RecipeError("its assistant is too small"), True, "its assistant is too small"),
        (ValueError("of a loss of one's own"), False, "ValueError: of a loss of one's own"),
    ],
    ids=["what it needs", "its training"],
)
def test_an_arm_that_cannot_be_trained_takes_no_other_with_it(error: Exception, is_shared: bool, told: str) -> None:
    do: Any = Stages(error, is_shared)
    look: Any = FindsNothing()
    configs = {"kd": DistillConfig(model="m"), "wrong": DistillConfig(model="m", temperature=WRONG)}
    trainings = [Training(arm=arm, seed=seed, config=config) for seed in (1, 2) for arm, config in configs.items()]

    failed = _Ablation(do, look, 1)._train(trainings)

    assert do.trained == ["kd, seed 1", "kd, seed 2"]
    assert {name: str(one) for name, one in failed.items()} == {"wrong, seed 1": told, "wrong, seed 2": told}
    assert all(isinstance(one, EdgestillError) for one in failed.values())
