"""The hardware comparison: what its files say, and that nothing in a record can break or bend them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.hardware import render_hardware_report
from benchmarks.hardware.figures import curve_of, history_of, layers_of
from benchmarks.hardware.findings import findings_of
from benchmarks.hardware.rows import rows_of
from benchmarks.hardware.verb import hardware_report
from benchmarks.records import Stored, write_records
from benchmarks.report_page import escape_markdown
from targets.base import write_json
from targets.errors import DataError, MeasurementError, RecipeError

Make = Callable[..., Stored]
HOSTILE = "</script><script>window.bent=1</script><img src=x onerror=alert(1)>\"'|`[x](https://evil.example)\n# {{7*7}}"


class Page(HTMLParser):
    """Tags, attributes and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._texts: list[str] = []
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self._texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    @property
    def headings(self) -> list[str]:
        return [attributes["data-key"] or "" for tag, attributes in self.attributes if "data-key" in attributes]

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def top1(value: float, dataset: str = "digits", metric: str = "top1") -> dict[str, Any]:
    return {
        "dataset": dataset,
        "n": 500,
        "metric": metric,
        "value": value,
        "teacher": 0.95,
        "ci95": [value - 0.01, value + 0.01],
    }


def page_of(stored: Sequence[Stored], out_dir: Path, **more: Any) -> Page:
    return Page(render_hardware_report(stored, out_dir, **more).read_text(encoding="utf-8"))


@pytest.fixture
def pair(make_stored: Make, tmp_path: Path) -> list[Stored]:
    macs = {"int8": 750, "fp32": 250}
    return [
        make_stored(tmp_path, precision="fp32", p50_ms=4.0, accuracy=top1(0.93)),
        make_stored(tmp_path, precision="int8", p50_ms=1.0, size_mib=2.5, accuracy=top1(0.92), macs=macs, valid=False),
    ]


def test_page_is_one_small_file_that_refers_to_nothing_outside(pair: list[Stored], tmp_path: Path) -> None:
    path = render_hardware_report(pair, tmp_path / "out")

    page = Page(path.read_text(encoding="utf-8"))
    references = [a[key] or "" for _, a in page.attributes for key in ("src", "href", "data", "action") if key in a]
    ids = {a["id"] for _, a in page.attributes if "id" in a}
    assert sorted(one.name for one in path.parent.iterdir()) == ["index.html", "report.csv", "report.json", "report.md"]
    assert path.stat().st_size < 6_000_000
    assert references
    assert {reference[1:] for reference in references} <= ids
    assert page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0


def test_policy_lets_exactly_the_two_scripts_of_the_page_run(pair: list[Stored], tmp_path: Path) -> None:
    page = page_of(pair, tmp_path / "out")

    policy = next(a["content"] or "" for _, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    own = {f"sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}" for one in page.scripts[1:]}
    assert len(own) == 2
    assert set(re.findall(r"sha256-[A-Za-z0-9+/=]+", policy)) == own
    assert policy.startswith("default-src 'none'")


def test_a_column_without_a_value_is_left_out_of_the_page_and_stands_in_csv_and_json(
    pair: list[Stored], tmp_path: Path
) -> None:
    page = page_of(pair, tmp_path / "out")

    rows = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out/report.csv").read_text())))
    assert {"p50_ms", "peak_rss_mib", "accuracy top1 on digits"} <= set(page.headings)
    assert not {"gross_mj", "net_mj", "gpu_mib", "throughput_fps", "energy_source"} & set(page.headings)
    assert [row["gross_mj"] for row in rows] == [None, None]
    assert [line["gross_mj"] for line in lines] == ["", ""]
    assert "gross energy in no row: this machine shows no RAPL package counter" in page.text
    assert "GPU memory in no row: no GPU memory was read" in page.text


def test_a_field_that_all_rows_share_is_told_once_and_is_no_column(make_stored: Make, tmp_path: Path) -> None:
    page = page_of([make_stored(tmp_path, threads=threads) for threads in (1, 2)], tmp_path / "out")

    assert "threads" in page.headings
    assert "device" not in page.headings
    assert "In every row CPU One · 2 CPUs · single stream · batch 1 · preset ci" in page.text


def test_a_row_that_is_not_valid_says_so_in_words_with_its_reasons(pair: list[Stored], tmp_path: Path) -> None:
    page = page_of(pair, tmp_path / "out")

    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    reason = "other work waited for a CPU in 22.9 % of the time (6 of 6 launches)"
    assert page.text.count("not valid : why") == 1
    assert reason in page.text
    assert "1 of 2 rows failed the validity checks and are marked." in page.text
    assert "resnet18 **not valid** | int8" in markdown
    assert f"Not valid: resnet18 int8 on openvino-cpu: {reason}." in markdown


def test_headline_names_the_fastest_valid_row_and_its_accuracy(make_stored: Make, tmp_path: Path) -> None:
    rows = {"small": (1.0, 0.6), "middle": (2.0, 0.7), "large": (9.0, 0.8), "broken": (0.5, 0.9)}
    made = [
        make_stored(tmp_path, model=model, p50_ms=p50_ms, accuracy=top1(value), valid=model != "broken")
        for model, (p50_ms, value) in rows.items()
    ]

    page = page_of(made, tmp_path / "out")

    assert (
        findings_of(made).headline == "small fp32 on openvino-cpu is fastest: 1.00 ms (p50) at 60.00 % top1 on digits."
    )
    assert "large fp32 on openvino-cpu is most accurate: 80.00 % in 9.00 ms." in page.text


def test_headline_without_an_accuracy_is_over_all_models(make_stored: Make, tmp_path: Path) -> None:
    made = [
        make_stored(tmp_path, model=model, precision=precision, p50_ms=p50_ms)
        for precision, p50_ms in (("fp32", 6.0), ("int8", 2.0))
        for model in "ab"
    ]

    page = page_of(made, tmp_path / "out")

    assert findings_of(made).headline == (
        "openvino-cpu int8 is 3.00× as fast as openvino-cpu fp32 over 2 models (geometric mean)."
    )
    assert "No row has an accuracy" in page.text
    assert "pareto-latency" not in {a.get("id") for _, a in page.attributes}


def test_rows_of_two_harnesses_are_told(make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, model=f"m{one}", hard={"harness": one}) for one in (1, 2)]

    alone, both = (page_of(some, tmp_path / f"out{len(some)}") for some in (made[:1], made))

    assert "Measured by versions 1 and 2 of the harness, whose times are not comparable." in both.text
    assert "of the harness" not in alone.text


def test_headline_of_nothing_valid_claims_nothing(make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, threads=threads, valid=False, accuracy=top1(0.9)) for threads in (1, 2)]

    assert findings_of(made).headline.startswith("None of these 2 measurements is trustworthy.")
    assert findings_of(made[:1]).headline.startswith("This measurement is not trustworthy.")


def test_accuracies_of_another_metric_or_data_set_are_never_in_one_column(make_stored: Make, tmp_path: Path) -> None:
    accuracies = [top1(0.9), top1(0.8), top1(0.7, dataset="letters"), top1(31.5, metric="mAP")]
    made = [make_stored(tmp_path, model=f"m{i}", accuracy=one) for i, one in enumerate(accuracies)]

    page = page_of(made, tmp_path / "out")

    columns = [column["key"] for column in page.data["columns"]]
    values = [
        [row["sort"][columns.index(f"accuracy {name}")] for row in page.data["rows"]]
        for name in ("top1 on digits", "top1 on letters", "mAP on digits")
    ]
    assert values == [[0.9, 0.8, None, None], [None, None, 0.7, None], [None, None, None, 31.5]]
    assert page.data["metrics"] == [
        {"name": "top1 on digits", "is_fraction": True},  # most rows have it
        {"name": "top1 on letters", "is_fraction": True},
        {"name": "mAP on digits", "is_fraction": False},
    ]
    assert "none: measured by top1 on letters" in page.text


def test_a_score_over_fewer_models_is_marked(make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, model=model) for model in "ab"]
    made.append(make_stored(tmp_path, model="a", precision="int8", p50_ms=1.0))

    page = page_of(made, tmp_path / "out")

    assert "openvino-cpu int8 fewer models 2.00 1 of 2 1.00 2.00×" in page.text
    assert "openvino-cpu fp32 baseline 1.00 2 of 2 2.00 1.00×" in page.text
    assert "none: not measured" in page.text
    assert "Marked is what lacks some of the baseline’s models" in page.text


def test_csv_reads_back_whatever_a_name_holds(make_stored: Make, tmp_path: Path) -> None:
    names = [HOSTILE, 'a,"b"\r\nc', "=1+1", "plain"]
    made = [make_stored(tmp_path, model=name, num_launches=6 if name == "plain" else 3) for name in names]

    render_hardware_report(made, tmp_path / "out")

    raw = (tmp_path / "out/report.csv").read_bytes().decode()
    lines = list(csv.DictReader(io.StringIO(raw, newline="")))
    assert raw.endswith("\r\n")
    assert {line["model"] for line in lines} == {HOSTILE, 'a,"b"\r\nc', "'=1+1", "plain"}
    assert all(len(line) == len(lines[0]) and None not in line for line in lines)
    plain = next(line for line in lines if line["model"] == "plain")
    assert (float(plain["p50_ms"]), float(plain["p50_ci95_ms_low"])) == (2.0, pytest.approx(1.94))
    assert {line["p50_ci95_ms_low"] for line in lines if line is not plain} == {""}
    assert "p99_ms: n too small: fewer than 662 queries" in lines[0]["absent"]


def test_json_holds_every_row_every_score_and_what_is_older(make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, precision=one, p50_ms=p50) for one, p50 in (("fp32", 4.0), ("int8", 1.0))]
    old = make_stored(tmp_path, precision="int8", p50_ms=9.0, utc="2026-01-01T00:00:00+00:00")

    render_hardware_report([*made, old], tmp_path / "out", title="Mine")

    document = json.loads((tmp_path / "out/report.json").read_text())
    assert (document["schema_version"], document["title"], document["baseline"]) == (1, "Mine", "openvino-cpu fp32")
    assert [(row["precision"], row["p50_ms"]) for row in document["rows"]] == [("int8", 1.0), ("fp32", 4.0)]
    assert [one["times_baseline"] for one in document["scores"]] == [4.0, 1.0]
    assert [(one["run_id"], one["p50_ms"]) for one in document["older"]] == [(old.record.run_id, 9.0)]
    assert document["rows"][0]["run_id"] == made[1].record.run_id


def hostile_records(make_stored: Make, directory: Path) -> list[Stored]:
    profile = {"source": HOSTILE, "layers": [{"name": HOSTILE, "op": HOSTILE, "precision": HOSTILE, "time_us": 1.0}]}
    made = make_stored(
        directory,
        model=HOSTILE,
        precision=HOSTILE,
        runtime=HOSTILE,
        cpu=HOSTILE,
        hard={"power_mode": HOSTILE},
        accuracy=top1(0.9, dataset=HOSTILE, metric=HOSTILE),
        macs={HOSTILE: 10},
        fallback_ops=(HOSTILE,),
        valid=False,
        profile=profile,
        run_id=HOSTILE,
    )
    launches = tuple(replace(one, disturbances=(HOSTILE,), samples_file=HOSTILE) for one in made.record.launches)
    bent = replace(made.record, launches=launches, runtime=replace(made.record.runtime, version=HOSTILE))
    return [replace(made, record=bent), make_stored(directory, accuracy=top1(0.9))]


def test_hostile_names_add_no_element_to_the_page(make_stored: Make, tmp_path: Path) -> None:
    history = {HOSTILE: [{"utc": HOSTILE, "p50_ms": 1.0, "mark": HOSTILE}]}

    page = page_of(hostile_records(make_stored, tmp_path), tmp_path / "out", title=HOSTILE, history=history)

    assert page.tags["script"] == 3
    assert page.tags["img"] == 0
    assert all(not key.startswith("on") for _, attributes in page.attributes for key in attributes)
    assert page.data["rows"][0]["label"].startswith(HOSTILE) or page.data["rows"][1]["label"].startswith(HOSTILE)
    assert "{{7*7}}" in page.text


def test_hostile_names_stay_in_their_cell_of_a_markdown_table(make_stored: Make, tmp_path: Path) -> None:
    render_hardware_report(hostile_records(make_stored, tmp_path), tmp_path / "out", title=HOSTILE)

    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    unescaped = re.sub(r"\\.", "", markdown)
    tables = "\n".join(line if line.startswith("|") else "" for line in unescaped.splitlines()).split("\n\n")
    widths = [{line.count("|") for line in table.splitlines() if line} for table in tables if table.strip()]
    assert str(escape_markdown(HOSTILE)) in markdown
    assert len(widths) == 2
    assert all(len(width) == 1 for width in widths)
    assert "<" not in markdown
    assert "](" not in unescaped


def test_curve_holds_the_quantiles_of_all_launches(make_stored: Make, tmp_path: Path) -> None:
    ((row,), _) = rows_of([make_stored(tmp_path, num_samples=500, num_launches=3)])
    pooled = np.concatenate([np.load(tmp_path / one.samples_file) for one in row.stored.record.launches]) / 1e6

    quantiles, missing = curve_of(row, num_rows=1)

    assert missing == []
    assert len(quantiles) == 200
    assert quantiles == sorted(quantiles)
    assert quantiles[-1] == pytest.approx(pooled.max(), rel=1e-3)
    assert quantiles[99] == pytest.approx(np.median(pooled), rel=5e-3)
    assert len(curve_of(row, num_rows=200)[0]) == 100


def test_samples_that_are_missing_are_told_and_the_others_drawn(make_stored: Make, tmp_path: Path) -> None:
    stored = make_stored(tmp_path / "run", num_samples=50, num_launches=4)
    names = [one.samples_file for one in stored.record.launches]
    (tmp_path / "run" / names[0]).unlink()
    (tmp_path / "run" / names[1]).write_bytes(b"no numbers")
    np.save(tmp_path / "outside.npy", np.ones(5))
    launches = (*stored.record.launches[:3], replace(stored.record.launches[3], samples_file="../outside.npy"))
    stored = replace(stored, record=replace(stored.record, launches=launches))

    page = page_of([stored], tmp_path / "out")
    quantiles, missing = curve_of(rows_of([stored])[0][0], num_rows=1)

    assert len(quantiles) == 50
    assert missing[0] == f"{names[0]}: absent"
    assert missing[1].startswith(f"{names[1]}: ")
    assert missing[2] == "../outside.npy: outside of the record's directory"
    assert f"Samples that are missing: {names[0]}: absent" in page.text


def test_records_without_samples_have_no_curve_and_say_so(pair: list[Stored], tmp_path: Path) -> None:
    page = page_of(pair, tmp_path / "out")

    assert "No raw samples stand beside these records" in page.text
    assert "draw" not in {a.get("class") for tag, a in page.attributes if tag == "input"}


def test_samples_that_no_clock_can_have_measured_are_in_no_curve(make_stored: Make, tmp_path: Path) -> None:
    stored = make_stored(tmp_path, num_samples=50, num_launches=3)
    first, second, third = (one.samples_file for one in stored.record.launches)
    np.save(tmp_path / first, np.array([0, -5, 2_000_000]))
    np.save(tmp_path / second, np.zeros(5, dtype=np.int64))
    np.save(tmp_path / third, np.array([np.nan, np.inf, 1e6]))

    quantiles, missing = curve_of(rows_of([stored])[0][0], num_rows=1)

    assert quantiles == [1.0, 2.0]
    assert missing == [f"{second}: no time above zero"]


def test_layers_that_take_longest_come_first_and_the_others_are_summed() -> None:
    layers = [
        {"name": f"l{i}", "op": "Conv", "precision": "int8", "macs": i, "time_us": float(i), "new": 1}
        for i in range(1, 41)
    ]
    broken = [{"name": "no time"}, {"name": "nan", "time_us": float("nan")}, "no layer"]

    found = layers_of({"source": "PERF_COUNT", "layers": layers + broken, "total_us": 1.0, "more": {}}, num_rows=1)

    assert found is not None
    assert [layer[0] for layer in found["top"]][:2] == ["l40", "l39"]
    assert len(found["top"]) == 25
    assert found["rest"] == {"num": 15, "us": sum(range(1, 16))}
    assert found["total_us"] == sum(range(1, 41))
    assert layers_of({"layers": broken}, num_rows=1) is None
    assert layers_of(None, num_rows=1) is None


def test_history_is_in_the_order_of_time_and_keeps_its_marks() -> None:
    points = [
        {"utc": "2026-11-02", "p50_ms": 2.0, "mark": "accepted"},
        {"utc": "2026-11-01", "p50_ms": 1.0, "mark": None},
        {"utc": "2026-11-03", "p50_ms": None, "mark": None},
    ]

    assert history_of({"a": points, "empty": []}) == [
        {"name": "a", "utc": ["2026-11-01", "2026-11-02"], "ms": [1.0, 2.0], "mark": [None, "accepted"]}
    ]
    assert history_of(None) == []


def test_the_verb_reads_directories_and_says_what_it_wrote(make_stored: Make, tmp_path: Path) -> None:
    made = [
        make_stored(tmp_path, precision=one, p50_ms=p50, valid=one != "bf16")
        for one, p50 in (("fp32", 4.0), ("bf16", 2.0))
    ]
    for name, one in zip(("a", "b"), made, strict=True):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name, {"arm": one.record})

    report = hardware_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", baseline=None, title="Mine")

    assert report.to_json() == {
        "schema_version": 1,
        "verb": "report",
        "page": str(tmp_path / "out/index.html"),
        "headline": "resnet18 fp32 on openvino-cpu answers in 4.00 ms (p50); no accuracy was measured.",
        "baseline": "openvino-cpu fp32",
        "num_rows": 2,
        "num_invalid": 1,
        "error": None,
        "exit_code": 0,
    }
    assert "rows         2, 1 of them not valid" in report.text()
    assert report.page.is_file()


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no records\.json is there"):
        hardware_report([tmp_path], tmp_path / "out", baseline=None, title=None)
    with pytest.raises(DataError, match="no records to compare"):
        render_hardware_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_schema_is_refused(make_stored: Make, tmp_path: Path) -> None:
    write_json(tmp_path / "records.json", {"arm": make_stored(tmp_path).record.to_json() | {"schema_version": 9}})

    with pytest.raises(MeasurementError, match="schema_version=9"):
        hardware_report([tmp_path], tmp_path / "out", baseline=None, title=None)


def test_an_unknown_baseline_writes_nothing(pair: list[Stored], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean: openvino-cpu"):
        render_hardware_report(pair, tmp_path / "out", baseline="openvino fp33")
    assert not (tmp_path / "out").exists()
