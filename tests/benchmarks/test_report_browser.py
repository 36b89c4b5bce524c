"""The report in headless Chromium, driven by chromedriver over its HTTP protocol: what a reader sees and can do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import render_report

pytestmark = pytest.mark.system

FIXTURE = Path(__file__).parents[1] / "fixtures" / "report_summary.json"
HOSTILE = (
    "</script><script>window.bent=1</script><img src=x onerror='window.bent=1'><a href='https://evil.example'>x</a>"
)
TAB, ENTER = "\ue004", "\ue007"
Browser = Any  # of conftest.py


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(json.loads(FIXTURE.read_text(encoding="utf-8")), tmp_path_factory.mktemp("report"))


def test_opens_within_two_seconds_draws_every_figure_and_fetches_nothing(browser: Browser, page_path: Path) -> None:
    seconds = min(browser.open(page_path) for _ in range(2))  # the first one may start the renderer as well

    drawn = browser.run(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.main-svg').length)"
    )
    assert seconds < 2
    assert len(drawn) == 6
    assert min(drawn) > 0
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.complaints() == []


def test_points_of_the_pareto_plot_carry_the_colours_of_the_page(browser: Browser, page_path: Path) -> None:
    browser.open(page_path)

    colours = browser.run(
        "return [...document.querySelectorAll('#pareto .scatterlayer path.point')].map(p => getComputedStyle(p).fill)"
    )

    assert len(colours) == 8
    assert colours.count("rgb(11, 107, 203)") == 2  # --int8, one a target
    assert colours.count("rgb(195, 198, 203)") == 1  # --dominated


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_scroll_tables_and_never_the_page(browser: Browser, page_path: Path, width: int) -> None:
    browser.open(page_path, width=width)

    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(
        "return [...document.querySelectorAll('.plot .main-svg')].every(s => s.clientWidth < innerWidth)"
    )
    assert browser.run("const t = document.querySelector('#ledger .scroll'); return t.scrollWidth > t.clientWidth")


def test_figures_follow_the_colour_scheme_while_the_page_is_open(browser: Browser, page_path: Path) -> None:
    browser.open(page_path, scheme="light")
    light = ink_and_paper(browser)
    browser.prefer("dark")
    wait_until(
        browser, "return getComputedStyle(document.querySelector('#pareto .xtick text')).fill", "rgb(232, 233, 235)"
    )
    dark = ink_and_paper(browser)

    assert sum(light["paper"]) > 700 > 200 > sum(light["ink"])
    assert sum(dark["ink"]) > 600 > 200 > sum(dark["paper"])


def test_text_is_readable_in_both_schemes(browser: Browser, page_path: Path) -> None:
    for scheme in ("light", "dark"):
        browser.open(page_path, scheme=scheme)
        colours = {name: channels(browser, name) for name in ("text", "muted", "accent", "warn", "card", "warn-soft")}
        for ink, paper in (("text", "card"), ("muted", "card"), ("accent", "card"), ("warn", "warn-soft")):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (scheme, ink)  # WCAG 2.2, level AA


def test_print_is_light_on_a_dark_screen_and_the_screen_comes_back(browser: Browser, page_path: Path) -> None:
    browser.open(page_path, scheme="dark")
    browser.run(
        "addEventListener('beforeprint', () => {window.printed = getComputedStyle("
        "document.querySelector('#pareto .xtick text')).fill})"
    )

    pdf = browser.cdp("Page.printToPDF", preferCSSPageSize=True)

    assert len(pdf["data"]) > 50_000
    assert browser.run("return window.printed") == "rgb(29, 31, 35)"
    assert sum(ink_and_paper(browser)["ink"]) > 600


def test_keyboard_reaches_results_tables_and_details(browser: Browser, page_path: Path) -> None:
    browser.open(page_path)
    browser.press(TAB)
    first = browser.run("return document.activeElement.textContent")
    browser.press(ENTER)
    landed = browser.run("return location.hash")
    seen = set()
    for _ in range(40):
        browser.press(TAB)
        seen.add(browser.run("return document.activeElement.className || document.activeElement.tagName"))
        if browser.run("return document.activeElement.tagName") == "SUMMARY":
            break
    browser.press(ENTER)

    assert first == "Skip to the results"
    assert landed == "#main"
    assert {"scroll", "SUMMARY"} <= seen
    assert browser.run("return document.activeElement.parentElement.open") is True


def test_hostile_names_run_nothing_and_link_nowhere(browser: Browser, tmp_path: Path) -> None:
    summary = json.loads(FIXTURE.read_text(encoding="utf-8"))
    summary["name"] = HOSTILE
    for target in summary["targets"]:
        target["target"] = HOSTILE
        for row in target["rows"]:
            row["arm"] = HOSTILE

    browser.open(render_report(summary, tmp_path))

    assert browser.run("return window.bent") is None
    links = browser.run(
        "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href'))"
    )
    assert all(link.startswith("#") for link in links)
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelector('#pareto .legendtext').textContent") == HOSTILE
    assert browser.run("return document.querySelector('.name').textContent").endswith(HOSTILE)
    assert browser.complaints() == []


def ink_and_paper(browser: Browser) -> dict[str, list[int]]:
    """RGB of a figure's tick labels and of the page."""
    fill = browser.run("return getComputedStyle(document.querySelector('#pareto .xtick text')).fill")
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    return {name: [int(part) for part in text[4:-1].split(",")] for name, text in (("ink", fill), ("paper", paper))}


def channels(browser: Browser, name: str) -> list[float]:
    colour = browser.run(f"return getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours, 1 to 21."""
    linear = [
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (first, second)
    ]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


def wait_until(browser: Browser, script: str, expected: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while browser.run(script) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert browser.run(script) == expected
