"""The hardware comparison in headless Chromium: sorts, filters, draws, and can be used by anybody."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hardware import render_hardware_report
from benchmarks.records import Stored

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
AXE = ROOT / "build" / "axe" / "axe_playwright_python" / "axe.min.js"
HOSTILE = (
    "</script><script>window.bent=1</script><img src=x onerror='window.bent=1'><a href='https://evil.example'>x</a>"
)
TAB, ENTER, SPACE, ESCAPE = "\ue004", "\ue007", " ", "\ue00c"
MODELS = {"small": (2.0, 0.64, 9.7), "middle": (6.0, 0.72, 13.4), "large": (24.0, 0.70, 44.7)}
SPEEDS = {"fp32": 1.0, "int8": 0.35}
Browser = Any  # of conftest.py
Make = Callable[..., Stored]

LINES = "[...document.querySelectorAll('#rows tbody tr:not([hidden])')]"
SHOWN = f"return {LINES}.map(r => [...r.children].slice(0, 3).map(c => c.firstChild.textContent.trim()).join(' '))"
POINTS = "return document.querySelectorAll('#pareto-latency path.point').length"
TICKS = "return [...document.querySelectorAll('#latency .ytick text')].map(t => t.textContent)"


def comparison(make: Make, directory: Path) -> list[Stored]:
    """Twelve rows: three models in two precisions on two runtimes; one is not valid, the fastest of all."""
    return [
        make(
            directory,
            model=model,
            precision=precision,
            runtime=runtime,
            p50_ms=p50_ms * speed * slowness,
            size_mib=size_mib * (0.26 if precision == "int8" else 1.0),
            accuracy=accuracy(value - (0.006 if precision == "int8" else 0.0)),
            macs={"int8": 900, "fp32": 100} if precision == "int8" else {"fp32": 1000},
            fallback_ops=("/head/Gemm",) if precision == "int8" else (),
            valid=(model, precision, runtime) != ("small", "int8", "openvino-cpu"),
            num_samples=60,
            gross_mj=15 * p50_ms * speed * slowness,
            profile=profile(model, precision) if runtime == "openvino-cpu" else None,
        )
        for model, (p50_ms, value, size_mib) in MODELS.items()
        for precision, speed in SPEEDS.items()
        for runtime, slowness in (("openvino-cpu", 1.0), ("onnxruntime-cpu", 1.3))
    ]


def accuracy(value: float) -> dict[str, Any]:
    interval = [value - 0.02, value + 0.02]
    return {"dataset": "digits", "n": 500, "metric": "top1", "value": value, "teacher": 0.75, "ci95": interval}


def profile(model: str, precision: str) -> dict[str, Any]:
    layers = [
        {
            "name": f"/{model}/conv{i}",
            "op": "Convolution",
            "precision": precision,
            "macs": 10**6 * i,
            "time_us": 10.0 * i,
        }
        for i in range(1, 31)
    ]
    return {"source": "PERF_COUNT", "layers": layers, "total_us": 4650.0}


HISTORY = {
    f"middle {precision}": [
        {"utc": f"2026-11-{day:02}T10:00:00+00:00", "p50_ms": ms + day / 100, "mark": "change" if day == 5 else None}
        for day in range(1, 9)
    ]
    for precision, ms in (("fp32", 6.0), ("int8", 2.1))
}


@pytest.fixture(scope="module")
def page_path(make_stored: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hardware")
    return render_hardware_report(comparison(make_stored, directory), directory / "out", history=HISTORY)


def wait_until(browser: Browser, script: str, expected: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := browser.run(script)) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == expected


def opened(browser: Browser, path: Path, **more: Any) -> None:
    """Open the page and go to its first figure."""
    browser.open(path, **more)
    see(browser, "latency")


def see(browser: Browser, name: str) -> None:
    """Bring a figure in sight, which draws it."""
    browser.run(f"document.getElementById('{name}').scrollIntoView({{behavior: 'instant'}})")
    wait_until(browser, f"return document.querySelectorAll('#{name} .main-svg').length > 0", True)


def keep_screenshot(browser: Browser, name: str, *, width: int) -> None:
    """Of the whole page: what is out of sight is drawn when the window is as tall as the page."""
    tall = browser.run("return document.documentElement.scrollHeight") + 1000
    browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=tall, deviceScaleFactor=1, mobile=width < 600)
    drawn = "return [...document.querySelectorAll('.plot:not([hidden])')].every(p => p.querySelector('.main-svg'))"
    wait_until(browser, drawn, True)
    height = browser.run("return Math.ceil(document.querySelector('footer').getBoundingClientRect().bottom)")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.cdp("Page.captureScreenshot", format="png", clip=clip)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / f"hardware-{name}.png").write_bytes(base64.b64decode(shot["data"]))
    assert shot["data"].startswith("iVBOR")


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def choose(browser: Browser, facet: str, value: str) -> None:
    click(browser, f".facet[data-facet='{facet}'] input[value='{value}']")


def test_two_hundred_rows_are_six_megabytes_that_draw_at_first_what_is_in_sight(
    browser: Browser, make_stored: Make, tmp_path: Path
) -> None:
    made = [
        make_stored(
            tmp_path,
            model=f"model-{i // 8}",
            precision=("fp32", "int8")[i % 2],
            runtime=("openvino-cpu", "onnxruntime-cpu")[i // 2 % 2],
            threads=1 + i // 4 % 2,
            p50_ms=1 + i / 10,
            accuracy=accuracy(0.6 + i / 1000),
            num_launches=1,
            num_samples=300,
            gross_mj=1.0 + i,
            macs={"int8": 900, "fp32": 100},
            profile=profile(f"features/blocks.{i}/block/a-long-name-as-exporters-write-them", "int8"),
            valid=i % 9 > 0,
        )
        for i in range(200)
    ]
    path = render_hardware_report(made, tmp_path / "out", history=HISTORY)

    browser.open(path)
    wait_until(browser, "return document.querySelectorAll('#latency .main-svg').length > 0", True)

    assert path.stat().st_size < 6_000_000
    assert browser.run(f"return {LINES}.length") == 200
    assert (
        browser.run("return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).length")
        < 6
    )
    assert browser.complaints() == []


def test_every_figure_is_drawn_when_it_comes_in_sight_and_nothing_is_fetched(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    for name in ("pareto-latency", "pareto-size", "pareto-energy", "ecdf", "past"):
        see(browser, name)

    assert browser.run("return document.querySelectorAll('.plot').length") == 6
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.complaints() == []


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    before = browser.run(SHOWN)
    click(browser, "th[data-key='p50_ms'] button")
    rising = browser.run(SHOWN)
    state = browser.run("return [...document.querySelectorAll('th[aria-sort]')].map(h => [h.dataset.key, h.ariaSort])")
    click(browser, "th[data-key='p50_ms'] button")

    assert before[0].startswith("large int8")
    assert rising[:2] == ["small int8 openvino-cpu", "small int8 onnxruntime-cpu"]
    assert rising[-1] == "large fp32 onnxruntime-cpu"
    assert state == [["p50_ms", "ascending"]]
    assert browser.run(SHOWN) == rising[::-1]
    assert browser.run("return document.querySelector('th[aria-sort]').ariaSort") == "descending"


def test_more_comes_first_where_more_is_better(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)

    click(browser, "th[data-key='accuracy top1 on digits'] button")

    assert browser.run("return document.querySelector('th[aria-sort]').ariaSort") == "descending"
    assert browser.run(SHOWN)[0].startswith("middle fp32")


def test_rows_without_a_value_come_last_whichever_way(browser: Browser, make_stored: Make, tmp_path: Path) -> None:
    made = [make_stored(tmp_path, model=f"m{i}", p50_ms=1 + i, gross_mj=None if i == 1 else 9.0 - i) for i in range(3)]
    opened(browser, render_hardware_report(made, tmp_path / "out"))

    orders = []
    for _ in range(2):
        click(browser, "th[data-key='gross_mj'] button")
        orders.append([line.split()[0] for line in browser.run(SHOWN)])

    assert orders == [["m2", "m0", "m1"], ["m0", "m2", "m1"]]


def test_rows_figures_and_placement_follow_the_filter(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    see(browser, "pareto-latency")
    wait_until(browser, POINTS, 12)
    choose(browser, "precision", "int8")
    choose(browser, "model", "small")
    choose(browser, "model", "middle")

    wait_until(browser, POINTS, 4)
    assert sorted(browser.run(SHOWN)) == [
        f"{model} int8 {runtime}" for model in ("middle", "small") for runtime in ("onnxruntime-cpu", "openvino-cpu")
    ]
    assert browser.run(TICKS) == ["middle", "small"]
    assert browser.run("return document.getElementById('count').textContent") == "4 of 12 rows"
    assert browser.run("return document.getElementById('count').getAttribute('aria-live')") == "polite"
    assert browser.run("return document.querySelectorAll('#places > li:not([hidden])').length") == 4
    assert browser.run("return [...document.getElementById('profiled').options].length") == 2
    click(browser, "#reset")
    wait_until(browser, POINTS, 12)
    assert browser.run("return document.getElementById('count').textContent") == "12 of 12 rows"


def test_words_filter_and_nothing_left_is_said(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    type_words(browser, "onnx LARGE")
    some = browser.run(SHOWN)
    type_words(browser, "tensorrt")

    assert some == ["large int8 onnxruntime-cpu", "large fp32 onnxruntime-cpu"]
    assert browser.run(SHOWN) == []
    assert browser.run("return document.getElementById('count').textContent") == "0 of 12 rows"
    assert browser.run("return document.getElementById('nothing').checkVisibility()") is True
    assert browser.run("return document.querySelector('#latency + .empty').textContent") == "No row fits the filter."
    assert browser.complaints() == []


def type_words(browser: Browser, words: str) -> None:
    browser.run(
        "const box = document.getElementById('words');"
        f"box.value = {json.dumps(words)}; box.dispatchEvent(new Event('input', {{bubbles: true}}))"
    )


def test_the_address_holds_the_view_and_brings_it_back(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    click(browser, "th[data-key='size_mib'] button")
    click(browser, "th[data-key='size_mib'] button")
    choose(browser, "runtime", "openvino-cpu")
    click(browser, "tr:not([hidden]) input.draw")
    shown = browser.run(SHOWN)
    address = browser.run("return location.hash")
    drawn = browser.run("return document.querySelector('input.draw:checked').value")

    browser.run("location.hash = '#results'")
    opened(browser, page_path)
    plain = browser.run(SHOWN)
    browser.run(f"location.hash = {json.dumps(address)}")
    wait_until(browser, "return document.getElementById('count').textContent", "6 of 12 rows")

    assert plain != shown
    assert browser.run(SHOWN) == shown
    browser.run("location.reload()")
    wait_until(browser, "return document.getElementById('count')?.textContent", "6 of 12 rows")
    assert browser.run(SHOWN) == shown
    assert browser.run("return [...document.querySelectorAll('input.draw:checked')].map(b => b.value)") == [drawn]
    assert browser.run("return document.querySelector('.facet.active .chosen').textContent") == "openvino-cpu"


def test_an_address_from_elsewhere_breaks_nothing(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)

    browser.run("location.hash = '#sort=%3Cimg%20src%3Dx%3E&precision=no&draw=x&metric=y&profiled=z&series=9&q=%'")

    wait_until(browser, "return document.getElementById('count').textContent", "12 of 12 rows")
    assert browser.complaints() == []


def test_what_another_row_beats_is_grey_and_what_is_not_valid_beats_nothing(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    see(browser, "pareto-latency")
    wait_until(browser, POINTS, 12)

    traces = browser.run(
        "return document.getElementById('pareto-latency').data.slice(1)"
        ".map(t => t.customdata.map((c, i) => [c[0], t.marker.color[i], t.marker.symbol[i]]))"
    )

    grey = browser.run("return getComputedStyle(document.documentElement).getPropertyValue('--dominated')").strip()
    points = {name: (colour, symbol) for trace in traces for name, colour, symbol in trace}
    front = {name for name, (colour, _) in points.items() if colour != grey}
    assert front == {
        "small int8 on openvino-cpu",  # not valid: nothing that is valid beats it, and it beats nothing
        "small int8 on onnxruntime-cpu",
        "small fp32 on openvino-cpu",
        "middle int8 on openvino-cpu",
        "middle fp32 on openvino-cpu",
    }
    assert points["small int8 on openvino-cpu"][1].endswith("-open")
    assert not points["small int8 on onnxruntime-cpu"][1].endswith("-open")


def test_two_metrics_are_never_in_one_plot(browser: Browser, make_stored: Make, tmp_path: Path) -> None:
    metrics = [accuracy(0.9), accuracy(0.8), {**accuracy(0.5), "metric": "mIoU"}]
    made = [make_stored(tmp_path, model=f"m{i}", accuracy=one) for i, one in enumerate(metrics)]
    opened(browser, render_hardware_report(made, tmp_path / "out"))
    see(browser, "pareto-latency")

    wait_until(browser, POINTS, 2)
    browser.run(
        "const s = document.getElementById('metric'); s.value = 'mIoU on digits'; s.dispatchEvent(new Event('change'))"
    )
    wait_until(browser, POINTS, 1)
    assert "metric=mIoU" in browser.run("return location.hash")


def test_chosen_rows_are_drawn_and_without_a_choice_the_first_six(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    see(browser, "ecdf")
    curves = "return (document.getElementById('ecdf').data || []).length"
    wait_until(browser, curves, 6)

    click(browser, "#rows tbody tr:nth-child(12) input.draw")

    wait_until(browser, curves, 1)
    name = browser.run("return document.getElementById('ecdf').data[0].name")
    assert name == browser.run("return document.querySelector('input.draw:checked').ariaLabel").removeprefix(
        "Draw the curve of "
    )


def test_the_curve_of_a_row_that_is_not_valid_says_so(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    see(browser, "ecdf")

    click(browser, "#rows tbody tr.not-valid input.draw")

    wait_until(browser, "return document.getElementById('ecdf').data.length", 1)
    names = browser.run("const e = document.getElementById('ecdf'); return [e.data[0].name, e.ariaLabel]")
    assert names[0] == "small int8 on openvino-cpu (not valid)"
    assert names[1] == f"Curves of {names[0]}."


def test_choosing_a_row_keeps_the_keyboard_where_it_is(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    browser.run("document.querySelectorAll('input.draw')[3].focus()")

    browser.press(SPACE)

    assert browser.run("return document.activeElement === document.querySelectorAll('input.draw')[3]") is True
    assert browser.run("return document.activeElement.checked") is True


def test_layers_of_the_chosen_row_are_listed_the_longest_first(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    browser.run(
        "const s = document.getElementById('profiled');"
        "s.value = [...s.options].find(o => o.text.startsWith('small int8')).value; s.dispatchEvent(new Event('change'))"
    )

    lines = browser.run(
        "return [...document.querySelectorAll('#layer-times tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert lines[0] == ["/small/conv30", "Convolution", "int8", "30,000,000", "300", "6.5", "200"]
    assert lines[-1][0] == "5 other layers"


def test_a_row_that_is_not_valid_tells_why_on_a_key(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    browser.run("document.querySelector('tr.not-valid .why summary').focus()")
    closed = browser.run("return document.querySelector('.why li').checkVisibility()")

    browser.press(ENTER)

    assert browser.run("return document.querySelectorAll('tr.not-valid').length") == 1
    assert "not valid" in browser.run("return document.querySelector('tr.not-valid .badge').textContent")
    assert closed is False
    assert browser.run("return document.querySelector('.why li').checkVisibility()") is True
    assert "other work waited" in browser.run("return document.querySelector('.why li').textContent")


def test_the_keyboard_filters_and_sorts(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path)
    browser.run("document.querySelector('.facet[data-facet=precision] summary').focus()")
    browser.press(ENTER, TAB, SPACE)
    filtered = browser.run("return document.getElementById('count').textContent")
    browser.press(ESCAPE)
    left = browser.run("return document.activeElement.textContent")
    is_open = browser.run("return document.querySelector('.facet[data-facet=precision]').open")
    browser.run("document.querySelector('th[data-key=p50_ms] button').focus()")
    browser.press(SPACE)

    assert filtered == "6 of 12 rows"
    assert left.startswith("Precision")
    assert is_open is False
    assert browser.run("return document.querySelector('th[aria-sort]').dataset.key") == "p50_ms"
    assert browser.run("return document.activeElement.parentElement.dataset.key") == "p50_ms"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(browser: Browser, page_path: Path, width: int, scheme: str) -> None:
    assert AXE.is_file(), f"{AXE} is not there. Get axe-core first: make build/axe"
    opened(browser, page_path, width=width, scheme=scheme)
    browser.run("for (const facet of document.querySelectorAll('.facet')) facet.open = false")
    keep_screenshot(browser, f"{'phone' if width < 600 else 'desktop'}-{scheme}", width=width)
    browser.run(AXE.read_text(encoding="utf-8"))

    found = browser.run(
        "return axe.run().then(({violations, passes}) => [passes.length, violations"
        ".filter(v => ['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.nodes.map(n => n.html)])])"
    )

    assert found[0] > 20  # it did look
    assert found[1] == []


@pytest.mark.parametrize("width", [320, 360, 768])
def test_narrow_screens_scroll_tables_and_never_the_page(browser: Browser, page_path: Path, width: int) -> None:
    opened(browser, page_path, width=width)

    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("const t = document.querySelector('#results .scroll'); return t.scrollWidth > t.clientWidth")
    named = browser.run("return document.querySelector('#rows tbody th').innerText")
    assert ("openvino-cpu" in named) is (width < 640)  # the configuration stands under the model where columns are few


def test_paper_is_light_and_shows_rows_figures_and_reasons(browser: Browser, page_path: Path) -> None:
    opened(browser, page_path, scheme="dark")
    choose(browser, "model", "small")
    browser.run(
        "addEventListener('beforeprint', () => { window.printed = {"
        "ink: getComputedStyle(document.querySelector('#latency .xtick text')).fill,"
        "drawn: [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg')),"
        f"rows: {LINES}.length,"
        "why: document.querySelector('tr.not-valid .why').open }; })"
    )

    pdf = browser.cdp("Page.printToPDF", preferCSSPageSize=True)

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / "hardware.pdf").write_bytes(base64.b64decode(pdf["data"]))
    assert len(pdf["data"]) > 50_000
    assert browser.run("return window.printed") == {"ink": "rgb(29, 31, 35)", "drawn": True, "rows": 4, "why": True}
    assert browser.run("return document.querySelector('tr.not-valid .why').open") is False


def test_hostile_names_run_nothing_and_link_nowhere(browser: Browser, make_stored: Make, tmp_path: Path) -> None:
    layers = {"source": HOSTILE, "layers": [{"name": HOSTILE, "op": HOSTILE, "precision": HOSTILE, "time_us": 1.0}]}
    made = [
        make_stored(
            tmp_path,
            model=f"{HOSTILE} {i}",
            runtime=HOSTILE,
            cpu=f"{HOSTILE} {i}",
            accuracy={**accuracy(0.5), "dataset": HOSTILE},
            macs={HOSTILE: 1},
            fallback_ops=(HOSTILE,),
            num_samples=20,
            num_launches=1,
            profile=layers,
            valid=i > 0,
        )
        for i in range(2)
    ]
    history = {HOSTILE: [{"utc": "2026-11-01T00:00:00+00:00", "p50_ms": 1.0, "mark": HOSTILE}]}
    path = render_hardware_report(made, tmp_path / "out", title=HOSTILE, history=history)

    opened(browser, path)
    click(browser, "th[data-key='p50_ms'] button")
    click(browser, ".facet input")
    keep_screenshot(browser, "hostile", width=1280)

    assert browser.run("return window.bent") is None
    links = browser.run(
        "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href'))"
    )
    assert all(link.startswith("#") for link in links)
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelector('.name').textContent") == HOSTILE
    assert browser.run("return document.querySelector('#layer-times td').textContent.slice(1)") == HOSTILE[-80:]
    assert HOSTILE in browser.run("return document.querySelector('#ecdf .legendtext').textContent")
    assert browser.complaints() == []
