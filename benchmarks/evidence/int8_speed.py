"""INT8 that is faster: four nets, both CPU targets, float, ours, ONNX Runtime's and NNCF's own, in interleaved rounds.

    python -m benchmarks.evidence.int8_speed --images DIR --weights W --architecture A --out docs/results/int8_speed.json

DIR, W and A as in `benchmarks.evidence.efficientnet_lite0`. A round launches each arm of a net once, in a random order, in a
process of its own; then OpenVINO's benchmark_app compares our graph with NNCF's. Prints each goal with what was reached and
writes everything to --out. Killed and started again, it goes on with the next round. `--show FILE` prints a stored result,
`python -m benchmarks.documents` puts it into docs/peers.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.measure import PRESETS
from benchmarks.evidence.benchmark_app import app_medians
from benchmarks.evidence.goals import OPENVINO, ORT, Goal, Measured, goals_of
from benchmarks.evidence.models import INPUT, FloatModel, add_arguments, write_models
from benchmarks.peers.candidates import Candidate, make_ours, make_peer
from benchmarks.peers.comparison import compare, entry_of, float_entries
from benchmarks.peers.environments import PEERS
from benchmarks.peers.images import Images, prepare_images
from benchmarks.peers.kept import DECIDING, sources
from benchmarks.peers.table import table
from benchmarks.peers.trial import Bench, local_bench
from targets.base import read_json, sha256_file, write_json
from targets.errors import EdgestillError

SCHEMA_VERSION = 1
# Answers of random weights mean nothing, and a gate on them would send the ladder after layers to leave in float.
OPTIONS = {"random": ("--min-agreement", "0"), "published": ()}
OTHERS = {ORT: "onnxruntime_defaults", OPENVINO: "nncf_openvino"}


def main(argv: Sequence[str]) -> int:
    """Measure, or show what was measured; returns the exit code, 0 also where a goal is not met."""
    arguments = _arguments(argv)
    try:
        document = read_json(arguments.show) if arguments.show else _measure_all(arguments)
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text(document))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def text(document: Mapping[str, Any]) -> str:
    """Markdown: the goals, then a table a net."""
    lines = ["| net | what | goal | reached | |", "| --- | --- | --- | --- | --- |"]
    for goal in document["goals"]:
        cells = [
            goal["model"],
            goal["what"],
            goal["goal"],
            goal["reached"].replace("|", "/"),
            "met" if goal["met"] else "not met",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for one in document["models"]:
        weights = "" if one["weights"] == "published" else ", random weights: agreement and accuracy mean nothing"
        lines += ["", f"**{one['model']}**{weights}", "", table({**document, **one})]
    return "\n".join(lines)


def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Net by net: what is compared stands within one net, and its rounds lie close together."""
    work_dir = arguments.work.absolute()
    models = write_models(
        arguments.models, arguments.images, arguments.weights, arguments.architecture, work_dir / "float"
    )
    measured, told = {}, []
    with local_bench(arguments.threads) as bench:
        for model in models.values():
            say(f"{model.name}: prepare the images")
            images = prepare_images(arguments.images, INPUT, model.preprocessing, work_dir / model.name / "images")
            one, quantizers = _measure(arguments, bench, model, images, work_dir / model.name)
            measured[model.name] = one
            told.append(_told(model, one, quantizers, images))
    document = _document(arguments, told, goals_of(measured))
    write_json(arguments.out, document)
    return document


def _measure(
    arguments: argparse.Namespace, bench: Bench, model: FloatModel, images: Images, work_dir: Path
) -> tuple[Measured, list[Candidate]]:
    """Quantize with everybody, measure all arms of both targets in the same rounds, then benchmark_app."""
    entries, candidates = [], []
    for target, other in OTHERS.items():
        say(f"{model.name}: quantize for {target}")
        ours_dir = work_dir / f"ours-{target}"
        ours = make_ours(model.path, images, target, arguments.threads, ours_dir, options=OPTIONS[model.weights])
        peer = make_peer(PEERS[other], model.path, images, None, work_dir / other)
        candidates += [ours, peer]
        entries += float_entries(target, bench.float_precisions(target), model.path)
        entries += [entry_of(ours, target), entry_of(peer, target)]
    comparison = compare(
        bench,
        entries,
        model.path,
        images,
        model.preprocessing,
        preset=arguments.preset,
        rounds=_rounds(arguments),
        work_dir=work_dir / "trials",
        sources=sources(),
        say=lambda line: say(f"{model.name}: {line}"),
    )
    on_openvino = entries[-2:]
    ran = all(comparison.row(entry.target, entry.name).error is None for entry in on_openvino)
    say(f"{model.name}: benchmark_app")
    medians = app_medians(
        [work_dir / "trials" / entry.folder / "compiled" / "model.xml" for entry in on_openvino] if ran else [],
        rounds=_rounds(arguments),
        seconds=arguments.app_seconds,
        num_threads=arguments.threads,
        shape=INPUT.fixed(1),
        out_dir=work_dir / "benchmark_app",
    )
    ours_ms, nncf_ms = medians if ran else ([], [])
    return Measured(comparison=comparison, app_ours_ms=ours_ms, app_nncf_ms=nncf_ms), candidates


def _rounds(arguments: argparse.Namespace) -> int:
    return int(arguments.launches or PRESETS[arguments.preset].launches)


def _told(model: FloatModel, one: Measured, candidates: Sequence[Candidate], images: Images) -> dict[str, Any]:
    return {
        "model": model.name,
        "weights": model.weights,
        "model_sha256": sha256_file(model.path),
        "images": {"calibration": images.num_calibration, "held_out": images.num_held_out},
        "rows": [asdict(row) for row in one.comparison.rows],
        "machine": one.comparison.machine,
        "benchmark_app": {"ours_ms": list(one.app_ours_ms), "nncf_ms": list(one.app_nncf_ms)},
        "quantizers": [
            {
                "name": candidate.name,
                "error": candidate.error,
                "versions": dict(candidate.versions),
                **{key: candidate.report[key] for key in ("target", "ships", "why") if key in candidate.report},
            }
            for candidate in candidates
        ],
    }


def _document(arguments: argparse.Namespace, models: Sequence[dict[str, Any]], goals: Sequence[Goal]) -> dict[str, Any]:
    installed = sources()
    return {
        "schema_version": SCHEMA_VERSION,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": arguments.preset,
        "rounds": _rounds(arguments),
        "threads": arguments.threads,
        "app_seconds": arguments.app_seconds,
        "versions": {name: installed[name] for name in DECIDING},
        "goals": [asdict(goal) for goal in goals],
        "models": list(models),
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.evidence.int8_speed", description=__doc__.partition("\n")[0])
    add_arguments(parser, required=False)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", choices=list(PRESETS), default="ci")
    parser.add_argument("--launches", type=int, help="rounds; the preset's number by default")
    parser.add_argument("--app-seconds", type=int, default=3, help="how long benchmark_app measures in a round")
    parser.add_argument("--work", type=Path, default=Path("build/int8-speed"), help="what is made on the way, kept")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a stored result, and no more")
    arguments = parser.parse_args(argv)
    absent = [name for name in ("images", "weights", "architecture", "out") if getattr(arguments, name) is None]
    if arguments.show is None and absent:
        parser.error(f"these are needed: --images --weights --architecture --out; absent: {', '.join(absent)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
