"""How often the rule of `benchmarks/change_rule.py` cries wolf, and what it sees: by simulation, no clock is read.

    python -m benchmarks.evidence.history_rule --out docs/results/history_rule.json

Series of 60 runs; a step comes after the first 30. Seeds are fixed: the same numpy gives the same counts. `--series N` for
less, `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.change_rule import (
    MIN_SHIFT,
    MIN_SIGMA,
    MIN_WINDOW,
    NOISES,
    SUSPECTS,
    WINDOW,
    Noise,
    Share,
    creep_seen,
    false_alarms,
    power,
)
from targets.base import read_json, write_json

SERIES, RUNS, STEP_AT = 20_000, 60, 30
SLOWDOWNS, CREEPS = (0.03, 0.05, 0.10), (0.0005, 0.001, 0.002)
SOON = 5  # runs
SEED = 20260101


def main(argv: Sequence[str]) -> None:
    """Simulate, write one JSON file, print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.history_rule")
    parser.add_argument("--series", type=int, default=SERIES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    arguments = parser.parse_args(argv)
    document = read_json(arguments.show) if arguments.show else measured(arguments.series)
    if arguments.out:
        write_json(arguments.out, document)
    print(text(document))


def measured(num_series: int) -> dict[str, Any]:
    """All rates of all noises, over `num_series` series each."""
    return {
        "schema_version": 1,
        "rule": {
            "window": WINDOW,
            "min_window": MIN_WINDOW,
            "suspects": SUSPECTS,
            "min_sigma": MIN_SIGMA,
            "min_shift": MIN_SHIFT,
        },
        "num_runs": RUNS,
        "step_at": STEP_AT,
        "seed": SEED,
        "numpy": np.__version__,
        "noises": [_rates(noise, num_series) for noise in NOISES],
    }


def text(document: Mapping[str, Any]) -> str:
    """A Markdown table: a line a question, a column a noise; percent of the series, with the exact 95 % interval."""
    noises = document["noises"]
    rows = {"false alarm in 60 runs": [noise["false_alarms"] for noise in noises]}
    for slow in noises[0]["power"]:
        rows[f"step of {slow}, seen within {SOON} runs"] = [noise[f"power_within_{SOON}"][slow] for noise in noises]
        rows[f"step of {slow}, seen within {RUNS - STEP_AT} runs"] = [noise["power"][slow] for noise in noises]
    for slow in noises[0]["creep"]:
        rows[f"creep of {slow} a run, seen in 60 runs"] = [noise["creep"][slow] for noise in noises]
    head = f"| of {noises[0]['false_alarms']['num_series']:,} series | " + " | ".join(n["about"] for n in noises) + " |"
    lines = [f"| {name} | " + " | ".join(map(_percent, shares)) + " |" for name, shares in rows.items()]
    return "\n".join([head, "|---|" + "---:|" * len(noises), *lines])


def _rates(noise: Noise, num_series: int) -> dict[str, Any]:
    size = {"num_series": num_series, "num_runs": RUNS, "seed": SEED}
    return {
        "name": noise.name,
        "about": noise.about,
        "false_alarms": false_alarms(noise, **size).to_json(),
        "power": {f"{slow:+.0%}": _power(noise, slow, RUNS - STEP_AT, size) for slow in SLOWDOWNS},
        f"power_within_{SOON}": {f"{slow:+.0%}": _power(noise, slow, SOON, size) for slow in SLOWDOWNS},
        "creep": {f"{slow:+.2%}": creep_seen(noise, slow, **size).to_json() for slow in CREEPS},
    }


def _power(noise: Noise, slowdown: float, within: int, size: Mapping[str, int]) -> dict[str, Any]:
    share: Share = power(noise, slowdown, step_at=STEP_AT, within=within, **size)
    return share.to_json()


def _percent(share: Mapping[str, Any]) -> str:
    low, high = share["ci95"]
    return f"{100 * share['share']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
