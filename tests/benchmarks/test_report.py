"""The report: what its page and its Markdown say, and that nothing in a summary can break or bend them."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.headline import headline
from benchmarks.report import headline_rows, render_report, verdict
from benchmarks.report_figures import ecdf_figure, is_dominated, pareto_figure, training_figure
from benchmarks.report_page import escape_markdown
from benchmarks.report_tables import Column, make_table, number, percent, points
from targets.errors import IntegrityError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "report_summary.json"
HOSTILE = "</script><script>window.bent=1</script><img src=x onerror=alert(1)>\"'|`[x](https://evil.example)\n# {{7*7}}"
Summary = dict[str, Any]


class Page(HTMLParser):
    """The elements of a page: tags, ids, and the text of each element by tag, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def text(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def scripts(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "script"]


@pytest.fixture
def summary() -> Summary:
    loaded: Summary = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return loaded


def render(summary: Summary) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as out_dir:
        page_path = render_report(summary, Path(out_dir) / "report")
        return page_path.read_text(encoding="utf-8"), page_path.with_name("report.md").read_text(encoding="utf-8")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of every mapping, sections as well as single values."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if isinstance(value, dict):
            yield (*path, key)
        yield from leaves(child, (*path, key))


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: map_strings(child, change) for key, child in value.items()}
    if isinstance(value, list):
        return [map_strings(child, change) for child in value]
    return change(value) if isinstance(value, str) else value


def test_page_is_one_small_file_that_refers_to_nothing_outside(summary: Summary) -> None:
    html, _ = render(summary)

    page = Page(html)
    references = [
        value
        for _, attributes in page.attributes
        for key, value in attributes.items()
        if key in ("src", "href", "data")
    ]
    assert len(html.encode()) < 6_000_000
    assert references
    assert all(value is not None and value.startswith("#") for value in references)
    assert page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert "url(" not in "".join(text for tag, text in page.texts if tag == "style")


def test_policy_lets_exactly_the_two_scripts_of_the_page_run(summary: Summary) -> None:
    html, _ = render(summary)

    page = Page(html)
    _, plotly, drawing = page.scripts()
    policy = next(a["content"] for _, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    expected = {
        f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" for script in (plotly, drawing)
    }
    assert set(re.findall(r"sha256-[A-Za-z0-9+/=]+", policy or "")) == expected
    assert (policy or "").startswith("default-src 'none'")


def test_tables_are_captioned_and_their_headings_scoped(summary: Summary) -> None:
    html, _ = render(summary)

    page = Page(html)
    headings = [attributes for tag, attributes in page.attributes if tag == "th"]
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    scrolled = [attributes for _, attributes in page.attributes if attributes.get("class") == "scroll"]
    targets = {(a["href"] or "")[1:] for tag, a in page.attributes if tag == "a"}
    assert page.tags["table"] == page.tags["caption"] == len(scrolled) > 10
    assert all(attributes.get("scope") in ("col", "row", "colgroup") for attributes in headings)
    assert all(attributes["tabindex"] == "0" and attributes["aria-labelledby"] in ids for attributes in scrolled)
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)


def test_page_and_markdown_show_every_hop_every_row_and_every_gate(summary: Summary) -> None:
    html, markdown = render(summary)

    text = Page(html).text()
    names = [row["hop"] for row in summary["ledgers"]["openvino-cpu"]]
    names += [row["arm"] for target in summary["targets"] for row in target["rows"]]
    names += [gate["detail"] for target in summary["targets"] for gate in target["gates"]]
    names += [control["name"] for stage in summary["training"] for control in stage["controls"]]
    assert all(name in text for name in names)
    assert all(str(escape_markdown(name)) in markdown for name in names)
    assert "97.66 to 99.17" in text  # the teacher's interval, 0.9766 to 0.9917
    assert "97.66 to 99.17" in markdown


def test_summary_stands_beside_the_page_unchanged(summary: Summary, tmp_path: Path) -> None:
    render_report(summary, tmp_path)

    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary


def test_headline_compares_what_ships_with_the_fastest_float_teacher(summary: Summary) -> None:
    first, second = headline_rows(summary)

    assert first == {
        "Target": "openvino-cpu",
        "Ships": "int8",
        "p50, ms": "0.184",
        "× teacher": "3.81",  # 0.701 (BF16, faster than FP32's 0.912) / 0.184
        "Size, MiB": "0.101",
        "× smaller": "10.5",  # 1.06 / 0.101
        "Top-1, %": "97.50",
        "Δ points": "−1.10",
        "Gates passed": "5 of 5",
    }
    assert second["× teacher"] == "3.73"  # 0.988 / 0.265
    assert second["Gates passed"] == "4 of 5"


def test_verdict_spans_the_targets(summary: Summary) -> None:
    assert verdict(summary) == (
        "INT8 ships on 2 of 2 targets: 3.73 to 3.81× as fast as the float teacher, 10.5 to 10.9× smaller, "
        "−1.10 points of top-1."
    )


def test_float_that_ships_is_not_counted_as_int8_and_says_why(summary: Summary) -> None:
    summary["targets"][0] |= {"shipped": "bf16", "why": "INT8 is slower than BF16 here."}

    html, markdown = render(summary)

    assert verdict(summary).startswith("INT8 ships on 1 of 2 targets: 3.73×")
    assert headline_rows(summary)[0]["p50, ms"] == "0.349"
    for text in (Page(html).text(), markdown):
        assert "openvino-cpu: BF16 ships at 0.349 ms an image (p50)" in text
        assert "INT8 is slower than BF16 here." in text


def test_run_that_deployed_nothing_says_so(summary: Summary) -> None:
    summary["targets"] = []

    assert verdict(summary) == "Nothing was deployed in this run."
    assert headline_rows(summary) == []
    assert "Nothing was deployed" in Page(render(summary)[0]).text()


def test_missed_and_undecided_gates_are_named(summary: Summary) -> None:
    summary["targets"][0]["gates"][2]["passed"] = None

    text = Page(render(summary)[0]).text()

    assert "Gates undecided: accuracy." in text
    assert "Gates missed: budget p99_ms." in text


def test_null_is_a_dash_whose_reason_is_a_note(summary: Summary) -> None:
    html, markdown = render(summary)

    abbreviation = '<abbr title="p99: n too small (401 of 662)" aria-label="p99: n too small (401 of 662)">—</abbr>'
    assert abbreviation in html
    assert "<li id=" in html
    assert re.search(r"\| — \(\d\) \|", markdown)
    assert re.search(r"\(\d\) p99: n too small \(401 of 662\)", markdown)


def test_a_flag_about_what_the_headline_does_not_show_stands_with_the_measured_rows_only(summary: Summary) -> None:
    shipped = summary["targets"][0]["rows"][-1]
    shipped["flags"] = [*(shipped.get("flags") or ()), "gpu_mib: no GPU is here"]

    tables = render(summary)[0].split("<table")

    (headline,) = [table for table in tables if "What ships on each target" in table]
    assert "gpu_mib" not in headline
    assert any("gpu_mib: no GPU is here" in table for table in tables if "Measured on the device" in table)


def test_smoke_run_is_marked_and_a_full_one_is_not(summary: Summary) -> None:
    marked = Page(render(summary)[0]).text()
    unmarked = Page(render(summary | {"marked": None})[0]).text()

    assert "Marked “smoke”" in marked
    assert "Marked" not in unmarked


def test_invalid_row_is_marked_with_its_flags(summary: Summary) -> None:
    html, _ = render(summary)

    assert re.search(
        r'<tr class="not-valid">\s*<th scope="row">student fp32 <span class="badge">not valid</span>', html
    )
    assert "3 of 3 launches disturbed: cpu pressure 9.1 %" in Page(html).text()
    assert "Not trustworthy" not in html  # neither what ships nor its baseline is at fault


def test_headline_on_an_invalid_measurement_is_not_trustworthy(summary: Summary) -> None:
    summary["targets"][0]["rows"][-1]["valid"] = False

    html, markdown = render(summary)

    assert "Not trustworthy" in html
    assert "checks on openvino-cpu" in Page(html).text()
    assert "Not trustworthy" in markdown


def test_hop_that_lost_most_is_named(summary: Summary) -> None:
    html, markdown = render(summary)

    assert re.search(r'<tr class="lost-most">\s*<th scope="row">quantized', html)
    assert "On openvino-cpu, most accuracy was lost at the hop “quantized”." in Page(html).text()
    assert "onnxruntime-cpu: no hop lost accuracy beyond the noise." in markdown


def test_placement_shares_are_of_the_multiply_accumulates(summary: Summary) -> None:
    summary["targets"][0]["placement"]["layers"] = [
        {"name": "a", "op": "Convolution", "precision": "fp32", "macs": 250},
        {"name": "b", "op": "Convolution", "precision": "int8", "macs": 500},
        {"name": "c", "op": "MatMul", "precision": "int8", "macs": 250},
    ]

    html, markdown = render(summary)

    assert "int8 75.00 %, fp32 25.00 %" in markdown
    assert '<span class="int8" style="flex:75.00"></span><span class="fp32" style="flex:25.00"></span>' in html


def test_summary_of_another_schema_is_refused(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="schema_version=2"):
        render_report(summary | {"schema_version": 2}, tmp_path)


def test_hostile_names_add_no_element_to_the_page(summary: Summary) -> None:
    hostile = map_strings(summary, lambda text: text if text in ("student", "teacher", "int8") else HOSTILE)

    page = Page(render(hostile)[0])

    assert page.tags["script"] == 3
    assert page.tags["img"] == 0
    assert all(not key.startswith("on") for _, attributes in page.attributes for key in attributes)
    figures = json.loads(page.scripts()[0])
    assert figures
    assert not {"<script", "<img"} & set(re.findall(r"<\w+", json.dumps(figures)))  # plotly reads tags in labels
    assert "{{7*7}}" in page.text()


def test_hostile_names_stay_in_their_cell_of_a_markdown_table(summary: Summary) -> None:
    hostile = map_strings(summary, lambda text: text if text in ("student", "teacher", "int8") else HOSTILE)

    _, markdown = render(hostile)

    unescaped = re.sub(r"\\.", "", markdown)
    lines = [line for line in unescaped.splitlines() if line.startswith("|")]
    tables = "\n".join(line if line.startswith("|") else "" for line in unescaped.splitlines()).split("\n\n")
    widths = [{line.count("|") for line in table.splitlines() if line} for table in tables if table.strip()]
    assert len(lines) > 30
    assert all(len(width) == 1 for width in widths)
    assert "<" not in markdown
    assert "](" not in unescaped


def test_page_of_a_path_with_foreign_bytes_is_written(summary: Summary) -> None:
    summary["targets"][0]["bundle"] = "runs/caf\udce9"  # how Python reads a Latin-1 name

    html, markdown = render(summary)

    assert "runs/caf\\udce9" in html
    assert "runs/caf\\udce9" in markdown


PATHS = [path for path in leaves(json.loads(FIXTURE.read_text(encoding="utf-8"))) if path != ("schema_version",)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.booleans()), min_size=1, max_size=60))
def test_any_part_of_a_summary_may_be_null_or_absent(cuts: list[tuple[tuple[Any, ...], bool]]) -> None:
    summary = json.loads(FIXTURE.read_text(encoding="utf-8"))
    for path, is_removed in cuts:
        cut(summary, path, is_removed)

    html, markdown = render(summary)

    text = Page(html).text()
    assert verdict(summary) in text
    assert not re.search(r"\b(None|nan|Undefined)\b", text + markdown)
    assert all(set(row) <= set(headline_rows(summary)[0]) for row in headline_rows(summary))


def cut(value: Any, path: tuple[Any, ...], is_removed: bool) -> None:
    """Null or remove what `path` leads to, unless an earlier cut took it away."""
    for key in path[:-1]:
        value = value.get(key) if isinstance(value, dict) else value[key]
        if value is None:
            return
    if is_removed:
        value.pop(path[-1], None)
    else:
        value[path[-1]] = None


def test_every_part_of_a_summary_may_be_absent_at_once() -> None:
    html, markdown = render({"schema_version": 1})

    assert "Nothing was deployed in this run." in Page(html).text()
    assert markdown.startswith("# —: edgestill report")


def test_figures_are_what_plotly_accepts(summary: Summary) -> None:
    import plotly.graph_objects as go

    figures = [pareto_figure(summary["targets"]), *(ecdf_figure(target) for target in summary["targets"])]
    figures += [training_figure(stage) for stage in summary["training"]]

    assert len(figures) == 6
    for figure in figures:
        assert figure is not None
        assert go.Figure(figure).to_plotly_json()["data"]


def test_figures_without_a_point_are_left_out() -> None:
    assert pareto_figure([{"target": "t", "rows": [{"arm": "a", "p50_ms": None, "top1": 0.9}]}]) is None
    assert ecdf_figure({"rows": [{"arm": "a", "latency_ecdf_ms": []}]}) is None
    assert training_figure({"epochs": [{"epoch": 1, "loss": None}]}) is None


def test_pareto_greys_what_is_beaten_within_its_target_only(summary: Summary) -> None:
    figure = copy.deepcopy(pareto_figure(summary["targets"]))

    assert figure is not None
    openvino, onnxruntime = (trace for trace in figure["data"] if trace["mode"] == "markers+text")
    grey = [label for label, c in zip(openvino["customdata"], openvino["marker"]["color"], strict=True) if "domin" in c]
    assert grey == ["teacher fp32"]  # as accurate as BF16 and slower
    assert "var(--dominated)" not in onnxruntime["marker"]["color"]  # though OpenVINO beats all of it


def test_what_is_not_valid_beats_nothing_and_is_hollow_and_named_so(summary: Summary) -> None:
    target = {
        "target": "t",
        "rows": [
            {"arm": "int8", "precision": "int8", "p50_ms": 1.0, "top1": 0.9, "valid": False, "latency_ecdf_ms": [1.0]},
            {"arm": "bf16", "precision": "bf16", "p50_ms": 1.5, "top1": 0.8, "valid": False, "latency_ecdf_ms": [1.5]},
            {"arm": "fp32", "precision": "fp32", "p50_ms": 2.0, "top1": 0.9, "valid": True, "latency_ecdf_ms": [2.0]},
            {"arm": "slow", "precision": "fp32", "p50_ms": 3.0, "top1": 0.9, "valid": False, "latency_ecdf_ms": [3.0]},
        ],
    }

    pareto, ecdf = pareto_figure([target]), ecdf_figure(target)

    assert pareto is not None
    assert ecdf is not None
    line, markers = pareto["data"]
    assert line["x"] == [2.0]
    assert markers["marker"]["color"] == ["var(--int8)", "var(--half)", "var(--fp32)", "var(--dominated)"]
    assert markers["marker"]["symbol"] == ["circle-open", "circle-open", "circle", "circle-open"]
    assert markers["text"] == ["", "", "fp32", ""]
    names = ["int8 (not valid)", "bf16 (not valid)", "fp32", "slow (not valid)"]
    assert markers["customdata"] == [trace["name"] for trace in ecdf["data"]] == names


def test_a_target_without_a_valid_row_has_no_front() -> None:
    row = {"arm": "int8", "precision": "int8", "p50_ms": 1.0, "top1": 0.9, "valid": False}

    figure = pareto_figure([{"target": "t", "rows": [row, {**row, "p50_ms": 2.0}]}])

    assert figure is not None
    line, markers = figure["data"]
    assert line["x"] == []
    assert markers["text"] == ["", ""]
    assert markers["marker"]["color"] == ["var(--int8)"] * 2


def test_times_that_no_clock_can_have_measured_are_in_no_figure() -> None:
    rows = [{"arm": "a", "latency_ecdf_ms": [0.0, -1.0, 2.0]}, {"arm": "b", "latency_ecdf_ms": [0.0]}]

    figure = ecdf_figure({"rows": rows})

    assert figure is not None
    assert [(trace["name"], trace["x"]) for trace in figure["data"]] == [("a", [2.0])]
    assert ecdf_figure({"rows": rows[1:]}) is None
    assert pareto_figure([{"target": "t", "rows": [{"arm": "a", "p50_ms": -1.0, "top1": 0.9}]}]) is None


@pytest.mark.parametrize(("valid", "marked"), [(True, "0.595"), (False, "0.595 (not valid)")])
def test_the_readmes_table_marks_a_latency_that_is_not_valid(valid: bool, marked: str) -> None:
    summary = json.loads((FIXTURE.parents[2] / "docs/results/fashion_mnist.json").read_text(encoding="utf-8"))
    teacher = next(row for row in summary["targets"][0]["rows"] if row["arm"] == "teacher fp32")
    teacher["valid"] = valid

    assert f" {marked} |" in headline(summary)


def test_ecdf_rises_to_all_calls(summary: Summary) -> None:
    figure = ecdf_figure(summary["targets"][0])

    assert figure is not None
    for trace in figure["data"]:
        assert trace["x"] == sorted(trace["x"])
        assert trace["y"][-1] == 100
        assert trace["y"][0] == pytest.approx(100 / len(trace["y"]))


def test_training_figure_has_a_pacing_panel_only_with_a_curriculum(summary: Summary) -> None:
    teacher, distill = (training_figure(stage) for stage in summary["training"][:2])

    assert teacher is not None
    assert distill is not None
    assert [trace["name"] for trace in teacher["data"]] == ["validation", "training", "loss"]
    assert [trace["name"] for trace in distill["data"]] == ["validation", "training", "loss", "pacing: samples shown"]
    assert distill["data"][-1]["y"][0] == pytest.approx(30)


coordinates = st.tuples(st.integers(1, 20).map(float), st.integers(0, 20).map(float))


@given(st.lists(coordinates, min_size=1, max_size=30))
def test_front_rises_with_latency_and_beats_all_the_rest(cloud: list[tuple[float, float]]) -> None:
    front = sorted({point for point in cloud if not is_dominated(point, cloud)})

    accuracies = [top1 for _, top1 in front]
    assert front
    assert all(earlier < later for earlier, later in pairwise(accuracies))
    assert all(any(x <= point[0] and y >= point[1] for x, y in front) for point in cloud)


@given(st.floats(1e-12, 1e9) | st.floats(-1e9, -1e-12))
def test_numbers_keep_three_significant_digits(value: float) -> None:
    assert float(number(value).replace("−", "-").replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0"),
        (number(1234567), "1,234,567"),
        (number(0.1844), "0.184"),
        (number(12.34), "12.3"),
        (number(True), "True"),
        (number("n/a"), "n/a"),
        (percent(0.98765), "98.77"),
        (points(-0.011), "−1.10"),
        (points(0.00001), "0.00"),
        (points(-0.00001), "0.00"),
        (points(0.0029), "+0.29"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


def test_flag_speaks_of_a_field_by_its_whole_name_only() -> None:
    columns = (Column("arm", "arm"), Column("p9", "p9_ms"), Column("p99", "p99_ms"))
    table = make_table("t", columns, [{"arm": "a", "p9_ms": None, "p99_ms": None, "flags": ["p99: n too small"]}])

    assert table is not None
    assert [column.key for column in table.columns] == ["arm", "p99_ms"]  # p9 is null without a reason: left out
    assert table.rows[0][1].hint == "p99: n too small"
    assert table.notes == ("p99: n too small",)


def test_flag_that_explains_no_cell_stands_at_the_heading() -> None:
    table = make_table("t", (Column("arm", "arm"), Column("n", "n")), [{"arm": "a", "n": 1, "flags": ["throttled"]}])

    assert table is not None
    assert table.rows[0][0].notes == (1,)
    assert table.notes == ("throttled",)
