"""JSON into frozen dataclasses, strictly: no key too many or too few, every value of its type, no number that is none.

Knows the few annotations that records have: numbers, strings, dicts, tuples, dataclasses, and any of them or None.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from targets.errors import MeasurementError


def from_json(kind: type[Any], values: Any, where: str) -> Any:
    """Build the dataclass `kind`; `where` names the values in messages. Raises MeasurementError that names the key at fault."""
    if not isinstance(values, Mapping):
        raise _fault(where, f"a {type(values).__name__} stands where '{kind.__name__}' belongs")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise _fault(f"{where}.{unknown[0]}", "unknown key")
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if absent := sorted(required - set(values)):
        raise _fault(f"{where}.{absent[0]}", "missing")
    return kind(**{key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _typed(annotation: Any, value: Any, where: str) -> Any:
    """`value` as `annotation` wants it: the few forms that the dataclasses above use."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(arguments[0], value, where)
    if dataclasses.is_dataclass(annotation):
        return from_json(typing.cast("type[Any]", annotation), value, where)
    if origin is tuple:
        return _items(arguments, value, where)
    wanted = dict if origin is dict else annotation
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise _fault(where, f"{value!r} is not of type {wanted.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _fault(where, f"{value} is not a number; unreadable is null")
    return value


def _items(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _fault(where, f"{value!r} is not a list")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise _fault(where, f"{len(value)} values where {len(kinds)} belong")
    return tuple(_typed(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _fault(where: str, why: str) -> MeasurementError:
    return MeasurementError(f"{where}: {why}. Measure again, or mend the record.")
