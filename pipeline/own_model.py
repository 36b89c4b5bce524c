"""What a person points at: an ONNX file, a compiled directory, or a bundle."""

from __future__ import annotations

from pathlib import Path

from benchmarks.device.verify import MANIFEST, check_files
from targets.errors import ModelError

COMPILED_FILE = "compiled.json"


def compiled_in(model: Path) -> Path | None:
    """The compiled directory that `model` is or, as a bundle whose files are all as written, holds; None for an ONNX file."""
    if not model.is_dir():
        return None
    if (model / MANIFEST).is_file():
        check_files(model)
        return model / "model"
    if (model / COMPILED_FILE).is_file():
        return model
    raise ModelError(f"{model} is neither a compiled directory nor a bundle. Give one of these, or an ONNX file.")


def is_compiled(model: Path) -> bool:
    """Whether `model` is a bundle or a compiled directory, its files not looked at."""
    return (model / MANIFEST).is_file() or (model / COMPILED_FILE).is_file()
