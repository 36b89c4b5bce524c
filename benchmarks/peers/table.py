"""The table of docs/peers.md, from what a comparison stored: `python -m benchmarks.peers.table docs/results/peers.json`.

Prints Markdown; `python -m benchmarks.documents` puts it into the document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from targets.base import read_json
from targets.errors import EdgestillError

COLUMNS = (
    "target",
    "quantizer",
    "convolutions in INT8",
    "MACs in INT8",
    "p50, ms (95 % CI)",
    "times as fast as FP32",
    "same top-1 as float",
    "cosine with float",
    "size, MiB",
)
ERROR_CHARACTERS = 160


def table(document: Mapping[str, Any]) -> str:
    """Markdown lines: a row each, then where and with what it was measured."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*lines, *(_line(_cells(row)) for row in document["rows"]), "", provenance(document)])


def provenance(document: Mapping[str, Any]) -> str:
    """What, on what, under which rules; and whether a quiet machine measured it."""
    hard, images = document["machine"]["hard"], document["images"]
    versions = ", ".join(f"{name} {version}" for name, version in _versions(document).items())
    disturbed = [f"{row['target']} {row['name']}" for row in document["rows"] if row["valid"] is False]
    named = "in every row" if len(disturbed) == len(document["rows"]) else ", ".join(disturbed)
    noisy = f" Not to be quoted, half of the launches or more were disturbed: {named}." if disturbed else ""
    return (
        f"{document['model']}; {images['calibration']} images calibrate, {images['held_out']} others are asked; "
        f"{document['utc'][:10]}, {hard['cpu']}, {len(hard['cpus_allowed'])} cores, {document['threads']} threads, batch 1, "
        f"{document['rounds']} rounds of fresh processes (preset {document['preset']}), ratios paired by round on p25; "
        f"{versions}.{noisy}"
    )


def _versions(document: Mapping[str, Any]) -> dict[str, str]:
    """Ours, and what a peer brought along otherwise."""
    versions = dict(document["versions"])
    for quantizer in document["quantizers"]:
        for package, version in quantizer["versions"].items():
            if versions.setdefault(package, version) != version:
                versions[f"{package} of {quantizer['name']}"] = version
    return versions


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["error"] is not None:
        said = " ".join(row["error"].split())[:ERROR_CHARACTERS].replace("|", "/")
        return [row["target"], row["name"], f"no result: {said}", *([""] * (len(COLUMNS) - 3))]
    ratio = row["faster_than_fp32"]
    cosine = min(one["mean"] for one in row["cosines"].values())
    return [
        row["target"],
        row["name"],
        f"{row['num_int8_convolutions']} of {row['num_convolutions']}",
        f"{row['int8_share']:.0%}",
        f"{row['p50_us'] / 1e3:.2f}{_interval(row['p50_ci95_us'], 1e-3)}",
        f"{ratio['value']:.2f}{_interval(ratio['ci95'], 1.0)}",
        "-" if row["agreement"] is None else f"{row['agreement']['value']:.0%}",
        f"{cosine:.4f}",
        f"{row['num_bytes'] / 2**20:.1f}",
    ]


def _interval(limits: tuple[float, float] | None, scale: float) -> str:
    return "" if limits is None else f" ({limits[0] * scale:.2f} to {limits[1] * scale:.2f})"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers.table", description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args(argv)
    try:
        print(table(read_json(arguments.result)))
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
