"""Eight processes write to one history at once: is a record lost, is one there twice?

    python -m benchmarks.evidence.history_writes --out docs/results/history_writes.json [--also URL]

Each writer has 1,000 records of its own and sends, among them, a tenth of its neighbour's as well, so that two processes
hold the same id at the same moment. Each call of `keep_records` opens and closes the history. Then all is read back, record
by record. `--also` names an empty database of another kind, `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy

from benchmarks.device.record import Record, validate
from benchmarks.history import keep_records
from benchmarks.history_database import make_engine, spool_dir_of, url_of
from benchmarks.history_store import open_history
from targets.base import read_json, write_json

WRITERS, RECORDS, SHARED = 8, 1000, 10  # one record in SHARED is sent by two writers
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
MEMORY = {"vmhwm_mib": 90.5, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None}
ENERGY: dict[str, Any] = {"source": None, "rails": {}, "gross_mj": None, "idle_w": None, "net_mj": None}
TELEMETRY = {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": None}


def main(argv: Sequence[str]) -> int:
    """Write, read back, keep the counts in one JSON file; 1 where they are not what was sent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.history_writes")
    parser.add_argument("--also", action="append", default=[], metavar="URL")
    parser.add_argument("--batch", type=int, default=1, help="records a call")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        databases = [f"{folder}/history.db", *arguments.also]
        found = [write_at_once(db, batch=arguments.batch) for db in databases]
    document = {"schema_version": 1, "results": found, "versions": _versions()}
    if arguments.out:
        write_json(arguments.out, document)
    print(text(document))
    return int(any(one["lost"] or one["twice"] or one["not_whole"] for one in found))


def write_at_once(db: str, *, writers: int = WRITERS, records: int = RECORDS, batch: int = 1) -> dict[str, Any]:
    """Let `writers` processes begin together, then count."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    barrier = context.Barrier(writers)
    processes = [
        context.Process(target=_write, args=(db, writer, writers, records, batch, barrier)) for writer in range(writers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    waited = len(list(spool_dir_of(db).glob("*.json")))
    keep_records([], db=db)  # merges what had to wait
    failed = sum(process.exitcode != 0 for process in processes)
    return _counted(db, writers, records) | {"batch": batch, "failed_writers": failed, "waited_in_the_spool": waited}


def record_of(writer: int, number: int) -> Record:
    """A record as the harness makes them, of one launch; the same for the same numbers."""
    moment = BEGIN + timedelta(minutes=writer, hours=number)
    return replace(_template(), run_id=f"{writer:04d}-{number:06d}", utc=moment.isoformat())


def text(document: Mapping[str, Any]) -> str:
    """The counts as a Markdown table, a line a database."""
    names = (
        "writers",
        "records_a_writer",
        "batch",
        "sent",
        "rows",
        "lost",
        "twice",
        "not_whole",
        "waited_in_the_spool",
    )
    titles = ("writers", "records each", "records a call", "sent", "there", "lost", "twice", "not whole", "had to wait")
    lines = [
        f"| {one['database']} | " + " | ".join(f"{one[name]:,}" for name in names) + " |" for one in document["results"]
    ]
    return "\n".join([f"| database | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles), *lines])


def _write(db: str, writer: int, writers: int, records: int, batch: int, barrier: Any) -> None:
    """One process: its own records, and right after every tenth the neighbour's of the same number."""
    mine = []
    for number in range(records):
        mine.append(record_of(writer, number))
        if number % SHARED == 0:
            mine.append(record_of((writer + 1) % writers, number))
    barrier.wait()
    for begin in range(0, len(mine), batch):
        keep_records(mine[begin : begin + batch], db=db)


def _counted(db: str, writers: int, records: int) -> dict[str, Any]:
    expected = {one.run_id: one for writer in range(writers) for one in (record_of(writer, i) for i in range(records))}
    with open_history(db, write=False) as history:
        found = list(history.documents())
    ids = [document["run_id"] for document in found]
    whole = sum(one["run_id"] in expected and one == _as_json(expected[one["run_id"]]) for one in found)
    return {
        "database": _name(db),
        "writers": writers,
        "records_a_writer": records,
        "sent": writers * (records + len(range(0, records, SHARED))),
        "rows": len(ids),
        "lost": len(set(expected) - set(ids)),
        "twice": len(ids) - len(set(ids)),
        "not_whole": len(ids) - whole,
    }


def _name(db: str) -> str:
    """What wrote, with its version."""
    engine = make_engine(url_of(db), busy_s=0)
    with engine.connect() as connection:
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
    engine.dispose()
    return f"{engine.name} {version}"


def _as_json(record: Record) -> Any:
    return json.loads(json.dumps(record.to_json()))


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "sqlalchemy": sqlalchemy.__version__}


@cache
def _template() -> Record:
    return validate(
        {
            "schema_version": 1,
            "run_id": "template",
            "utc": BEGIN.isoformat(),
            "git": {"sha": None, "dirty": None},
            "model": {"name": "m", "sha256": "0" * 64, "bytes": 1000, "precision": "int8", "inputs": []},
            "runtime": {"name": "onnxruntime-cpu", "version": "1", "provider": "cpu", "flags": {"num_threads": 1}},
            "scenario": {
                "kind": "single_stream",
                "preset": "ci",
                "batch": 1,
                "boundary": "runtime",
                "warmup_s": 2.0,
                "min_s": 10.0,
                "min_q": 662,
                "seed": 0,
            },
            "launches": [_launch()],
            "summary": {
                "p25_us": 6.0,
                "p50_us": 7.0,
                "ci95": None,
                "fps": 140.0,
                "es_p90_us": None,
                "es_p99_us": None,
                "load_ms": 80.0,
                "first_ms": 2.0,
            },
            "host_e2e": None,
            "throughput": None,
            "memory": MEMORY,
            "energy": ENERGY,
            "accuracy": None,
            "env": {"hard": {"cpu": "one"}, "soft": {}, "hard_sha256": "0" * 64},
            "telemetry": TELEMETRY,
            "validity": {"ok": True, "flags": []},
        }
    )


def _launch() -> dict[str, Any]:
    return {
        "i": 0,
        "arm": "int8",
        "order": 0,
        "n": 100,
        "load_ms": 80.0,
        "first_ms": 2.0,
        "lat_us": {"min": 5.0, "p25": 6.0, "p50": 7.0, "p90": 9.0, "p99": None, "p999": None, "mean": 7.1, "sd": 0.4},
        "samples_file": "samples/int8-runtime-0.npy",
        "warmup_s": 2.0,
        "wall_s": 1.0,
        "cpu_s": 0.99,
        "nivcsw": 2,
        "majflt": 0,
        "overhead_us": 0.06,
        "memory": MEMORY,
        "energy": ENERGY,
        "telemetry": TELEMETRY,
        "disturbances": [],
        "flags": [],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
