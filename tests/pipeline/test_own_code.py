"""Code of a person's own: its source is part of what is made of it, and what it raises is told as the person's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.learning.own_code import called, code_digest, code_files, score
from pipeline.learning.trained import describe
from pipeline.recipe import ModelConfig
from targets.errors import ModelError, RecipeError

REFERENCE = "python:nets.small:network"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nets/small.py imports its sibling, a function that imports a neighbour, and what is no part of it."""
    files = {
        "nets/__init__.py": "",
        "nets/small.py": "import os\nimport numpy\nimport targets.base\nimport installed\nfrom . import parts\n\n\n"
        "def network():\n    from other.layers import Layer\n\n    return Layer\n",
        "nets/parts.py": "WIDTH = 8\n",
        "nets/unread.py": "",
        "other/__init__.py": "",
        "other/layers.py": "from nets.small import network\n",
        "targets/base.py": "",
        ".venv/site-packages/installed.py": "",
        "broken.py": "def (",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / ".venv/site-packages")])
    return tmp_path


@pytest.mark.usefixtures("repository")
def test_what_a_module_imports_of_the_persons_own_is_found_and_nothing_else() -> None:
    assert sorted(code_files(REFERENCE)) == ["nets", "nets.parts", "nets.small", "other", "other.layers"]
    assert list(code_files("python:installed:make")) == ["installed"]
    assert list(code_files("python:broken:make")) == ["broken"]
    assert code_files("python:absent:make") == {}
    assert "nets" not in sys.modules


def test_the_digest_moves_with_any_of_its_files(repository: Path) -> None:
    before = code_digest(REFERENCE)

    (repository / "nets" / "unread.py").write_text("A = 1\n")
    assert code_digest(REFERENCE) == before
    (repository / "nets" / "parts.py").write_text("WIDTH = 9\n")
    assert code_digest(REFERENCE) != before


def test_what_is_written_of_a_model_changes_with_its_code(repository: Path) -> None:
    data: Any = SimpleNamespace(channels=1, image_size=(4, 4))
    own, known = ModelConfig(model=REFERENCE), ModelConfig(model="cifar_resnet20")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    before = describe(net, own, data)

    (repository / "nets" / "parts.py").write_text("WIDTH = 9\n")

    assert describe(net, own, data) != before
    assert "code" not in describe(net, known, data)


def test_what_the_persons_code_raises_is_told_as_theirs() -> None:
    def broken(*_: object) -> None:
        raise KeyError("logits")

    with pytest.raises(RecipeError, match=r"--metric: your code raised KeyError: 'logits'"):
        called(broken, "--metric", 1)
    with pytest.raises(RecipeError, match=r"--metric: your metric returned a str"):
        score(lambda: "good", "--metric")
    assert score(lambda: torch.tensor(0.5), "--metric") == 0.5


def test_our_own_errors_keep_their_kind() -> None:
    def refusing() -> None:
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        called(refusing, "--metric")


def test_a_metric_that_cannot_be_made_ends_with_2(repository: Path, edgestill: Callable[..., Any]) -> None:
    (repository / "own_broken.py").write_text("def make():\n    raise ValueError('my own mistake')\n")
    model = repository / "m.onnx"

    ended = edgestill("quantize", model, "--calibration", model, "--metric", "python:own_broken:make", "--allow-code")

    assert ended.code == 2
    assert "--metric: your code raised ValueError: my own mistake" in ended.err
