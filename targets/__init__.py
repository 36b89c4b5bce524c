"""What a model is compiled for: one file a target, and the registry of their names. Imports no vendor SDK."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from targets.base import Target
from targets.errors import RecipeError
from targets.executorch import ExecuTorch
from targets.onnxruntime import OnnxRuntimeCpu
from targets.openvino import OpenVinoCpu
from targets.tensorrt import TensorRt

TARGETS: dict[str, type[Any]] = {target.name: target for target in (OpenVinoCpu, OnnxRuntimeCpu, TensorRt, ExecuTorch)}
KINDS: dict[str, type[Any]] = {
    "int": int,
    "bool": bool,
    "str": str,
    "float": float,
}  # annotations are strings in dataclasses


def make_target(name: str, options: Mapping[str, Any]) -> Target:
    """The target of that name with these options; raises RecipeError with the nearest known name."""
    if name not in TARGETS:
        raise RecipeError(f"target '{name}' is not known here. {_advice(name, TARGETS)}")
    known = {field.name: str(field.type) for field in fields(TARGETS[name])}
    for option, value in options.items():
        if option not in known:
            raise RecipeError(f"option '{option}' is none of target '{name}'. {_advice(option, known)}")
        _check(name, option, value, KINDS[known[option]])
    target: Target = TARGETS[name](**options)
    return target


def _check(name: str, option: str, value: Any, kind: type[Any]) -> None:
    if type(value) is not kind:
        raise RecipeError(f"option {option}={value!r} of target '{name}' must be {kind.__name__}. Write it as such.")
    if option.startswith("num_") and value < 1:
        raise RecipeError(f"option {option}={value} of target '{name}' must be 1 or more. Raise it.")


def _advice(given: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."
