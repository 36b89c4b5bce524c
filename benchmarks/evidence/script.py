"""What evidence scripts share: `--out` or `--show`, the stage that a run finished last, and `edgestill quantize` as a person runs it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from targets.base import Preprocessing, read_json


def parse_out_or_show(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with --out FILE.json to measure into and --show FILE.json to print from; one of both is needed."""
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print a stored result")
    arguments = parser.parse_args(argv)
    if not arguments.show and not arguments.out:
        parser.error("--out FILE.json is needed, or --show FILE.json")
    return arguments


def newest_stage(run_dir: Path, stage: str) -> Path:
    """The directory of the stage of that name which was finished last in a run."""
    finished = run_dir.glob(f"{stage}-????????/stage.json")
    return max(finished, key=lambda path: str(read_json(path)["utc"])).parent


def quantize(
    model: Path, preprocessing: Preprocessing, target: str, images: Path, out_dir: Path, *options: str
) -> dict[str, Any]:
    """Run the command in a process of its own; returns its report, also where the command refused what it made."""
    argv = [sys.executable, "-m", "pipeline", "quantize", str(model), "--json", "--calibration", str(images)]
    argv += ["--target", target, "--out", str(out_dir), "--resize", str(preprocessing.resize)]
    for name in ("mean", "std"):
        argv += [f"--{name}", ",".join(f"{value:g}" for value in getattr(preprocessing, name) or ())]
    report: dict[str, Any] = json.loads(subprocess.run([*argv, *options], stdout=subprocess.PIPE, check=False).stdout)
    return report


def quantize_ungated(
    model: Path, preprocessing: Preprocessing, target: str, images: Path, out_dir: Path, *options: str
) -> dict[str, Any]:
    """PTQ with every gate wide open: what falls back or is wrong is to be shown and not refused. Raises SystemExit where nothing ran."""
    gates = ("--method", "ptq", "--launches", "1", "--min-agreement", "0", "--min-int8-share", "0")
    report = quantize(model, preprocessing, target, images, out_dir, *gates, *options)
    if report.get("placement") is None:
        raise SystemExit(f"{model.stem} on {target}, {' '.join(options)}: {report['error']}")
    return report
