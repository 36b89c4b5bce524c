"""What the measurement of distillation_speed.py says: times to the same accuracy, images a second, and the share of each part.

An arm is a mapping with `before_s`, the seconds of its process outside of its epochs (up to the first; the teacher's answers
among them where they are asked beforehand, and for ours checkpoints and all else), and `epochs`, each with its `seconds`
(validation included) and `validation_top1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from benchmarks.peers.ratios import PairedRatio, paired_ratio

MARGIN = 0.002  # validation top-1 that may be missing: 0.2 points
GOAL, AIM = 8, 12
OURS, AS_PUBLISHED, THEIRS = "ours", "ours, published schedule", "torchdistill"
STEP_PARTS = ("data", "forward", "teacher", "loss", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The first epoch (from 1) that is as accurate as was asked, and the seconds from the start of the process to its end."""

    epoch: int
    seconds: float


def reached(arm: Mapping[str, Any], top1: float) -> Reached | None:
    """None where no epoch comes to `top1` (a fraction, validation)."""
    ends_s = accumulate((epoch["seconds"] for epoch in arm["epochs"]), initial=arm["before_s"])
    next(ends_s)
    for number, (epoch, end_s) in enumerate(zip(arm["epochs"], ends_s, strict=True), 1):
        if epoch["validation_top1"] >= top1 - 1e-9:  # a share of images, and a margin that is no binary fraction
            return Reached(epoch=number, seconds=end_s)
    return None


def times(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Reached | None]:
    """When each arm has, within MARGIN, the accuracy that the published loop ends with; that loop itself among them."""
    top1 = arms[THEIRS]["epochs"][-1]["validation_top1"]
    return {name: reached(arm, top1 - MARGIN) for name, arm in arms.items()}


def whole_s(arm: Mapping[str, Any]) -> float:
    """Seconds from the start of the process to the end of the last epoch."""
    return float(arm["before_s"] + sum(epoch["seconds"] for epoch in arm["epochs"]))


def rate(teacher: float, student: float, num_views: int, num_epochs: int) -> float:
    """Images a second that a training shows, the teacher's time included: it is asked for `num_views` views of the images, and
    the student is shown `num_epochs`. 1 / rate = (views / epochs) / teacher + 1 / student."""
    return 1 / (num_views / num_epochs / teacher + 1 / student)


def speeds(document: Mapping[str, Any]) -> list[tuple[str, float, PairedRatio]]:
    """What is compared, the median of its images a second over the rounds, and its ratio to the published loop."""
    rounds, ours = document["rounds"], document["arms"][OURS]
    num_views, num_epochs = ours["num_views"], len(ours["epochs"])
    compared = {
        "the student's steps alone": [one["student"] for one in rounds],
        f"{num_views} views asked for {num_epochs} epochs": _with_teacher(rounds, num_views, num_epochs),
        "a view of its own every epoch": _with_teacher(rounds, 1, 1),
    }
    theirs_s = [1 / one[THEIRS] for one in rounds]
    return [
        (what, _median(found), paired_ratio(theirs_s, [1 / one for one in found])) for what, found in compared.items()
    ]


def parts(document: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part of our whole training. Those within a step are shared out as torch's profiler saw them in blocks."""
    ours, profiled = document["arms"][OURS], document["parts"]
    train_s = sum(_train_s(epoch, document["data"]["num_train"]) for epoch in ours["epochs"])
    validation_s = sum(epoch["seconds"] for epoch in ours["epochs"]) - train_s
    ranges = {name: one["seconds"] for name, one in profiled["ranges"].items()}
    profiled_s = profiled["seconds"] - ranges["validation"]
    steps = {name: train_s * ranges[name] / profiled_s for name in STEP_PARTS}
    return {
        "imports, keys, checkpoints, the teacher's validation": ours["before_s"] - ours["teacher_s"],
        "the teacher's forward pass": ours["teacher_s"],
        **steps,
        "rest of the step": train_s - sum(steps.values()),
        "validation": validation_s,
    }


def text(document: Mapping[str, Any]) -> str:
    """Markdown: the time to the same accuracy, the images a second, the share of each part, and what it stands on."""
    return "\n".join(
        [*_times_table(document), "", *_speeds_table(document), "", *_parts_table(document), "", _note(document)]
    )


def _times_table(document: Mapping[str, Any]) -> list[str]:
    arms = document["arms"]
    found = times(arms)
    first = found[THEIRS]
    assert first is not None  # its last epoch, if none before
    all_s = whole_s(arms[THEIRS])
    lines = [
        "| | epochs | validation top-1, last epoch | test top-1, last epoch | as accurate as torchdistill's last epoch after "
        "| times as fast as its whole training | as its first epoch that is so accurate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in arms.items():
        top1 = [f"{100 * value:.2f}" for value in (arm["epochs"][-1]["validation_top1"], arm["top1_test"])]
        one = found[name]
        when = "never" if one is None else f"{one.seconds:.0f} s, epoch {one.epoch}"
        ratios = ["", ""] if one is None else [f"{seconds / one.seconds:.1f}" for seconds in (all_s, first.seconds)]
        lines.append(f"| {' | '.join([name, str(len(arm['epochs'])), *top1, when, *ratios])} |")
    return lines


def _speeds_table(document: Mapping[str, Any]) -> list[str]:
    lines = ["| images a second | | times torchdistill's (95 % CI) |", "| --- | --- | --- |"]
    lines.append(
        f"| torchdistill, the teacher asked in every step | {_median([one[THEIRS] for one in document['rounds']]):.0f} | 1 |"
    )
    for what, speed, ratio in speeds(document):
        interval = "" if ratio.ci95 is None else f" ({ratio.ci95[0]:.2f} to {ratio.ci95[1]:.2f})"
        lines.append(f"| ours, {what} | {speed:.0f} | {ratio.value:.2f}{interval} |")
    return lines


def _parts_table(document: Mapping[str, Any]) -> list[str]:
    found = parts(document)
    whole_s = sum(found.values())
    lines = ["| part of our time | s | share |", "| --- | --- | --- |"]
    return [*lines, *(f"| {name} | {seconds:.1f} | {seconds / whole_s:.0%} |" for name, seconds in found.items())]


def _note(document: Mapping[str, Any]) -> str:
    data, ours, theirs = document["data"], document["arms"][OURS], document["arms"][THEIRS]
    versions = ", ".join(f"{name} {number}" for name, number in theirs["versions"].items())
    steps = {workers: min(seconds) for workers, seconds in document["workers"]["step_s"].items()}
    tried = " and ".join(f"{seconds:.2f} s a step with {workers}" for workers, seconds in steps.items())
    top1 = theirs["epochs"][-1]["validation_top1"]
    error = 100 * (top1 * (1 - top1) / data["num_validation"]) ** 0.5
    return " ".join(
        [
            f"{data['num_train']:,} training images of {data['name']}, {data['num_validation']:,} for validation,",
            f"{data['num_test']:,} for the test, which is read once after the last epoch. The teacher has",
            f"{100 * document['teacher_top1']:.2f} on validation. Each arm is one training, and a validation top-1 has a standard",
            f"error of {error:.1f} points. torchdistill in fp32: {len(theirs['epochs'])} epochs of the published protocol, its",
            f"milestones scaled; {theirs['threads']} threads and {theirs['workers']} workers ({tried}). Ours in {ours['precision']}:",
            f"{ours['num_views']} stored views with the teacher's logits in fp16; norms and biases do not decay.",
            f"{len(document['rounds'])} blocks of {document['block']['images']:,} images; the parts of a step are shared out as a",
            f"profiler saw them in such a block. {versions}; {document['machine']['cpu']}, CPUs",
            f"{document['machine']['cpus_online']}; {document['utc'][:10]}. The goal is {GOAL} times, the aim {AIM}.",
        ]
    )


def _with_teacher(rounds: Sequence[Mapping[str, float]], num_views: int, num_epochs: int) -> list[float]:
    return [rate(one["teacher"], one["student"], num_views, num_epochs) for one in rounds]


def _train_s(epoch: Mapping[str, Any], num_train: int) -> float:
    return float(epoch["shown_fraction"] * num_train / epoch["images_per_s"])


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
