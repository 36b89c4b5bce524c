"""The state of a training on disk, whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FILE = "training.pt"


def save_checkpoint(state: Mapping[str, Any], checkpoint_dir: Path) -> None:
    """Replace the last state by this one, in one step."""
    partial = checkpoint_dir / f"{FILE}.partial"
    torch.save(dict(state), partial)
    partial.replace(checkpoint_dir / FILE)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state, or None where a byte is missing or flipped: torch.load checks none of its archive's checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception:  # a damaged file may raise anything at all
        return None
    return state
