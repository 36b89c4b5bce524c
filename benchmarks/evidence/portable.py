"""What one INT8 graph for every runtime costs: scheme `portable` against each target's own scheme, accuracy and speed.

    python -m benchmarks.evidence.portable --images DIR --weights W --architecture A --out docs/results/portable.json

DIR, W and A as in `benchmarks.evidence.efficientnet_lite0`. Both graphs are made by `edgestill quantize` from the same
calibration images; float, own and portable are then measured in interleaved launches of one process each. The agreement
counts for EfficientNet-Lite0 alone, the other nets have random weights. `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, measure_arms
from benchmarks.devices import Local
from benchmarks.evidence.models import FloatModel, add_arguments, write_models
from benchmarks.evidence.script import quantize_ungated
from targets.base import Placement, read_json, write_json

TARGETS = ("openvino-cpu", "onnxruntime-cpu")
NUM_THREADS = 2
OWN = "own"


def main(argv: Sequence[str]) -> None:
    """Quantize twice for each target, measure, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    models = write_models(
        arguments.models, arguments.images, arguments.weights, arguments.architecture, arguments.floats
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models.values():
            for target in TARGETS:
                rows += _compare(model, target, arguments, Path(folder) / f"{model.name}-{target}")
    document = {"schema_version": 1, "threads": NUM_THREADS, "preset": arguments.preset, "rows": rows}
    write_json(arguments.out, document)
    print(text(document))


def _compare(model: FloatModel, target: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows fp32, own, portable of one net on one target."""
    reports = {
        scheme: _quantize(model, target, scheme, arguments.images, folder / scheme) for scheme in (OWN, "portable")
    }
    arms = [Arm("fp32", folder / OWN / "compiled" / "fp32")]
    for scheme, report in reports.items():
        placement = Placement.from_json({"layers": report["placement"]["layers"], "source": ""})
        arms.append(Arm(scheme, folder / scheme / "compiled" / "int8", placement=placement))
    launches = arguments.launches
    records = measure_arms(
        Local(), arms, preset=arguments.preset, launches=launches, throughput=False, out_dir=folder / "bench"
    )
    p25s = {
        arm.name: [launch.lat_us.p25 for launch in record.launches] for arm, record in zip(arms, records, strict=True)
    }
    rows = []
    for arm, record in zip(arms, records, strict=True):
        told = reports.get(arm.name)
        ratios = np.array(p25s[arm.name]) / np.array(p25s[OWN])
        rows.append(
            {
                "model": model.name,
                "weights": model.weights,
                "target": target,
                "arm": arm.name,
                "p25_us": p25s[arm.name],
                "time_over_own": float(np.median(ratios)),
                "int8_share": told["placement"]["int8_share"] if told else 0.0,
                "in_all": _in_all(told) if told else None,
                "lint_errors": _errors(told) if told else 0,
                "valid": record.validity.ok,
                "flags": list(record.validity.flags),
                "toolchain": record.runtime.version,
                "machine": record.env.hard.get("cpu"),
            }
        )
    return rows


def _quantize(model: FloatModel, target: str, scheme: str, images: Path, out_dir: Path) -> dict[str, Any]:
    options = ["--threads", str(NUM_THREADS), *([] if scheme == OWN else ["--scheme", scheme])]
    return quantize_ungated(model.path, model.preprocessing, target, images, out_dir, *options)


def _in_all(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = report["differences"]
    row = next(row for row in rows if (row["hop"], row["against"]) == ("INT8, compiled", "float graph"))
    return {key: row[key] for key in ("num_samples", "agreement", "cosine_mean", "max_abs_delta")}


def _errors(report: Mapping[str, Any]) -> int:
    return sum(finding["severity"] == "error" for finding in report["findings"])


def text(document: Mapping[str, Any]) -> str:
    """Markdown: a line a graph."""
    lines = [
        "| net | target | graph | INT8 MACs | p25, ms | time / own | agreement with float | mean cosine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        found = row["in_all"] or {}
        agreement = found.get("agreement") if row["weights"] == "published" else None
        cells = [row["model"], row["target"], row["arm"], f"{row['int8_share']:.0%}"]
        cells += [f"{np.median(row['p25_us']) / 1e3:.2f}", f"{row['time_over_own']:.2f}"]
        cells += ["-" if agreement is None else f"{agreement:.1%} of {found['num_samples']}"]
        cells += [f"{found['cosine_mean']:.4f}" if found else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, required=False)
    parser.add_argument("--floats", type=Path, default=Path("build/float"), help="where the float nets are kept")
    parser.add_argument("--preset", default="ci", choices=("smoke", "ci", "release"))
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print a stored result")
    arguments = parser.parse_args(argv)
    if not arguments.show and not (arguments.out and arguments.images):
        parser.error("--images and --out are needed, or --show FILE.json")
    return arguments


if __name__ == "__main__":
    main(sys.argv[1:])
