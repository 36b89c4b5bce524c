"""The digest of the data: which content decides the result, found without reading it again.

Reads the files that `locate` names; writes a JSON cache of their content hashes, valid while size, time of change and
inode are the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from targets.base import read_json, sha256_file, write_json
from targets.errors import DataError, IntegrityError

SETTLED_NS = 2_000_000_000  # a younger file may change again within one tick of its clock: hashed, not remembered


def data_digest(paths: Iterable[Path], cache_path: Path) -> str:
    """sha256 (hex) over sorted (path relative to the common folder, content hash): moving the set does not change it."""
    absolute = [path.absolute() for path in paths]
    if not absolute:
        raise DataError("The data have no files, so that they have no digest. Check data.source.")
    common = os.path.commonpath([path.parent for path in absolute])
    known = _read_cache(cache_path)
    hashes = {path: _content_hash(path, known) for path in absolute}
    _write_cache(cache_path, known, hashes)
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(common).as_posix(), path) for path in absolute):
        digest.update(f"{name}\0{hashes[path][-1]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _content_hash(path: Path, known: dict[str, Any]) -> list[Any]:
    """[size in bytes, time of change in ns, inode, sha256]: what the cache holds of a file."""
    try:
        stat = path.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if (entry := known.get(str(path))) and entry[:3] == identity:
            return list(entry)
        return [*identity, sha256_file(path)]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Restore the file, or take it out of the data."
        ) from None


def _read_cache(cache_path: Path) -> dict[str, Any]:
    try:
        cached = read_json(cache_path)
    except IntegrityError:  # absent or damaged: everything is hashed again
        return {}
    return cached if isinstance(cached, dict) and all(_is_entry(entry) for entry in cached.values()) else {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], str)


def _write_cache(cache_path: Path, known: dict[str, Any], hashes: dict[Path, list[Any]]) -> None:
    now_ns = time.time_ns()
    settled = {str(path): entry for path, entry in hashes.items() if now_ns - entry[1] > SETTLED_NS}
    if any(known.get(path) != entry for path, entry in settled.items()):
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_path, {**known, **settled})
