"""An epoch that shows a part of the data again and again: how many steps it has, and how the same sample looks in each pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import PreparedData
from pipeline.learning.curriculum.samples import as_long_as_all, check_fills_a_batch
from pipeline.learning.data import Batch, Data, batch_slices
from pipeline.learning.passes import Teacher, pass_batches, plan_passes
from pipeline.learning.views import view_seeds
from pipeline.recipe import AugmentConfig, CurriculumConfig, DataConfig
from pipeline.stages.data import prepare_data
from targets.errors import RecipeError

NUM_TRAIN, BATCH_SIZE, SEED = 70, 16, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Images of noise, cropped and flipped at random."""
    directory = tmp_path_factory.mktemp("passes")
    x, y = np.random.default_rng(0).integers(1, 256, (90, 8, 6), dtype=np.uint8), np.arange(90) % 3
    np.savez(directory / "a.npz", x_train=x[:78], y_train=y[:78], x_test=x[78:], y_test=y[78:])
    config = DataConfig(source=f"npz:{directory / 'a.npz'}", calibration=9, augment=AugmentConfig(crop=2, flip=True))
    prepare_data(config, 0, directory / "out")
    loaded = Data.load(PreparedData(directory / "out", ""))
    assert loaded.num_train == NUM_TRAIN
    return loaded


def nobody(num_views: int | None = None) -> Teacher:
    return Teacher(None, None, None if num_views is None else view_seeds(SEED, num_views))


def batches_of(data: Data, teacher: Teacher, shown: torch.Tensor, epoch: int = 0) -> list[Batch]:
    visited = as_long_as_all(shown, NUM_TRAIN, BATCH_SIZE, seed=epoch)
    passes = plan_passes(visited, epoch, NUM_TRAIN, BATCH_SIZE, teacher)
    return list(pass_batches(data, passes, epoch, SEED, BATCH_SIZE, teacher))


SIZES = st.integers(2, 400).flatmap(
    lambda n: st.integers(2, n).flatmap(lambda shown: st.tuples(st.just(n), st.just(shown), st.integers(1, shown)))
)


@given(SIZES, st.integers(0, 2**64 - 1))
@settings(max_examples=200)
def test_what_is_shown_comes_equally_often_but_for_once_in_as_many_steps_as_all_the_data(
    sizes: tuple[int, int, int], seed: int
) -> None:
    num_samples, num_shown, batch_size = sizes
    shown = torch.randperm(num_samples)[:num_shown]

    passes = as_long_as_all(shown, num_samples, batch_size, seed=seed)

    counts = Counter(torch.cat(passes).tolist())
    assert counts.keys() == set(shown.tolist())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert num_samples - counts.total() in (0, 1)
    for one in passes:
        assert len(set(one.tolist())) == len(one) > min(batch_size - 1, 1)  # BatchNorm cannot train on one sample
    steps = sum(len(batch_slices(len(one), batch_size)) for one in passes)
    assert steps == len(batch_slices(num_samples, batch_size))


def test_a_share_that_fills_no_batch_is_refused() -> None:
    few = CurriculumConfig(start_fraction=0.2, epoch_length="all")
    replayed = CurriculumConfig(pacing="replay", fractions=(1.0, 0.2), epoch_length="all")

    with pytest.raises(RecipeError, match=r"shows 14 of 70 samples .* less than a batch of 16.*Raise start_fraction"):
        check_fills_a_batch(few, 70, 16)
    with pytest.raises(RecipeError, match=r"Raise fractions"):
        check_fills_a_batch(replayed, 70, 16)
    check_fills_a_batch(few, 70, 14)


def test_which_samples_fill_the_epoch_up_changes_from_epoch_to_epoch() -> None:
    shown = torch.arange(40)

    first, again, other = (as_long_as_all(shown, NUM_TRAIN, BATCH_SIZE, seed=seed)[-1].tolist() for seed in (1, 1, 2))

    assert first == again
    assert set(first) != set(other)


def test_a_short_share_makes_an_epoch_of_as_many_images_as_all_the_data(data: Data) -> None:
    shown = torch.arange(0, 66, 3)

    seen = torch.cat([batch.index_N for batch in batches_of(data, nobody(), shown)])

    assert len(seen) == NUM_TRAIN
    assert set(seen.tolist()) == set(shown.tolist())


@pytest.mark.parametrize("num_views", [None, 4], ids=["fresh views", "four views"])
def test_what_comes_again_in_an_epoch_looks_otherwise(data: Data, num_views: int | None) -> None:
    shown = torch.arange(25)  # twice and a bit

    batches = batches_of(data, nobody(num_views), shown)

    looks: dict[int, set[bytes]] = {}
    for batch in batches:
        for index, image in zip(batch.index_N.tolist(), batch.x_NCHW, strict=True):
            looks.setdefault(index, set()).add(image.numpy().tobytes())
    times = Counter(int(index) for batch in batches for index in batch.index_N)
    alike = sum(times[index] - len(seen) for index, seen in looks.items())
    assert sum(times.values()) == NUM_TRAIN
    assert alike <= 0.1 * NUM_TRAIN  # of 25 crops and 2 flips, two are the same now and then


@given(num_views=st.integers(1, 40), num_passes=st.integers(1, 40), epoch=st.integers(0, 99))
def test_the_passes_of_an_epoch_are_as_many_views_as_there_are(num_views: int, num_passes: int, epoch: int) -> None:
    views = {nobody(num_views).view(epoch, number, num_passes) for number in range(num_passes)}

    assert len(views) == min(num_passes, num_views)
    assert nobody(num_views).view(epoch, 0, num_passes) == epoch % num_views


def test_the_order_of_a_pass_is_its_own(data: Data) -> None:
    shown = torch.arange(32)  # two whole batches

    seen = torch.cat([batch.index_N for batch in batches_of(data, nobody(), shown)]).tolist()

    assert sorted(seen[:32]) == sorted(seen[32:64]) == shown.tolist()
    assert seen[:32] != seen[32:64]


def test_without_a_curriculum_an_epoch_is_one_pass_in_the_view_of_its_turn(data: Data, tmp_path: Path) -> None:
    (only,) = plan_passes((None,), 5, NUM_TRAIN, BATCH_SIZE, nobody(4))

    assert (only.number, only.shown, only.view, only.num_samples) == (0, None, 1, NUM_TRAIN)
