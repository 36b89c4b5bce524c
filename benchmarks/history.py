"""Measurements over time: what was kept, whether something became slower, what a person accepted.

    from benchmarks.history import check_history, keep_records
    keep_records(measure_arms(...), db="edgestill-history.db")
    print(check_history(db="edgestill-history.db").text())

A record that the database does not take now (locked, read-only, its server gone) waits in a folder beside it and is merged
by whichever verb opens the history next.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.device.record import Record
from benchmarks.history_answers import ChangeAccepted, HistoryAdded, HistoryChecked, HistoryShown
from benchmarks.history_database import BUSY_S, UnavailableError, label_of, spool_dir_of
from benchmarks.history_series import (
    SHORT,
    SLOWER,
    Run,
    Series,
    named,
    read_series,
    select_series,
    sentence,
)
from benchmarks.history_spool import keep, set_aside, waiting
from benchmarks.history_store import (
    CLOCK_TOLERANCE,
    History,
    check_record,
    open_history,
    utc_text,
)
from benchmarks.records import load_records, moment_of
from targets.errors import BudgetError, DataError, RecipeError

DEFAULT_DB = "edgestill-history.db"
Database = str | Path


def add_to_history(
    paths: Iterable[Path],
    *,
    db: Database = DEFAULT_DB,
    spool_dir: Path | None = None,
    busy_s: float = BUSY_S,
    now: datetime | None = None,
) -> HistoryAdded:
    """Keep every record at `paths` (files, or directories searched to their leaves). What is there already stays once."""
    records = [stored.record for path in paths for stored in load_records(path)]
    return keep_records(records, db=db, spool_dir=spool_dir, busy_s=busy_s, now=now)


def keep_records(
    records: Sequence[Record],
    *,
    db: Database = DEFAULT_DB,
    spool_dir: Path | None = None,
    busy_s: float = BUSY_S,
    now: datetime | None = None,
) -> HistoryAdded:
    """Write records, those first that wait in the spool. The same record again is no second one.

    `busy_s`: how long other writers are waited for. Another record of an id that is there is in `failure` (exit 2), the
    rest is written. Raises DataError for a record that has no date, id or latency, and where neither the database nor the
    spool can be written; IntegrityError for a history of another schema.
    """
    records, now = _distinct(records), now or datetime.now(UTC)
    directory = spool_dir or spool_dir_of(db)
    try:
        with open_history(db, write=True, busy_s=busy_s) as history:
            merged, notes = _merge(history, directory, now)
            newest = {key: history.newest(key) for key in {record.env.hard_sha256 for record in records}}
            stored = history.add(records, now=now)
    except UnavailableError as error:
        return _spooled(records, directory, label_of(db), error)
    added_ids = set(stored.added)
    added = [record for record in records if record.run_id in added_ids]
    notes += _clock_notes(added, newest, now)
    return HistoryAdded(
        db=label_of(db),
        added=stored.added,
        already=stored.already,
        different=stored.different,
        merged=merged,
        notes=tuple(notes),
        failure=_different(stored.different, label_of(db)),
    )


def show_history(
    series: str | None = None,
    *,
    db: Database = DEFAULT_DB,
    page: Path | None = None,
    spool_dir: Path | None = None,
    busy_s: float = BUSY_S,
    now: datetime | None = None,
) -> HistoryShown:
    """All series, or those that `series` names by the beginning of their id or by words of their title; `page`: as HTML."""
    found, notes = _read(db, spool_dir, busy_s, now)
    chosen = select_series(found, series)
    if page is not None:
        _write_page(chosen, page)
    return HistoryShown(db=label_of(db), series=tuple(chosen), page=page, notes=tuple(notes))


def check_history(
    series: Sequence[str] = (),
    *,
    db: Database = DEFAULT_DB,
    spool_dir: Path | None = None,
    busy_s: float = BUSY_S,
    now: datetime | None = None,
) -> HistoryChecked:
    """The verdict on every series, or on those named; a series that is slower is in `failure` (exit 4)."""
    found, notes = _read(db, spool_dir, busy_s, now)
    named_ids = {one.hard_sha256 for wanted in series for one in select_series(found, wanted)}
    chosen = [one for one in found if not series or one.hard_sha256 in named_ids]
    return HistoryChecked(db=label_of(db), series=tuple(chosen), notes=tuple(notes), failure=_slower(chosen))


def accept_change(
    series: str | None = None,
    *,
    note: str,
    run: str | None = None,
    who: str | None = None,
    db: Database = DEFAULT_DB,
    spool_dir: Path | None = None,
    busy_s: float = BUSY_S,
    now: datetime | None = None,
) -> ChangeAccepted:
    """Take a new level for good: from the open change of a series on, or from `run` (the beginning of its id).

    Raises RecipeError where there is no such change or more than one, DataError where the database cannot be written.
    """
    if not note.strip():
        raise RecipeError("--note is empty: who reads the history later needs the reason. Give it in a few words.")
    found, _ = _read(db, spool_dir, busy_s, now)
    one, first = _to_accept(select_series(found, series), run)
    with open_history(db, write=True, busy_s=busy_s) as history:
        row = history.accept(
            run_id=first.run_id,
            hard_sha256=one.hard_sha256,
            who=who or _user(),
            note=note.strip(),
            utc=utc_text(now or datetime.now(UTC)),
        )
    return ChangeAccepted(
        db=label_of(db), series=one.id, title=one.title, run=named(first), who=row.who, note=row.note, utc=row.utc
    )


def _distinct(records: Sequence[Record]) -> list[Record]:
    """Without what is reached by two paths; two different records of one id both stay, so that the second is told of."""
    distinct: list[Record] = []
    by_id: dict[str, list[Record]] = {}
    for record in records:
        check_record(record)
        same = by_id.setdefault(record.run_id, [])
        if record not in same:
            same.append(record)
            distinct.append(record)
    return sorted(distinct, key=lambda record: (moment_of(record), record.run_id))


def _merge(history: History, directory: Path, now: datetime) -> tuple[int, list[str]]:
    """Write what waits; its file goes once the database has it. A record of an id that is there is set aside."""
    spooled, notes = waiting(directory)
    merged = 0
    for one in spooled:
        stored = history.add([one.record], now=now)
        if stored.different:
            path = set_aside(one.path, "conflict")
            notes.append(
                f"run {one.record.run_id}: another record of this id is in the history; this one is now {path}"
            )
            continue
        merged += len(stored.added)
        with suppress(OSError):
            one.path.unlink()
    return merged, notes


def _clock_notes(records: Sequence[Record], newest: Mapping[str, str | None], now: datetime) -> list[str]:
    """Runs whose dates say that a clock jumped, or that they come late; `newest` is the last date of each series before."""
    late = [
        record.run_id[:SHORT]
        for record in records
        if (last := newest[record.env.hard_sha256]) is not None and utc_text(moment_of(record)) < last
    ]
    future = [record.run_id[:SHORT] for record in records if moment_of(record) > now + CLOCK_TOLERANCE]
    notes = []
    if late:
        notes.append(f"older than runs that are there already: {_some(late)}. Each takes its place by its date")
    if future:
        notes.append(f"dated in the future: {_some(future)}. The clock there is wrong; they are kept and not judged")
    return notes


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _spooled(records: Sequence[Record], directory: Path, label: str, error: UnavailableError) -> HistoryAdded:
    try:
        keep(directory, records)
    except OSError as reason:
        raise DataError(
            f"{error}\nNor can the records wait in {directory}: {reason.strerror}. They are where they were; "
            "give a folder with --spool."
        ) from None
    note = f"{error.reason}: {len(records)} records wait in {directory} and are merged when the history is opened next"
    return HistoryAdded(db=label, spooled=tuple(record.run_id for record in records), notes=(note,))


def _different(run_ids: Sequence[str], label: str) -> DataError | None:
    if not run_ids:
        return None
    return DataError(
        f"run {_some(run_ids)}: another record of this id is in {label} and stays. The one given was not written. "
        "Look which is right; give the other an id of its own."
    )


def _read(db: Database, spool_dir: Path | None, busy_s: float, now: datetime | None) -> tuple[list[Series], list[str]]:
    directory, now = spool_dir or spool_dir_of(db), now or datetime.now(UTC)
    notes: list[str] = []
    if num_waiting := len(list(directory.glob("*.json"))):
        try:
            with open_history(db, write=True, busy_s=busy_s) as history:
                merged, notes = _merge(history, directory, now)
                notes += [f"{merged} records that waited in {directory} are in the history now"] if merged else []
        except UnavailableError as error:
            notes = [f"{num_waiting} records wait in {directory} and are not shown: {error.reason}"]
    with open_history(db, write=False, busy_s=busy_s) as history:
        return read_series(history, now), notes


def _write_page(series: Sequence[Series], page: Path) -> None:
    from benchmarks.history_report import render_history  # plotly and jinja2: for a page only

    try:
        render_history(series, page)
    except OSError as error:
        raise DataError(
            f"--page {page}: cannot be written ({error.strerror}). Give a file in a folder of yours."
        ) from None


def _slower(series: Sequence[Series]) -> BudgetError | None:
    slower = [one for one in series if one.verdict == SLOWER]
    if not slower:
        return None
    told = "; ".join(f"{one.id} {one.title}: {sentence(one)}" for one in slower[:3])
    return BudgetError(
        f"{len(slower)} of {len(series)} series slower. {told}\n"
        f"Look what changed there, or take it for good: edgestill history accept {slower[0].id} --note WHY."
    )


def _to_accept(series: Sequence[Series], run: str | None) -> tuple[Series, Run]:
    wanted = [
        (one, candidate)
        for one in series
        for candidate in one.runs
        if (candidate.run_id.startswith(run) if run else one.open and candidate.run_id == one.open.first_run)
    ]
    if not wanted:
        asked = f"run {run}: no run of these series has such an id" if run else "no series has an open change"
        raise RecipeError(f"{asked}. See edgestill history show; --run RUN begins a new level at any run.")
    if len(wanted) > 1:
        told = "; ".join(f"{one.id} {one.title}, run {candidate.run_id}" for one, candidate in wanted[:5])
        raise RecipeError(f"{len(wanted)} changes could be meant: {told}. Name one series or run.")
    if wanted[0][1].why_not:
        raise RecipeError(
            f"run {wanted[0][1].run_id} is {wanted[0][1].why_not}: no level begins there. Name another run."
        )
    return wanted[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return f"uid {os.getuid()}"
