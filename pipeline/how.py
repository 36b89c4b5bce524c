"""What the command line says beside the recipe: it decides how a stage is built, never what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.progress import Progress, Quiet


@dataclass(frozen=True, kw_only=True)
class How:
    """`seed` is the recipe's; `allow_code` lets `python:` references run."""

    seed: int = 0
    progress: Progress = field(default_factory=Quiet)
    offline: bool = False
    allow_code: bool = False
    include_samples: bool = False
    sign_key: Path | None = None  # where it lies; pipeline/signing.py alone reads what it holds
