"""Where images and labels come from: one reader a kind of source, all of them ending in the same checked `Source`.

Reads what `data.source` and `data.unlabelled` of the recipe name; writes only what torchvision downloads. Imports numpy and the standard
library: torch, torchvision and a person's own module are imported by the reader that needs them, so that a digest is quick.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.learning.sources import embedded, factory, folder, npz, unlabelled, vision
from pipeline.learning.sources.digest import data_digest
from pipeline.learning.sources.parts import Arrays, Files, Part, Source, check_source
from pipeline.recipe import DataConfig
from targets.errors import DataError

__all__ = [
    "Arrays",
    "Files",
    "Part",
    "Source",
    "data_digest",
    "locate",
    "locate_unlabelled",
    "read_source",
    "read_unlabelled",
]

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


def locate_unlabelled(config: DataConfig, name: str, *, offline: bool) -> tuple[Path, ...]:
    """As `locate`, for one source of `data.unlabelled`."""
    kind, _, rest = name.partition(":")
    if kind not in ("torchvision", "npz", "image_folder", "python", *embedded.SETS) or bool(rest) is (
        kind in embedded.SETS
    ):
        raise DataError(f"data.unlabelled: {name!r} is no source that is known. Give {KINDS}.")
    if kind == "image_folder" and rest:
        return unlabelled.locate_folder(Path(rest))
    return locate(config.model_copy(update={"source": name}), offline=offline)


def read_unlabelled(config: DataConfig, name: str, *, allow_code: bool = False) -> Part:
    """The images of one source of `data.unlabelled`, each labelled UNLABELLED, whatever labels the source has."""
    kind, _, rest = name.partition(":")
    match kind:
        case "image_folder" if rest:
            return unlabelled.read_folder(Path(rest))
        case "npz" if rest:
            return unlabelled.read_npz(Path(rest))
        case "python" if rest:
            return unlabelled.read_factory(rest, allow_code=allow_code)
    source = read_source(config.model_copy(update={"source": name}), allow_code=allow_code)
    return unlabelled.without_labels(source.train)


def _unknown(config: DataConfig) -> DataError:
    return DataError(f"data.source={config.source!r} is no source that is known. Give one of: {KINDS}.")
