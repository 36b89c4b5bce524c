"""One training on several processes, as `accelerate launch` or torchrun start them.

Every process sees the whole batch's logits and computes the same loss L, but only from its own rows do gradients flow back. The
sum over processes of what flows back is dL/dtheta, exactly, for any L, also one that couples the samples of a batch. So the sum
is taken after the backward pass, once a step; DistributedDataParallel, which averages, fails where a net leaves a parameter
unused, and here nothing would be left to do while it overlaps the two.
"""
# Shapes: N samples of the whole batch, n of this process, P processes.

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

from targets.errors import TrainingError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # of one exchange in a training: a process that says nothing for so long is given up


def process_state() -> PartialState:
    """The processes that were started together; one where nothing started several.

    accelerate takes processes without a GPU for strangers to each other unless it is told that they are on CPUs.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
    if state.num_processes > 1:
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """Before the interpreter is taken down: gloo's threads abort a process that ends while they run."""
    atexit.register(leave)


def leave() -> None:
    """Let go of the other processes: what they wait for fails at once."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return bool(process_state().process_index == 0)


@dataclass(frozen=True)
class Share:
    """What one of `num_processes` takes of a batch of `total`: consecutive rows, at most one more than any other process.

    Of a batch with fewer samples than processes, each takes all, and its gradient counts by 1 / P.
    """

    total: int
    index: int = 0
    num_processes: int = 1

    @classmethod
    def of_batch(cls, total: int) -> Share:
        state = process_state()
        return cls(total, state.process_index, state.num_processes)

    @property
    def is_part(self) -> bool:
        return 1 < self.num_processes <= self.total

    @property
    def rows(self) -> slice:
        return _rows(self.total, self.index, self.num_processes) if self.is_part else slice(0, self.total)

    @property
    def num_rows(self) -> int:
        return len(range(self.total)[self.rows])

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of each process -> (N, ...); backwards, each gets the gradient of its own rows."""
        if self.num_processes == 1:
            return x
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def stack(self, x: Tensor) -> Tensor:
        """The same shape in each process -> (P, ...), without gradients."""
        stacked = x.new_zeros(self.num_processes, *x.shape)
        stacked[self.index] = x
        return all_reduce(stacked)


class _Gather(torch.autograd.Function):
    """Zeros but for the own rows, summed: adding zero changes no number, and shares of different sizes need no padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        if not share.is_part:
            return x.view_as(x)
        gathered = x.new_zeros(share.total, *x.shape[1:])
        gathered[share.rows] = x
        return all_reduce(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        share: Share = ctx.share
        return (gradient[share.rows] if share.is_part else gradient / share.num_processes), None


_current: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def taking(share: Share) -> Iterator[None]:
    """While this process takes `share` of a batch, `gathered` knows of it."""
    token = _current.set(share)
    try:
        yield
    finally:
        _current.reset(token)


def gathered(x: Tensor) -> Tensor:
    """(n, ...), what a hook saw of the batch at hand -> (N, ...), as `Share.gather`; as it is where no batch is shared."""
    share = _current.get()
    return x if share is None else share.gather(x)


def process_rows(total: int) -> slice:
    """This process's consecutive rows of `total`; none where there are more processes than rows."""
    state = process_state()
    return _rows(total, state.process_index, state.num_processes)


def _rows(total: int, index: int, num_processes: int) -> slice:
    return slice(total * index // num_processes, total * (index + 1) // num_processes)


def count_over_all(number: int) -> int:
    """The sum of what each process counted."""
    if process_state().num_processes == 1:
        return number
    return int(all_reduce(torch.tensor(number, device=process_state().device)))


def sum_gradients(parameters: Iterable[Tensor], *, alike: Iterable[Tensor] = ()) -> None:
    """Give every process the sum of all processes' gradients, in one exchange.

    `alike`: parameters whose gradient each process has computed in full already, from the gathered batch. Of these the mean is
    taken, so that no last bit lets them drift apart.
    """
    num_processes = process_state().num_processes
    if num_processes == 1:
        return
    in_full = [parameter.grad for parameter in alike if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None] + in_full
    if not gradients:
        return
    for gradient in in_full:
        gradient.div_(num_processes)
    flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def agree(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if process_state().num_processes == 1:
        return
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            content = tensor.reshape(-1).clone()  # in any memory format; sent as bytes, as no backend sends every type
            with or_lost():
                distributed.broadcast(content.view(torch.uint8), src=0)
            tensor.copy_(content.view_as(tensor))


def from_first(value: T) -> T:
    """The first process's value, in each; the others' own is not looked at. Nobody goes on before the first has come here."""
    if process_state().num_processes == 1:
        return value
    box = [value]
    with or_lost():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(x: Tensor) -> Tensor:
    """The sum over processes, in place. Raises TrainingError where one of them is gone or silent."""
    with or_lost():
        distributed.all_reduce(x)
    return x


@contextmanager
def or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        minutes = TIMEOUT.total_seconds() / 60
        raise TrainingError(
            f"The processes of this training have lost each other: one has ended, or said nothing for {minutes:.0f} minutes "
            f"({' '.join(str(error).split())[:120]}).\n"
            "Its own message says why. Start them again: the training goes on after its last whole epoch."
        ) from None
