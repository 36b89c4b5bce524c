"""What manifest.json of a bundle holds, schema 1, as JSON Schema: the one place from which the published file,
docs/schemas/bundle-manifest-1.json, is written, and by which a device reads a manifest.

Within version 1 no key goes away or changes its meaning. One may be added that need not be there; an older program refuses
it by name, and a bundle brings the program that knows it.
"""

from __future__ import annotations

from typing import Any

SCHEMA_VERSION = 1

# A path inside the bundle: relative, with "/", and neither "." nor ".." nor an empty part among its parts.
PATH = r"^(?!\.{1,2}(/|$))(?!.*/\.{1,2}(/|$))[^/\\\x00-\x1f]+(/[^/\\\x00-\x1f]+)*$"
SHA256 = "^[0-9a-f]{64}$"
GOLDEN_FILE = r"^golden/[A-Za-z0-9-]+\.npy$"

STRING: dict[str, Any] = {"type": "string"}
NUMBER_OR_NULL: dict[str, Any] = {"type": ["number", "null"]}
NUMBERS_OR_NULL: dict[str, Any] = {"type": ["array", "null"], "items": {"type": "number"}}


def _closed(properties: dict[str, Any], **notes: str) -> dict[str, Any]:
    """An object with exactly these keys."""
    return {
        **notes,
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _map(of: dict[str, Any], **notes: str) -> dict[str, Any]:
    """An object with keys of any name, all of one kind."""
    return {**notes, "type": "object", "additionalProperties": of}


TENSORS = {
    "type": "array",
    "items": _closed(
        {
            "name": STRING,
            "shape": {
                "description": "null where the graph leaves an axis free",
                "type": "array",
                "items": {"type": ["integer", "null"], "minimum": 0},
            },
            "dtype": {**STRING, "description": "numpy's name"},
            "layout": {**STRING, "description": "NCHW, NHWC, ...; empty where nobody said so"},
        }
    ),
}
PREPROCESSING = {
    "description": "from encoded bytes to the input; null where nobody said how",
    "type": ["object", "null"],
    "required": ["mode", "resize", "crop", "mean", "std"],
    "properties": {
        "mode": {**STRING, "description": "RGB or L"},
        "resize": {
            "description": "the shorter side in pixels before the crop",
            "type": ["integer", "null"],
            "minimum": 1,
        },
        "crop": {"description": "height, width", "type": ["array", "null"], "items": {"type": "integer", "minimum": 1}},
        "mean": {**NUMBERS_OR_NULL, "description": "of a channel, in pixel units, 0..255"},
        "std": {**NUMBERS_OR_NULL, "description": "of a channel, in pixel units, 0..255"},
    },
    "additionalProperties": False,
}
ACCURACY = {
    "description": "of what ships, on samples that no choice has seen; empty where there are no labels",
    "type": "object",
    "properties": {
        "metric": STRING,
        "value": NUMBER_OR_NULL,
        "n": {"description": "samples", "type": ["integer", "null"], "minimum": 0},
        "ci95": NUMBERS_OR_NULL,
    },
}
MEASURED = _closed(
    {
        "on": STRING,
        "at": {**STRING, "description": "ISO 8601, UTC"},
        "preset": STRING,
        "p50_us": NUMBER_OR_NULL,
        "p50_ci95_us": NUMBERS_OR_NULL,
        "fps": NUMBER_OR_NULL,
        "load_ms": NUMBER_OR_NULL,
        "peak_rss_mib": NUMBER_OR_NULL,
        "size_mib": NUMBER_OR_NULL,
        "trustworthy": {"type": "boolean"},
    },
    description="what a keeper asks first; record.json has the rest; null could not be read",
)
GOLDEN = _closed(
    {
        "source": STRING,
        "contains_samples": {"type": "boolean"},
        "batch": {"type": "integer", "minimum": 1},
        "inputs": _map({"type": "string", "pattern": GOLDEN_FILE}),
        "outputs": _map({"type": "string", "pattern": GOLDEN_FILE}),
        "tolerance": _map({"type": "number", "minimum": 0}, description="largest |delta| that is let pass, an output"),
    },
    description="an input and what the model answered to it where it was bundled",
)
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": f"urn:edgestill:bundle-manifest:{SCHEMA_VERSION}",
    "title": f"edgestill bundle manifest, version {SCHEMA_VERSION}",
    **_closed(
        {
            "schema_version": {"type": "integer", "const": SCHEMA_VERSION},
            "name": STRING,
            "target": STRING,
            "options": {"type": "object"},
            "precision": STRING,
            "float_reason": {"description": "why float ships in place of INT8", "type": ["string", "null"]},
            "toolchain": {**STRING, "description": "what compiled and proved it: package and version"},
            "built_for": _map(STRING, description="arch, runtime, sm, ...; empty in a portable bundle"),
            "inputs": TENSORS,
            "outputs": TENSORS,
            "preprocessing": PREPROCESSING,
            "labels": {"type": "array", "items": STRING},
            "accuracy": ACCURACY,
            "measured": MEASURED,
            "versions": _map(STRING),
            "provenance": {"type": "object"},
            "golden": GOLDEN,
            "files": {
                **_map({"type": "string", "pattern": SHA256}),
                "description": "sha256 of every file but manifest.json, manifest.sha256 and model.sig",
                "propertyNames": {"pattern": PATH},
            },
        }
    ),
}
