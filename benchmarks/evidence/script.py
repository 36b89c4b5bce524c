"""What evidence scripts share: `--out` or `--show`, and the stage that a run finished last."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from targets.base import read_json


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
