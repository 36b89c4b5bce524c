"""Records that a history could not take yet: a JSON file each in a folder beside it, merged when it can be written again.

A file is named by what it holds, so that a record kept twice is one file and two records of one id are two. A file that
is no record is set aside under another name and told of, never removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.device.environment import fingerprint
from benchmarks.device.record import Record, validate
from benchmarks.history_store import check_record, moment_of
from targets.base import read_json, write_json
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
    """What waits, oldest first, and a sentence for each file that is no record: it now ends in .corrupt."""
    spooled, notes = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            record = validate(read_json(path))
            check_record(record)
            spooled.append(Spooled(path, record))
        except EdgestillError as error:
            if path.exists():  # another process may have merged it meanwhile
                notes.append(f"{set_aside(path, 'corrupt')} is no whole record ({error}) and was not merged")
    spooled.sort(key=lambda one: (moment_of(one.record), one.record.run_id))
    return spooled, notes


def set_aside(path: Path, why: str) -> Path:
    """Rename a file so that it is not read again, over no other file; its old path where even that cannot be done."""
    names = (path.with_suffix(f".{number}.{why}" if number else f".{why}") for number in count())
    try:
        return path.rename(next(name for name in names if not name.exists()))
    except OSError:
        return path
