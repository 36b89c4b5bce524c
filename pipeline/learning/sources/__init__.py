"""Where images and labels come from: one reader a kind of source, all of them ending in the same checked `Source`.

Reads what `data.source` of the recipe names; writes only what torchvision downloads. Imports numpy and the standard
library: torch, torchvision and a person's own module are imported by the reader that needs them, so that a digest is quick.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.learning.sources import embedded, factory, folder, npz, vision
from pipeline.learning.sources.digest import data_digest
from pipeline.learning.sources.parts import Arrays, Files, Part, Source, check_source
from pipeline.recipe import DataConfig
from targets.errors import DataError

__all__ = ["Arrays", "Files", "Part", "Source", "data_digest", "locate", "read_source"]

KINDS = "mnist_5k, digits, torchvision:NAME, npz:PATH, image_folder:PATH or python:package.module:factory"


def locate(config: DataConfig, *, offline: bool) -> tuple[Path, ...]:
    """The files that decide the data. Downloads what is absent unless `offline`; raises DataError naming the path looked at."""
    kind, _, rest = config.source.partition(":")
    match kind:
        case "mnist_5k" | "digits" if not rest:
            return (embedded.locate(kind),)
        case "torchvision" if rest:
            return vision.locate(rest, config.root, offline=offline)
        case "npz" if rest:
            return (npz.locate(Path(rest)),)
        case "image_folder" if rest:
            return folder.locate(Path(rest))
        case "python" if rest:
            return (factory.locate(rest),)
    raise _unknown(config)


def read_source(config: DataConfig, *, allow_code: bool = False) -> Source:
    """Read and check everything but the pixels of image files. Raises DataError: what is wrong with which file."""
    kind, _, rest = config.source.partition(":")
    match kind:
        case "mnist_5k" | "digits" if not rest:
            source = embedded.read(kind)
        case "torchvision" if rest:
            source = vision.read(rest, config.root)
        case "npz" if rest:
            source = npz.read(Path(rest))
        case "image_folder" if rest:
            source = folder.read(Path(rest))
        case "python" if rest:
            source = factory.read(rest, allow_code=allow_code)
        case _:
            raise _unknown(config)
    check_source(source, config.source)
    return source


def _unknown(config: DataConfig) -> DataError:
    return DataError(f"data.source={config.source!r} is no source that is known. Give one of: {KINDS}.")
