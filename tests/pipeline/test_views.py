"""Views: each sample as its own draws say, the same in whatever order and company it comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.artifacts import PreparedData
from pipeline.learning.data import Batch, Data
from pipeline.learning.views import VIEW, View, erased, mixed_seed, shifted, view_seeds
from pipeline.recipe import AugmentConfig, DataConfig
from pipeline.stages.data import prepare_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """70 images of noise to train on, with every augmentation on."""
    directory = tmp_path_factory.mktemp("views")
    x, y = np.random.default_rng(0).integers(1, 256, (90, 8, 6), dtype=np.uint8), np.arange(90) % 3
    np.savez(directory / "a.npz", x_train=x[:78], y_train=y[:78], x_test=x[78:], y_test=y[78:])
    augment = AugmentConfig(crop=2, flip=True, erase=0.5)
    prepare_data(DataConfig(source=f"npz:{directory / 'a.npz'}", calibration=9, augment=augment), 0, directory / "out")
    return Data.load(PreparedData(directory / "out", ""))


def drawn(num_samples: int, seed: int = 0, *, crop: int = 0, flip: bool = False, erase: float = 0.0) -> View:
    return View.draw({"crop": crop, "flip": flip, "erase": erase}, num_samples, seed, CPU)


def coordinates(num_samples: int, height: int = 6, width: int = 5) -> Tensor:
    """Images whose pixels all differ and are never 0."""
    pixels = 1 + torch.arange(height * width, dtype=torch.uint8).view(1, 1, height, width)
    return pixels.expand(num_samples, 3, -1, -1).contiguous()


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x_NCHW", "labels_N", "index_N"))
    )


def whole(data: Data, view_seed: int) -> Tensor:
    """The train split in its order, in one batch."""
    return joined(list(data.view_batches([torch.arange(data.num_train)], view_seed))).x_NCHW


# --- a view is a function of (view seed, sample) -----------------------------------------------------------------------


@given(
    view_seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 300),
    seed=st.integers(0, 2**32),
    batch_size=st.integers(1, 80),
    num_shown=st.integers(1, 70),
    device_order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_a_sample_looks_the_same_in_whatever_order_and_company_it_comes(
    data: Data, view_seed: int, epoch: int, seed: int, batch_size: int, num_shown: int, device_order: object
) -> None:
    positions = list(range(data.num_train))
    device_order.shuffle(positions)  # type: ignore[attr-defined]
    shown = torch.tensor(positions[:num_shown])

    seen = joined(
        list(data.train_batches(epoch=epoch, seed=seed, batch_size=batch_size, shown=shown, view_seed=view_seed))
    )

    assert torch.equal(seen.x_NCHW, whole(data, view_seed)[seen.index_N])
    assert sorted(seen.index_N.tolist()) == sorted(shown.tolist())


def test_another_view_seed_shows_other_images(data: Data) -> None:
    first, second = (whole(data, view_seed) for view_seed in (1, 2))

    same = [torch.equal(one, other) for one, other in zip(first, second, strict=True)]
    assert sum(same) < 0.2 * len(same)


def test_the_order_of_an_epoch_does_not_depend_on_the_view_it_shows(data: Data) -> None:
    orders = [
        joined(list(data.train_batches(epoch=4, seed=1, batch_size=16, view_seed=view_seed))).index_N
        for view_seed in (None, 1, 2)
    ]

    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_without_a_view_seed_each_epoch_of_each_seed_shows_a_view_of_its_own(data: Data) -> None:
    epochs = [
        joined(list(data.train_batches(epoch=epoch, seed=seed, batch_size=16)))
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]

    in_order = [epoch.x_NCHW[epoch.index_N.argsort()] for epoch in epochs]
    assert torch.equal(in_order[0], whole(data, mixed_seed(0, 0)))
    assert not torch.equal(in_order[0], in_order[1])
    assert not torch.equal(in_order[0], in_order[2])


@given(seed=st.integers(0, 2**32), few=st.integers(0, 20), more=st.integers(0, 20))
@settings(deadline=None)
def test_fewer_views_are_the_first_of_more_and_no_two_are_the_same(seed: int, few: int, more: int) -> None:
    seeds = view_seeds(seed, few + more)

    assert view_seeds(seed, few) == seeds[:few]
    assert len(set(seeds)) == few + more
    assert not set(seeds) & set(view_seeds(seed + 1, few + more))
    assert not set(seeds) & {
        mixed_seed(seed, epoch, VIEW) for epoch in range(few + more)
    }  # what its teacher was trained on


# --- the augmentations -------------------------------------------------------------------------------------------------


def test_each_sample_is_shifted_flipped_and_erased_by_its_own_draws() -> None:
    x_NCHW = torch.randint(1, 256, (40, 3, 7, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    view = drawn(40, crop=2, flip=True, erase=0.6)
    index_N = torch.tensor([31, 4, 4, 0, 17, 39])

    seen = view.of(x_NCHW[index_N], index_N)

    assert view.offsets_2N is not None
    assert view.flips_N is not None
    assert view.erasing_5N is not None
    for image, index in zip(seen, index_N.tolist(), strict=True):
        padded = torch.zeros(3, 11, 10, dtype=torch.uint8)
        padded[:, 2:9, 2:8] = x_NCHW[index]
        down, right = view.offsets_2N[:, index].tolist()
        expected = padded[:, down : down + 7, right : right + 6]
        expected = expected.flip(2) if view.flips_N[index] else expected
        length_y, start_y, length_x, start_x, chance = view.erasing_5N[:, index].tolist()
        if chance < 0.6:
            rows, columns = 1 + min(int(length_y * 3), 2), 1 + min(int(length_x * 3), 2)
            top, left = int(start_y * (7 - rows + 1)), int(start_x * (6 - columns + 1))
            expected = expected.clone()
            expected[:, top : top + rows, left : left + columns] = 0
        assert torch.equal(image, expected)


def test_what_is_off_leaves_the_pixels_alone() -> None:
    x_NCHW = coordinates(5)

    assert torch.equal(drawn(5).of(x_NCHW, torch.arange(5)), x_NCHW)


def test_every_offset_is_drawn_and_zeros_come_from_outside() -> None:
    x_NCHW = coordinates(200)

    cropped = drawn(200, crop=2).of(x_NCHW, torch.arange(200))

    padded = torch.nn.functional.pad(x_NCHW[0], (2, 2, 2, 2))
    windows = {(dy, dx): padded[:, dy : dy + 6, dx : dx + 5] for dy in range(5) for dx in range(5)}
    found = [next(offset for offset, window in windows.items() if torch.equal(window, image)) for image in cropped]
    assert set(found) == set(windows)


def test_the_middle_offset_moves_nothing() -> None:
    x_NCHW = coordinates(3)

    assert torch.equal(shifted(x_NCHW, 2, torch.full((2, 3), 2)), x_NCHW)


def test_flips_mirror_about_half_of_the_images() -> None:
    x_NCHW = coordinates(400)

    flipped = drawn(400, flip=True).of(x_NCHW, torch.arange(400))

    mirrored = [torch.equal(image, x_NCHW[0].flip(2)) for image in flipped]
    assert all(
        torch.equal(image, x_NCHW[0]) for image, is_mirrored in zip(flipped, mirrored, strict=True) if not is_mirrored
    )
    assert 150 < sum(mirrored) < 250


@given(height=st.integers(2, 12), width=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_erasing_zeroes_one_rectangle_of_at_most_a_quarter(height: int, width: int, seed: int) -> None:
    x_NCHW = coordinates(8, height, width)
    draws_5N = torch.rand(5, 8, generator=torch.Generator().manual_seed(seed))

    erased_NHW = (erased(x_NCHW, 1.0, draws_5N) == 0).all(dim=1)

    for mask in erased_NHW:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == rows * columns
        assert 1 <= mask.sum() <= height * width / 4


def test_erasing_happens_with_the_probability_asked_for() -> None:
    zeroed = drawn(2000, erase=0.25).of(coordinates(2000), torch.arange(2000)) == 0

    assert 400 < zeroed.flatten(1).any(dim=1).sum() < 600


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_file_too_looks_the_same_in_another_order_and_flips_with_its_view(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "images" / ("test" if number % 3 == 0 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30, 26)).save(folder / f"{number:02d}.png")
    config = DataConfig(
        source=f"image_folder:{tmp_path / 'images'}", image_size=16, workers=0, augment=AugmentConfig(flip=True)
    )
    prepare_data(config, 0, tmp_path / "out")
    files = Data.load(PreparedData(tmp_path / "out", ""))

    seen = joined(list(files.train_batches(epoch=2, seed=5, batch_size=4, view_seed=9)))

    assert torch.equal(seen.x_NCHW, whole(files, 9)[seen.index_N])
    assert not torch.equal(whole(files, 9), whole(files, 10))
