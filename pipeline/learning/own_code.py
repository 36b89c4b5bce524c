"""Code of the person's own, named in a recipe as `python:package.module:factory`, and only behind --allow-code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets.errors import RecipeError

PREFIX = "python:"


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
            f"{where}={reference}: cannot be imported: {type(error).__name__}: {str(error)[:200]}. "
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
