from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgestill

ROOT = Path(__file__).resolve().parents[2]


def test_the_interface_and_the_packages_are_this_repository_s() -> None:
    import benchmarks
    import pipeline
    import targets

    for module in (edgestill, benchmarks, pipeline, targets):
        assert Path(str(module.__file__)).is_relative_to(ROOT), "installed as a copy: install it again, editable"
        assert "site-packages" not in str(module.__file__)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, edgestill; print(sorted({'torch', 'numpy', 'pydantic', 'onnx'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_every_name_is_there_and_has_a_type_for_mypy() -> None:
    tree = ast.parse((ROOT / "edgestill.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name for one in typed.body if isinstance(one, ast.ImportFrom) for alias in one.names}

    assert names == set(edgestill.__all__)
    assert all(callable(getattr(edgestill, name)) for name in edgestill.__all__)
    assert set(edgestill.__all__) <= set(dir(edgestill))


def test_errors_are_the_ones_that_the_verbs_raise() -> None:
    from targets import errors

    with pytest.raises(edgestill.RecipeError):
        edgestill.load_recipe(Path("nowhere.yaml"))
    assert edgestill.EdgestillError is errors.EdgestillError


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise_model'"):
        edgestill.quantise_model  # noqa: B018
