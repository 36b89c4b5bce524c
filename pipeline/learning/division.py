"""How the data are divided: a training part into train, validation and calibration, and which of train keep their label."""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.learning.sources import Part, Source
from pipeline.learning.sources.parts import join, take
from pipeline.recipe import DataConfig

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices into the training part; calibration lies within train, validation outside of it. Of `data.unlabelled` all images
    are in train, behind the others, and none is in another split."""

    train: Indices
    validation: Indices
    calibration: Indices


def divide(
    config: DataConfig, source: Source, rng: np.random.Generator, share_rng: np.random.Generator
) -> tuple[Part, Part, Split]:
    """The training part, the test part and the split of the first. What a set divides itself is kept as it is, but for
    `validation: 0`, which trains on its validation part too. Below a `train_share` of 1 the train samples that are not kept
    are in no split; test and validation are those of a share of 1."""
    part, test = source.train, source.test
    if test is None:
        held_out = stratified(part.labels_N, round(config.test * len(part.labels_N)), rng)
        part, test = take(part, _others(held_out, len(part.labels_N))), take(part, held_out)
    num_samples = len(part.labels_N)
    if source.validation is None or config.validation == 0:
        validation = stratified(part.labels_N, round(config.validation * num_samples), rng)
    else:
        validation = np.arange(num_samples, num_samples + len(source.validation.labels_N))
    if source.validation is not None:
        part = join(part, source.validation)
    train = _others(validation, len(part.labels_N))
    if config.train_share < 1:
        train = train[stratified(part.labels_N[train], round(config.train_share * len(train)), share_rng)]
    chosen = stratified(part.labels_N[train], min(config.calibration, len(train)), rng)
    return part, test, Split(train, validation, train[chosen])


def labelled_samples(config: DataConfig, labels_N: Indices, train: Indices, rng: np.random.Generator) -> Indices:
    """Those of the train samples that keep their label, the same share of every class."""
    if config.labelled_share == 1:
        return train
    return train[stratified(labels_N[train], round(config.labelled_share * len(train)), rng)]


def with_unlabelled(part: Part, split: Split, foreign: Iterable[Part]) -> tuple[Part, Split]:
    """The training part with the foreign images behind it, all of them in train."""
    num_own = len(part.labels_N)
    for one in foreign:
        part = join(part, one)
    return part, replace(split, train=np.concatenate([split.train, np.arange(num_own, len(part.labels_N))]))


def stratified(labels_N: Indices, num_chosen: int, rng: np.random.Generator) -> Indices:
    """`num_chosen` sorted indices, each class with its share up to one sample (largest remainders, ties at random)."""
    order = rng.permutation(len(labels_N))
    counts_K = np.unique(labels_N, return_counts=True)[1]
    quota_K, remainder_K = np.divmod(counts_K * num_chosen, max(len(labels_N), 1))
    by_remainder = np.lexsort((rng.random(len(counts_K)), -remainder_K))
    quota_K[by_remainder[: num_chosen - quota_K.sum()]] += 1
    by_class = order[np.argsort(labels_N[order], kind="stable")]
    starts_K = np.cumsum(counts_K) - counts_K
    rank_N = np.arange(len(labels_N)) - np.repeat(starts_K, counts_K)  # a sample's place within its class
    return np.sort(by_class[rank_N < np.repeat(quota_K, counts_K)])


def _others(indices: Indices, num_samples: int) -> Indices:
    return np.setdiff1d(np.arange(num_samples), indices, assume_unique=True)
