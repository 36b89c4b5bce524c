"""Which precision a training computes in: as the recipe says, or for `auto` the one in which a step is faster here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.learning.distributed import from_first, is_first
from targets.base import read_json, write_json
from targets.errors import IntegrityError

FP32, BF16 = "fp32", "bf16"
NUM_STEPS, NUM_WARM = 6, 2  # of a trial
NO_KERNELS = (
    "bf16: oneDNN has no BF16 kernels for this CPU, so that convolutions run on torch's slow reference code. Set precision: auto or "
    "fp32"
)

Step = Callable[[bool], object]  # one step, in bf16 or not


def decide_precision(wanted: str, device: torch.device, path: Path, trial: Callable[[], Step]) -> str:
    """fp32 or bf16. `auto` is settled by a few steps of `trial` before the first one, written to `path`, and read there when a
    training goes on; where no kernel computes in bf16 nothing is tried. The first of several processes decides for all."""
    if wanted != "auto":
        return wanted
    if not is_first():
        return from_first("")
    decided = _decided(path)
    if decided is None:
        seconds: dict[str, float] = {}
        if has_bf16_kernels(device):
            step = trial()
            seconds = {precision: _step_seconds(step, bf16=precision == BF16) for precision in (FP32, BF16)}
        decided = min(seconds, key=seconds.__getitem__, default=FP32)
        write_json(path, {"precision": decided, "step_seconds": seconds})
    return from_first(decided)


def has_bf16_kernels(device: torch.device) -> bool:
    """Whether convolutions in bf16 run on kernels made for it: on a CPU, as oneDNN says."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _decided(path: Path) -> str | None:
    """The precision that was written down; None where nothing whole was."""
    try:
        precision: object = read_json(path)["precision"]
    except (IntegrityError, KeyError, TypeError):
        return None
    return str(precision) if precision in (FP32, BF16) else None


def _step_seconds(step: Step, *, bf16: bool) -> float:
    """Median of a few steps."""
    seconds = []
    for _ in range(NUM_STEPS):
        begun_s = time.perf_counter()
        step(bf16)
        seconds.append(time.perf_counter() - begun_s)
    return sorted(seconds[NUM_WARM:])[1]
