"""A model's weights on disk: safetensors that are ours, and the safetensors and torch files that people bring.

Our files carry the sha256 of their tensors in the header, because the format itself notices truncation but no flipped
bit. Foreign safetensors have no such digest; torch's own files are zip archives, whose checksums are verified.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from targets.errors import ModelError

_DIGEST = "edgestill.sha256"
_WRAPPERS = ("state_dict", "model", "net")  # keys under which training scripts keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # put before every name by DataParallel and by torch.compile
_NUM_LISTED = 3

_log = logging.getLogger(__name__)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers as safetensors; `path` is then the old file or the whole new one."""
    # Cloned: safetensors takes neither channels_last nor tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # One entry only: safetensors writes several in random order, and equal weights must be equal files.
        save_file(tensors, partial, metadata={_DIGEST: _digest(tensors)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file, or from a torch file that loads with weights_only.

    Strict: every name and shape must fit, and every number must be finite. A torch file's weights may lie under
    "state_dict", "model" or "net" and behind the prefix "module."; what was unwrapped is logged. Raises ModelError,
    and leaves the model as it was, when the file is absent, truncated, altered, or not this model's.
    """
    tensors = _read(path)
    check_fit(tensors, model.state_dict(), str(path))
    if bad := [
        name for name, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()
    ]:
        raise ModelError(
            f"{path}: {_listed(bad)} hold NaN or Inf. The training that wrote them failed; use an earlier checkpoint."
        )
    model.load_state_dict(tensors)


def check_fit(given: Mapping[str, Any], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Raise ModelError with the first few names (and how many more) that are missing, unknown, or of another shape."""
    faults = []
    if missing := [name for name in wanted if name not in given]:
        faults.append(f"missing {_listed(missing)}")
    if unexpected := [name for name in given if name not in wanted]:
        faults.append(f"unknown {_listed(unexpected)}")
    misfits = (_misfit(name, given[name], wanted[name]) for name in wanted if name in given)
    if misshaped := [misfit for misfit in misfits if misfit is not None]:
        faults.append(f"misshapen {_listed(misshaped)}")
    if faults:
        heads = _heads(given, wanted) if not missing and not unexpected else None
        advice = "Name the model, args and classes that it was trained with."
        if heads is not None:
            advice = f"It answers {heads[0]} classes, not {heads[1]}: give weights that answer the data's classes, in their order."
        raise ModelError(f"{origin} does not fit the model: {'; '.join(faults)}.\n{advice}")


def _heads(given: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """How many classes are answered and how many are asked, where nothing but the size of the last layer differs."""
    shapes = [
        (given[name].shape, value.shape)
        for name, value in wanted.items()
        if _misfit(name, given[name], value) is not None
    ]
    if not all(len(found) == len(asked) > 0 and found[1:] == asked[1:] for found, asked in shapes):
        return None
    sizes = {(found[0], asked[0]) for found, asked in shapes}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _misfit(name: str, given: Any, wanted: Tensor) -> str | None:
    if not isinstance(given, Tensor):
        return f"{name} (no tensor)"
    if given.shape != wanted.shape:
        return f"{name} ({list(given.shape)}, the model has {list(wanted.shape)})"
    if given.is_floating_point() != wanted.is_floating_point():
        return f"{name} ({given.dtype}, the model has {wanted.dtype})"
    return None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NUM_LISTED
    return ", ".join(names[:_NUM_LISTED]) + (f" and {more} more" if more > 0 else "")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{path}: there is no such file. Name an existing checkpoint, relative to the working directory."
        )
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except ModelError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything at all
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{path} cannot be read as weights: {type(error).__name__}: {reason}.\n"
            "It is truncated, altered, or holds more than tensors. Save the state_dict again, best as safetensors."
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        expected = (file.metadata() or {}).get(_DIGEST)
    if expected is not None and _digest(tensors) != expected:
        raise ModelError(f"{path} is not the file that was written: its digest differs. Copy or train it again.")
    return tensors


def _read_torch(path: Path) -> Mapping[str, Any]:
    if zipfile.is_zipfile(path):  # torch does not check the archive's checksums itself
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ModelError(f"{path} is damaged: the checksum of '{damaged}' differs. Copy it again.")
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True), path)


def _unwrapped(loaded: Any, path: Path) -> Mapping[str, Any]:
    """The names and tensors in what a torch file held."""
    taken = []
    while isinstance(loaded, Mapping) and (wrapper := _wrapper_in(loaded)) is not None:
        loaded = loaded[wrapper]
        taken.append(f"took its entry '{wrapper}'")
    if not isinstance(loaded, Mapping):
        raise ModelError(
            f"{path} holds a {type(loaded).__name__}, no names with tensors. Save model.state_dict() in it."
        )
    weights = {str(name): value for name, value in loaded.items()}
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
            taken.append(f"dropped the prefix '{prefix}'")
    if taken:
        _log.info("%s: %s", path, ", ".join(taken))
    return weights


def _wrapper_in(loaded: Mapping[str, Any]) -> str | None:
    return next((key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
