"""How often `edgestill compare` cries wolf, and whether it sees 3 %: pairs of one compiled model that take turns.

    python -m benchmarks.evidence.false_alarms COMPILED --kept build/false_alarms --out docs/results/false_alarms.json

COMPILED is a compiled directory, such as `edgestill quantize` leaves in OUT/compiled/int8. First the model against itself; then
against itself with a busy wait of 3 % in every call; last against itself on whatever CPUs the scheduler gives to either. What
every pair said stands in the result, so that `--show FILE` computes the rates anew. Blocks of pairs that were measured are kept
and not repeated. `--beside FILE...` lays results side by side, those of launches one after the other among them.
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

from benchmarks.bench import Arm
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Record
from benchmarks.devices import Local
from benchmarks.evidence import contiguous
from benchmarks.evidence.alarm_table import Injected, repeated, shares, table
from benchmarks.peers.kept import kept
from benchmarks.selftest import NUM_PAIRS, selftest
from benchmarks.turns import measure_by_turns, pair_differences
from targets.base import CompiledModel, read_json, sha256_file, write_json

BLOCK = 20  # pairs that are measured and kept at once
SLOWER = 0.03
SAME, SLOWED, ANY_CPUS = "same", "slowed", "any_cpus"
SEEDS = {SAME: 0, SLOWED: 1000, ANY_CPUS: 2000}
SIZES = (10, 20)  # pairs of a comparison, side by side


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.beside:
        print(beside([read_json(path) for path in arguments.beside]))
        return
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    document = measure(arguments)
    write_json(arguments.out, document)
    print(text(document))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every pair said, in the order in which it was measured: ln B - ln A, and both p25 in microseconds."""
    compiled = CompiledModel.load(arguments.compiled)
    digest = sha256_file(arguments.compiled / "compiled.json")
    same = _blocks(SAME, arguments.pairs, None, digest, arguments)
    wait_us = round(SLOWER * float(np.median(_joined(same)["p25_us"])), 1)
    slowed = _blocks(SLOWED, arguments.slowed, wait_us, digest, arguments)
    return {
        "schema_version": 2,
        "model": compiled.name,
        "precision": compiled.precision,
        "toolchain": compiled.toolchain,
        "preset": arguments.preset,
        "retries": arguments.retries,
        "num_pairs": NUM_PAIRS,
        "machine": same[0]["machine"],
        "utc": same[0]["utc"],
        SAME: _joined(same),
        SLOWED: {"slower": SLOWER, "wait_us": wait_us, **_joined(slowed)},
        ANY_CPUS: _joined(_blocks(ANY_CPUS, arguments.any_cpus, None, digest, arguments)),
    }


def _blocks(
    kind: str, pairs: int, wait_us: float | None, digest: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    key = {"compiled": digest, "preset": arguments.preset, "pairs": BLOCK, "wait_us": wait_us}
    key |= {"retries": arguments.retries, "protocol": "turns"}
    found = []
    for index in range(math.ceil(pairs / BLOCK)):
        make = functools.partial(_measure_block, kind, index, wait_us, arguments)
        found.append(kept(arguments.kept / f"turns-{kind}-{index:02}.json", key, make))
    return found


def _measure_block(kind: str, index: int, wait_us: float | None, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.kept / "session"
    print(f"{kind}: block {index + 1}, {BLOCK} pairs", file=sys.stderr, flush=True)
    a, b = measure_by_turns(
        Local(),
        Arm("A", arguments.compiled),
        Arm("B", arguments.compiled, injected_us=wait_us),
        preset=arguments.preset,
        pairs=BLOCK,
        chance=str(SEEDS[kind] + index),
        out_dir=folder,
        retries=arguments.retries,
        same_cpus=kind != ANY_CPUS,
    )
    shutil.rmtree(folder)
    return {
        "differences": pair_differences(a, b),
        "p25_us": [[one.lat_us.p25 for one in record.launches] for record in (a, b)],
        "disturbed": _disturbed(a, b),
        "repeated": sum(len(launch.repeated) for launch in a.launches),
        "machine": {key: a.env.hard[key] for key in ("cpu", "isa", "cpus_online", "kernel")},
        "utc": a.utc,
    }


def _disturbed(a: Record, b: Record) -> int:
    """Pairs in which either was."""
    pairs = zip(a.launches, b.launches, strict=True)
    return sum(bool(one.disturbances or other.disturbances) for one, other in pairs)


def _joined(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "differences": [one for block in blocks for one in block["differences"]],
        "p25_us": [[one for block in blocks for one in block["p25_us"][arm]] for arm in (0, 1)],
        **{key: sum(block[key] for block in blocks) for key in ("disturbed", "repeated")},
    }


def text(document: Mapping[str, Any]) -> str:
    """Markdown of one result: what was asked, how often, and the 95 % bound."""
    if document["schema_version"] == 1:
        return contiguous.text(document)
    same, slowed = document[SAME], document[SLOWED]
    tested = selftest(same["differences"], num_pairs=document["num_pairs"])
    injected = Injected("B slowed by a busy wait", np.asarray(slowed["differences"]))
    num_repeated = same["repeated"] + slowed["repeated"]
    notes = (
        f"{document['model']} in {document['precision']}, {document['toolchain']}, preset {document['preset']}, "
        f"{tested.num_measured} pairs of the model and itself and {injected.differences.size} with a busy wait of "
        f"{slowed['wait_us']:.0f} µs; {document['machine']['cpu']} ({document['machine']['isa']}), "
        f"{document['utc'][:10]}. B against A varies by {tested.spread:.2%} between pairs, p25 by {_between(same):.1%} "
        f"between launches; {same['disturbed']} and {slowed['disturbed']} pairs were "
        f"disturbed{repeated(document['retries'], num_repeated)}. Windows overlap, so "
        "their bounds are as if they did not."
    )
    return f"{table(tested, 'pair', injected)}\n\n{notes}"


def _between(part: Mapping[str, Any]) -> float:
    return float(np.log(part["p25_us"]).ravel().std(ddof=1))


def beside(documents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a protocol and result, how far pairs of identical models differ, and what comparisons say of them."""
    heads = [f"{what}, {size} pairs" for size in SIZES for what in ("false alarms", "sees +3 %")]
    lines = [
        f"| how | measured | B against A varies by | {' | '.join(heads)} |",
        "| --- | --- | ---: |" + " ---: |" * len(heads),
    ]
    for document in documents:
        rows = _contiguous_row(document) if document["schema_version"] == 1 else _turns_rows(document)
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _contiguous_row(document: Mapping[str, Any]) -> list[list[str]]:
    tested = [contiguous.rates(document, size) for size in SIZES]
    measured = f"{tested[0].num_measured} launches, {_when(document)}"
    return [["one after the other", measured, f"{tested[0].spread:.2%}", *shares(tested)]]


def _turns_rows(document: Mapping[str, Any]) -> list[list[str]]:
    names = {ANY_CPUS: "by turns, on any CPUs", SAME: "by turns, on the same CPUs"}
    rows = []
    for part, name in names.items():
        differences = document[part]["differences"]
        if len(differences) >= max(SIZES):
            tested = [selftest(differences, num_pairs=size) for size in SIZES]
            measured = f"{len(differences)} pairs, {_when(document)}"
            rows.append([name, measured, f"{tested[0].spread:.2%}", *shares(tested)])
    a_us, b_us = document[SAME]["p25_us"]
    apart = np.log(b_us[1:]) - np.log(a_us[:-1])  # a pair that did not take turns, of the same processes
    if len(apart) >= max(SIZES):
        tested = [selftest(apart, num_pairs=size) for size in SIZES]
        measured = f"{len(apart)} pairs, of the row above"
        rows.append(["A of a pair, B of the next", measured, f"{tested[0].spread:.2%}", *shares(tested)])
    return rows


def _when(document: Mapping[str, Any]) -> str:
    retries = f", {document['retries']} retries at most" if document.get("retries") else ""
    return f"{document['utc'][:16].replace('T', ' ')} UTC{retries}"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("compiled", type=Path, nargs="?")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS + 300, help="of the model and itself")
    parser.add_argument("--slowed", type=int, default=4 * NUM_PAIRS, help="pairs with a busy wait in B")
    parser.add_argument("--any-cpus", type=int, default=BLOCK, help="pairs that are not held to the same CPUs")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--retries", type=int, default=PRESETS["ci"].retries, help="of a disturbed pair, as `compare`")
    parser.add_argument("--kept", type=Path, default=Path("build/false_alarms"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print a stored result")
    parser.add_argument("--beside", type=Path, nargs="+", metavar="FILE", help="print stored results side by side")
    arguments = parser.parse_args(argv)
    if not arguments.show and not arguments.beside and not (arguments.compiled and arguments.out):
        parser.error("COMPILED and --out are needed, or --show FILE, or --beside FILE...")
    return arguments


if __name__ == "__main__":
    main(sys.argv[1:])
