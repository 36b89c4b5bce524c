"""How often `edgestill compare` cries wolf, and whether it sees 3 %: contiguous launches of one compiled model.

    python -m benchmarks.evidence.false_alarms COMPILED --kept build/false_alarms --out docs/results/false_alarms.json

COMPILED is a compiled directory, such as `edgestill quantize` leaves in OUT/compiled/int8. First the model against itself, one
launch after the other; then in interleaved pairs against itself with a busy wait of 3 % in every call. Every launch's p25 stands
in the result, so that `--show FILE` computes the rates anew. Blocks of launches that were measured are kept and not repeated.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.record import Record
from benchmarks.devices import Local
from benchmarks.peers.kept import kept
from benchmarks.selftest import Rate, alarms, selftest
from targets.base import CompiledModel, read_json, sha256_file, write_json

NUM_PAIRS = 10
BLOCK = 20  # launches (or pairs) that are measured and kept at once
SLOWER = 0.03
PLAIN, SLOWED = "as it is", "slowed"


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    document = measure(arguments)
    write_json(arguments.out, document)
    print(text(document))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every p25 in the order in which it was measured, microseconds."""
    compiled = CompiledModel.load(arguments.compiled)
    digest = sha256_file(arguments.compiled / "compiled.json")
    blocks = [_block("same", i, None, digest, arguments) for i in range(math.ceil(arguments.launches / BLOCK))]
    p25s_us = [p25 for block in blocks for p25 in block["p25_us"][PLAIN]]
    wait_us = SLOWER * float(np.median(p25s_us))
    pairs = [_block("slowed", i, wait_us, digest, arguments) for i in range(math.ceil(arguments.pairs / BLOCK))]
    return {
        "schema_version": 1,
        "model": compiled.name,
        "precision": compiled.precision,
        "toolchain": compiled.toolchain,
        "preset": arguments.preset,
        "machine": blocks[0]["machine"],
        "utc": blocks[0]["utc"],
        "same": {"p25_us": p25s_us, "disturbed": sum(block["disturbed"] for block in blocks)},
        "slowed": {
            "slower": SLOWER,
            "wait_us": wait_us,
            **{name: [p25 for block in pairs for p25 in block["p25_us"][name]] for name in (PLAIN, SLOWED)},
            "disturbed": sum(block["disturbed"] for block in pairs),
        },
    }


def _block(kind: str, index: int, wait_us: float | None, digest: str, arguments: argparse.Namespace) -> dict[str, Any]:
    key = {"compiled": digest, "preset": arguments.preset, "launches": BLOCK, "wait_us": wait_us}
    make = functools.partial(_measure_block, wait_us, index, arguments)
    found: dict[str, Any] = kept(arguments.kept / f"{kind}-{index:02}.json", key, make)
    return found


def _measure_block(wait_us: float | None, index: int, arguments: argparse.Namespace) -> dict[str, Any]:
    arms = [Arm(PLAIN, arguments.compiled)]
    if wait_us is not None:
        arms.append(Arm(SLOWED, arguments.compiled, injected_us=wait_us))
    folder = arguments.kept / "session"
    print(f"block {index + 1}, {BLOCK} rounds", file=sys.stderr, flush=True)
    records = measure_arms(
        Local(), arms, preset=arguments.preset, launches=BLOCK, seed=index, out_dir=folder, throughput=False, retries=0
    )
    shutil.rmtree(folder)
    return {
        "p25_us": {arm.name: _p25s(record) for arm, record in zip(arms, records, strict=True)},
        "disturbed": sum(bool(launch.disturbances) for record in records for launch in record.launches),
        "machine": {key: records[0].env.hard[key] for key in ("cpu", "cpus_online", "kernel")},
        "utc": records[0].utc,
    }


def _p25s(record: Record) -> list[float]:
    return [launch.lat_us.p25 for launch in sorted(record.launches, key=lambda one: one.order)]


def rates(document: Mapping[str, Any]) -> dict[str, Any]:
    """The self-test's rates on the launches of the model against itself, and the windows of pairs that saw the busy wait."""
    slowed = document["slowed"]
    differences = np.log(slowed[SLOWED]) - np.log(slowed[PLAIN])
    windows = np.lib.stride_tricks.sliding_window_view(differences, NUM_PAIRS)
    seen = alarms(np.ascontiguousarray(windows))
    return {
        "selftest": selftest(document["same"]["p25_us"], num_pairs=NUM_PAIRS),
        "seen": Rate(alarms=int(seen.sum()), windows=len(seen)),
        "shift": float(np.expm1(np.median(differences))),
    }


def text(document: Mapping[str, Any]) -> str:
    """Markdown: what was asked, how often, and the 95 % bound."""
    found = rates(document)
    tested, seen = found["selftest"], found["seen"]
    rows = [("false alarms, A against A", tested.false_alarms, "at most", tested.false_alarms.upper95)]
    rows += [("the same, windows that share no launch", tested.apart, "at most", tested.apart.upper95)]
    rows += [
        (f"seen, B slower by {name} by arithmetic", rate, "at least", rate.lower95)
        for name, rate in tested.power.items()
    ]
    rows += [(f"seen, B slowed by a busy wait ({found['shift']:+.1%} measured)", seen, "at least", seen.lower95)]
    lines = ["| comparisons of ten pairs | windows | share | 95 % bound |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {what} | {rate.alarms} of {rate.windows} | {rate.share:.1%} | {word} {bound:.2%} |"
        for what, rate, word, bound in rows
    ]
    same, slowed = document["same"], document["slowed"]
    lines += [
        f"| false alarms over every throw of the coins | | {tested.counted:.3%} | below 1 % by construction |",
        "",
        f"{document['model']} in {document['precision']}, {document['toolchain']}, preset {document['preset']}, "
        f"{len(same['p25_us'])} launches against themselves and {len(slowed[PLAIN])} pairs with a busy wait of "
        f"{slowed['wait_us']:.0f} µs; {document['machine']['cpu']}, {document['utc'][:10]}. p25 varies by {tested.spread:.1%} "
        f"between launches; {same['disturbed']} and {slowed['disturbed']} launches were disturbed. Windows overlap, so "
        "their bounds are as if they did not.",
    ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("compiled", type=Path, nargs="?")
    parser.add_argument("--launches", type=int, default=340)
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--kept", type=Path, default=Path("build/false_alarms"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print a stored result")
    arguments = parser.parse_args(argv)
    if not arguments.show and not (arguments.compiled and arguments.out):
        parser.error("COMPILED and --out are needed, or --show FILE")
    return arguments


if __name__ == "__main__":
    main(sys.argv[1:])
