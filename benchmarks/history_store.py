"""The history of measurements: a database of whole records, with the columns that are asked for beside them.

A record is written once and never changed; what a person accepts stands in a table of its own. The database holds the version
of its schema, and another version is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Engine,
    Index,
    Text,
    exc,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, defer, mapped_column

from benchmarks.device.record import Record, validate
from benchmarks.history_database import BUSY_S, UnavailableError, label_of, make_engine, readable, told, url_of, writing
from benchmarks.records import moment_of
from targets.errors import DataError, IntegrityError, MeasurementError

SCHEMA_VERSION = 1
CLOCK_TOLERANCE = timedelta(days=1)
MAX_TRIES = 20  # of a write that other writers came between
IDS_A_QUERY = 500  # a statement holds a limited number of values


class Base(DeclarativeBase):
    """Tables are named edgestill_*: a team's database may hold others."""


class SchemaRow(Base):
    """One row: the version that wrote the tables."""

    __tablename__ = "edgestill_schema"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class RunRow(Base):
    """One record, whole in `record` (JSON). `utc` is ISO 8601 in UTC with microseconds, so that it sorts as text.

    `valid`: neither disturbed, nor dated in the future when it came: that wrong date passes, and stays wrong.
    """

    __tablename__ = "edgestill_runs"
    __table_args__ = (Index("edgestill_runs_in_order", "hard_sha256", "utc"),)
    run_id: Mapped[str] = mapped_column(primary_key=True)
    utc: Mapped[str] = mapped_column(index=True)
    hard_sha256: Mapped[str]
    name: Mapped[str] = mapped_column(index=True)
    target: Mapped[str] = mapped_column(index=True)
    precision: Mapped[str] = mapped_column(index=True)
    preset: Mapped[str]
    p25_us: Mapped[float]
    p50_us: Mapped[float]
    p99_us: Mapped[float | None]
    fps: Mapped[float]
    load_ms: Mapped[float | None]
    peak_rss_mib: Mapped[float | None]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    model_sha256: Mapped[str]
    git_sha: Mapped[str | None] = mapped_column(index=True)
    valid: Mapped[bool]
    record: Mapped[str] = mapped_column(Text)


class AcceptedRow(Base):
    """A level that a person accepted: it begins at `run_id`."""

    __tablename__ = "edgestill_accepted"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    hard_sha256: Mapped[str] = mapped_column(index=True)
    who: Mapped[str]
    note: Mapped[str]
    utc: Mapped[str]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Run ids of one write. `different`: another record of this id was there already, and stays."""

    added: tuple[str, ...]
    already: tuple[str, ...]
    different: tuple[str, ...]


class History:
    """An open history. Use `open_history`."""

    def __init__(self, engine: Engine, label: str) -> None:
        self._engine = engine
        self._label = label

    def add(self, records: Sequence[Record], *, now: datetime) -> Written:
        """Write records in one transaction. Raises UnavailableError, and then none of them is written."""
        latest = utc_text(now + CLOCK_TOLERANCE)
        with told(self._label):
            for _ in range(MAX_TRIES):
                try:
                    with Session(writing(self._engine)) as session, session.begin():
                        return _add(session, records, latest)
                except exc.IntegrityError:
                    continue  # another process wrote one of these between our look and our write: look again
        raise UnavailableError(self._label, f"other writers came first {MAX_TRIES} times")

    def accept(self, *, run_id: str, hard_sha256: str, who: str, note: str, utc: str) -> AcceptedRow:
        """Mark where an accepted level begins; the mark that is there already, if there is one."""
        row = AcceptedRow(run_id=run_id, hard_sha256=hard_sha256, who=_storable(who), note=_storable(note), utc=utc)
        with told(self._label), suppress(exc.IntegrityError):
            with Session(writing(self._engine), expire_on_commit=False) as session, session.begin():
                session.add(row)
            return row
        return next(one for one in self.accepted() if one.run_id == run_id)

    def newest(self, hard_sha256: str) -> str | None:
        """The date of the newest run of a series."""
        query = select(RunRow.utc).filter_by(hard_sha256=hard_sha256).order_by(RunRow.utc.desc()).limit(1)
        with told(self._label), Session(self._engine) as session:
            return session.scalar(query)

    def runs(self) -> list[RunRow]:
        """Every run, oldest first, without its record. Runs of one moment stand in the order of their ids."""
        query = select(RunRow).options(defer(RunRow.record, raiseload=True)).order_by(RunRow.utc, RunRow.run_id)
        with told(self._label), Session(self._engine) as session:
            return list(session.scalars(query))

    def accepted(self) -> list[AcceptedRow]:
        with told(self._label), Session(self._engine) as session:
            return list(session.scalars(select(AcceptedRow).order_by(AcceptedRow.utc, AcceptedRow.run_id)))

    def documents(self) -> Iterator[dict[str, Any]]:
        """Every record as the JSON that it was kept as, oldest first."""
        query = select(RunRow.record).order_by(RunRow.utc, RunRow.run_id)
        with told(self._label), Session(self._engine) as session:
            for text in session.scalars(query):
                yield json.loads(text)

    def hard(self, run_id: str) -> dict[str, Any]:
        """The hard keys of one record. It is not validated: a later edgestill may have written keys that are not known here."""
        with told(self._label), Session(self._engine) as session:
            text = session.scalars(select(RunRow.record).filter_by(run_id=run_id)).one()
        hard: dict[str, Any] = json.loads(text)["env"]["hard"]
        return hard


@contextmanager
def open_history(db: str | Path, *, write: bool, busy_s: float = BUSY_S) -> Iterator[History]:
    """The history at a path or a URL; with `write` it is made where there is none.

    Raises DataError where there is none to read, IntegrityError for another schema or a file that is no database,
    UnavailableError where it cannot be opened now.
    """
    url = url_of(db)
    label = label_of(db)
    engine = make_engine(url if write else readable(url), busy_s)
    try:
        with told(label):
            _check_schema(engine, label, write)
        yield History(engine, label)
    finally:
        engine.dispose()


def utc_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _add(session: Session, records: Sequence[Record], latest: str) -> Written:
    known = dict(_present(session, [record.run_id for record in records]))
    added, already, different = [], [], []
    for record in records:
        row = _row(record, latest)
        if record.run_id not in known:
            known[record.run_id] = row.record
            session.add(row)
            added.append(record.run_id)
        elif _is_same(known[record.run_id], row.record, record):
            already.append(record.run_id)
        else:
            different.append(record.run_id)
    return Written(added=tuple(added), already=tuple(already), different=tuple(different))


def _is_same(stored: str, given: str, record: Record) -> bool:
    """By the text, else by what it says: a later edgestill writes keys into a record that an earlier one did not know."""
    try:
        return stored == given or validate(json.loads(stored)) == record
    except MeasurementError:  # with such keys it is not what was given
        return False


def _present(session: Session, run_ids: Sequence[str]) -> Iterator[tuple[str, str]]:
    for begin in range(0, len(run_ids), IDS_A_QUERY):
        some = run_ids[begin : begin + IDS_A_QUERY]
        for row in session.execute(select(RunRow.run_id, RunRow.record).where(RunRow.run_id.in_(some))):
            yield row.run_id, row.record


def _row(record: Record, latest: str) -> RunRow:
    utc = utc_text(moment_of(record))
    return RunRow(
        run_id=record.run_id,
        utc=utc,
        hard_sha256=_storable(record.env.hard_sha256),
        name=_storable(record.model.name),
        target=_storable(record.runtime.name),
        precision=_storable(record.model.precision),
        preset=_storable(record.scenario.preset),
        p25_us=record.summary.p25_us,
        p50_us=record.summary.p50_us,
        p99_us=record.summary.es_p99_us,
        fps=record.summary.fps,
        load_ms=record.summary.load_ms,
        peak_rss_mib=record.memory.vmhwm_mib,
        size_bytes=record.model.bytes,
        model_sha256=_storable(record.model.sha256),
        git_sha=_storable(sha) if isinstance(sha := record.git.get("sha"), str) else None,
        valid=record.validity.ok and utc <= latest,
        record=json.dumps(record.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False),
    )


def _storable(text: str) -> str:
    """What no database takes (half a surrogate pair, NUL) is escaped in the columns; the record keeps it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_record(record: Record) -> None:
    """Raises DataError for a record that a history cannot order, name or judge."""
    moment_of(record)
    if not record.run_id or not record.run_id.isprintable():
        raise DataError(f"run_id={record.run_id!r} names no run. Mend the record.")
    if record.summary.p25_us <= 0:
        raise DataError(f"run {record.run_id}: p25_us={record.summary.p25_us} is no latency. Measure again.")


def _check_schema(engine: Engine, label: str, write: bool) -> None:
    version = _version(engine)
    if version is None and not write:
        raise DataError(f"{label} holds no history. Add runs first: edgestill history add DIR --db {label}.")
    if version is None:
        version = _create(engine, label)
    if version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        advice = "Update edgestill" if newer else "Restore the file from a copy"
        raise IntegrityError(
            f"history {label}: its schema is version {version}, this edgestill reads {SCHEMA_VERSION}. "
            f"{advice}, or give another --db. Nothing was changed."
        )


def _version(engine: Engine) -> int | None:
    """The version of the schema, 0 for a table without one; None where there are no tables of ours."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(SchemaRow.__tablename__):
            return None
        return connection.scalar(select(func.max(SchemaRow.version))) or 0


def _create(engine: Engine, label: str) -> int:
    try:
        with writing(engine).begin() as connection:
            tables = inspect(connection).get_table_names()
            if SchemaRow.__tablename__ not in tables:
                _refuse_foreign(connection.dialect.name, tables, label)
                Base.metadata.create_all(connection)
                connection.execute(insert(SchemaRow).values(version=SCHEMA_VERSION))
    except (exc.IntegrityError, exc.ProgrammingError, exc.OperationalError):
        if _version(engine) is None:  # no other process made them at the same moment
            raise
    return _version(engine) or 0


def _refuse_foreign(dialect: str, tables: Iterable[str], label: str) -> None:
    if dialect == "sqlite" and (others := sorted(tables)):
        raise DataError(
            f"--db {label}: a database of something else (it holds '{others[0]}'). Give a path of its own to the history."
        )
