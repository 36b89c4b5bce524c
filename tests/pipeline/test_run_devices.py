"""A recipe whose targets lie on several devices, of which one cannot be reached."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.integration

TARGET = "onnxruntime-cpu"


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a port that nobody listens on, for a person without keys."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"ssh://ann@127.0.0.1:{port}"


def with_targets(finished: Any, *targets: dict[str, Any]) -> None:
    recipe = yaml.safe_load(finished.recipe.read_text())
    finished.recipe.write_text(yaml.safe_dump({**recipe, "targets": list(targets)}))


def test_a_board_that_is_away_costs_its_own_target_only(
    finished: Any, edgestill: Callable[..., Any], nobody_there: str
) -> None:
    with_targets(finished, {"name": TARGET}, {"name": TARGET, "device": nobody_there})

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

    result = json.loads(ended.out)
    assert (ended.code, result["exit_code"]) == (6, 6)
    assert list(result["failed"]) == [f"{TARGET}-2"]
    assert f"{nobody_there} cannot be reached" in result["failed"][f"{TARGET}-2"]
    assert list(result["bundles"]) == [TARGET]
    assert TARGET in (finished.dir / "report" / "index.html").read_text()
    assert ended.err.count("cannot be reached") == 2  # when the run began, and how it ended
    text = edgestill("run", finished.recipe, "--runs", finished.runs)
    assert f"{TARGET}-2: failed: {nobody_there}: " in text.out


def test_nothing_begins_where_no_device_can_be_reached(
    finished: Any, edgestill: Callable[..., Any], nobody_there: str
) -> None:
    with_targets(finished, {"name": TARGET, "device": nobody_there})

    ended = edgestill("run", finished.recipe, "--runs", finished.runs, "--json")

    assert ended.code == 6
    assert json.loads(ended.out)["exit_code"] == 6
    assert len(ended.err.strip().splitlines()) <= 3


def test_a_device_that_stands_nowhere_is_a_fault_of_the_recipe(
    finished: Any, edgestill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.yaml").write_text("orin: {address: ssh://orin}\n")
    with_targets(finished, {"name": TARGET, "device": "orion"})

    ended = edgestill("run", finished.recipe, "--runs", finished.runs)

    assert ended.code == 2
    assert f"target '{TARGET}': device 'orion' does not stand in devices.yaml; did you mean 'orin'?" in ended.err
