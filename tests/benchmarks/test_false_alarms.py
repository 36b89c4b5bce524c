"""The evidence of the gate: blocks that are kept, tables of the results of both protocols. Nothing is measured here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bench import Arm
from benchmarks.compare import is_worse
from benchmarks.device.record import Record, Turns, validate
from benchmarks.evidence import contiguous, false_alarms
from benchmarks.evidence.contiguous import contiguous_windows
from benchmarks.records import Stored
from targets.base import CompiledModel, read_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"
BEFORE = RESULTS / "false_alarms_contiguous.json"


class Pairs:
    """In place of the measurement: pairs that differ by 0.5 %, and by the wait of B where it has one."""

    def __init__(self, record: Record) -> None:
        self.record, self.asked = record, list[dict[str, Any]]()

    def __call__(self, _: object, a: Arm, b: Arm, **asked: Any) -> tuple[Record, Record]:
        self.asked.append({**asked, "wait_us": b.injected_us})
        asked["out_dir"].mkdir(parents=True, exist_ok=True)
        noise = np.exp(np.random.default_rng(int(asked["chance"])).normal(0, 0.005, asked["pairs"]))
        plain = self.of(np.full(asked["pairs"], 4000.0))
        return plain, self.of((4000.0 + (b.injected_us or 0.0)) * noise)

    def of(self, p25s_us: Any) -> Record:
        first = self.record.launches[0]
        launches = []
        for i, p25_us in enumerate(p25s_us.tolist()):
            turns = Turns(queries=(10,) * 8, p25_us=(p25_us,) * 8, dropped=16, slice_s=0.05)
            latency = replace(first.lat_us, p25=p25_us)
            launches.append(replace(first, i=i, turns=turns, lat_us=latency, disturbances=("noise",) if i == 0 else ()))
        hard = {**self.record.env.hard, "cpus_online": "0-1", "kernel": "6", "isa": "AVX2"}
        return replace(self.record, launches=tuple(launches), env=replace(self.record.env, hard=hard))


@pytest.fixture
def pairs(make_stored: Callable[..., Stored], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pairs:
    found = Pairs(validate(make_stored(tmp_path).record.to_json()))
    monkeypatch.setattr(false_alarms, "measure_by_turns", found)
    return found


def _measured(compiled: CompiledModel, tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    kept = ["--kept", str(tmp_path / "kept"), "--out", str(out)]
    false_alarms.main([str(compiled.directory), *kept, *more])
    return dict(read_json(out))


SHORT = ("--pairs", "80", "--slowed", "40", "--any-cpus", "20")


def test_every_pair_stands_in_the_result_and_is_measured_once(
    pairs: Pairs, compiled: CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _measured(compiled, tmp_path, *SHORT)
    again = _measured(compiled, tmp_path, *SHORT)

    assert found == again
    assert len(pairs.asked) == 7
    assert [asked["same_cpus"] for asked in pairs.asked] == [True] * 6 + [False]
    assert {asked["wait_us"] for asked in pairs.asked[4:6]} == {found["slowed"]["wait_us"]}
    assert len({asked["chance"] for asked in pairs.asked}) == 7
    assert (len(found["same"]["differences"]), found["same"]["disturbed"]) == (80, 4)
    assert found["slowed"]["wait_us"] == pytest.approx(0.03 * 4000, rel=0.01)
    assert "false alarms, A against A | 0 of 61" in capsys.readouterr().out


def test_by_default_there_are_three_hundred_windows(pairs: Pairs, compiled: CompiledModel, tmp_path: Path) -> None:
    table = false_alarms.text(_measured(compiled, tmp_path)).splitlines()

    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table[2:]}
    assert rows["false alarms, A against A"][:2] == ["0 of 301", "0.0%"]
    assert rows["the same, windows that share no pair"][0] == "0 of 16"
    assert rows["seen, B slower by +3% by arithmetic"][0] == "301 of 301"
    (slowed,) = (name for name in rows if name.startswith("seen, B slowed by a busy wait"))
    assert (slowed.endswith("(+3.0% measured)"), rows[slowed][0]) == (True, "61 of 61")


def test_both_protocols_stand_side_by_side(pairs: Pairs, compiled: CompiledModel, tmp_path: Path) -> None:
    table = false_alarms.beside([read_json(BEFORE), _measured(compiled, tmp_path, *SHORT)]).splitlines()

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    by_turns = ["by turns, on any CPUs", "by turns, on the same CPUs", "A of a pair, B of the next"]
    assert [row[0] for row in rows] == ["one after the other", *by_turns]
    assert rows[0][2:5] == ["2.61%", "0 of 301", "77.7%"]
    assert rows[1][3:] == ["-"] * 4  # twenty pairs are a spread, and no rate
    assert rows[2][3:] == ["0 of 71", "100.0%", "0 of 61", "100.0%"]
    assert (rows[3][1], rows[3][3]) == ("79 pairs, of the row above", "0 of 70")
    assert {len(line.split("|")) for line in table} == {9}


def test_what_launches_one_after_the_other_said_is_still_read() -> None:
    document = read_json(BEFORE)

    table = false_alarms.text(document)

    assert "| false alarms, A against A | 0 of 301 | 0.0% | at most 0.99% |" in table
    assert "| seen, B slower by +3% by arithmetic | 234 of 301 | 77.7% | at least 73.43% |" in table
    assert "11 of 11" in table


def test_a_window_of_launches_pairs_neighbours() -> None:
    logs = np.random.default_rng(0).normal(0, 0.02, 30)

    found = contiguous_windows(logs, 8, np.random.default_rng(5))

    coins = np.random.default_rng(5)
    for begin, window in enumerate(found):
        signs = coins.choice((-1.0, 1.0), 8)
        expected = [(logs[begin + 2 * i + 1] - logs[begin + 2 * i]) * sign for i, sign in enumerate(signs)]
        assert window == pytest.approx(expected)
    assert len(found) == 15


def test_its_rates_are_those_of_the_gate_window_by_window() -> None:
    document = read_json(BEFORE)
    short = {**document, "same": {**document["same"], "p25_us": document["same"]["p25_us"][:40]}}

    found = contiguous.rates(short)

    windows = contiguous_windows(np.log(short["same"]["p25_us"]), 10, np.random.default_rng(0))
    assert found.power["+3%"].alarms == sum(is_worse(window + np.log(1.03), 1.02) for window in windows)
    assert found.apart.windows == 2
    assert found.spread == pytest.approx(
        np.std([np.log(b / a) for a, b in itertools.pairwise(short["same"]["p25_us"])], ddof=1)
    )


def test_what_is_to_be_done_must_be_said() -> None:
    with pytest.raises(SystemExit):
        false_alarms.main([])
    assert json.loads(BEFORE.read_text())["schema_version"] == 1
