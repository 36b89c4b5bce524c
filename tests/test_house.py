"""The house itself: where the packages come from, and what the documents promise."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICE_FILES = sorted([*(ROOT / "targets").rglob("*.py"), *(ROOT / "benchmarks" / "device").rglob("*.py")])


@pytest.mark.parametrize("package", ["pipeline", "targets", "benchmarks", "edgestill"])
def test_each_package_is_imported_from_this_repository(package: str) -> None:
    assert Path(str(import_module(package).__file__)).is_relative_to(ROOT)


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_device_side_files_parse_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


def test_the_readme_table_is_what_its_command_prints() -> None:
    from benchmarks.headline import headline
    from targets.base import read_json

    readme = (ROOT / "README.md").read_text()
    marked = re.search(r"<!-- results: python -m benchmarks\.headline (\S+) -->\n(.*?)\n<!-- end -->", readme, re.S)

    assert marked is not None
    assert marked[2].strip() == headline(read_json(ROOT / marked[1])).strip()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_document_names_exist(name: str) -> None:
    named = re.findall(
        r"`((?:pipeline|benchmarks|targets|docs|recipes)/[A-Za-z0-9_./]+?)/?`", (ROOT / name).read_text()
    )

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_recipe_is_valid() -> None:
    from pipeline.recipe import load_recipe

    recipes = sorted((ROOT / "recipes").glob("*.yaml"))

    assert [load_recipe(path).name for path in recipes] == [path.stem for path in recipes]
