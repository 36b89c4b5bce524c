"""Work that is done once: a JSON file a result, kept as long as everything that it was made from is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from targets.base import read_json, write_json
from targets.errors import IntegrityError

ROOT = Path(__file__).parents[2]
DECIDING = ("onnxruntime", "openvino", "nncf", "torch", "numpy")


def kept(path: Path, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The value in `path` if it was made under this key (compared as JSON), else what `make` gives, written there.

    A damaged file is made again, and so is a value that holds an `error`: the next try may go well.
    """
    try:
        document = read_json(path) if path.is_file() else {}
    except IntegrityError:
        document = {}
    found: dict[str, Any] | None = document.get("value") if document.get("key") == key else None
    if found is not None and found.get("error") is None:
        return found
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "value": value})
    return value


def sources() -> dict[str, str]:
    """What a measurement of ours stands on: one digest over our own modules, and the versions below them."""
    digest = hashlib.sha256()
    for package in ("benchmarks", "pipeline", "targets"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return {"sources": digest.hexdigest(), **{name: version(name) for name in DECIDING}}
