"""The part of JSON Schema (draft 2020-12) that our published schemas use: a device has the standard library and no more.

Keywords: type, const, required, properties, additionalProperties, propertyNames, items, pattern, minimum. A pattern is
written `^...$` and must fit the whole string. Numbers are finite: JSON has no others, though Python reads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
NOTES = {"$schema", "$id", "title", "description"}  # said to people


def first_fault(schema: Schema, value: Any, where: str) -> str | None:
    """What is wrong first, as "where.key: why"; None for a value that fits. Raises ValueError for an unknown keyword."""
    return next(_faults(schema, value, where), None)


def _faults(schema: Schema, value: Any, where: str) -> Iterator[str]:
    if unknown := sorted(schema.keys() - KEYWORDS.keys() - NOTES):
        raise ValueError(f"{where}: the schema uses '{unknown[0]}', which is not read here")
    for keyword, check in KEYWORDS.items():
        if keyword in schema:
            yield from check(schema[keyword], value, where, schema)


def _type(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    names = [wanted] if isinstance(wanted, str) else wanted
    if not any(TYPES[name](value) for name in names):
        yield f"{where}: {_shown(value)} is not of type {' or '.join(names)}"


def _const(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if value != wanted or isinstance(value, bool) is not isinstance(wanted, bool):
        yield f"{where}: {_shown(value)} is not {wanted!r}"


def _required(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from (f"{where}.{key}: missing" for key in wanted if key not in value)


def _properties(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key in (key for key in wanted if key in value):
            yield from _faults(wanted[key], value[key], f"{where}.{key}")


def _additional(wanted: Any, value: Any, where: str, schema: Schema) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for key in (key for key in value if key not in schema.get("properties", {})):
        if isinstance(wanted, Mapping):
            yield from _faults(wanted, value[key], f"{where}.{key}")
        elif not wanted:
            yield f"{where}.{key}: unknown key"


def _property_names(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _faults(wanted, key, f"{where}: the name")


def _items(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(wanted, item, f"{where}.{index}")


def _pattern(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if isinstance(value, str) and not re.fullmatch(wanted[1:-1], value):
        yield f"{where}: {_shown(value)} has not the form {wanted}"


def _minimum(wanted: Any, value: Any, where: str, _: Schema) -> Iterator[str]:
    if _is_number(value) and value < wanted:
        yield f"{where}: {value} is below {wanted}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value == int(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
KEYWORDS: dict[str, Callable[[Any, Any, str, Schema], Iterator[str]]] = {
    "type": _type,
    "const": _const,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "propertyNames": _property_names,
    "items": _items,
    "pattern": _pattern,
    "minimum": _minimum,
}
