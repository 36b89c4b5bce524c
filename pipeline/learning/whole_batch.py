"""A net's forward pass on some rows of a batch, with what depends on the batch as a whole: BatchNorm's moments, dropout's masks.

torch's SyncBatchNorm takes no tensor on a CPU, is another module than the net's own, and timm's BatchNorm is a class of its
own. So it is the call of F.batch_norm that is answered, whoever makes it: no module is replaced, and hooks, names and weights
stay as they are.
"""
# Shapes: n rows of this process, N of the whole batch, C channels, * further axes.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 (torch's own custom)
from torch.overrides import TorchFunctionMode

from pipeline.learning import distributed
from pipeline.learning.distributed import Share


def whole_batch(share: Share) -> AbstractContextManager[object]:
    """Let forward passes on the rows of `share` be those of the whole batch; all processes make the same ones.

    Where every process takes all rows there is nothing to do.
    """
    return _WholeBatch(share) if share.is_part else nullcontext()


class _WholeBatch(TorchFunctionMode):
    """Answers the calls of ANSWERS, and leaves all others alone."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = ANSWERS.get(func)
        return func(*args, **(kwargs or {})) if answer is None else answer(self.share, func, *args, **(kwargs or {}))


def _batch_norm(
    share: Share,
    func: Callable[..., Tensor],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm on (n, C, *), its moments over N and *; the running variance is the unbiased one, as torch's."""
    if not training:
        return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        mean_C, var_C, count = _moments(x, share)
        for running, moment in ((running_mean, mean_C), (running_var, var_C * (count / (count - 1)))):
            if running is not None:
                running.copy_((1 - momentum) * running + momentum * moment)
    normalized: Tensor = _Normalize.apply(x, weight, bias, mean_C, var_C, count, eps)
    return normalized


def _torch_batch_norm(
    share: Share,
    func: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """The same by torch's inner name, which NNCF calls in a quantized net."""
    return _batch_norm(share, F.batch_norm, x, running_mean, running_var, weight, bias, training, momentum, eps)


def _moments(x: Tensor, share: Share) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance a channel, (C,), and over how many values: each process's own, put together (Chan et al., 1979)."""
    x = _full_precision(x)
    mean_C = x.mean(_others(x))
    squares_C = (x - _along(mean_C, x)).square().sum(_others(x))
    count_1 = mean_C.new_tensor([x.numel() / x.shape[1]])
    told = share.stack(torch.cat([mean_C, squares_C, count_1]).double())
    means_PC, squares_PC, counts_P1 = told.split([len(mean_C), len(mean_C), 1], dim=1)
    count = float(counts_P1.sum())
    whole_C = (counts_P1 * means_PC).sum(0) / count
    var_C = (squares_PC + counts_P1 * (means_PC - whole_C).square()).sum(0) / count
    return whole_C.to(x.dtype), var_C.to(x.dtype), count


class _Normalize(torch.autograd.Function):
    """y = w (x - mean) / sqrt(var + eps) + b, where mean and var are of the whole batch and so depend on every x of it.

    dL/dx = w / s (dy - mean(dy) - z mean(dy z)), z = (x - mean) / s, s = sqrt(var + eps), the means over the whole batch; those of
    w and b are this process's part of a sum, as every parameter's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean_C: Tensor,
        var_C: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean_C, (var_C + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean_C, var_C, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, scale_C = ctx.saved_tensors
        z = (_full_precision(x) - _along(mean_C, x)) * _along(scale_C, x)
        dy = gradient.to(z.dtype)
        own_2C = torch.stack([dy.sum(_others(x)), (dy * z).sum(_others(x))])
        of_y_C, of_yz_C = (distributed.all_reduce(own_2C.to(torch.float64, copy=True)) / ctx.count).to(z.dtype)
        scale_C = scale_C if weight is None else scale_C * weight
        dx = (dy - _along(of_y_C, x) - z * _along(of_yz_C, x)) * _along(scale_C, x)
        of_bias, of_weight = own_2C
        of_parameters = (of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None)
        return dx.to(x.dtype), *of_parameters, None, None, None, None


def _dropout(
    share: Share,
    func: Callable[..., Tensor],
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Dropout of any kind but alpha: a factor, which is drawn for the whole batch and cut to this process's rows.

    Every process draws the same numbers as one process alone would. A tensor whose first axis is no multiple of the rows has no
    axis of samples there: it is left to torch.
    """
    if not training or x.ndim == 0 or x.shape[0] % share.num_rows:
        return func(x, p, training, inplace)
    a_row = x.shape[0] // share.num_rows
    ones = x.new_ones(a_row * share.total, *x.shape[1:])
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        ones = ones.to(memory_format=torch.channels_last)  # numbers are drawn in the order of memory
    rows = slice(a_row * share.rows.start, a_row * share.rows.stop)
    factor = func(ones, p, True)[rows]
    return x.mul_(factor) if inplace else x * factor


def _bernoulli(share: Share, func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stochastic depth as timm and torchvision have it: one draw a sample, (n, 1, ...), is cut from (N, 1, ...)."""
    if x.ndim < 2 or x.numel() != share.num_rows or x.shape[0] != share.num_rows:
        return func(x, *args, **kwargs)
    drawn = func(x.new_empty(share.total, *x.shape[1:]), *args, **kwargs)
    return x.copy_(drawn[share.rows])


ANSWERS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
    torch.Tensor.bernoulli_: _bernoulli,
}


def _others(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [0, *range(2, x.ndim)]


def _along(of_C: Tensor, x: Tensor) -> Tensor:
    return of_C.view(1, -1, *[1] * (x.ndim - 2))


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
