"""How the first process tells the others what comes next, however long that takes: a channel beside that of the trainings."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from pipeline.learning.distributed import TIMEOUT, or_lost, process_state
from pipeline.learning.distributed import leave as leave_all
from targets.errors import TrainingError

LONGEST = timedelta(days=30)  # of what the first does alone, while the others wait

_channel: Any = None  # torch's process group


def join(num_processes: int) -> None:
    """Meet the other processes. Raises TrainingError where accelerate finds another number of them."""
    global _channel
    found = process_state().num_processes
    if found != num_processes:
        raise TrainingError(
            f"{num_processes} processes were started, and accelerate finds {found}: it cannot connect them on this device. "
            "Start them with accelerate launch --multi_gpu, or with torchrun."
        )
    if _channel is None:
        _channel = distributed.new_group(backend="gloo", timeout=LONGEST)


def tell(message: Any) -> None:
    """To all others, from the first."""
    with or_lost():
        distributed.broadcast(torch.zeros(1), src=0, group=_channel)
        distributed.broadcast_object_list([message], src=0, group=_channel)


def hear(patience_s: float = LONGEST.total_seconds()) -> Any:
    """What the first tells next. Raises TrainingError where it is gone, or says nothing for so long."""
    box: list[Any] = [None]
    with or_lost():
        bell = distributed.broadcast(torch.zeros(1), src=0, group=_channel, async_op=True)
        assert bell is not None  # async_op gives a handle
        bell.wait(timedelta(seconds=patience_s))
        distributed.broadcast_object_list(box, src=0, group=_channel)
    return box[0]


def meet() -> None:
    """Wait until every process is here."""
    with or_lost():
        distributed.monitored_barrier(_channel, timeout=TIMEOUT)


def leave() -> None:
    """Let go of the others: what they wait for fails at once."""
    global _channel
    _channel = None
    leave_all()


def is_here() -> bool:
    """Whether the others can still be told something."""
    return _channel is not None
