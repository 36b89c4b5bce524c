"""Finished stages: reused, noticed when broken, built again for a reason that is said."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import workspace
from pipeline.artifacts import Artifact
from pipeline.progress import Quiet
from pipeline.workspace import CHECKPOINT_DIR, Workspace, differences, key_parts
from targets import base

MODULE = "pipeline.gates"


class Listening(Quiet):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def writer(text: str, calls: list[Path]) -> Callable[[Path], None]:
    def write(out_dir: Path) -> None:
        calls.append(out_dir)
        (out_dir / "result.txt").write_text(text)

    return write


def build(
    root: Path, config: dict[str, object], calls: list[Path], *, text: str = "x", force: str | None = None
) -> tuple[Artifact, list[str]]:
    progress = Listening()
    runs = Workspace(root, "r", progress, force=force)
    artifact = runs.build(Artifact, "teacher", config, ["input"], writer(text, calls), module=MODULE)
    return artifact, progress.lines


def test_a_finished_stage_is_not_built_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    first, _ = build(tmp_path, {"epochs": 1}, calls)
    second, lines = build(tmp_path, {"epochs": 1}, calls)

    assert (len(calls), first, lines) == (1, second, [])


def test_a_changed_config_is_built_again_and_said(tmp_path: Path) -> None:
    calls: list[Path] = []
    build(tmp_path, {"train": {"epochs": 1}}, calls)
    _, lines = build(tmp_path, {"train": {"epochs": 2}}, calls)

    assert lines == ["teacher: building again, changed: train.epochs 1 -> 2"]


def test_the_earlier_result_is_still_there_after_a_change_back(tmp_path: Path) -> None:
    calls: list[Path] = []
    for epochs in (1, 2, 1):
        build(tmp_path, {"epochs": epochs}, calls)

    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "half_json", "not_json"])
def test_a_damaged_stage_is_named_and_built_again(tmp_path: Path, damage: str) -> None:
    calls: list[Path] = []
    artifact, _ = build(tmp_path, {}, calls, text="hello")
    result, stage = artifact.dir / "result.txt", artifact.dir / "stage.json"
    time.sleep(0.01)  # another mtime
    if damage == "truncate":
        result.write_text("hel")
    elif damage == "flip":
        result.write_text("hellp")
    elif damage == "delete":
        result.unlink()
    elif damage == "half_json":
        stage.write_text(stage.read_text()[:50])
    else:
        stage.write_text("[]")
    again, lines = build(tmp_path, {}, calls, text="hello")

    assert len(calls) == 2
    assert "teacher: " in lines[0]
    assert str(artifact.dir) in lines[0] or damage == "not_json"
    assert (again.dir / "result.txt").read_text() == "hello"


def test_a_stage_that_was_interrupted_is_cleared_but_for_its_checkpoint(tmp_path: Path) -> None:
    def interrupted(out_dir: Path) -> None:
        (out_dir / "half.txt").write_text("half")
        (out_dir / CHECKPOINT_DIR).mkdir()
        (out_dir / CHECKPOINT_DIR / "training.pt").write_text("state")
        raise KeyboardInterrupt

    workspace = Workspace(tmp_path, "r", Quiet())
    with pytest.raises(KeyboardInterrupt):
        workspace.build(Artifact, "teacher", {}, [], interrupted, module=MODULE)
    seen: list[list[str]] = []

    def goes_on(out_dir: Path) -> None:
        seen.append(sorted(str(path.relative_to(out_dir)) for path in out_dir.rglob("*") if path.is_file()))

    artifact = workspace.build(Artifact, "teacher", {}, [], goes_on, module=MODULE)

    assert seen == [[f"{CHECKPOINT_DIR}/training.pt"]]
    assert not (artifact.dir / CHECKPOINT_DIR).exists()


def test_force_builds_once_more(tmp_path: Path) -> None:
    calls: list[Path] = []
    build(tmp_path, {}, calls)
    build(tmp_path, {}, calls, force="teacher")
    build(tmp_path, {}, calls, force="quantize")

    assert len(calls) == 2


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    one, _ = build(tmp_path / "a", {"epochs": 1}, [], text="same")
    two, _ = build(tmp_path / "b", {"epochs": 2}, [], text="same")
    other, _ = build(tmp_path / "c", {"epochs": 1}, [], text="other")

    assert one.digest == two.digest != other.digest


def test_the_key_holds_the_sources_that_the_stage_imports_and_their_libraries() -> None:
    parts = key_parts({}, [], "pipeline.stages.teacher")

    assert {"pipeline.stages.teacher", "pipeline.learning.training", "pipeline.learning.losses"} <= parts[
        "sources"
    ].keys()
    assert "pipeline.stages.distill" not in parts["sources"]
    assert {"torch", "accelerate", "python"} <= parts["libraries"].keys()


def test_a_library_of_a_wheel_with_another_name_is_in_the_key_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"onnxruntime-gpu": "1.32.0"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    base._distributions.cache_clear()

    found = [workspace._version.__wrapped__(name) for name in ("onnxruntime", "json", "nowhere")]

    base._distributions.cache_clear()
    assert found == ["1.32.0", None, None]


def test_differences_name_sources_and_inputs_in_words() -> None:
    before = {"config": {"a": 1}, "inputs": ["x"], "sources": {"pipeline.run": "1"}}
    after = {"config": {"a": 1, "b": 2}, "inputs": ["y"], "sources": {"pipeline.run": "2"}}

    assert differences(before, after) == ["b absent -> 2", "its input", "pipeline.run (source)"]


def test_reading_a_finished_stage_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.artifacts import Artifact; from pipeline.progress import Quiet\n"
        "from pipeline.workspace import Workspace\n"
        f"w = Workspace(Path({str(tmp_path)!r}), 'r', Quiet())\n"
        "w.build(Artifact, 'teacher', {}, [], lambda out: None, module='pipeline.stages.teacher')\n"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def hold(root: Path, held: object, release: object) -> None:
    with Workspace(root, "r", Quiet()).locked():
        held.set()  # type: ignore[attr-defined]
        release.wait(20)  # type: ignore[attr-defined]


def test_a_second_run_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path, held, release))
    first.start()
    assert held.wait(20)

    class ReleasesOnceSpoken(Listening):
        def say(self, line: str) -> None:
            super().say(line)
            release.set()

    progress = ReleasesOnceSpoken()
    with Workspace(tmp_path, "r", progress).locked():
        pass
    first.join(20)

    assert first.exitcode == 0
    assert "another run is at work" in progress.lines[0]
