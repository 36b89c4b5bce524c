"""The passes of an epoch: each a way through samples of the train split, in one view; and who answers for the teacher.

An epoch has one pass, or more where a curriculum shows the same samples again.
"""
# Shapes: N batch, K classes.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.learning.data import Batch, Data, batch_slices
from pipeline.learning.distributed import Share
from pipeline.learning.label_cache import LabelCache


@dataclass(frozen=True)
class Teacher:
    """Who answers what the teacher is asked: a module, its answers on disk, or nobody; and which views are shown in turn."""

    module: nn.Module | None
    labels: LabelCache | None
    view_seeds: Sequence[int] | None

    def view(self, epoch: int, number: int = 0, num_passes: int = 1) -> int | None:
        """Which view a pass of an epoch shows, both from 0; None for one of its own.

        The passes of one epoch lie as far apart among the views as they can, so that what is shown again looks otherwise.
        """
        if not self.view_seeds:
            return None
        num_views = len(self.view_seeds)
        return (epoch + number * max(num_views // num_passes, 1)) % num_views

    def view_seed(self, view: int | None) -> int | None:
        """None for a view that no other pass shows."""
        return None if view is None or self.view_seeds is None else self.view_seeds[view]

    def logits(self, batch: Batch, view: int | None) -> Tensor | None:
        """(N, K) float32 in the autocast that is on, without gradients; None where nobody answers."""
        if self.labels is not None and view is not None:
            return self.labels.logits(view, batch.index_N)
        if self.module is None:
            return None
        with torch.no_grad():
            logits_NK: Tensor = self.module(batch.x_NCHW).float()
        return logits_NK


@dataclass(frozen=True)
class Pass:
    """One way through what an epoch shows."""

    number: int  # within the epoch, from 0
    shown: Tensor | None  # positions in the train split; None for all
    view: int | None
    shares: list[Share]  # what this process takes of each batch

    @property
    def num_samples(self) -> int:
        return sum(share.total for share in self.shares)


def plan_passes(
    visited: Sequence[Tensor | None], epoch: int, num_train: int, batch_size: int, teacher: Teacher
) -> list[Pass]:
    """A pass for each of `visited`, positions in the train split; None for all of it."""
    passes = []
    for number, shown in enumerate(visited):
        batches = batch_slices(num_train if shown is None else len(shown), batch_size)
        shares = [Share.of_batch(one.stop - one.start) for one in batches]
        passes.append(Pass(number, shown, teacher.view(epoch, number, len(visited)), shares))
    return passes


def num_different(passes: Sequence[Pass], num_train: int) -> int:
    """How many samples of the train split the passes visit, each counted once."""
    shown = [one.shown for one in passes if one.shown is not None]
    return num_train if len(shown) < len(passes) else len(torch.cat(shown).unique())


def pass_batches(
    data: Data, passes: Sequence[Pass], epoch: int, seed: int, batch_size: int, teacher: Teacher
) -> Iterator[Batch]:
    """This process's part of every batch, pass after pass."""
    for one in passes:
        yield from data.train_batches(
            epoch=epoch,
            seed=seed,
            batch_size=batch_size,
            shown=one.shown,
            view_seed=teacher.view_seed(one.view),
            rows=[share.rows for share in one.shares],
            number=one.number,
        )
