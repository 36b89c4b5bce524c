"""Records that a history could not take yet: a JSON file each in a folder beside it, merged when it can be written again.

A file is named by what it holds, so that a record kept twice is one file and two records of one id are two. A file that
is no record is set aside under another name and told of, never removed; one that cannot be read now, or that a later
edgestill wrote, waits on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.device.environment import fingerprint
from benchmarks.device.record import SCHEMA_VERSION, Record, validate
from benchmarks.history_store import check_record
from benchmarks.records import moment_of
from targets.base import write_json
from targets.errors import EdgestillError


@dataclass(frozen=True)
class Spooled:
    """A record that waits, and its file."""

    path: Path
    record: Record


def keep(directory: Path, records: Iterable[Record]) -> None:
    """Write each record whole or not at all. Raises OSError where the folder cannot be written."""
    directory.mkdir(exist_ok=True)
    for record in records:
        values = record.to_json()
        write_json(directory / f"{fingerprint(values)[:32]}.json", values)


def waiting(directory: Path) -> tuple[list[Spooled], list[str]]:
    """What can be merged, oldest first, and a sentence for each other file: that it waits on, or that it is no record and
    now ends in .corrupt."""
    spooled, notes = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            found = _read(path)
        except FileNotFoundError:
            continue  # another process has merged it meanwhile
        except OSError as error:
            notes.append(f"{path} cannot be read now ({error.strerror}) and waits on")
            continue
        if isinstance(found, Record):
            spooled.append(Spooled(path, found))
        else:
            notes.append(found)
    spooled.sort(key=lambda one: (moment_of(one.record), one.record.run_id))
    return spooled, notes


def _read(path: Path) -> Record | str:
    """A record, or in a sentence what the file is instead."""
    data = path.read_bytes()
    try:
        values = json.loads(data)
        if _is_newer(values):
            return f"{path} was written by a later edgestill (schema {values['schema_version']}) and waits for one"
        record = validate(values)
        check_record(record)
        return record
    except (ValueError, EdgestillError) as error:
        return f"{set_aside(path, 'corrupt')} is no whole record ({error}) and was not merged"


def _is_newer(values: Any) -> bool:
    version = values.get("schema_version") if isinstance(values, dict) else None
    return isinstance(version, int) and version > SCHEMA_VERSION


def set_aside(path: Path, why: str) -> Path:
    """Rename a file so that it is not read again, over no other file; its old path where even that cannot be done."""
    names = (path.with_suffix(f".{number}.{why}" if number else f".{why}") for number in count())
    try:
        return path.rename(next(name for name in names if not name.exists()))
    except OSError:
        return path
