"""The published schema of a bundle's manifest, held against jsonschema, what we write, and what a device reads by."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from benchmarks.device.json_schema import first_fault
from benchmarks.device.manifest import SCHEMA, SCHEMA_VERSION
from pipeline.bundles import bundle_schema
from targets.base import read_json

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "tests" / "fixtures" / "bundle-quickstart"
PUBLISHED = ROOT / "docs" / "schemas" / f"bundle-manifest-{SCHEMA_VERSION}.json"
VALIDATOR = Draft202012Validator(SCHEMA)
Keys = tuple[str | int, ...]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-2, 2)
    | st.sampled_from(["", "a", "../a", "a/b", "0" * 64, "golden/x.npy"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "shape", "x", "../x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    read: dict[str, Any] = read_json(COMMITTED / "manifest.json")
    return read


def test_the_published_file_is_the_schema_that_devices_read_by() -> None:
    """Written by `edgestill bundle schema`."""
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == bundle_schema() == SCHEMA
    Draft202012Validator.check_schema(SCHEMA)


def test_what_a_caller_does_to_the_schema_changes_ours_not() -> None:
    bundle_schema()["properties"].clear()

    assert SCHEMA["properties"]


def test_the_committed_manifest_is_valid_for_both(manifest: dict[str, Any]) -> None:
    VALIDATOR.validate(manifest)
    assert first_fault(SCHEMA, manifest, "manifest") is None


def _paths(value: Any, path: Keys = ()) -> Iterator[Keys]:
    """Of every value in a JSON document but the document itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))


def _parent(document: Any, path: Keys) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def _required(schema: dict[str, Any], path: Keys = ()) -> Iterator[Keys]:
    yield from ((*path, key) for key in schema.get("required", ()))
    for key, inner in schema.get("properties", {}).items():
        yield from _required(inner, (*path, key))
    if "items" in schema:
        yield from _required(schema["items"], (*path, 0))


@pytest.mark.parametrize("path", list(_required(SCHEMA)), ids=lambda path: ".".join(map(str, path)))
def test_each_required_key_is_missed(path: Keys, manifest: dict[str, Any]) -> None:
    broken = copy.deepcopy(manifest)
    del _parent(broken, path)[path[-1]]

    assert not VALIDATOR.is_valid(broken)
    assert first_fault(SCHEMA, broken, "manifest") == f"manifest.{'.'.join(map(str, path))}: missing"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_we_and_jsonschema_take_and_refuse_the_same(manifest: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(manifest)
    path = data.draw(st.sampled_from(sorted(_paths(manifest), key=str)))
    parent, value = _parent(changed, path), data.draw(JSON)
    if isinstance(parent, dict) and data.draw(st.booleans()):
        parent[data.draw(st.sampled_from(["name", "x", "../x", "a//b"]))] = value
    else:
        parent[path[-1]] = value

    assert (first_fault(SCHEMA, changed, "manifest") is None) == VALIDATOR.is_valid(changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1"])
def test_a_tolerance_is_a_finite_number(value: Any, manifest: dict[str, Any]) -> None:
    broken = copy.deepcopy(manifest)
    broken["golden"]["tolerance"]["logits"] = value

    fault = first_fault(SCHEMA, broken, "manifest")

    assert fault == f"manifest.golden.tolerance.logits: {value!r} is not of type number"


def test_a_keyword_that_is_not_read_is_no_silent_pass() -> None:
    with pytest.raises(ValueError, match="uses 'maxLength'"):
        first_fault({"maxLength": 3}, "four", "value")
