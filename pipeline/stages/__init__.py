"""The stages, each imported when it is first used: a run that finds everything finished imports none of them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.stages import (
        ablation_score,
        bundle,
        data,
        deploy,
        distill,
        export,
        kit,
        quantize,
        report,
        score,
        soft_labels,
        teacher,
        verdict,
    )

__all__ = [
    "ablation_score",
    "bundle",
    "data",
    "deploy",
    "distill",
    "export",
    "kit",
    "quantize",
    "report",
    "score",
    "soft_labels",
    "teacher",
    "verdict",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no stage '{name}'")
    return import_module(f"{__name__}.{name}")
