"""Several processes, as `accelerate launch` and torchrun start them: the first runs the recipe, the others help where it learns.

The first alone takes the workspace, writes, speaks and measures. Where a stage learns it tells the others, and all run that stage:
the first in the stage's directory, the others in one below its checkpoints that nobody keeps. They compute the same, but for what
a training shares out (pipeline/learning/distributed.py). Imports torch only where there are several.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipeline.how import How
from pipeline.launch import leaves_others_to_mpirun, num_processes, process_index
from pipeline.progress import Quiet
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import EdgestillError, RecipeError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 20.0  # how long a helper that fails waits for the first to fail of the same, and to say it better
COMMAND = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no -m pipeline run RECIPE"
)


@dataclass(frozen=True)
class _Learn:
    """A stage that all are to run, as `learn` is given it."""

    stage: Callable[[Path, How], None]
    out_dir: Path
    how: How

    def aside(self) -> None:
        """Run the stage where what it writes is of no use, and where the first one's checkpoints are at hand."""
        checkpoints = self.out_dir / CHECKPOINT_DIR
        out_dir = checkpoints / f"process-{process_index()}"
        out_dir.mkdir(parents=True, exist_ok=True)
        link = out_dir / CHECKPOINT_DIR
        if not link.is_symlink():
            link.symlink_to(checkpoints.resolve(), target_is_directory=True)
        self.stage(out_dir, self.how)


@dataclass(frozen=True)
class _End:
    """The run is over for the first process, and so for the others."""

    result: Any = None
    error: EdgestillError | None = None


def led_by_first(work: Callable[P, T]) -> Callable[P, T]:
    """What all processes call together: the first does it, the others help it, and each returns its result or raises its error."""

    @wraps(work)
    def led(*args: P.args, **kwargs: P.kwargs) -> T:
        if num_processes() == 1:
            _refuse_silent_launch()
            return work(*args, **kwargs)
        from pipeline.learning import channel

        channel.join(num_processes())
        if process_index() > 0:
            result: T = _help()
            return result
        return _lead(partial(work, *args, **kwargs))

    return led


def learn(stage: Callable[[Path, How], None], out_dir: Path, how: How) -> None:
    """Run a stage that learns in every process. `stage` is a function's `partial`: it is sent to the others by name.

    Where it fails in the first, the others are let go at once.
    """
    if num_processes() == 1:
        stage(out_dir, how)
        return
    from pipeline.learning import channel

    if not channel.is_here():
        raise RecipeError(
            f"{num_processes()} processes were started, and only run_recipe knows what to do with them. Start one."
        )
    channel.tell(_Learn(stage, out_dir, replace(how, progress=Quiet())))
    try:
        stage(out_dir, how)
        channel.meet()
    except BaseException:
        channel.leave()
        raise


def _lead(work: Callable[[], T]) -> T:
    from pipeline.learning import channel

    try:
        result = work()
    except EdgestillError as error:
        if channel.is_here():
            channel.tell(_End(error=error))
        raise
    except BaseException:
        channel.leave()
        raise
    channel.tell(_End(result))
    return result


def _help() -> Any:
    from pipeline.learning import channel

    while True:
        told = channel.hear()
        if isinstance(told, _End):
            if told.error is not None:
                raise told.error
            return told.result
        try:
            told.aside()
            channel.meet()
        except Exception as error:
            if not _first_fails_too():
                number, of = process_index() + 1, num_processes()
                print(f"edgestill: process {number} of {of} cannot go on: {error}", file=sys.__stderr__, flush=True)
            raise


def _first_fails_too() -> bool:
    """Whether the first process ends within PATIENCE_S, after which it would have said why."""
    from pipeline.learning import channel

    begun_s = time.monotonic()
    try:
        channel.hear(PATIENCE_S)
    except EdgestillError:
        return time.monotonic() - begun_s < PATIENCE_S
    return True


def _refuse_silent_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, leaves an address for several, and says nothing."""
    if leaves_others_to_mpirun():
        raise RecipeError(
            "accelerate launch --cpu was asked for several processes and started one: several on CPUs it leaves to mpirun.\n"
            f"For one, set --num_processes 1. For two: {COMMAND}"
        )
