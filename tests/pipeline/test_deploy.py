"""Compiling the arms of a target on a device that is not this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.artifacts import ExportedModel
from pipeline.progress import Quiet
from pipeline.recipe import TargetConfig
from pipeline.stages import deploy
from targets.base import Exported, read_json
from targets.errors import TargetError
from targets.lint import Platform


class Board:
    """An ARM board whose every command is answered by `on_board`."""

    name, python = "board", "python3"

    def measuring(self) -> AbstractContextManager[None]:
        return nullcontext()

    def facts(self) -> Mapping[str, Any]:
        return {"arch": "aarch64"}

    def put(self, path: Path) -> str:
        return path.name

    def get(self, remote: str, path: Path) -> None: ...

    def scratch(self, directory: Path) -> str:
        return directory.name


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compile a student and a teacher, where these precisions are refused; returns (arms by name, platforms of the linter)."""
    platforms: list[Platform] = []

    def run(*refused: str) -> tuple[dict[str, Any], list[Platform]]:
        def on_board(device: object, program: str, argv: Sequence[str]) -> dict[str, Any]:
            if argv[0] == "compile" and argv[argv.index("--precision") + 1] in refused:
                raise TargetError("board: constant 'mask' is too large.")
            return {"missing": None, "float_precisions": ["fp32", "fp16"]}

        monkeypatch.setattr(deploy, "run_program", on_board)
        monkeypatch.setattr(deploy, "lint", lambda path, runtime, platform: platforms.append(platform) or [])
        graphs = {name: _exported(tmp_path / name) for name in ("int8", "student", "teacher")}
        floats = {name: graphs[name] for name in ("student", "teacher")}
        how: Any = SimpleNamespace(progress=Quiet())
        board: Any = Board()
        deploy.compile_arms(TargetConfig(name="onnxruntime-cpu"), graphs["int8"], floats, tmp_path, how, board)
        return {arm["dir"]: arm for arm in read_json(tmp_path / "arms.json")}, platforms

    return run


def _exported(directory: Path) -> ExportedModel:
    directory.mkdir()
    Exported(name="m", onnx_path="model.onnx", inputs=(), outputs=(), directory=directory).save()
    return ExportedModel(dir=directory, digest="")


def test_a_float_precision_that_cannot_be_built_keeps_its_reason(compiled: Any) -> None:
    arms, _ = compiled("fp16")

    assert {name for name, arm in arms.items() if arm["error"]} == {"student-fp16", "teacher-fp16"}
    assert "'mask'" in arms["student-fp16"]["error"]


def test_without_fp32_there_is_nothing_to_compare_with(compiled: Any) -> None:
    with pytest.raises(TargetError, match="'mask'"):
        compiled("fp32")


def test_the_linter_judges_for_the_boards_processor(compiled: Any) -> None:
    _, platforms = compiled()

    assert [(one.machine, one.vnni) for one in platforms] == [("aarch64", None)]
