"""How fast a student is distilled: ours beside torchdistill's loop, ResNet-32x4 to ResNet-8x4, on the same cores in one run.

    python -m benchmarks.evidence.distillation_speed --data npz:FILE --out docs/results/distillation_speed.json

Both are given the same images, the same teacher, the same first weights of the student, T and the share of the labels. Asked is the
time to the accuracy that the published loop has after its last epoch, within MARGIN, from the start of the process: what the
teacher is asked, and the validation of every epoch, are in it; the training of the teacher is in nobody's time. Ours is charged
with checkpoints and with a validation of the teacher and one more of the student beside, the published loop is not. Ours is
recipes/distillation_speed.yaml, and once more with the published batch size, schedule and number of epochs. Images a second come
from short blocks of both in turn. What was measured is kept and not repeated; `--show FILE` prints the tables of a stored result.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.environment import environment
from benchmarks.evidence.distillation_speed_table import AS_PUBLISHED, OURS, THEIRS, text
from benchmarks.evidence.script import newest_stage, parse_out_or_show
from benchmarks.peers.distillation_protocol import BATCH_SIZE, GAMMA, LR, MOMENTUM, WEIGHT_DECAY, milestones
from benchmarks.peers.kept import kept, sources
from targets.base import read_json, sha256_file, write_json

RECIPE = Path("recipes/distillation_speed.yaml")
NETWORKS = "pipeline.learning.models.cifar:build_cifar_model"  # by name: nothing here imports pipeline
RANGES = "edgestill."  # how the epoch loop names its parts to a profiler
SPLITS = ("num_train", "num_validation", "num_test")
BLOCK_IMAGES, BLOCK_VALIDATION = 1280, 200  # of 50,000
BLOCK_SHARE = BLOCK_IMAGES / (50_000 - BLOCK_VALIDATION)
BLOCK_STEPS, WARM_STEPS = BLOCK_IMAGES // BATCH_SIZE, 3


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, write one JSON file, print the tables."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    document = Measurement(arguments).document()
    write_json(arguments.out, document)
    print(text(document))


class Measurement:
    """One teacher, and both arms on it; everything lies under --kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._kept: Path = arguments.kept / _digest8({"data": arguments.data, "seed": arguments.seed})
        self._kept.mkdir(parents=True, exist_ok=True)
        self._teacher: Path = arguments.teacher or self._kept / "teacher.safetensors"
        self._student = self._kept / "student.safetensors"  # what both begin with

    def document(self) -> dict[str, Any]:
        self._prepare()
        workers = self._once("workers", self._count_workers)
        rounds = [
            self._once(f"round-{i}", functools.partial(self._round, workers["workers"]), number=i)
            for i in range(self._arguments.rounds)
        ]
        arms = {THEIRS: self._once("torchdistill", functools.partial(self._theirs, workers["workers"]))}
        arms[AS_PUBLISHED] = self._once("published_schedule", functools.partial(self._ours, self._as_published()))
        arms[OURS] = self._once("ours", functools.partial(self._ours, ()))
        info = read_json(self._data_dir / "data.json")
        machine = environment().hard
        return {
            "schema_version": 1,
            "utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {key: machine[key] for key in ("cpu", "isa", "cpus_online", "kernel", "python")},
            "data": {"name": _data_name(info["source"]), **{key: info[key] for key in SPLITS}},
            "teacher_top1": self._teacher_top1,
            "workers": workers,
            "block": {"images": BLOCK_IMAGES, "warm_steps": WARM_STEPS},
            "rounds": rounds,
            "arms": arms,
            "parts": self._once("parts", self._parts),
        }

    def _prepare(self) -> None:
        """The data, the teacher, and the first weights of the student, each made once."""
        if not self._teacher.is_file():
            self._pipeline("teacher", "runs", [f"data.source={self._arguments.data}", f"seed={self._arguments.seed}"])
            shutil.copyfile(self._stage("runs", "teacher") / "model.safetensors", self._teacher)
        self._pipeline("teacher", "runs", self._given())
        self._data_dir = self._stage("runs", "data")
        self._teacher_top1 = read_json(self._stage("runs", "teacher") / "teacher.json")["top1_validation"]
        self._pipeline("data", "blocks", [*self._given(), *self._block()])
        if not self._student.is_file():
            self._loop(self._data_dir, "--epochs", "1", "--steps", "1", "--workers", "0")

    # --- the published loop ---

    def _count_workers(self) -> dict[str, Any]:
        """Workers of the published loop, none or two, whichever is faster: seconds a step, the best of two tries each."""
        seconds: dict[str, list[float]] = {"0": [], "2": []}
        for _ in range(2):
            for workers, found in seconds.items():
                found.append(self._step_s(self._data_dir, int(workers)))
        return {"workers": int(min(seconds, key=lambda workers: min(seconds[workers]))), "step_s": seconds}

    def _step_s(self, data_dir: Path, workers: int) -> float:
        steps = ["--epochs", "1", "--steps", str(BLOCK_STEPS), "--workers", str(workers)]
        found = self._loop(data_dir, *steps)["step_s"]
        return float(np.mean(found[WARM_STEPS:]))

    def _theirs(self, workers: int) -> dict[str, Any]:
        """The curve of the published loop, and the test accuracy of its last epoch."""
        epochs = ["--epochs", str(self._arguments.epochs), "--workers", str(workers)]
        name = f"torchdistill-{_digest8(self._key())}"  # its checkpoint is of no other measurement
        found = self._loop(self._data_dir, *epochs, name=name)
        return {**found, "top1_test": self._score(self._kept / f"{name}.safetensors")}

    def _score(self, weights: Path) -> float:
        return float(self._loop(self._data_dir, "--score", str(weights))["top1_test"])

    def _loop(self, data_dir: Path, *options: str, name: str = "loop") -> dict[str, Any]:
        out = self._kept / f"{name}.json"
        argv = [sys.executable, "-m", "benchmarks.peers.torchdistill_loop", "--networks", NETWORKS]
        argv += ["--data", str(data_dir), "--teacher-weights", str(self._teacher), "--out", str(out)]
        argv += ["--student-weights", str(self._student), "--seed", str(self._arguments.seed)]
        subprocess.run([*argv, *options, "--begun-s", str(time.time())], check=True, stdout=sys.stderr)
        found: dict[str, Any] = read_json(out)
        return found

    # --- ours ---

    def _ours(self, changed: Sequence[str]) -> dict[str, Any]:
        """One distillation from the start of the process, with nothing left of an earlier one."""
        for stage in ("soft_labels", "distill"):
            for left in (self._kept / "runs" / RECIPE.stem).glob(f"{stage}-????????"):
                shutil.rmtree(left)
        begun_s = time.monotonic()
        self._pipeline("distill", "runs", [*self._given(), *changed])
        wall_s = time.monotonic() - begun_s
        directory, labels = self._stage("runs", "distill"), self._stage("runs", "soft_labels")
        told = read_json(directory / "distill.json")["rounds"][0]
        return {
            "before_s": wall_s - sum(epoch["seconds"] for epoch in told["epochs"]),
            "teacher_s": sum(read_json(labels / "soft_labels.json")["seconds"]),
            "num_views": told["soft_labels"]["num_views"],
            "precision": told["precision"],
            "epochs": told["epochs"],
            "top1_test": self._score(directory / "last.safetensors"),
        }

    def _as_published(self) -> list[str]:
        """Batch size, rate, schedule and epochs of the published loop."""
        epochs = self._arguments.epochs
        train = {"batch_size": BATCH_SIZE, "lr": LR, "schedule": "step", "milestones": milestones(epochs)}
        train |= {"warmup_epochs": 0, "nesterov": "false", "epochs": epochs, "gamma": GAMMA}
        train |= {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        return ["distill.teacher_forward=cached", *(f"distill.train.{key}={value}" for key, value in train.items())]

    def _round(self, workers: int) -> dict[str, Any]:
        """Images a second of both arms on a few images, one after the other: the teacher's forward pass and the student's steps
        of ours, and a whole step of the published loop."""
        blocks = self._kept / "blocks" / RECIPE.stem
        theirs = BATCH_SIZE / self._step_s(self._stage("blocks", "data"), workers)
        for left in blocks.glob("soft_labels-????????"):
            shutil.rmtree(left)
        self._pipeline("distill", "blocks", [*self._given(), *self._block()])
        told = read_json(self._stage("blocks", "distill") / "distill.json")["rounds"][0]
        asked_s = read_json(self._stage("blocks", "soft_labels") / "soft_labels.json")["seconds"]
        num_train = read_json(self._stage("blocks", "data") / "data.json")["num_train"]
        return {
            THEIRS: theirs,
            "teacher": num_train / float(np.median(asked_s)),
            "student": float(np.median([epoch["images_per_s"] for epoch in told["epochs"][1:]])),
        }

    def _parts(self) -> dict[str, Any]:
        """Seconds of each part of a few epochs of ours, by torch's profiler."""
        out = self._kept / "ranges.json"
        for left in (self._kept / "blocks" / RECIPE.stem).glob("distill-????????"):
            shutil.rmtree(left)
        argv = ["-m", "benchmarks.evidence.profiled_run", str(out), RANGES]
        self._pipeline("distill", "blocks", [*self._given(), *self._block()], by=argv)
        told = read_json(self._stage("blocks", "distill") / "distill.json")["rounds"][0]
        return {"ranges": read_json(out), "seconds": sum(epoch["seconds"] for epoch in told["epochs"])}

    def _given(self) -> list[str]:
        """What every run of ours is told beside the recipe."""
        student = [f"distill.checkpoint={self._student}"] if self._student.is_file() else []
        teacher = [f"teacher.checkpoint={self._teacher}", "teacher.train=null"]
        return [f"data.source={self._arguments.data}", f"seed={self._arguments.seed}", *teacher, *student]

    def _block(self) -> list[str]:
        """A few images, two views and three epochs, of which the first warms up."""
        few = [f"data.train_share={BLOCK_SHARE:.6f}", f"data.validation={BLOCK_VALIDATION / 50_000}"]
        few += ["distill.views=2", "distill.teacher_forward=cached"]
        return [*few, "distill.train.epochs=3", "distill.train.warmup_epochs=0"]

    def _pipeline(self, until: str, folder: str, overrides: Sequence[str], by: Sequence[str] = ("-m",)) -> None:
        argv = [sys.executable, *by, "pipeline", "run", str(RECIPE)]
        argv += ["--runs", str(self._kept / folder), "--until", until]
        subprocess.run([*argv, *(f"--set={one}" for one in overrides)], check=True, stdout=sys.stderr)

    def _stage(self, folder: str, label: str) -> Path:
        return newest_stage(self._kept / folder / RECIPE.stem, label)

    def _once(self, name: str, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """What is kept under the same sources, recipe, teacher and arguments; else measured."""
        print(f"{name}", file=sys.stderr, flush=True)
        return kept(self._kept / "done" / f"{name}.json", {**self._key(), **key}, make)

    def _key(self) -> dict[str, str]:
        of = {name: str(getattr(self._arguments, name)) for name in ("data", "seed", "epochs")}
        of |= {"teacher": sha256_file(self._teacher), "recipe": hashlib.sha256(RECIPE.read_bytes()).hexdigest()}
        return {**of, **sources(), **{name: version(name) for name in ("torchdistill", "torchvision")}}


def _digest8(of: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:8]


def _data_name(source: str) -> str:
    """`npz:some/cifar10.npz` and `torchvision:CIFAR10` by the name alone."""
    return Path(source.partition(":")[2]).stem


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="torchvision:CIFAR10", help="npz:FILE or torchvision:CIFAR10")
    parser.add_argument("--epochs", type=int, default=12, help="of the published loop")
    parser.add_argument("--rounds", type=int, default=7, help="short blocks of both arms, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=Path, help="its weights; else it is trained once, by the recipe")
    parser.add_argument("--kept", type=Path, default=Path("build/distillation_speed"))
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
