"""A recipe's file, whatever recipe it is: read as plain values, and its first fault told in words. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from targets.errors import RecipeError


def read_sections(path: Path, *, begin: str) -> dict[str, Any]:
    """The sections of a YAML file. Raises RecipeError: what, why, and `begin`, how to come by a recipe."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise RecipeError(f"{path} cannot be read: {reason}. {begin}") from None
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(f"{path} is not YAML: {reason}. Mend that line.") from None
    if not isinstance(raw, dict):
        kind = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise RecipeError(f"{path} holds {kind}, not a recipe's sections. {begin}")
    return raw


def explain(error: ValidationError, origin: str, root: type[BaseModel], *, see: str) -> str:
    """The first fault in words, and how many more there are; `see` says where the keys are described."""
    faults = error.errors(include_url=False)
    first = faults[0]
    where = ".".join(str(part) for part in first["loc"]) or "the recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}."
        message = f"{origin}: unknown key '{where}'; {advice}"
    elif first["type"] == "missing":
        message = f"{origin}: '{where}' is missing. Add it; {see} describes it."
    else:
        given = "" if isinstance(first["input"], dict) else f"={str(first['input'])[:60]!r}"
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{origin}: {where}{given}: {reason}."
    more = len(faults) - 1
    return message + (f" ({more} more fault{'s' if more > 1 else ''} in this recipe)" if more else "")


def _known_keys(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that the section at `location` knows."""
    section = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        found = _section_in(annotation)
        if found is None:
            return []
        section = found
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _section_in(argument)) is not None:
            return found
    return None
