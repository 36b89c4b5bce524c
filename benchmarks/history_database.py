"""Which database a history lies in, how it is opened, and what its driver's complaints mean in words.

SQLite in one file, or PostgreSQL by its URL. What is SQLite's own stands at the end of this file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, exc, make_url

from benchmarks.device.environment import fingerprint
from targets.errors import DataError, IntegrityError, RecipeError

BUSY_S = 30.0  # how long a write waits for other writers


class UnavailableError(DataError):
    """The database cannot be read or written now: locked, read-only, full, or its server does not answer."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(f"history {label}: {reason}. Nothing was changed. Try again, or give another --db.")
        self.reason = reason


def url_of(db: str | Path) -> URL:
    """Of a database URL or the path of an SQLite file. Raises RecipeError or DataError for what can be neither."""
    if "://" not in str(db):
        return URL.create("sqlite", database=str(_checked(Path(db))))
    try:
        url = make_url(str(db))
    except exc.ArgumentError:
        raise RecipeError("--db: the URL cannot be read. Give DIALECT+DRIVER://USER@HOST/NAME, or a path.") from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise RecipeError(f"--db {url}: a history in memory is lost at the end. Give a file.")
    return url


def label_of(db: str | Path) -> str:
    """The database in words, without a password."""
    return url_of(db).render_as_string(hide_password=True) if "://" in str(db) else str(db)


def spool_dir_of(db: str | Path) -> Path:
    """Where records wait that the database does not take: beside its file; for a server in the working directory, in a
    folder of its own, so that records for one server never reach another."""
    url = url_of(db)
    if url.get_backend_name() == "sqlite" and url.database is not None:
        return Path(f"{url.database.removeprefix('file:')}.spool")
    return Path(f"edgestill-history-{fingerprint({'url': label_of(db)})[:8]}.spool")


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"--db {path}: this is a directory. Give the file of the history, e.g. {path}/history.db.")
    if not path.absolute().parent.is_dir():
        raise DataError(f"--db {path}: there is no directory {path.parent}. Make it, or give another path.")
    return path


@contextmanager
def told(label: str) -> Iterator[None]:
    """Turn what a driver says into one of our errors."""
    try:
        yield
    except (exc.OperationalError, exc.InternalError, exc.ProgrammingError) as error:
        raise UnavailableError(label, _reason(error)) from error
    except exc.IntegrityError:
        raise
    except exc.DatabaseError as error:
        raise IntegrityError(
            f"history {label}: {_reason(error)}. Restore the file from a copy, or give another --db."
        ) from error


def _reason(error: exc.DBAPIError) -> str:
    return " ".join(str(error.orig).split()).rstrip(".?")


def make_engine(url: URL, busy_s: float) -> Engine:
    """Raises RecipeError for a kind of database that is not known or whose driver is not installed."""
    try:
        if url.get_backend_name() != "sqlite":
            return create_engine(url)
        engine = create_engine(url, connect_args={"timeout": busy_s})
    except exc.NoSuchModuleError:
        raise RecipeError(
            f"--db: SQLAlchemy knows no database '{url.drivername}'. Use postgresql:// or a path."
        ) from None
    except ModuleNotFoundError as error:
        driver = "'psycopg[binary]'" if error.name == "psycopg" else error.name
        raise RecipeError(
            f"--db {url.drivername}://: its driver '{error.name}' is not installed. pip install {driver}."
        ) from None
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine, its transactions such as will write."""
    return engine.execution_options(edgestill_write=True)


def readable(url: URL) -> URL:
    """Of an SQLite file that may be read-only, in a folder that may be too: SQLite must not want to write beside it."""
    path = Path(url.database or "")
    if url.get_backend_name() != "sqlite" or str(path).startswith("file:"):
        return url
    if not path.exists():
        raise DataError(f"{path}: there is no history. Add runs first: edgestill history add DIR --db {path}.")
    effective = os.access in os.supports_effective_ids
    if all(os.access(one, os.W_OK, effective_ids=effective) for one in (path, path.absolute().parent)):
        return url
    log = path.with_name(f"{path.name}-wal")
    how = {"mode": "ro"} if log.exists() and log.stat().st_size else {"immutable": "1"}
    return URL.create("sqlite", database=path.absolute().as_uri(), query={**how, "uri": "true"})


def _on_connect(connection: Any, _record: Any) -> None:
    """Readers and a writer at once (WAL); transactions begin when `_on_begin` says so, not when the driver guesses.

    Switching to WAL needs the file alone. Who does not get it goes on without: the next opener switches.
    """
    connection.isolation_level = None
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")


def _on_begin(connection: Any) -> None:
    """A writer takes its lock at the start: one that reads first and writes then could find itself refused, not waiting."""
    kind = "IMMEDIATE" if connection.get_execution_options().get("edgestill_write") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {kind}")
