from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.device.record import Record
from benchmarks.evidence.history_writes import record_of, write_at_once
from benchmarks.history import accept_change, add_to_history, check_history, keep_records, show_history
from benchmarks.history_database import spool_dir_of
from benchmarks.history_store import SCHEMA_VERSION, open_history
from benchmarks.records import write_records
from targets.errors import DataError, IntegrityError, RecipeError

NOW = datetime(2027, 1, 1, tzinfo=UTC)
RECORDS = [record_of(0, number) for number in range(6)]


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


def slower(record: Record) -> Record:
    """Another record of the same id."""
    return replace(record, summary=replace(record.summary, p50_us=9.0))


def documents(db: str | Path) -> list[dict[str, Any]]:
    with open_history(db, write=False) as history:
        return list(history.documents())


def ids(db: str | Path) -> list[str]:
    return [str(document["run_id"]) for document in documents(db)]


@contextmanager
def locked(db: Path) -> Iterator[None]:
    """Another process that writes and does not end."""
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder with a history of RECORDS[:2] in which nothing can be written, not even by root, who becomes nobody."""
    folder = Path(tempfile.mkdtemp())
    keep_records(RECORDS[:2], db=folder / "history.db")
    (folder / "history.db").chmod(0o444)
    folder.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_record_is_read_back_whole(db: Path) -> None:
    keep_records(RECORDS, db=db)

    assert documents(db) == [json.loads(json.dumps(record.to_json())) for record in RECORDS]
    with open_history(db, write=False) as history:
        assert history.hard(RECORDS[3].run_id) == RECORDS[3].env.hard


def test_the_same_record_again_is_no_second_one(db: Path) -> None:
    first = keep_records(RECORDS[:4], db=db)
    again = keep_records(RECORDS, db=db)

    assert (len(first.added), len(again.added), len(again.already)) == (4, 2, 4)
    assert again.failure is None
    assert ids(db) == [record.run_id for record in RECORDS]


@settings(max_examples=15, deadline=None)
@given(st.permutations(RECORDS), st.lists(st.sampled_from(RECORDS), max_size=3), st.integers(1, 5))
def test_any_order_and_any_batches_give_the_same_history(order: list[Record], twice: list[Record], batch: int) -> None:
    sent = [*order, *twice]
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "history.db"
        for begin in range(0, len(sent), batch):
            keep_records(sent[begin : begin + batch], db=db)

        assert documents(db) == [json.loads(json.dumps(record.to_json())) for record in RECORDS]


def test_another_record_of_an_id_is_an_error_that_names_it_and_the_rest_is_written(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)

    answer = keep_records([slower(RECORDS[0]), RECORDS[1]], db=db)

    assert answer.different == (RECORDS[0].run_id,)
    assert answer.failure is not None
    assert answer.failure.exit_code == 2
    assert RECORDS[0].run_id in str(answer.failure)
    assert [document["summary"]["p50_us"] for document in documents(db)] == [7.0, 7.0]


def test_two_records_of_one_id_in_two_directories_are_told_of(db: Path, tmp_path: Path) -> None:
    for name, record in (("a", RECORDS[0]), ("b", slower(RECORDS[0])), ("c", RECORDS[0])):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, {"int8": record})

    answer = add_to_history([tmp_path / name for name in "abc"], db=db)

    assert (answer.added, answer.already, answer.different) == ((RECORDS[0].run_id,), (), (RECORDS[0].run_id,))


def test_a_record_that_an_earlier_edgestill_wrote_is_the_same_one(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)
    with closing(sqlite3.connect(db)) as connection:  # without keys that have defaults, as before they were known
        document = json.loads(connection.execute("SELECT record FROM edgestill_runs").fetchone()[0])
        del document["model"]["teacher"], document["scenario"]["spin"]
        connection.execute("UPDATE edgestill_runs SET record = ?", [json.dumps(document)])
        connection.commit()

    assert keep_records(RECORDS[:1], db=db).already == (RECORDS[0].run_id,)


def with_a_newer_key(db: Path, record: Record) -> None:
    """As a later edgestill keeps it."""
    with closing(sqlite3.connect(db)) as connection:
        connection.execute(
            "UPDATE edgestill_runs SET record = ? WHERE run_id = ?",
            [json.dumps({**record.to_json(), "newer": 1}), record.run_id],
        )
        connection.commit()


def test_a_record_of_a_later_edgestill_hides_no_series(db: Path) -> None:
    other = replace(RECORDS[1], env=replace(RECORDS[1].env, hard={"cpu": "two"}, hard_sha256="f" * 64))
    keep_records([RECORDS[0], other], db=db)
    with_a_newer_key(db, other)

    shown, checked = show_history(db=db, now=NOW), check_history(db=db, now=NOW)

    assert len(shown.series) == len(checked.series) == 2
    assert any(one.before is not None and one.before.changed == {"cpu": ["one", "two"]} for one in shown.series)


def test_a_record_that_a_later_edgestill_wrote_differs_and_the_rest_is_written(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)
    with_a_newer_key(db, RECORDS[0])

    answer = keep_records(RECORDS[:2], db=db)

    assert (answer.added, answer.different) == ((RECORDS[1].run_id,), (RECORDS[0].run_id,))


def test_eight_writers_at_once_lose_nothing_and_write_nothing_twice(db: Path) -> None:
    found = write_at_once(str(db), writers=8, records=200, batch=20)

    assert (found["sent"], found["rows"], found["failed_writers"]) == (1760, 1600, 0)
    assert (found["lost"], found["twice"], found["not_whole"]) == (0, 0, 0)


@pytest.mark.skipif(
    "EDGESTILL_TEST_POSTGRESQL" not in os.environ, reason="EDGESTILL_TEST_POSTGRESQL: no empty database"
)
def test_a_server_takes_the_same_by_its_url_alone() -> None:
    url = os.environ["EDGESTILL_TEST_POSTGRESQL"]

    found = write_at_once(url, writers=4, records=100, batch=10)
    accepted = [accept_change(run="0000-000005", note=note, db=url, now=NOW).note for note in ("first", "second")]

    assert (found["rows"], found["lost"], found["twice"], found["not_whole"]) == (400, 0, 0, 0)
    assert accepted == ["first", "first"]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0])
def test_a_history_of_another_schema_is_refused_in_words_and_left_alone(db: Path, version: int) -> None:
    keep_records(RECORDS[:1], db=db)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE edgestill_schema SET version = ?", [version])
        connection.commit()

    for verb in (lambda: keep_records(RECORDS, db=db), lambda: show_history(db=db)):
        with pytest.raises(IntegrityError, match=rf"version {version}, this edgestill reads {SCHEMA_VERSION}\. \w+"):
            verb()
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT count(*) FROM edgestill_runs").fetchone() == (1,)
    assert not spool_dir_of(db).exists()


def test_a_file_that_is_no_database_is_refused(db: Path) -> None:
    db.write_text("no database, but long enough to be looked at " * 10)

    with pytest.raises(IntegrityError, match="not a database"):
        keep_records(RECORDS, db=db)


def test_a_database_of_something_else_is_left_alone(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE customers (name)")

    with pytest.raises(DataError, match="it holds 'customers'"):
        keep_records(RECORDS, db=db)
    with pytest.raises(DataError, match="holds no history"):
        show_history(db=db)


@pytest.mark.parametrize("exists", [True, False])
def test_records_for_a_locked_history_wait_and_are_merged_by_the_next_verb(db: Path, exists: bool) -> None:
    if exists:
        keep_records(RECORDS[:1], db=db)
    with locked(db):
        answer = keep_records(RECORDS[1:4], db=db, busy_s=0)

    assert (answer.added, len(answer.spooled), answer.failure) == ((), 3, None)
    assert "database is locked: 3 records wait in" in answer.text()
    shown = show_history(db=db, now=NOW)
    assert "3 records that waited" in shown.text()
    assert ids(db) == [record.run_id for record in RECORDS[0 if exists else 1 : 4]]
    assert list(spool_dir_of(db).iterdir()) == []


def test_a_record_that_waited_and_one_that_comes_are_both_written_once(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)
    with locked(db):
        keep_records(RECORDS[:2], db=db, busy_s=0)
        keep_records(RECORDS[1:3], db=db, busy_s=0)

    answer = keep_records(RECORDS[2:], db=db)

    assert (answer.merged, len(answer.added), len(answer.already)) == (2, 3, 1)
    assert ids(db) == [record.run_id for record in RECORDS]


def test_a_history_that_is_read_while_another_writes_says_what_waits(db: Path) -> None:
    keep_records(RECORDS[:2], db=db)
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        keep_records(RECORDS[2:3], db=db, busy_s=0)

        shown = show_history(db=db, busy_s=0, now=NOW)

    assert [len(one.runs) for one in shown.series] == [2]
    assert "1 records wait in" in shown.text()


def test_records_for_a_read_only_database_wait_beside_it(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)
    read_only_url = f"sqlite:///file:{db}?mode=ro&uri=true"

    answer = keep_records(RECORDS[1:2], db=read_only_url)

    assert answer.spooled == (RECORDS[1].run_id,)
    assert "readonly" in answer.text()
    assert keep_records([], db=db).merged == 1


def test_a_read_only_folder_is_read_and_says_that_nothing_could_be_kept(tmp_path: Path) -> None:
    other = Path(tempfile.mkdtemp())
    other.chmod(0o777)
    with read_only() as folder:
        with pytest.raises(DataError, match=r"They are where they were; give a folder with --spool"):
            keep_records(RECORDS[2:3], db=folder / "history.db")
        kept = keep_records(RECORDS[2:3], db=folder / "history.db", spool_dir=other)
        shown = show_history(db=folder / "history.db", spool_dir=other, now=NOW)
        with pytest.raises(DataError, match="Nothing was changed"):
            accept_change(run=RECORDS[0].run_id, note="why", db=folder / "history.db")
    shutil.copytree(other, tmp_path / "spool")
    shutil.rmtree(other)

    assert kept.spooled == (RECORDS[2].run_id,)
    assert [len(one.runs) for one in shown.series] == [2]
    assert keep_records([], db=tmp_path / "new.db", spool_dir=tmp_path / "spool").merged == 1


def test_a_spool_file_that_is_half_written_is_set_aside_and_told_of(db: Path) -> None:
    with locked(db):
        keep_records(RECORDS[:2], db=db, busy_s=0)
    broken, whole = sorted(spool_dir_of(db).iterdir())
    broken.write_text(broken.read_text()[:100])
    (spool_dir_of(db) / "empty.json").touch()

    answer = keep_records([], db=db)
    again = keep_records([], db=db)

    assert (answer.merged, len(ids(db))) == (1, 1)
    assert not whole.exists()
    assert sorted(path.suffix for path in spool_dir_of(db).iterdir()) == [".corrupt", ".corrupt"]
    assert str(broken.with_suffix(".corrupt")) in answer.text()
    assert again.notes == ()


def test_a_spool_file_that_cannot_be_read_now_waits_on(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(db):
        keep_records(RECORDS[:2], db=db, busy_s=0)
    unreadable, _ = sorted(spool_dir_of(db).iterdir())
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        answer = keep_records([], db=db)
    again = keep_records([], db=db)

    assert (answer.merged, again.merged, len(ids(db))) == (1, 1, 2)
    assert f"{unreadable} cannot be read now (Permission denied) and waits on" in answer.text()
    assert list(spool_dir_of(db).iterdir()) == []


def test_a_spool_file_of_a_later_edgestill_waits_for_one(db: Path) -> None:
    spool_dir_of(db).mkdir()
    newer = spool_dir_of(db) / "newer.json"
    newer.write_text(json.dumps({**RECORDS[0].to_json(), "schema_version": 2, "more": 1}))

    answer = keep_records(RECORDS[1:2], db=db)

    assert (len(answer.added), answer.merged) == (1, 0)
    assert f"{newer} was written by a later edgestill (schema 2) and waits for one" in answer.text()
    assert newer.exists()


def test_a_spool_file_that_another_process_merged_meanwhile_is_no_matter(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(db):
        keep_records(RECORDS[:1], db=db, busy_s=0)

    def gone(path: Path) -> bytes:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "read_bytes", gone)
    answer = keep_records([], db=db)

    assert (answer.merged, answer.notes) == (0, ())


def test_a_file_that_is_set_aside_overwrites_none_that_was(db: Path) -> None:
    spool = spool_dir_of(db)
    spool.mkdir()
    for text in ("first", "second"):
        (spool / "x.json").write_text(text)
        keep_records([], db=db)

    assert sorted(path.read_text() for path in spool.iterdir()) == ["first", "second"]


def test_a_record_that_waited_and_contradicts_the_history_is_set_aside(db: Path) -> None:
    keep_records(RECORDS[:1], db=db)
    with locked(db):
        keep_records([slower(RECORDS[0])], db=db, busy_s=0)

    answer = keep_records([], db=db)

    (aside,) = spool_dir_of(db).iterdir()
    assert (answer.merged, aside.suffix) == (0, ".conflict")
    assert json.loads(aside.read_text())["summary"]["p50_us"] == 9.0
    assert str(aside) in answer.text()


def test_a_clock_that_jumped_back_is_told_of_and_the_run_takes_the_place_of_its_date(db: Path) -> None:
    keep_records(RECORDS[1:4], db=db, now=NOW)
    early = replace(RECORDS[0], utc="1970-01-01T00:00:00+00:00")

    answer = keep_records([early], db=db, now=NOW)

    assert "older than runs that are there already: 0000-000" in answer.text()
    assert ids(db)[0] == early.run_id


def test_a_run_dated_in_the_future_is_kept_told_of_and_not_judged(db: Path) -> None:
    ahead = replace(RECORDS[5], utc=(NOW + timedelta(days=400)).isoformat())

    answer = keep_records([*RECORDS[:5], ahead], db=db, now=NOW)
    (series,) = show_history(db=db, now=NOW).series

    assert "dated in the future" in answer.text()
    assert [run.why_not for run in series.runs] == [None] * 5 + ["dated in the future"]
    assert series.num_runs == 5
    assert "The clock there was wrong" in series.notes[0]


def test_a_wrong_date_stays_wrong_when_it_has_passed(db: Path) -> None:
    ahead = replace(RECORDS[5], utc=(NOW + timedelta(days=30)).isoformat())
    keep_records([*RECORDS[:5], ahead], db=db, now=NOW)

    (series,) = show_history(db=db, now=NOW + timedelta(days=60)).series

    assert [run.why_not for run in series.runs] == [None] * 5 + ["not valid"]
    assert series.num_runs == 5


def test_dates_of_other_zones_and_of_none_are_ordered_by_the_moment(db: Path) -> None:
    dates = ["2026-01-01T12:00:00+00:00", "2026-01-01T12:30:00+02:00", "2026-01-01T11:00:00", "2026-01-01T11:30:00Z"]
    keep_records([replace(record, utc=date) for record, date in zip(RECORDS, dates, strict=False)], db=db, now=NOW)

    assert [document["utc"] for document in documents(db)] == [dates[1], dates[2], dates[3], dates[0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"utc": "yesterday"}, "utc='yesterday' is no date"),
        ({"run_id": ""}, "run_id='' names no run"),
        ({"run_id": "a\nb"}, "names no run"),
    ],
)
def test_a_record_that_cannot_be_ordered_or_named_is_refused(db: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        keep_records([RECORDS[0], replace(RECORDS[1], **changed)], db=db)  # type: ignore[arg-type]

    assert not db.exists()


def test_a_latency_of_zero_is_refused(db: Path) -> None:
    with pytest.raises(DataError, match=r"p25_us=0\.0 is no latency"):
        keep_records([replace(RECORDS[0], summary=replace(RECORDS[0].summary, p25_us=0.0))], db=db)


def test_names_that_no_database_takes_are_kept_in_the_record_and_escaped_beside_it(db: Path) -> None:
    odd = replace(RECORDS[0], model=replace(RECORDS[0].model, name="a\ud800\x00b"))

    keep_records([odd], db=db)

    assert documents(db)[0]["model"]["name"] == "a\ud800\x00b"
    assert show_history(db=db, now=NOW).series[0].name == "a\\ud800\\x00b"


@pytest.mark.parametrize(
    ("db", "message"),
    [
        ("nosuch://user@host/name", "no database 'nosuch'"),
        ("://", "cannot be read"),
        ("sqlite://", "in memory is lost"),
        ("sqlite:///:memory:", "in memory is lost"),
        ("mysql+pymysql://host/name", "pip install pymysql"),
    ],
)
def test_a_url_that_names_no_history_is_refused(db: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        keep_records(RECORDS, db=db)


def test_a_path_that_can_be_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a directory"):
        keep_records(RECORDS, db=tmp_path)
    with pytest.raises(DataError, match="there is no directory"):
        keep_records(RECORDS, db=tmp_path / "none" / "history.db")
    with pytest.raises(DataError, match="there is no history"):
        check_history(db=tmp_path / "none.db")
    assert list(tmp_path.iterdir()) == []


def test_records_for_two_servers_wait_apart_and_no_password_is_shown() -> None:
    one, other = "postgresql://user:secret@one/history", "postgresql://user:secret@other/history"

    assert spool_dir_of(one) != spool_dir_of(other)
    assert "secret" not in str(spool_dir_of(one))


def test_nothing_but_the_file_is_left_when_all_have_closed_it(db: Path) -> None:
    keep_records(RECORDS, db=db)
    show_history(db=db, now=NOW)

    assert [path.name for path in db.parent.iterdir()] == ["history.db"]
