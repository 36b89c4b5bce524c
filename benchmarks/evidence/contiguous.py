"""What `edgestill compare` did before its processes took turns: fresh processes one after the other, interleaved.

Reads the results of that time (schema 1 of `benchmarks/evidence/false_alarms.py`): the p25 of every launch, in the order in which
they were measured. Windows of 2 K launches slide over them, one launch at a time; in each, neighbours are a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.evidence.alarm_table import Injected, repeated, table
from benchmarks.selftest import Floats, SelfTest, judged

NUM_PAIRS = 10
PLAIN, SLOWED = "as it is", "slowed"


def rates(document: Mapping[str, Any], num_pairs: int = NUM_PAIRS) -> SelfTest:
    """`spread` is between neighbours, as it is for pairs that take turns."""
    logs = np.log(document["same"]["p25_us"])
    spread = float(np.diff(logs).std(ddof=1))
    windows = contiguous_windows(logs, num_pairs, np.random.default_rng(0))
    return judged(windows, num_measured=int(logs.size), spread=spread, step=2 * num_pairs)


def contiguous_windows(logs: Floats, num_pairs: int, generator: np.random.Generator) -> Floats:
    """ln B - ln A of each window of 2 K launches, the coins thrown anew in each: (M, K)."""
    found = []
    for begin in range(logs.size - 2 * num_pairs + 1):
        pairs = logs[begin : begin + 2 * num_pairs].reshape(num_pairs, 2)
        found.append((pairs[:, 1] - pairs[:, 0]) * generator.choice((-1.0, 1.0), num_pairs))
    return np.stack(found)


def text(document: Mapping[str, Any]) -> str:
    """Markdown of one result."""
    same, slowed = document["same"], document["slowed"]
    found = rates(document)
    injected = Injected("B slowed by a busy wait", np.log(slowed[SLOWED]) - np.log(slowed[PLAIN]))
    between = float(np.log(same["p25_us"]).std(ddof=1))
    num_repeated = sum(part.get("repeated", 0) for part in (same, slowed))
    notes = (
        f"{document['model']} in {document['precision']}, {document['toolchain']}, preset {document['preset']}, "
        f"{len(same['p25_us'])} launches against themselves and {len(slowed[PLAIN])} pairs with a busy wait of "
        f"{slowed['wait_us']:.0f} µs; {document['machine']['cpu']}, {document['utc'][:10]}. p25 varies by {between:.1%} "
        f"between launches; {same['disturbed']} and {slowed['disturbed']} launches were disturbed"
        f"{repeated(document.get('retries', 0), num_repeated)}. Windows overlap, so their bounds are as if they did not."
    )
    return f"{table(found, 'launch', injected)}\n\n{notes}"
