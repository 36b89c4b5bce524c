"""Records on disk: what `edgestill bench` and the matrix keep, read back whole and checked.

A measured directory holds records.json {arm: record}, the raw samples that the records name, and where they were made
placements.json and profiles.json {arm: ...}. A file of one record reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.record import Record, validate
from targets.base import Placement, read_json, write_json
from targets.errors import DataError

SAME_MOMENT_S = 5.0  # records of one session carry one moment; each of older ones has its own, within seconds
RECORDS_FILE, PLACEMENTS_FILE, PROFILES_FILE = "records.json", "placements.json", "profiles.json"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One record and what was kept beside it; `directory` is where its samples_file paths begin."""

    arm: str
    record: Record
    file: Path
    placement: Placement | None = None
    profile: Mapping[str, Any] | None = None

    @property
    def directory(self) -> Path:
        return self.file.parent


def one_session(a: Stored, b: Stored) -> bool:
    """Whether both are arms of one session, so that their launches are pairs: written at once, and no two in one place.

    Raises DataError for a record whose time is none.
    """
    apart_s = abs(moment_of(a.record) - moment_of(b.record)).total_seconds()
    places = [{launch.order for launch in one.record.launches} for one in (a, b)]
    return a.file == b.file and apart_s <= SAME_MOMENT_S and places[0].isdisjoint(places[1])


def moment_of(record: Record) -> datetime:
    """When it was measured; a time without a zone is UTC. Raises DataError for what is no time."""
    try:
        moment = datetime.fromisoformat(record.utc)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise DataError(f"run {record.run_id}: utc='{record.utc}' is no date. Mend the record.") from None


def write_records(
    directory: Path, records: Mapping[str, Record], placements: Mapping[str, Placement | None] | None = None
) -> None:
    """Keep records, and the placements that are known, by the names of their arms."""
    write_json(directory / RECORDS_FILE, {arm: record.to_json() for arm, record in records.items()})
    known = {arm: one.to_json() for arm, one in (placements or {}).items() if one is not None}
    if known:
        write_json(directory / PLACEMENTS_FILE, known)


def load_records(path: Path) -> list[Stored]:
    """Every record at `path`: a file of one or of many, or a directory searched to its leaves, in the order of their paths.

    Raises DataError where there is none, MeasurementError for one of another schema.
    """
    if path.is_file():
        return list(_in_file(path))
    found = [stored for file in sorted(path.rglob(RECORDS_FILE)) for stored in _in_file(file)]
    if not found:
        raise DataError(f"{path}: no {RECORDS_FILE} is there. Measure first: edgestill bench MODEL --out {path}.")
    return found


def load_all(paths: Iterable[Path]) -> list[Stored]:
    """`load_records` of several; a record that is reached twice, by two paths or two copies, stands once.

    Raises DataError for two different records of one id.
    """
    found: dict[str, Stored] = {}
    for stored in (one for path in paths for one in load_records(path)):
        known = found.setdefault(stored.record.run_id, stored)
        if known.record != stored.record:
            raise DataError(
                f"{known.file} and {stored.file} hold two different records of one id ({stored.record.run_id}). "
                "One of them was changed by hand: leave it away."
            )
    return list(found.values())


def _in_file(file: Path) -> Iterator[Stored]:
    document = read_json(file)
    if not isinstance(document, dict):
        raise DataError(f"{file} holds no records. Give what edgestill bench wrote.")
    if "run_id" in document:
        document = {Path(file).stem: document}
    placements = _beside(file, PLACEMENTS_FILE)
    profiles = _beside(file, PROFILES_FILE)
    for arm, values in document.items():
        placement = Placement.from_json(placements[arm]) if arm in placements else None
        yield Stored(arm=arm, record=validate(values), file=file, placement=placement, profile=profiles.get(arm))


def _beside(file: Path, name: str) -> Mapping[str, Any]:
    path = file.with_name(name)
    return read_json(path) if path.is_file() and file.name == RECORDS_FILE else {}
