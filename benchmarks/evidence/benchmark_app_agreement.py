"""Whether our latency is OpenVINO's own: this harness and benchmark_app on one compiled model, in interleaved pairs.

    python -m benchmarks.evidence.benchmark_app_agreement [MODEL.onnx ...] --out docs/results/benchmark_app_agreement.json

Without a model: a net of eight convolutions with seeded weights. Each measurement is a fresh process; in each pair a coin says which
comes first. benchmark_app reports its runtime's own clock, in milliseconds with two decimals, and computes in the type that
OpenVINO prefers on the machine: so do we. Our boundary `runtime` holds the copy of the input and the binding as well. Every
pair stands in the result, and `--show FILE` prints the table from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.record import Record
from benchmarks.devices import Local
from benchmarks.evidence.benchmark_app import median_ms
from benchmarks.evidence.graphs import convolutions, exported_of
from benchmarks.evidence.script import parse_out_or_show
from benchmarks.statistics import Interval, median_interval
from targets import make_target
from targets.base import CompiledModel, read_json, write_json

TARGET = "openvino-cpu"
PRECISIONS = {"f32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}
MAX_RATIO, MAX_DIFFERENCE_US = 0.03, 10.0
BOUNDARIES = {"runtime": "our stop watch around the call", "device": "OpenVINO's clock, read by us"}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Ours over benchmark_app's: medians over pairs with their 95 % intervals. `holds`: one of the two lies within its limit."""

    ratio: float
    ratio_ci95: Interval | None
    difference_us: float
    difference_ci95_us: Interval | None

    @property
    def holds(self) -> bool:
        inside = [
            interval is not None and -limit <= interval[0] and interval[1] <= limit
            for interval, limit in (
                (None if self.ratio_ci95 is None else (self.ratio_ci95[0] - 1, self.ratio_ci95[1] - 1), MAX_RATIO),
                (self.difference_ci95_us, MAX_DIFFERENCE_US),
            )
        ]
        return any(inside)


def main(argv: Sequence[str]) -> None:
    """Measure, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    with tempfile.TemporaryDirectory() as folder:
        document = measure(arguments, Path(folder))
    write_json(arguments.out, document)
    print(text(document))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every pair of every model, in microseconds."""
    paths = arguments.models or [convolutions(folder / "convolutions.onnx")]
    models = [_measure_model(path, arguments, folder / path.stem) for path in paths]
    first = models[0]["records"][0]
    return {
        "schema_version": 1,
        "preset": arguments.preset,
        "app_seconds": arguments.seconds,
        "num_threads": arguments.threads,
        "machine": {key: first.env.hard[key] for key in ("cpu", "isa", "cpus_online", "kernel")},
        "toolchain": first.runtime.version,
        "utc": first.utc,
        "models": [{key: value for key, value in model.items() if key != "records"} for model in models],
    }


def _measure_model(path: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    target = make_target(TARGET, {"num_threads": arguments.threads})
    exported = exported_of(path, folder / "exported")
    precision = preferred_precision(target.compile(exported, folder / "fp32", "fp32"))
    compiled = target.compile(exported, folder / "compiled", precision)
    records, pairs = [], []
    for index in range(arguments.pairs):
        print(f"{path.stem}: pair {index + 1} of {arguments.pairs}", file=sys.stderr, flush=True)
        record, app_us = _pair(compiled, index, arguments, folder / f"pair-{index:02}")
        records.append(record)
        own = record.device
        disturbances = list(record.launches[0].disturbances)
        ours = {"runtime_us": record.summary.p50_us, "device_us": None if own is None else own.p50_us}
        pairs.append({**ours, "app_us": app_us, "disturbances": disturbances})
    return {"model": path.stem, "precision": precision, "pairs": pairs, "records": records}


def _pair(compiled: CompiledModel, index: int, arguments: argparse.Namespace, folder: Path) -> tuple[Record, float]:
    """(our record of one launch, benchmark_app's median in microseconds), the order by a coin."""
    folder.mkdir(parents=True)
    shape = compiled.inputs[0].fixed(1)
    app_us = 0.0
    app_first = bool(np.random.default_rng(index).integers(2))
    if app_first:
        app_us = 1e3 * median_ms(compiled.directory / "model.xml", arguments.seconds, arguments.threads, shape, folder)
    (record,) = measure_arms(
        Local(),
        [Arm(compiled.name, compiled.directory)],
        preset=arguments.preset,
        launches=1,
        seed=index,
        out_dir=folder,
        throughput=False,
        retries=0,
    )
    if not app_first:
        app_us = 1e3 * median_ms(compiled.directory / "model.xml", arguments.seconds, arguments.threads, shape, folder)
    return record, app_us


def preferred_precision(compiled: CompiledModel) -> str:
    """What OpenVINO computes a float model in when nobody asks: what benchmark_app gets."""
    import openvino as ov

    opened = ov.Core().compile_model(str(compiled.directory / "model.xml"), "CPU")
    return PRECISIONS[str(opened.get_property("INFERENCE_PRECISION_HINT").get_type_name())]


def agreement(ours_us: Sequence[float], app_us: Sequence[float]) -> Agreement:
    """Pair by pair: what slowed a pair slowed both."""
    logs = np.log(np.asarray(ours_us)) - np.log(np.asarray(app_us))
    differences_us = np.asarray(ours_us) - np.asarray(app_us)
    interval = median_interval(logs)
    return Agreement(
        ratio=float(np.exp(np.median(logs))),
        ratio_ci95=None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1]))),
        difference_us=float(np.median(differences_us)),
        difference_ci95_us=median_interval(differences_us),
    )


def text(document: Mapping[str, Any]) -> str:
    """Markdown: a line a model and boundary."""
    lines = [
        "| model | ours | benchmark_app, µs | ours, µs | ratio (95 %) | difference, µs (95 %) | within ±3 % or 10 µs |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for model in document["models"]:
        lines += [_line(model, boundary) for boundary in BOUNDARIES]
    pairs = [pair for model in document["models"] for pair in model["pairs"]]
    disturbed = sum(bool(pair["disturbances"]) for pair in pairs)
    lines += [
        "",
        f"{len(document['models'][0]['pairs'])} interleaved pairs of fresh processes a model, {document['num_threads']} thread, "
        f"batch 1; benchmark_app for {document['app_seconds']} s, ours with preset {document['preset']}; {disturbed} of "
        f"{len(pairs)} of our launches were disturbed. {document['toolchain']}; {document['machine']['cpu']}, "
        f"{document['utc'][:10]}. Medians over pairs, intervals by order statistics.",
    ]
    return "\n".join(lines)


def _line(model: Mapping[str, Any], boundary: str) -> str:
    name = f"| {model['model']} in {model['precision']} | {BOUNDARIES[boundary]}"
    ours_us = [pair[f"{boundary}_us"] for pair in model["pairs"]]
    app_us = [pair["app_us"] for pair in model["pairs"]]
    if None in ours_us:
        return f"{name} | {np.median(app_us):.0f} | null | - | - | not known |"
    found = agreement(ours_us, app_us)
    ratio, difference = f"{found.ratio:.3f}", f"{found.difference_us:+.1f}"
    if found.ratio_ci95 is not None and found.difference_ci95_us is not None:
        ratio += f" ({found.ratio_ci95[0]:.3f} to {found.ratio_ci95[1]:.3f})"
        difference += f" ({found.difference_ci95_us[0]:+.1f} to {found.difference_ci95_us[1]:+.1f})"
    words = "yes" if found.holds else "**no**"
    return f"{name} | {np.median(app_us):.0f} | {np.median(ours_us):.0f} | {ratio} | {difference} | {words} |"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, help="float ONNX files (default: a net made here)")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=3, help="how long benchmark_app measures")
    parser.add_argument("--preset", default="smoke", help="how long we measure")
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
