"""A teacher's logits for each view of the train split, on disk: written once, read in every epoch that shows the view again.

One row a sample of the split; one .npy a view and part, memory-mapped, so that an epoch reads the rows that it shows and memory
does not grow with the data. soft_labels.json says what they hold for; opened for anything else they are refused. Logits are stored
as float32, or as float16 of the float32: off by |z| / 2048 at most, so that no log-softmax at T moves by more than
max|z| / (1024 T). With top_k the parts are

    values (N, k): the k largest z_j;  classes (N, k): which they are;  rest (N,): ln of the sum of exp z_j over the others,

and each of the others comes back as rest - ln(K - k). At T = 1 the probabilities of the k, and the mass m of the others together,
are then exact, and what is lost is how the others differ: KL(true || restored) = m (ln(K - k) - H), H the entropy of the others
among themselves, in nats. Above T = 1 the others come back with more mass than they had, below with less (Jensen).
"""
# Shapes: N samples, K classes, k = top_k.

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from targets.base import read_json, sha256_file, write_json
from targets.errors import IntegrityError, ModelError

FILE = "soft_labels.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
AGAIN = "Build them again: edgestill run RECIPE --force soft_labels"


@dataclass(frozen=True, kw_only=True)
class LabelsOf:
    """What soft labels hold for, and nothing else. teacher, data and transform are sha256 digests."""

    teacher: str
    data: str
    transform: str
    view_seeds: tuple[int, ...]
    num_samples: int
    num_classes: int
    dtype: str = "fp16"
    top_k: int | None = None

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what is stored a view."""
        dtype = DTYPES[self.dtype]
        if self.top_k is None:
            return {"logits": (dtype, (self.num_samples, self.num_classes))}
        shape = (self.num_samples, self.top_k)
        index_dtype = torch.int16 if self.num_classes <= 2**15 else torch.int32
        return {"values": (dtype, shape), "classes": (index_dtype, shape), "rest": (dtype, shape[:1])}

    def files(self, view: int) -> dict[str, str]:
        """The names of a view's files, by their part."""
        return {part: f"view-{view:04d}-{part}.npy" for part in self.parts}


# What a reader is told where the field differs.
DIFFERS = {
    "teacher": "they are the answers of another teacher",
    "data": "they were made from other data",
    "transform": "the images were augmented, sized or normalised otherwise",
    "view_seeds": "they are of other views",
    "num_samples": "the train split had another number of samples",
    "num_classes": "there was another number of classes",
    "dtype": "they are stored in another type",
    "top_k": "another number of classes is stored a sample",
}


class LabelCache:
    """Soft labels for training, opened. On a GPU the view that is read lies in its memory, on a CPU it is the mapped file."""

    def __init__(self, directory: Path, of: LabelsOf, info: Mapping[str, Any], device: torch.device) -> None:
        self.of = of
        self.info = info
        self._directory, self._device = directory, device
        self._held: tuple[int, dict[str, Tensor]] | None = None

    @classmethod
    def open(cls, directory: Path, of: LabelsOf, device: torch.device) -> LabelCache:
        """Raises IntegrityError, which says what differs, unless these are whole files of just the labels `of`: every byte is
        read."""
        info = read_info(directory)
        _check_holds_for(info, of, directory)
        wanted = {name for view in range(len(of.view_seeds)) for name in of.files(view).values()}
        if missing := sorted(wanted - info["files"].keys()):
            raise IntegrityError(
                f"{directory}: {missing[0]} was never written: the soft labels are not whole. {AGAIN}."
            )
        _check_files(directory, {name: info["files"][name] for name in wanted})
        return cls(directory, of, info, device)

    @property
    def view_seeds(self) -> tuple[int, ...]:
        return self.of.view_seeds

    @property
    def seconds_a_view(self) -> float:
        """How long the teacher took for one, in the mean."""
        return float(sum(self.info["seconds"]) / len(self.info["seconds"]))

    def logits(self, view: int, index_N: Tensor) -> Tensor:
        """(N, K) float32 for these positions of the train split, as view number `view` shows them."""
        if self._held is None or self._held[0] != view:
            self._held = (view, self._load(view))
        return restored(self._held[1], index_N, self.of.num_classes)

    def _load(self, view: int) -> dict[str, Tensor]:
        # Copy-on-write, as torch takes no read-only array; nothing writes.
        arrays = {part: np.load(self._directory / name, mmap_mode="c") for part, name in self.of.files(view).items()}
        return {part: torch.from_numpy(array).to(self._device) for part, array in arrays.items()}


class LabelWriter:
    """Writes view after view; the views of these labels that a killed writer left whole are not missing."""

    def __init__(self, directory: Path, of: LabelsOf) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._of = directory, of
        self._info = _left_whole(directory, of)

    @property
    def precision(self) -> str | None:
        """What the first view was computed in; None before it."""
        precision: str | None = self._info["precision"]
        return precision

    @property
    def missing(self) -> list[int]:
        written = self._info["files"].keys()
        return [view for view in range(len(self._of.view_seeds)) if not written >= set(self._of.files(view).values())]

    def write(self, view: int, batches: Iterable[Tensor], *, precision: str) -> None:
        """`batches`: logits of the whole split in its order. Raises ModelError where they cannot be stored."""
        begun_s = time.monotonic()
        names = self._of.files(view)
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for part, (dtype, shape) in self._of.parts.items():
                files[part] = stack.enter_context((self._directory / f".{names[part]}").open("wb"))
                _write_header(files[part], dtype, shape)
            for logits_NK in batches:
                for part, values in stored(logits_NK, self._of).items():
                    files[part].write(values.cpu().numpy().tobytes())
        for name in names.values():
            (self._directory / f".{name}").replace(self._directory / name)
        self._info["files"] |= {name: _facts(self._directory / name) for name in names.values()}
        self._info["precision"] = precision
        self._info["seconds"].append(time.monotonic() - begun_s)
        write_json(self._directory / FILE, self._info)


def stored(logits_NK: Tensor, of: LabelsOf) -> dict[str, Tensor]:
    """Logits as the parts that are written. Raises ModelError for logits that no part can hold."""
    logits_NK = logits_NK.float()
    if logits_NK.shape[1] != of.num_classes:
        raise ModelError(
            f"The teacher gives {logits_NK.shape[1]} logits for {of.num_classes} classes. Mend the teacher."
        )
    parts = {"logits": logits_NK}
    if of.top_k is not None:
        values_Nk, classes_Nk = logits_NK.topk(of.top_k, dim=1)
        rest_N = logits_NK.scatter(1, classes_Nk, -math.inf).logsumexp(1)
        parts = {"values": values_Nk, "classes": classes_Nk, "rest": rest_N}
    typed = {part: parts[part].to(dtype) for part, (dtype, _) in of.parts.items()}
    if not all(bool(torch.isfinite(values).all()) for values in typed.values()):
        raise ModelError(_not_storable(logits_NK, of))
    return typed


def restored(parts: Mapping[str, Tensor], index_N: Tensor, num_classes: int) -> Tensor:
    """(N, K) float32: the rows `index_N` of stored parts; the formula of the rest stands above."""
    if "logits" in parts:
        return parts["logits"][index_N].float()
    values_Nk, classes_Nk, rest_N = (parts[part][index_N] for part in ("values", "classes", "rest"))
    other_N = rest_N.float() - math.log(num_classes - values_Nk.shape[1])
    return other_N[:, None].repeat(1, num_classes).scatter_(1, classes_Nk.long(), values_Nk.float())


def read_info(directory: Path) -> dict[str, Any]:
    """soft_labels.json; raises IntegrityError where it is not as it was written."""
    info = read_json(directory / FILE)
    if not isinstance(info, dict) or not {*DIFFERS, "precision", "seconds", "files"} <= info.keys():
        raise IntegrityError(f"{directory / FILE} is not as it was written. {AGAIN}.")
    return info


def _left_whole(directory: Path, of: LabelsOf) -> dict[str, Any]:
    """The description of what an earlier writer of the same labels left; of nothing where a byte of it differs."""
    nothing = {"schema_version": 1, **asdict(of), "precision": None, "seconds": [], "files": {}}
    try:
        info = read_info(directory)
        _check_holds_for(info, of, directory)
        _check_files(directory, info["files"])
    except IntegrityError:
        return nothing
    return info


def _check_holds_for(info: Mapping[str, Any], of: LabelsOf, directory: Path) -> None:
    for field, wanted in asdict(of).items():
        found = tuple(info[field]) if isinstance(info[field], list) else info[field]
        if found == wanted:
            continue
        raise IntegrityError(
            f"{directory}: these soft labels do not hold here: {DIFFERS[field]} ({_short(found)}, not {_short(wanted)}).\n"
            f"{AGAIN}, or distil with teacher_forward: online."
        )


def _check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise IntegrityError(f"{path} is gone. {AGAIN}.")
        if path.stat().st_size != facts["bytes"]:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}. {AGAIN}.")
        if sha256_file(path) != facts["sha256"]:
            raise IntegrityError(f"{path} has changed since it was written. {AGAIN}.")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_header(file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of a .npy. What follows is written, not mapped: a full disk kills a process that writes through a mapping."""
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _not_storable(logits_NK: Tensor, of: LabelsOf) -> str:
    if not bool(torch.isfinite(logits_NK).all()):
        return "The teacher's logits are no numbers (NaN or Inf), so there is nothing to store. Look at how it was trained."
    return (
        f"The teacher's logits reach {float(logits_NK.abs().max()):.3g}, and float16 ends at 65504. "
        "Set distill.cache.dtype: fp32."
    )


def _short(value: object) -> str:
    """A value in a message: a digest by its beginning, view seeds by their number and the first."""
    if isinstance(value, tuple):
        return f"{len(value)} from seed {value[0]}" if value else "none"
    return value[:12] if isinstance(value, str) else str(value)
