"""The page of the history in headless Chromium: it draws, fetches nothing, and can be used by anybody."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence.history_writes import record_of
from benchmarks.history import accept_change, keep_records, show_history

pytestmark = pytest.mark.system

AXE = Path(__file__).parents[2] / "build" / "axe" / "axe_playwright_python" / "axe.min.js"
Browser = Any  # of conftest.py


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series: one slower at first and accepted, then faster, with runs that are not valid; one slower and open."""
    folder = tmp_path_factory.mktemp("history")
    noise = np.random.default_rng(0).normal(0, 0.008, 80)
    for series, steps in (("a", {20: 0.07, 50: -0.05}), ("b", {40: 0.08})):
        records = []
        for day in range(80):
            base = record_of(0, day)
            log = noise[day] + sum(step for start, step in steps.items() if day >= start)
            records.append(
                replace(
                    base,
                    run_id=f"{series}-{day:03d}",
                    utc=(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day)).isoformat(),
                    summary=replace(base.summary, p25_us=1000 * math.exp(log)),
                    validity=replace(base.validity, ok=day % 13 != 5),
                    env=replace(base.env, hard={"kernel": series}, hard_sha256=series * 64),
                )
            )
        keep_records(records, db=folder / "history.db")
    accept_change("aaaa", run="a-020", note="a larger head", who="ada", db=folder / "history.db")
    show_history(db=folder / "history.db", page=folder / "page.html")
    return folder / "page.html"


def test_the_history_draws_every_series_and_fetches_nothing(browser: Browser, page_path: Path) -> None:
    browser.complaints()
    browser.open(page_path)

    drawn = browser.run(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.main-svg').length)"
    )
    labels = browser.run("return [...document.querySelectorAll('.annotation-text')].map(t => t.textContent)")
    assert (len(drawn), min(drawn) > 0) == (2, True)
    assert labels == ["accepted", "faster", "slower"]
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.complaints() == []


def test_a_phone_scrolls_tables_and_not_the_page(browser: Browser, page_path: Path) -> None:
    browser.open(page_path, width=390)

    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.run("return document.querySelectorAll('tbody tr').length") == 80 + 80 + 2 + 1


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_in_the_history(browser: Browser, page_path: Path, width: int, scheme: str) -> None:
    assert AXE.is_file(), f"{AXE} is not there. Get axe-core first: make build/axe"
    browser.open(page_path, width=width, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run(AXE.read_text(encoding="utf-8"))

    passes, violations = browser.run(
        "return axe.run().then(({violations, passes}) => [passes.length, violations"
        ".filter(v => ['serious', 'critical'].includes(v.impact)).map(v => v.id + ': ' + v.nodes[0].html)])"
    )

    assert passes > 10
    assert violations == []
