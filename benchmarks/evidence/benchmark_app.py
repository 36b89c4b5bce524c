"""OpenVINO's own benchmark_app on two models, in interleaved pairs of fresh processes: no harness of ours takes part.

Its latencies come from its JSON report, in milliseconds with two decimals; it fills the input with random values and runs
what is not INT8 in the type that OpenVINO prefers on the machine.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.kept import kept
from targets.base import read_json, sha256_file
from targets.errors import MeasurementError

REPORT = "benchmark_report.json"


def app_medians(
    models: Sequence[Path], *, rounds: int, seconds: int, num_threads: int, shape: Sequence[int], out_dir: Path
) -> list[list[float]]:
    """A list a model (an IR's .xml): the median latency of each round in milliseconds. A round that is done stays done.

    Raises MeasurementError with the program's last words.
    """
    digests = [f"{sha256_file(model)} {sha256_file(model.with_suffix('.bin'))}" for model in models]
    key = {"models": digests, "seconds": seconds, "threads": num_threads, "shape": list(shape)}
    answers = []
    for index in range(rounds):
        make = functools.partial(_round, models, index, seconds, num_threads, shape, out_dir)
        answers.append(kept(out_dir / f"round-{index:02}.json", key, make))
    return [[answer[str(place)] for answer in answers] for place in range(len(models))]


def _round(
    models: Sequence[Path], index: int, seconds: int, num_threads: int, shape: Sequence[int], out_dir: Path
) -> dict[str, float]:
    """Each model once, in a random order; by its place in `models`, as JSON has it."""
    order = [int(place) for place in np.random.default_rng(index).permutation(len(models))]
    return {str(place): median_ms(models[place], seconds, num_threads, shape, out_dir) for place in order}


def median_ms(model: Path, seconds: int, num_threads: int, shape: Sequence[int], out_dir: Path) -> float:
    """One process: latency hint's one stream with a number of threads, which benchmark_app takes without a hint only."""
    out_dir.mkdir(parents=True, exist_ok=True)
    argv = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(model), "-d", "CPU", "-hint", "none"]
    argv += ["-nthreads", str(num_threads), "-nstreams", "1", "-api", "sync", "-t", str(seconds)]
    argv += ["-shape", f"[{','.join(map(str, shape))}]"]
    argv += ["-report_type", "no_counters", "-json_stats", "-report_folder", str(out_dir)]
    (out_dir / REPORT).unlink(missing_ok=True)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120 + seconds)
    if done.returncode or not (out_dir / REPORT).is_file():
        raise MeasurementError(
            f"benchmark_app on {model} ended with {done.returncode}: {done.stdout[-200:]}. Run it by hand to see more."
        )
    return float(read_json(out_dir / REPORT)["execution_results"]["latency (ms)"])
