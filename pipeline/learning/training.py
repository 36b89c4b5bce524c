"""The one epoch loop, on accelerate: teacher, student, quantized student and every control are trained here.

Every epoch's randomness is a function of (seed, epoch) and the learning rate one of the step, so the state between two
epochs is the weights, the optimizer, the average and the best epoch so far. It is written after each epoch: a training
that was killed goes on and ends with the same weights, bit for bit, on the same CPU. Several processes share every batch
and end with the weights of one, but for float rounding (distributed.py); the first of them writes and speaks.
"""
# Shapes: N batch, C channels, H height, W width, K classes.

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.learning.checkpoint import FILE, read_checkpoint, save_checkpoint
from pipeline.learning.data import Batch, Data
from pipeline.learning.distributed import (
    Share,
    agree,
    count_over_all,
    from_first,
    is_first,
    process_rows,
    process_state,
    sum_gradients,
    taking,
)
from pipeline.learning.epochs import Epoch
from pipeline.learning.epochs import Trained as Trained
from pipeline.learning.label_cache import LabelCache
from pipeline.learning.labels import UNLABELLED
from pipeline.learning.models import predict, save_weights
from pipeline.learning.objective import FixedObjective, Objective, Shown, all_samples
from pipeline.learning.objective import Loss as Loss
from pipeline.learning.optimization import learning_rate, make_optimizer, survives_channels_last
from pipeline.learning.passes import Pass, Teacher, num_different, pass_batches, plan_passes
from pipeline.learning.precision import BF16, NO_KERNELS, decide_precision, has_bf16_kernels
from pipeline.learning.whole_batch import whole_batch
from pipeline.progress import Progress, Quiet
from pipeline.recipe import TrainConfig
from targets.errors import TrainingError


def train(
    model: nn.Module,
    data: Data,
    loss: Loss | Objective,
    config: TrainConfig,
    *,
    seed: int,
    checkpoint_dir: Path,
    progress: Progress,
    label: str,
    teacher: nn.Module | None = None,
    labels: LabelCache | None = None,
    view_seeds: Sequence[int] | None = None,
    shown: Shown = all_samples,
    keep_epochs: Collection[int] = (),
) -> Trained:
    """Train `model` in place and return the best and the last weights.

    loss takes logits (N, K) of the student and of the teacher (None without one) and class ids (N,), and returns a
    scalar in nats; an Objective says itself what it shows. The teacher is asked in every step, or its answers are read from
    `labels`, in place of it. Epochs show the views of `view_seeds` (those of `labels`) in turn; without any, each a fresh one.
    The weights after each of `keep_epochs` (from 1) are left in checkpoint_dir, under `kept_weights`. Raises TrainingError when
    the loss is no number; the last good checkpoint stays.
    """
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    progress = progress if is_first() else Quiet()
    objective = loss if isinstance(loss, Objective) else FixedObjective(loss, shown)
    answers = Teacher(teacher, labels, labels.view_seeds if labels is not None else view_seeds)
    run = _begin(model, data, objective, config, seed, checkpoint_dir, answers)
    if run.precision == BF16 and not has_bf16_kernels(data.device):
        progress.say(f"{label}: {NO_KERNELS}")
    first_epoch = _resume(run, checkpoint_dir, progress)
    total = config.epochs
    with progress.task(label, total=total) as overall:
        overall.advance(first_epoch)
        for epoch in range(first_epoch, total):
            visited = from_first(objective.begin_epoch(epoch, total, run.epochs, run.model))
            passes = plan_passes(visited or (None,), epoch, data.num_train, config.batch_size, answers)
            done = _train_epoch(run, passes, epoch, progress, label)
            _keep(run, done)
            if done.epoch in keep_epochs and is_first():
                save_weights(run.evaluated, kept_weights(checkpoint_dir, done.epoch))
            if is_first():
                save_checkpoint(_state(run), checkpoint_dir)
            overall.advance(1)
            progress.say(_epoch_line(label, done, total))
    from_first(None)  # from here on all find what it has written
    trained = Trained(run.best, _state_of(run.evaluated), run.best_epoch, run.precision, run.epochs)
    model.load_state_dict(trained.best)
    return trained


def kept_weights(checkpoint_dir: Path, epoch: int) -> Path:
    """Where the weights after `epoch` lie."""
    return checkpoint_dir / f"epoch-{epoch:04d}.safetensors"


@dataclass
class _Run:
    """A training between two epochs."""

    accelerator: Accelerator
    model: nn.Module  # the caller's own module
    forward: nn.Module  # the same, prepared: autocast
    teacher: Teacher
    optimizer: Any
    average: AveragedModel | None
    data: Data
    objective: Objective
    config: TrainConfig
    seed: int
    precision: str
    best: dict[str, Tensor]
    best_top1: float = -1.0
    best_epoch: int = 0
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The module whose weights are evaluated and kept: the average where there is one."""
        return self.average.module if self.average is not None else self.model


class _Held(nn.Module):
    """What accelerate prepares: it replaces `forward` of the module it is given, which NNCF's tracing does not survive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self.model(x_NCHW)
        return logits_NK


def _begin(
    model: nn.Module,
    data: Data,
    objective: Objective,
    config: TrainConfig,
    seed: int,
    checkpoint_dir: Path,
    teacher: Teacher,
) -> _Run:
    device = process_state().device
    agree(model.to(device))
    agree(objective.to(device))
    # Contiguous again, where a net that does not survive the other format comes in it: as the copy of one that has taught.
    in_last = config.channels_last and survives_channels_last(model)
    model.to(memory_format=torch.channels_last if in_last else torch.contiguous_format)
    if teacher.module is not None:
        teacher.module.to(device).eval().requires_grad_(False)
        if config.channels_last:
            teacher.module.to(memory_format=torch.channels_last)
    trial = partial(_trial, model, teacher, data, objective, config, seed)
    precision = decide_precision(config.precision, device, checkpoint_dir / "decided.json", trial)
    # The state of accelerate is one a process: bf16 is declared once, and each training switches autocast on or off.
    accelerator = Accelerator(
        mixed_precision="bf16", kwargs_handlers=[AutocastKwargs(enabled=precision == "bf16", cache_enabled=True)]
    )
    learned = [*model.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    forward = accelerator.prepare_model(_Held(model), evaluation_mode=True)  # without DDP: the step sums the gradients
    optimizer = accelerator.prepare_optimizer(make_optimizer(learned, config))
    average = None
    if config.ema_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    parts = (accelerator, model, forward, teacher, optimizer, average, data, objective)
    return _Run(*parts, config, seed, precision, _state_of(model))


def _train_epoch(run: _Run, passes: Sequence[Pass], epoch: int, progress: Progress, label: str) -> Epoch:
    begun_s = time.monotonic()
    torch.manual_seed((run.seed << 16) + epoch)  # dropout and its like; the data derive their own from the same pair
    run.model.train()
    steps = [(one, share) for one in passes for share in one.shares]
    num_batches = len(steps)
    loss_sum, num_right, num_labelled, num_seen = 0.0, 0, 0, 0
    with progress.task(f"{label} epoch {epoch + 1}/{run.config.epochs}", total=num_batches) as task:
        batches = pass_batches(run.data, passes, epoch, run.seed, run.config.batch_size, run.teacher)
        for step, (one, share) in enumerate(steps):
            with _range("data"):
                batch = next(batches)
            rate = learning_rate(run.config, epoch + step / num_batches)
            run.objective.begin_step(epoch + step / num_batches)
            loss, right, labelled = _train_step(run, batch, share, one.view, rate)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{label}: the loss is {loss} in epoch {epoch + 1}, step {step + 1} (learning rate {rate:.2g}). "
                    "Lower train.lr, or set train.grad_clip or train.warmup_epochs; the last good checkpoint is kept."
                )
            num_right, num_labelled, num_seen = num_right + right, num_labelled + labelled, num_seen + share.total
            loss_sum += loss * share.total
            top1 = num_right / num_labelled if num_labelled else None
            speed = num_seen / (time.monotonic() - begun_s)
            task.advance(1, f"loss {loss_sum / num_seen:.3f}, top-1 {_percent(top1, 1)}, {speed:.0f} images/s")
    train_s = time.monotonic() - begun_s
    with _range("validation"):
        validation_top1 = _validate(run)
    return Epoch(
        epoch=epoch + 1,
        loss=loss_sum / num_seen,
        train_top1=top1,
        validation_top1=validation_top1,
        shown_fraction=num_different(passes, run.data.num_train) / run.data.num_train,
        lr=learning_rate(run.config, epoch),
        images_per_s=num_seen / train_s,
        seconds=time.monotonic() - begun_s,
        num_images=num_seen,
        **run.objective.facts(),
    )


def _train_step(run: _Run, batch: Batch, share: Share, view: int | None, rate: float) -> tuple[float, int, int]:
    """One step on a share of a batch; of all of it, the loss in nats, and how many were classified right of how many with a label."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with taking(share):
        with _range("forward"), whole_batch(share):
            student_NK = share.gather(run.forward(batch.x_NCHW).float())
        with _range("teacher"), run.accelerator.autocast():
            teacher_NK = run.teacher.logits(batch, view)
        teacher_NK = None if teacher_NK is None else share.gather(teacher_NK)
        labels_N = share.gather(batch.labels_N)
        with _range("loss"):
            loss: Tensor = run.objective(student_NK, teacher_NK, labels_N)
    run.optimizer.zero_grad()
    with _range("backward"):
        run.accelerator.backward(loss)
        sum_gradients(run.model.parameters(), alike=run.objective.parameters())
    with _range("optimizer"):
        if run.config.grad_clip is not None:
            learned = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
            run.accelerator.clip_grad_norm_(learned, run.config.grad_clip)
        run.optimizer.step()
        if run.average is not None:
            run.average.update_parameters(run.model)
    num_right = int((student_NK.detach().argmax(1) == labels_N).sum())
    return float(loss.detach()), num_right, int((labels_N != UNLABELLED).sum())


def _range(part: str) -> record_function:
    """A part of an epoch, named to torch's profiler."""
    return record_function(f"edgestill.{part}")


def _validate(run: _Run) -> float | None:
    if run.data.num_validation == 0:
        return None
    right = 0
    for batch in run.data.plain_batches("validation"):
        rows = process_rows(len(batch.labels_N))
        if rows.start < rows.stop:
            own = Batch(batch.x_NCHW[rows], batch.labels_N[rows], batch.index_N[rows])
            right += int((predict(run.evaluated, [own]).argmax(1) == own.labels_N).sum())
    return count_over_all(right) / run.data.num_validation


def _keep(run: _Run, done: Epoch) -> None:
    run.epochs.append(done)
    top1 = done.validation_top1
    if top1 is None or top1 > run.best_top1:
        run.best, run.best_epoch = _state_of(run.evaluated), done.epoch
        run.best_top1 = run.best_top1 if top1 is None else top1


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _epoch_line(label: str, done: Epoch, total: int) -> str:
    validation = "" if done.validation_top1 is None else f", validation {done.validation_top1:.2%}"
    shown = "" if done.shown_fraction > 0.99 else f", {done.shown_fraction:.0%} of the data"
    return (
        f"{label} {done.epoch}/{total}: loss {done.loss:.3f}, train {_percent(done.train_top1, 2)}{validation}{shown}, "
        f"{done.images_per_s:.0f} images/s"
    )


def _percent(top1: float | None, digits: int) -> str:
    """For people; of samples without labels there is none."""
    return "without labels" if top1 is None else f"{top1:.{digits}%}"


def _state(run: _Run) -> dict[str, Any]:
    """The state between two epochs."""
    return {
        "model": run.model.state_dict(),
        "objective": run.objective.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "average": run.average.state_dict() if run.average is not None else None,
        "best": run.best,
        "best_top1": run.best_top1,
        "best_epoch": run.best_epoch,
        "epochs": [asdict(epoch) for epoch in run.epochs],
    }


def _resume(run: _Run, checkpoint_dir: Path, progress: Progress) -> int:
    """Restore the state after the last finished epoch; returns the epoch to go on with."""
    path = checkpoint_dir / FILE
    if not from_first(path.exists()):
        return 0
    state = from_first(read_checkpoint(path, torch.device("cpu")) if is_first() else None)
    if state is None:
        progress.say(f"{path} is truncated or altered: this training begins again")
        return 0
    _restore(run, state)
    progress.say(f"going on after epoch {len(run.epochs)} of {run.config.epochs}")
    return len(run.epochs)


def _restore(run: _Run, state: Mapping[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    run.objective.load_state_dict(state["objective"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    run.best, run.best_top1, run.best_epoch = state["best"], state["best_top1"], state["best_epoch"]
    run.epochs = [Epoch(**epoch) for epoch in state["epochs"]]


def _trial(
    model: nn.Module, teacher: Teacher, data: Data, objective: Objective, config: TrainConfig, seed: int
) -> Callable[[bool], None]:
    """Steps on a copy, so that measuring them leaves no trace in the weights."""
    view = teacher.view(0)
    view_seed = teacher.view_seed(view)
    batch = next(iter(data.train_batches(epoch=0, seed=seed, batch_size=config.batch_size, view_seed=view_seed)))
    copied = copy.deepcopy(model).train()

    def step(bf16: bool) -> None:
        objective.begin_step(0.0)
        with torch.autocast(batch.x_NCHW.device.type, torch.bfloat16, enabled=bf16):
            student_NK = copied(batch.x_NCHW)
            teacher_NK = teacher.logits(batch, view)
        objective(student_NK.float(), teacher_NK, batch.labels_N).backward()
        if batch.x_NCHW.is_cuda:
            torch.cuda.synchronize()  # else the clock stops before the GPU does

    return step
