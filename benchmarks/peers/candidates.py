"""INT8 graphs to compare, each made in a process of its own: ours by the command line, a peer's by its own interpreter.

Reads a float ONNX file and images that are prepared. Writes a directory a candidate. A candidate that could not be made has
an error and no graph: it is a row all the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import HERE, Peer, python_of
from benchmarks.peers.images import Images
from benchmarks.peers.kept import ROOT, kept, sources
from targets.base import read_json, sha256_file
from targets.errors import TargetError

OURS = "edgestill"
TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A graph to compare, or why there is none. `report` is our own command's JSON, empty for a peer."""

    name: str
    model: str | None
    error: str | None
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        return None if self.model is None else Path(self.model)


def make_peer(peer: Peer, floats: Path, images: Images, root: Path | None, out_dir: Path) -> Candidate:
    """What `peer` makes of the float graph; kept while the graph, the images and the way are the same."""
    key = {
        "floats": sha256_file(floats),
        "calibration": sha256_file(images.calibration),
        "quantizers": sha256_file(HERE / "quantizers.py"),
        "lock": sha256_file(HERE / f"{peer.environment}.lock") if peer.environment else None,
        "peer": asdict(peer),
    }
    try:
        python = python_of(peer, root)
    except TargetError as error:
        return Candidate(name=peer.name, model=None, error=str(error), seconds=0.0)
    argv = [str(python), "-I", str(HERE / "quantizers.py"), peer.quantizer]
    argv += [str(floats.absolute()), str(images.calibration.absolute()), str(out_dir.absolute())]
    return Candidate(**kept(out_dir / "candidate.json", key, lambda: asdict(_peer(peer, argv, out_dir))))


def make_ours(
    floats: Path, images: Images, target: str, num_threads: int, out_dir: Path, *, options: Sequence[str] = ()
) -> Candidate:
    """What `edgestill quantize` makes of it for `target`; kept while nothing of ours has changed either.

    The same images as an NPZ file: our command holds one in five of them back for its own comparison with float. `options`
    are further ones of that command.
    """
    argv = [sys.executable, "-m", "pipeline", "quantize", str(floats.absolute()), "--json", "--target", target]
    argv += ["--calibration", str(images.calibration), "--threads", str(num_threads), "--out", str(out_dir / "made")]
    argv += ["--preset", "smoke", "--launches", "1", *options]  # what is said of speed is measured here, interleaved
    key = {
        "floats": sha256_file(floats),
        "calibration": sha256_file(images.calibration),
        "command": argv[1:],
        "sources": sources(),
    }
    return Candidate(**kept(out_dir / "candidate.json", key, lambda: asdict(_ours(argv, out_dir / "made"))))


def _ours(argv: Sequence[str], out_dir: Path) -> Candidate:
    begin = time.monotonic()
    done = subprocess.run(argv, stdout=subprocess.PIPE, cwd=ROOT, check=False, timeout=TIMEOUT_S)
    report = _json(done.stdout)
    model = out_dir / "model.onnx"
    made = "rows" in report and model.is_file()  # INT8 that a gate refuses is written too, and compared
    return Candidate(
        name=OURS,
        model=str(model) if made else None,
        error=None if made else str(report.get("error") or f"exit code {done.returncode} without an answer"),
        seconds=time.monotonic() - begin,
        report=report,
    )


def _peer(peer: Peer, argv: Sequence[str], out_dir: Path) -> Candidate:
    out_dir.mkdir(parents=True, exist_ok=True)
    answer_path = out_dir / "answer.json"
    answer_path.unlink(missing_ok=True)
    begin = time.monotonic()
    with (out_dir / "log.txt").open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(argv, stdout=log, stderr=log, check=False, cwd=out_dir, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            ended = None
    answer = read_json(answer_path) if answer_path.is_file() else {"file": None, "versions": {}}
    error = answer.get("error", f"ended with {ended} and without an answer")
    return Candidate(
        name=peer.name,
        model=None if answer["file"] is None else str(out_dir / answer["file"]),
        error=f"no answer in {TIMEOUT_S:g} s" if ended is None else error,
        seconds=time.monotonic() - begin,
        versions=answer["versions"],
    )


def _json(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
