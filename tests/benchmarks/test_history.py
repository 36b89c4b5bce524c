from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device.record import Record
from benchmarks.evidence.history_writes import record_of
from benchmarks.history import accept_change, check_history, keep_records, show_history
from benchmarks.history_report import history_figure, render_history
from benchmarks.history_series import Series, points_by_series, read_series, select_series, sentence
from benchmarks.history_store import open_history
from benchmarks.records import write_records
from benchmarks.terminal import WIDTH, Point, aligned, plot
from targets.errors import BudgetError, DataError, RecipeError

NOW = datetime(2027, 1, 1, tzinfo=UTC)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
HARD = {
    "cpu": "one",
    "kernel": "6.1",
    "runtime": "onnxruntime-cpu 1.32",
    "shapes": [[None, 3, 32, 32]],
    "batch": 1,
    "flags": {"num_threads": 1},
}
NOISE = (1.0, 1.004, 0.997, 1.002, 0.999, 1.003, 0.998)


def run(
    day: int, p25_us: float, *, series: str = "a", hard: dict[str, Any] | None = None, valid: bool = True, **model: Any
) -> Record:
    """One record of the series whose fingerprint is `series` over and over, measured on the given day."""
    base = record_of(0, 0)
    return replace(
        base,
        run_id=f"{series}{day:03d}-{'0' * 8}",
        utc=(BEGIN + timedelta(days=day)).isoformat(),
        git={"sha": f"{day:040x}", "dirty": False},
        model=replace(base.model, name="net", **model),
        summary=replace(base.summary, p25_us=p25_us, p50_us=1.02 * p25_us),
        env=replace(base.env, hard=HARD | (hard or {}), hard_sha256=series * 64),
        validity=replace(base.validity, ok=valid),
    )


def runs(levels: Sequence[float], **more: Any) -> list[Record]:
    """A run a day; a level of 1.0 is a millisecond."""
    return [run(day, 1000 * level * NOISE[day % len(NOISE)], **more) for day, level in enumerate(levels)]


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


def kept(db: Path, *records: Record) -> Path:
    keep_records(records, db=db, now=NOW)
    return db


def series_of(db: Path) -> list[Series]:
    with open_history(db, write=False) as history:
        return read_series(history, NOW)


def test_a_slow_down_ends_the_check_with_exit_4_and_says_since_when(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3))

    found = check_history(db=db, now=NOW)

    assert isinstance(found.failure, BudgetError)
    assert found.failure.exit_code == 4
    assert "1 of 1 series slower" in str(found.failure)
    assert re.search(r"slower: \+[56]\.\d% from run a020-000 \(2026-01-21, git 0{8}\) on", found.text())
    assert "edgestill history accept aaaaaaaa --note WHY" in str(found.failure)
    assert len(str(found.failure).split("\n")) <= 3


def test_two_slow_runs_are_no_alarm(db: Path) -> None:
    found = check_history(db=kept(db, *runs([1.0] * 20 + [1.06] * 2)), now=NOW)

    assert found.failure is None
    assert "no change beyond 3.0%" in found.text()


def test_with_too_few_runs_nothing_is_claimed(db: Path) -> None:
    found = check_history(db=kept(db, *runs([1.0] * 7)), now=NOW)

    assert found.failure is None
    assert "cannot tell: 7 of 13 valid runs (10 to hold against, 3 to judge)" in found.text()
    assert found.series[0].verdict == "cannot tell"


def test_runs_that_are_not_valid_are_kept_and_neither_judged_nor_held_against(db: Path) -> None:
    slow = [run(day, 2000.0, valid=False) for day in range(20, 40)]
    kept(db, *runs([1.0] * 20), *slow)

    found = check_history(db=db, now=NOW)

    assert found.failure is None
    assert len(found.series[0].runs) == 40
    assert found.series[0].num_runs == 20
    assert "the newest 20 runs are not valid and not judged" in found.text()


def test_disturbed_runs_between_slow_ones_do_not_hide_them(db: Path) -> None:
    levels = [1.0] * 20 + [1.06, 1.0, 1.06, 1.0, 1.06]
    records = [
        replace(one, validity=replace(one.validity, ok=day not in (21, 23))) for day, one in enumerate(runs(levels))
    ]

    assert check_history(db=kept(db, *records), now=NOW).failure is not None


def test_runs_of_another_fingerprint_are_never_compared(db: Path) -> None:
    kept(db, *runs([1.0] * 20), *[run(day, 3000.0, series="b", hard={"kernel": "6.8"}) for day in range(20, 26)])

    found = check_history(db=db, now=NOW)

    assert found.failure is None
    assert [(one.id, one.verdict, one.num_runs) for one in found.series] == [
        ("a" * 8, "no change", 20),
        ("b" * 8, "cannot tell", 6),
    ]


def test_a_new_series_says_which_hard_keys_changed(db: Path) -> None:
    far = {"kernel": "6.8", "cpu": "two", "flags": {"num_threads": 2}}
    kept(
        db,
        *runs([1.0] * 3),
        *[run(5, 900.0, series="b", hard=far), run(6, 900.0, series="c", hard=far | {"flags": {"num_threads": 4}})],
        run(7, 900.0, series="d", hard=far, precision="fp32"),
    )

    changed = {one.id[0]: one.before for one in series_of(db)}

    assert changed["a"] is None
    assert changed["b"] is not None
    assert changed["b"].changed == {"cpu": ["one", "two"], "flags.num_threads": [1, 2], "kernel": ["6.1", "6.8"]}
    assert changed["c"] is not None
    assert (changed["c"].series[0], changed["c"].changed) == ("b", {"flags.num_threads": [2, 4]})
    assert changed["d"] is None  # another precision is another question
    assert "not compared with series bbbbbbbb, they differ in flags.num_threads: 2 -> 4" in _shown("cccc", db)


def test_an_accepted_change_is_the_level_from_then_on_and_says_who_and_why(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 13))

    accepted = accept_change(db=db, note="a larger head", who="ada", now=NOW)
    found = check_history(db=db, now=NOW)

    assert accepted.run.startswith("a020-000")
    assert found.failure is None
    assert found.series[0].verdict == "no change"
    assert "accepted from run a020-000 (2026-01-21, git 00000000) on, +" in _shown(None, db)
    assert "by ada, 2027-01-01: a larger head" in _shown(None, db)


def test_what_is_accepted_is_judged_again_only_with_runs_enough(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3))
    accept_change(db=db, note="why", now=NOW)

    assert "cannot tell: 3 of 13 valid runs since the accepted change" in check_history(db=db, now=NOW).text()

    kept(db, *runs([1.0] * 20 + [1.06] * 10 + [1.12] * 3)[23:])
    assert check_history(db=db, now=NOW).failure is not None


def test_an_alarm_stays_however_many_slow_runs_follow(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 80))

    found = check_history(db=db, now=NOW)

    assert found.failure is not None
    assert "from run a020-000" in found.text()


def test_a_slow_down_that_was_mended_is_told_and_no_failure(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 5 + [1.0] * 3))

    assert check_history(db=db, now=NOW).failure is None
    assert "back from run a025-000" in _shown(None, db)


def test_an_improvement_is_told_and_no_failure(db: Path) -> None:
    found = check_history(db=kept(db, *runs([1.0] * 20 + [0.9] * 4)), now=NOW)

    assert found.failure is None
    assert found.series[0].verdict == "faster"
    assert re.search(r"faster: -(9|10)\.\d% from run a020-000 .* on\. This is the new level; 4 of 13", found.text())


def test_a_change_is_accepted_once_and_the_first_reason_stays(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3))
    accept_change(db=db, note="first", who="ada", now=NOW)

    again = accept_change(db=db, run="a020", note="second", who="bob", now=NOW)

    assert (again.who, again.note) == ("ada", "first")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"note": " "}, "--note is empty"),
        ({"note": "x"}, "no series has an open change"),
        ({"note": "x", "run": "zzz"}, "no run of these series has such an id"),
        ({"note": "x", "run": "a0"}, "12 changes could be meant"),
        ({"note": "x", "run": "a011"}, "is not valid: no level begins there"),
        ({"note": "x", "series": "nothing"}, "series 'nothing': there is none"),
    ],
)
def test_what_cannot_be_accepted_is_refused_in_words(db: Path, asked: dict[str, str], message: str) -> None:
    kept(db, *runs([1.0] * 11), run(11, 1000.0, valid=False))

    with pytest.raises(RecipeError, match=message):
        accept_change(db=db, **asked)  # type: ignore[arg-type]


def test_a_series_is_named_by_its_id_or_by_words_of_its_title(db: Path) -> None:
    kept(db, *runs([1.0] * 2), *runs([1.0] * 2, series="b", hard={"runtime": "openvino-cpu 2026.4"}))
    found = series_of(db)

    assert [one.id[0] for one in select_series(found, "aaaa")] == ["a"]
    assert [one.id[0] for one in select_series(found, "OpenVINO")] == ["b"]
    assert len(select_series(found, None)) == 2
    assert [one.id[0] for one in check_history(["openvino"], db=db, now=NOW).series] == ["b"]


def test_an_improvement_is_told_in_the_table(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [0.9] * 3), *runs([1.0] * 2, series="b", hard={"kernel": "6.8"}))

    assert series_of(db)[0].verdict == "faster"
    assert re.search(r"aaaaaaaa .* 23 .* faster", _shown(None, db))


def test_all_series_are_a_table_and_one_is_a_plot(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3), *runs([1.0] * 2, series="b", hard={"kernel": "6.8"}))

    table, one = _shown(None, db), _shown("aaaa", db)

    assert table.splitlines()[0].split() == ["series", "what", "runs", "last", "p25", "ms", "verdict", "differs", "in"]
    assert re.search(r"aaaaaaaa .* 23 .* 2026-01-23 .* slower", table)
    assert re.search(r"bbbbbbbb .* cannot tell \(2 valid\) +kernel", table)
    assert re.search(r"\| {20}[ .]*\^", one)
    assert "o valid  ^ slower from here  - level  . two sigma" in one


def test_json_holds_verdict_runs_and_changes(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3))

    checked = json.loads(json.dumps(check_history(db=db, now=NOW).to_json(), allow_nan=False))
    shown = json.loads(json.dumps(show_history(db=db, now=NOW).to_json(), allow_nan=False))

    assert (checked["verb"], checked["exit_code"]) == ("history check", 4)
    assert checked["series"][0]["verdict"] == "slower"
    assert checked["series"][0]["steps"][0]["first_run"] == "a020-00000000"
    assert len(shown["series"][0]["runs"]) == 23
    assert shown["exit_code"] == 0


def test_runs_of_several_presets_in_one_series_are_told_of(db: Path) -> None:
    first, second = runs([1.0] * 2)
    kept(db, first, replace(second, scenario=replace(second.scenario, preset="smoke")))

    assert "several presets (ci, smoke)" in check_history(db=db, now=NOW).text()


def test_the_hardware_report_gets_valid_runs_and_their_marks(db: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3), run(30, 5000.0, valid=False))

    ((title, points),) = points_by_series(series_of(db)).items()

    assert title == "net int8, onnxruntime-cpu 1.32, Nx3x32x32, batch 1, num_threads=1 (aaaaaaaa)"
    assert len(points) == 23
    assert points[20] == {
        "utc": "2026-01-21T00:00:00.000000+00:00",
        "p50_ms": pytest.approx(1.06 * 1.02, rel=0.005),
        "mark": "slower",
    }


def test_the_figure_marks_changes_accepted_levels_and_runs_that_are_not_judged(db: Path) -> None:
    levels = [1.0] * 20 + [1.06] * 5 + [1.0] * 15 + [0.9] * 15
    kept(db, *runs(levels), run(60, 5000.0, valid=False))
    accept_change(db=db, run="a050", note="why", now=NOW)

    (series,) = series_of(db)
    figure = history_figure(series)

    assert [(one["x"], one["text"]) for one in figure["layout"]["annotations"]] == [
        (20.5, "slower"),
        (25.5, "back"),
        (40.5, "faster"),
        (50.5, "accepted"),
    ]
    assert len(figure["layout"]["shapes"]) == 4
    assert {trace["name"]: len(trace["x"]) for trace in figure["data"]} == {"valid": 55, "not judged": 1}
    assert figure["data"][1]["marker"]["symbol"] == "x"


def test_the_page_is_one_file_with_verdict_figure_and_every_run(db: Path, tmp_path: Path) -> None:
    kept(db, *runs([1.0] * 20 + [1.06] * 3), run(30, 5000.0, valid=False))

    shown = show_history(db=db, page=tmp_path / "new" / "page.html", now=NOW)
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")

    assert f"written to {tmp_path / 'new' / 'page.html'}" in shown.text()
    assert "<h1>1 of 1 series slower</h1>" in page
    assert page.count('<th scope="row">') == 24 + 1
    assert '<tr class="not-valid">' in page
    assert 'id="history-0"' in page
    assert "script-src" in page
    assert len(page) < 6 * 2**20


def test_hostile_names_and_notes_are_text_on_the_page(db: Path, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    records = [
        replace(one, model=replace(one.model, name=hostile), env=replace(one.env, hard={"runtime": hostile}))
        for one in runs([1.0] * 14)
    ]
    kept(db, *records)
    accept_change(db=db, run="a005", note=hostile, who=hostile, now=NOW)

    page = render_history(series_of(db), tmp_path / "page.html").read_text(encoding="utf-8")

    assert hostile not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_page_that_cannot_be_written_is_refused_in_words(db: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--page .*: cannot be written \(Is a directory\)"):
        show_history(db=kept(db, *runs([1.0])), page=tmp_path, now=NOW)


def test_an_empty_history_is_no_error(db: Path, tmp_path: Path) -> None:
    keep_records([], db=db)

    assert "holds no runs" in show_history(db=db, page=tmp_path / "page.html", now=NOW).text()
    assert "holds no runs" in check_history(db=db, now=NOW).text()


def test_a_sentence_gives_the_level_that_new_runs_are_held_against(db: Path) -> None:
    (series,) = series_of(kept(db, *runs([1.0] * 20 + [1.06] * 3)))

    assert series.level_us == pytest.approx(1000, rel=0.003)
    assert series.ratio == pytest.approx(1.06, abs=0.005)
    assert re.search(r"the last 3 runs are \+[56]\.\d% on the 1\.00\d ms of before", sentence(series))


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=150), st.integers(0, 160))
def test_a_plot_shows_each_of_the_last_runs_once_in_a_column_of_its_own(values: list[float], lines_from: int) -> None:
    lines = plot([Point(value) for value in values], {"-": values[0]}, lines_from=lines_from)

    columns = [line.partition("|")[2].ljust(WIDTH) for line in lines]
    assert [sum(line[x] == "o" for line in columns) for x in range(min(len(values), WIDTH))] == [1] * min(
        len(values), WIDTH
    )
    assert max(map(len, columns)) <= WIDTH
    assert math.isclose(
        float(lines[0].split("|")[0] or max(values[-WIDTH:])), max(values[-WIDTH:] + values[:1]), rel_tol=1e-3
    )


def test_a_plot_of_nothing_and_a_table_of_nothing_are_nothing() -> None:
    assert plot([], {}) == []
    assert aligned([]) == []


def test_the_example_of_the_document_runs_and_its_workflow_is_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "history.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    Path("measured").mkdir()
    write_records(Path("measured"), {one.run_id: one for one in runs([1.0] * 20 + [1.06] * 3)})

    with pytest.raises(SystemExit) as ended:
        exec(blocks["python"], {})  # noqa: S102 - the example that a person would copy

    steps = yaml.safe_load(blocks["yaml"])["jobs"]["latency"]["steps"]
    assert ended.value.code == 4
    assert "batch 1, num_threads=1 slower 1.0" in capsys.readouterr().out
    assert Path("history.html").is_file()
    assert [step["run"].split()[:3] for step in steps if "edgestill" in step.get("run", "")][-1] == [
        "edgestill",
        "history",
        "check",
    ]


def _shown(series: str | None, db: Path) -> str:
    return show_history(series, db=db, now=NOW).text()
