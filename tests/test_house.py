"""The house itself: where the packages come from, and what the documents promise."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.documents import documents, filled, printed

ROOT = Path(__file__).resolve().parent.parent
DEVICE_FILES = sorted([*(ROOT / "targets").rglob("*.py"), *(ROOT / "benchmarks" / "device").rglob("*.py")])


@pytest.mark.parametrize("package", ["pipeline", "targets", "benchmarks", "edgestill"])
def test_each_package_is_imported_from_this_repository(package: str) -> None:
    assert Path(str(import_module(package).__file__)).is_relative_to(ROOT)


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_device_side_files_parse_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_a_document_holds_nothing_but_what_its_commands_print(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert filled(text) == text


def test_only_what_stands_in_a_place_is_replaced() -> None:
    command = "benchmarks.headline docs/results/fashion_mnist.json"
    begin, end = f"<!-- results: python -m {command} -->\n", "<!-- end -->"

    text = filled(f"before\n{begin}old\n{end}\nafter <!-- end -->")

    assert text == f"before\n{begin}{printed(command)}\n{end}\nafter <!-- end -->"
    assert "wrn_16_2" in printed(command)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_document_names_exist(name: str) -> None:
    named = re.findall(
        r"`((?:pipeline|benchmarks|targets|docs|recipes)/[A-Za-z0-9_./]+?)/?`", (ROOT / name).read_text()
    )

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_recipe_is_valid() -> None:
    from pipeline.recipe import load_recipe

    recipes = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem != "hardware"]  # a matrix

    assert [load_recipe(path).name for path in recipes] == [path.stem for path in recipes]
