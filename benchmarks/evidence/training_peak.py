"""How much of what a processor can do a distillation uses: images a second, and the share of the measured peak that they are.

    python -m benchmarks.evidence.training_peak --data npz:FILE --out FILE.json

Teacher and student of recipes/distillation_speed.yaml, on a GPU where there is one and else on the CPU, in the precision that the
recipe decides for there: the student's whole steps on stored soft labels, and the teacher's forward pass that stores them. The peak
is that of a large product of matrices or of a 3 x 3 convolution, whichever is faster, in the same precision, measured in turn with
them. Without `--teacher` the recipe trains it first, on the same images. `--show FILE` prints a stored result.
"""
# Shapes: N batch, C channels, H height, W width.

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device.environment import environment
from benchmarks.evidence.distillation_speed import NETWORKS, RECIPE
from benchmarks.evidence.script import newest_stage, parse_out_or_show
from targets.base import read_json, write_json

TEACHER, STUDENT = "resnet32x4", "resnet8x4"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_ALL, VALIDATION = 50_000, 0.004
REPEATS = 5


def main(argv: Sequence[str]) -> None:
    """Measure, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    document = measured(arguments)
    write_json(arguments.out, document)
    print(text(document))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of a peak and a training, one after the other."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = [_round(arguments, device) for _ in range(arguments.rounds)]
    hard = environment().hard
    on_gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "schema_version": 1,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": on_gpu or hard["cpu"],
            **{key: hard[key] for key in ("cpu", "isa", "cpus_online", "python")},
        },
        "torch": torch.__version__.partition("+")[0],
        "batch_size": arguments.batch_size,
        "flop_an_image": {"teacher": flop(TEACHER, trained=False), "student": flop(STUDENT, trained=True)},
        "rounds": rounds,
    }


def _round(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    runs = arguments.kept / "runs" / RECIPE.stem
    for stage in ("soft_labels", "distill"):
        for left in runs.glob(f"{stage}-????????"):
            shutil.rmtree(left)
    train_share = min(arguments.images / (NUM_ALL * (1 - VALIDATION)), 1.0)
    given = [f"data.source={arguments.data}", f"data.train_share={train_share:.6f}", f"data.validation={VALIDATION}"]
    given += [f"teacher.checkpoint={arguments.teacher}", "teacher.train=null"] if arguments.teacher else []
    given += ["distill.views=2", "distill.teacher_forward=cached", f"distill.train.batch_size={arguments.batch_size}"]
    given += ["distill.train.epochs=4", "distill.train.warmup_epochs=0"]
    argv = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        str(RECIPE),
        "--runs",
        str(arguments.kept / "runs"),
        "--until",
        "distill",
    ]
    subprocess.run([*argv, *(f"--set={one}" for one in given)], check=True, stdout=sys.stderr)
    told = read_json(newest_stage(runs, "distill") / "distill.json")["rounds"][0]
    labels = read_json(newest_stage(runs, "soft_labels") / "soft_labels.json")
    num_train = read_json(newest_stage(runs, "data") / "data.json")["num_train"]
    peaks = {precision: peak(device, DTYPES[precision]) for precision in {told["precision"], labels["precision"]}}
    return {
        "num_train": num_train,
        "teacher": {
            "images_per_s": num_train / float(np.median(labels["seconds"])),
            "precision": labels["precision"],
            "peak_flop_per_s": peaks[labels["precision"]],
        },
        "student": {
            "images_per_s": float(np.median([epoch["images_per_s"] for epoch in told["epochs"][1:]])),
            "precision": told["precision"],
            "peak_flop_per_s": peaks[told["precision"]],
        },
    }


def network(name: str) -> nn.Module:
    """A net for CIFAR-10, its weights random."""
    module, _, function = NETWORKS.partition(":")
    made: nn.Module = getattr(importlib.import_module(module), function)(name, {}, channels=3, num_classes=10)
    return made


def flop(name: str, *, trained: bool) -> float:
    """Floating-point operations an image of 32 x 32 pixels (two a multiply-add) of a forward pass, or of a training step."""
    x_NCHW = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        logits_NK = network(name)(x_NCHW)
        if trained:
            logits_NK.sum().backward()
    return float(counter.get_total_flops() / len(x_NCHW))


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a product of matrices or of a convolution, whichever is faster; the median of a few tries each."""
    size, batch = (8192, 512) if device.type == "cuda" else (2048, 32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    convolution = nn.Conv2d(256, 256, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x_NCHW = torch.randn(batch, 256, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        product_s = _seconds(lambda: matrix @ matrix, device)
        convolution_s = _seconds(lambda: convolution(x_NCHW), device)
    return max(2 * size**3 / product_s, 2 * batch * 16 * 16 * 256 * 256 * 9 / convolution_s)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 2):
        started_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return float(np.median(seconds[2:]))


def share(document: dict[str, Any], who: str) -> list[float]:
    """Of the peak that was measured beside it, a fraction a round."""
    flop_an_image = document["flop_an_image"][who]
    return [one[who]["images_per_s"] * flop_an_image / one[who]["peak_flop_per_s"] for one in document["rounds"]]


def text(document: dict[str, Any]) -> str:
    """Markdown: a line for the teacher's forward pass and one for the student's steps."""
    lines = [
        "| on "
        + document["machine"]["device"]
        + " | precision | images a second | GFLOP an image | measured peak, TFLOP/s | share of it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for who, what in (("teacher", f"{TEACHER}, forward"), ("student", f"{STUDENT}, training step")):
        of = [one[who] for one in document["rounds"]]
        speed, peak_s = (float(np.median([one[key] for one in of])) for key in ("images_per_s", "peak_flop_per_s"))
        gflop = document["flop_an_image"][who] / 1e9
        found = f"{of[0]['precision']} | {speed:,.0f} | {gflop:.2f} | {peak_s / 1e12:.3g} | {np.median(share(document, who)):.0%}"
        lines.append(f"| {what} | {found} |")
    rounds = document["rounds"]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of rounds ({len(rounds)}) of {rounds[0]['num_train']:,} images in batches of {document['batch_size']}. "
            f"torch {document['torch']}, {document['utc'][:10]}.",
        ]
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="torchvision:CIFAR10", help="npz:FILE or torchvision:CIFAR10")
    parser.add_argument("--images", type=int, default=1280, help="of 50,000; take all on a GPU")
    parser.add_argument("--teacher", type=Path, help=f"weights of a {TEACHER} for these data")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kept", type=Path, default=Path("build/training_peak"))
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
