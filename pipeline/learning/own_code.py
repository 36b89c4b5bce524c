"""Code of the person's own, named in a recipe as `python:package.module:factory`, and only behind --allow-code.

What it raises is the person's to mend, so it is told as such. What enters a stage's key is its source.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from targets.base import sha256_file
from targets.errors import EdgestillError, RecipeError, first_line

PREFIX = "python:"
INSTALLED = frozenset({"site-packages", "dist-packages"})


def own_factory(reference: str, where: str, *, allow_code: bool) -> Callable[..., Any]:
    """Import the factory that `reference` names; `where` is the recipe's key, for the message.

    The working directory is appended to sys.path, never prepended: a `pipeline/` of the person's own must not hide ours.
    Raises RecipeError without --allow-code, and where module or function do not exist.
    """
    module_name, _, function = reference.removeprefix(PREFIX).partition(":")
    if not reference.startswith(PREFIX) or not module_name or not function:
        raise RecipeError(f"{where}={reference}: not of the form python:package.module:factory. Write it so.")
    if not allow_code:
        raise RecipeError(
            f"{where}={reference}: a recipe runs no code of its own unless it is told to. Add --allow-code if you trust it."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the import runs foreign code, which may raise anything
        raise RecipeError(
            f"{where}={reference}: cannot be imported: {type(error).__name__}: {first_line(error)}. "
            "Mend it, run from the folder that holds it, or install it."
        ) from error
    try:
        factory = getattr(module, function)
    except AttributeError:
        raise RecipeError(
            f"{where}={reference}: module {module_name} has no '{function}'. Name a function it has."
        ) from None
    if not callable(factory):
        raise RecipeError(
            f"{where}={reference}: '{function}' cannot be called. Name a function that returns the object."
        )
    result: Callable[..., Any] = factory
    return result


def called(function: Callable[..., Any], where: str, *given: Any) -> Any:
    """Call code of the person's own; what it raises becomes a RecipeError that says `where` it was named."""
    try:
        return function(*given)
    except EdgestillError:
        raise
    except Exception as error:  # foreign code may raise anything
        raise RecipeError(f"{where}: your code raised {type(error).__name__}: {first_line(error)}. Mend it.") from error


def score(metric: Callable[..., Any], where: str, *given: Any) -> float:
    """What a metric of the person's own says. Raises RecipeError for what is no number, NaN and infinity among it."""
    value = called(metric, where, *given)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{where}: your metric returned a {type(value).__name__}. Return one number.") from None
    if not math.isfinite(number):
        raise RecipeError(f"{where}: your metric returned {number}, which cannot be compared. Return a finite number.")
    return number


def code_digest(reference: str) -> str:
    """sha256 over the named module and all that it imports of the person's."""
    told = [f"{name} {sha256_file(path)}" for name, path in sorted(code_files(reference).items())]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def code_files(reference: str) -> dict[str, Path]:
    """Name -> file, of the named module and of what it imports, from anywhere in it, that lies below the working directory.
    Found by reading, not by running."""
    module = reference.removeprefix(PREFIX).partition(":")[0]
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or name in found or not (name == module or _is_own(name, path)):
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [package, *_imports(path, package)]
    return found


def _file_of(module: str) -> Path | None:
    """Where Python would find it: the working directory comes last."""
    for folder in [*sys.path, "."] if module else []:
        stem = Path(folder, *module.split(".")).absolute()
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def _is_own(name: str, path: Path) -> bool:
    """What a person edits: below the working directory, but neither installed there nor ours."""
    ours = name.partition(".")[0] in ("benchmarks", "edgestill", "pipeline", "targets")
    return path.is_relative_to(Path.cwd()) and not INSTALLED.intersection(path.parts) and not ours


def _imports(path: Path, package: str) -> Iterator[str]:
    """The names of modules, and of what may be one, that a file imports; none of a file that is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
