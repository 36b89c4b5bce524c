"""One image file: its pixels, or the reason why it has none. Reads files; Pillow is imported by the decoder."""

from __future__ import annotations

import io
from pathlib import Path

from benchmarks.device.preprocess import decode
from targets.base import Array
from targets.errors import DataError


def read_image(path: str, mode: str) -> Array:
    """uint8 (H, W, C) in `mode` (RGB or L); raises DataError with the file's name."""
    try:
        return decode(Path(path).read_bytes(), mode)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Restore it, or prepare the data again.") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def inspect(path: str) -> tuple[str, str]:
    """Pillow's name for the image's own mode, and why it cannot be decoded ("" where it can)."""
    from PIL import Image

    try:
        data = Path(path).read_bytes()
        decode(data, "RGB")
        with Image.open(io.BytesIO(data)) as image:
            return image.mode, ""
    except (DataError, OSError) as error:
        return "", str(error)
