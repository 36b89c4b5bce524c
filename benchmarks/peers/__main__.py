"""Ours beside ONNX Runtime's, Olive's, ModelOpt's and NNCF's quantization of one float ONNX file, on both CPU targets.

    python -m benchmarks.peers --install build/peers
    python -m benchmarks.peers MODEL.onnx --images DIR --mean 127 --std 128 --resize 256 --out docs/results/peers.json

Half of the images calibrate, the other half is asked. Everything runs in processes of its own; a peer that is not installed,
raises, or makes a graph that a runtime refuses is a row with its error. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.measure import PRESETS
from benchmarks.peers.candidates import Candidate, make_ours, make_peer
from benchmarks.peers.comparison import Entry, compare, entry_of, float_entries
from benchmarks.peers.environments import COMPARED, PEERS, install
from benchmarks.peers.images import Images, prepare_images
from benchmarks.peers.kept import DECIDING, sources
from benchmarks.peers.table import table
from benchmarks.peers.trial import Bench, local_bench, specs_of
from targets.base import Preprocessing, sha256_file, write_json
from targets.errors import EdgestillError, ModelError

SCHEMA_VERSION = 1
TARGETS = ("onnxruntime-cpu", "openvino-cpu")


def main(argv: Sequence[str]) -> int:
    """Install, or compare and print the table; returns the exit code."""
    arguments = _arguments(argv)
    try:
        return _install(arguments.install) if arguments.install else _compare(arguments)
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _install(root: Path) -> int:
    failures = install(root)
    for name, failure in failures.items():
        print(f"{name}: {failure or 'installed'}")
    return 1 if any(failures.values()) else 0


def _compare(arguments: argparse.Namespace) -> int:
    inputs, _ = specs_of(arguments.model)
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise ModelError(f"{arguments.model}: images feed one input of four axes. Give a model of images.")
    height, width = (size or arguments.resize for size in inputs[0].shape[2:])
    preprocessing = Preprocessing(resize=arguments.resize, crop=(height, width), mean=arguments.mean, std=arguments.std)
    work_dir = arguments.work.absolute()
    images = prepare_images(arguments.images, inputs[0], preprocessing, work_dir / "images")
    with local_bench(arguments.threads) as bench:
        candidates = _peers(arguments, images, work_dir)
        entries, ours = _entries(arguments, bench, images, candidates, work_dir)
        comparison = compare(
            bench,
            entries,
            arguments.model,
            images,
            preprocessing,
            preset=arguments.preset,
            rounds=arguments.launches or PRESETS[arguments.preset].launches,
            work_dir=work_dir / "trials",
            sources=sources(),
            say=say,
        )
    document = _document(arguments, images, [*candidates, *ours])
    document |= {"machine": comparison.machine, "rows": [asdict(row) for row in comparison.rows]}
    write_json(arguments.out, document)
    print(table(document))
    return 0


def _peers(arguments: argparse.Namespace, images: Images, work_dir: Path) -> list[Candidate]:
    made = []
    for name in arguments.peers:
        say(f"quantize: {PEERS[name].name}")
        made.append(make_peer(PEERS[name], arguments.model, images, arguments.environments, work_dir / name))
    return made


def _entries(
    arguments: argparse.Namespace, bench: Bench, images: Images, candidates: Sequence[Candidate], work_dir: Path
) -> tuple[list[Entry], list[Candidate]]:
    """Each target's float precisions, ours for it, and every peer."""
    entries, made = [], []
    for target in arguments.targets:
        say(f"quantize: ours for {target}")
        ours = make_ours(arguments.model.absolute(), images, target, arguments.threads, work_dir / f"ours-{target}")
        made.append(ours)
        entries += float_entries(target, bench.float_precisions(target), arguments.model)
        entries += [entry_of(candidate, target) for candidate in (ours, *candidates)]
    return entries, made


def _document(arguments: argparse.Namespace, images: Images, candidates: Sequence[Candidate]) -> dict[str, Any]:
    installed = sources()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": arguments.model.name,
        "model_sha256": sha256_file(arguments.model),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": arguments.preset,
        "rounds": arguments.launches or PRESETS[arguments.preset].launches,
        "threads": arguments.threads,
        "images": {"calibration": images.num_calibration, "held_out": images.num_held_out},
        "versions": {name: installed[name] for name in DECIDING},
        "quantizers": [
            {"name": one.name, "error": one.error, "seconds": one.seconds, "versions": dict(one.versions)}
            for one in candidates
        ],
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """--install stands alone; everything else needs a model, images, and how a pixel becomes an input."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    needed = ("model", "images", "mean", "std", "out")
    absent = [name for name in needed if getattr(arguments, name) is None]
    if arguments.install is None and absent:
        parser.error(f"these are needed: MODEL.onnx --images --mean --std --out; absent: {', '.join(absent)}")
    return arguments


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    return values * (3 if len(values) == 1 else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a float ONNX file")
    parser.add_argument("--install", type=Path, metavar="DIR", help="make the peers' environments there, and no more")
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), help="where they were made")
    parser.add_argument("--images", type=Path, help="photographs; 0123_name.jpg gives the class")
    parser.add_argument("--mean", type=_numbers, help="in pixel units, one number or three")
    parser.add_argument("--std", type=_numbers, help="in pixel units, one number or three")
    parser.add_argument("--resize", type=int, help="shorter side before the centre crop")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--peers", nargs="*", choices=list(COMPARED), default=list(COMPARED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", choices=list(PRESETS), default="ci")
    parser.add_argument("--launches", type=int, help="rounds; the preset's number by default")
    parser.add_argument("--work", type=Path, default=Path("build/peers-work"), help="what is made on the way, kept")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
