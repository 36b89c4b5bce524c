"""The rates of the gate as Markdown, whatever was measured to know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.selftest import Floats, SelfTest, rate_of, throws

MIN_WINDOWS = 50  # a share of fewer says nothing


@dataclass(frozen=True)
class Injected:
    """Pairs whose B was really slower: ln B - ln A, in the order in which they were measured."""

    what: str
    differences: Floats

    @property
    def shift(self) -> float:
        return float(np.expm1(np.median(self.differences)))

    def windows(self, num_pairs: int) -> Floats:
        return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(self.differences, num_pairs))


def table(tested: SelfTest, unit: str, injected: Injected) -> str:
    """What was asked, how often, and the 95 % bound; `unit` is what windows share. No row for too few injected pairs."""
    rows = [("false alarms, A against A", tested.false_alarms, "at most", tested.false_alarms.upper95)]
    rows += [(f"the same, windows that share no {unit}", tested.apart, "at most", tested.apart.upper95)]
    rows += [
        (f"seen, B slower by {name} by arithmetic", rate, "at least", rate.lower95)
        for name, rate in tested.power.items()
    ]
    if injected.differences.size >= tested.num_pairs:
        rate = rate_of(injected.windows(tested.num_pairs))
        rows.append((f"seen, {injected.what} ({injected.shift:+.1%} measured)", rate, "at least", rate.lower95))
    lines = [f"| comparisons of {tested.num_pairs} pairs | windows | share | 95 % bound |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {what} | {rate.alarms} of {rate.windows} | {rate.share:.1%} | {word} {bound:.2%} |"
        for what, rate, word, bound in rows
    ]
    coins = f"false alarms over {throws(tested.num_pairs)} of the coins"
    lines.append(f"| {coins} | | {tested.counted:.3%} | below 1 % by construction |")
    return "\n".join(lines)


def repeated(retries: int, num: int) -> str:
    return f" after at most {retries} retries each, {num} in all" if retries else ""


def shares(tested: Sequence[SelfTest]) -> list[str]:
    """Cells of one protocol at several numbers of pairs: false alarms and +3 % of each; no share of too few windows."""
    cells = []
    for one in tested:
        slower = one.power["+3%"]
        enough = one.false_alarms.windows >= MIN_WINDOWS
        cells += [f"{one.false_alarms.alarms} of {one.false_alarms.windows}" if enough else "-"]
        cells += [f"{slower.share:.1%}" if enough else "-"]
    return cells
