"""Soft labels on disk: what comes back, what is lost, and whose they are."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.learning.label_cache import FILE, LabelCache, LabelsOf, LabelWriter, restored, stored
from targets.errors import IntegrityError, ModelError

CPU = torch.device("cpu")
OF = LabelsOf(
    teacher="t" * 64,
    data="d" * 64,
    transform="f" * 64,
    view_seeds=(11, 22, 33),
    num_samples=7,
    num_classes=5,
    dtype="fp32",
)


def answers(of: LabelsOf, view: int = 0, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(view)
    return scale * torch.randn(of.num_samples, of.num_classes, generator=generator)


def written(directory: Path, of: LabelsOf) -> LabelCache:
    """A whole cache of made-up logits, each view its own."""
    writer = LabelWriter(directory, of)
    for view in writer.missing:
        writer.write(view, answers(of, view).split(max(3, of.num_samples // 2)), precision="fp32")
    return LabelCache.open(directory, of, CPU)


# --- what comes back ---------------------------------------------------------------------------------------------------


def test_float32_logits_come_back_bit_for_bit_for_any_rows_of_any_view(tmp_path: Path) -> None:
    cache = written(tmp_path, OF)

    for view, rows in ((2, [6, 0, 3]), (0, [1, 1]), (2, [5]), (1, list(range(7)))):
        index_N = torch.tensor(rows)
        assert torch.equal(cache.logits(view, index_N), answers(OF, view)[index_N])


@given(values=st.lists(st.floats(-65000, 65000, width=32), min_size=2, max_size=9), temperature=st.floats(0.5, 20))
@settings(deadline=None)
def test_float16_is_off_by_a_2048th_and_moves_no_log_softmax_by_more_than_it_may(
    values: list[float], temperature: float
) -> None:
    z_NK = torch.tensor([values], dtype=torch.float32)
    of = replace(OF, num_samples=1, num_classes=len(values), dtype="fp16")

    back_NK = restored(stored(z_NK, of), torch.tensor([0]), len(values)).double()

    z_NK = z_NK.double()
    assert (back_NK - z_NK).abs().le(z_NK.abs() / 2048 + 2**-25).all()
    moved = (back_NK / temperature).log_softmax(1) - (z_NK / temperature).log_softmax(1)
    assert moved.abs().max() <= (z_NK.abs().max() / 1024 + 2**-24) / temperature * (1 + 1e-9) + 1e-12


@given(num_classes=st.integers(3, 14), share=st.floats(0, 0.999), seed=st.integers(0, 10**6), scale=st.floats(0.01, 8))
@settings(deadline=None)
def test_top_k_keeps_its_probabilities_and_the_mass_of_the_rest_and_loses_what_the_formula_says(
    num_classes: int, share: float, seed: int, scale: float
) -> None:
    k = 1 + int(share * (num_classes - 1))
    z_NK = scale * torch.randn(4, num_classes, generator=torch.Generator().manual_seed(seed))
    of = replace(OF, num_samples=4, num_classes=num_classes, top_k=k)

    back_NK = restored(stored(z_NK, of), torch.arange(4), num_classes).double().numpy()

    z = z_NK.double().numpy()
    for true_K, found_K in zip(z, back_NK, strict=True):
        order = np.argsort(-true_K)
        top, others = order[:k], order[k:]
        p, q = softmax(true_K), softmax(found_K)
        assert found_K[top] == pytest.approx(true_K[top])
        assert q[top] == pytest.approx(p[top], rel=1e-5)
        mass = p[others].sum()
        assert q[others] == pytest.approx(np.full(len(others), mass / len(others)), rel=1e-4, abs=1e-9)
        entropy = -sum(one * math.log(one) for one in p[others] / mass)
        lost = (p * np.log(p / q)).sum()
        assert lost == pytest.approx(mass * (math.log(len(others)) - entropy), rel=1e-3, abs=5e-6)
        assert softmax(found_K / 4)[others].sum() >= softmax(true_K / 4)[others].sum() * (1 - 1e-5)
        assert softmax(found_K * 2)[others].sum() <= softmax(true_K * 2)[others].sum() * (1 + 1e-5) + 1e-9


def softmax(z_K: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    grown: np.ndarray[Any, Any] = np.exp(z_K - z_K.max())
    return grown / grown.sum()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("num_classes", [5, 40_000])  # class ids of 2 and of 4 bytes
def test_top_k_comes_back_from_disk_as_from_memory(tmp_path: Path, dtype: str, num_classes: int) -> None:
    of = replace(OF, dtype=dtype, top_k=3, num_classes=num_classes, view_seeds=(1,))

    cache = written(tmp_path, of)

    index_N = torch.tensor([4, 2])
    expected = restored(stored(answers(of), of), index_N, num_classes)
    assert torch.equal(cache.logits(0, index_N), expected)
    assert torch.equal(expected.argmax(1), answers(of)[index_N].argmax(1))
    assert np.load(tmp_path / "view-0000-classes.npy").dtype == (np.int16 if num_classes == 5 else np.int32)


def test_an_epoch_reads_its_rows_and_not_the_whole_view(tmp_path: Path) -> None:
    of = replace(OF, num_samples=200_000, view_seeds=(1,))
    cache = written(tmp_path, of)
    tracemalloc.start()

    for start in range(0, 1000, 100):
        cache.logits(0, torch.arange(start, start + 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (tmp_path / "view-0000-logits.npy").stat().st_size > 4_000_000
    assert peak < 400_000


# --- what cannot be stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ({"dtype": "fp16"}, 7e4, r"logits reach 7e\+04, and float16 ends at 65504.*distill\.cache\.dtype: fp32"),
        ({"dtype": "fp16", "top_k": 2}, -1e6, r"float16 ends at 65504"),
        ({}, math.nan, r"are no numbers"),
        ({}, math.inf, r"are no numbers"),
        ({"num_classes": 6}, 0.0, r"gives 5 logits for 6 classes"),
    ],
)
def test_logits_that_cannot_be_stored_are_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], value: float, message: str
) -> None:
    logits_NK = answers(OF)
    logits_NK[3] = torch.where(torch.arange(5) == 1, value, logits_NK[3]) if value > 0 else value
    of = replace(OF, **changed)

    with pytest.raises(ModelError, match=message) as refused:
        LabelWriter(tmp_path, of).write(0, [logits_NK], precision="fp32")

    assert len(str(refused.value).splitlines()) <= 3
    with pytest.raises(IntegrityError):
        LabelCache.open(tmp_path, of, CPU)


# --- whose they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "x" * 64}, r"the answers of another teacher \(tttttttttttt, not xxxxxxxxxxxx\)"),
        ({"data": "x" * 64}, r"made from other data"),
        ({"transform": "x" * 64}, r"augmented, sized or normalised otherwise"),
        ({"view_seeds": (11, 22, 34)}, r"of other views"),
        ({"view_seeds": (11, 22)}, r"of other views \(3 from seed 11, not 2 from seed 11\)"),
        ({"num_samples": 8}, r"another number of samples \(7, not 8\)"),
        ({"num_classes": 6}, r"another number of classes \(5, not 6\)"),
        ({"dtype": "fp16"}, r"stored in another type \(fp32, not fp16\)"),
        ({"top_k": 2}, r"another number of classes is stored a sample \(None, not 2\)"),
    ],
)
def test_labels_of_anything_else_are_refused_with_what_differs(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    written(tmp_path, OF)

    with pytest.raises(IntegrityError, match=message) as refused:
        LabelCache.open(tmp_path, replace(OF, **changed), CPU)

    assert "--force soft_labels" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"view-0001-logits\.npy is gone"),
        (flip, r"view-0001-logits\.npy has changed since it was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r"view-0001-logits\.npy has 260 bytes, not 268"),
    ],
)
def test_a_damaged_view_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    written(tmp_path, OF)
    damage(tmp_path / "view-0001-logits.npy")

    with pytest.raises(IntegrityError, match=message):
        LabelCache.open(tmp_path, OF, CPU)


def test_a_view_that_was_never_written_is_named(tmp_path: Path) -> None:
    LabelWriter(tmp_path, OF).write(0, [answers(OF)], precision="fp32")

    with pytest.raises(IntegrityError, match=r"view-0001-logits\.npy was never written"):
        LabelCache.open(tmp_path, OF, CPU)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"teacher": 1}'])
def test_a_description_that_is_not_as_it_was_written_is_refused(tmp_path: Path, content: str) -> None:
    written(tmp_path, OF)
    (tmp_path / FILE).write_text(content)

    with pytest.raises(IntegrityError, match=r"soft_labels\.json"):
        LabelCache.open(tmp_path, OF, CPU)


# --- killed and gone on ------------------------------------------------------------------------------------------------


def interrupted(logits_NK: Tensor) -> Iterator[Tensor]:
    yield logits_NK[:3]
    raise KeyboardInterrupt


def test_a_killed_writer_leaves_its_whole_views_and_the_next_goes_on_after_them(tmp_path: Path) -> None:
    writer = LabelWriter(tmp_path, OF)
    writer.write(0, [answers(OF, 0)], precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        writer.write(1, interrupted(answers(OF, 1)), precision="bf16")

    again = LabelWriter(tmp_path, OF)

    assert (again.missing, again.precision) == ([1, 2], "bf16")
    cache = written(tmp_path, OF)
    assert len(cache.info["seconds"]) == 3
    assert all(torch.equal(cache.logits(view, torch.arange(7)), answers(OF, view)) for view in range(3))


@pytest.mark.parametrize("of", [replace(OF, teacher="x" * 64), replace(OF, view_seeds=(11, 22, 34))])
def test_views_that_another_writer_left_are_not_taken(tmp_path: Path, of: LabelsOf) -> None:
    written(tmp_path, of)

    assert LabelWriter(tmp_path, OF).missing == [0, 1, 2]


def test_a_view_that_was_damaged_after_it_was_written_is_written_again(tmp_path: Path) -> None:
    written(tmp_path, OF)
    flip(tmp_path / "view-0002-logits.npy")

    cache = written(tmp_path, OF)

    assert torch.equal(cache.logits(2, torch.arange(7)), answers(OF, 2))


def test_the_description_says_what_the_labels_hold_for(tmp_path: Path) -> None:
    written(tmp_path, replace(OF, top_k=2))

    told = json.loads((tmp_path / FILE).read_text())

    assert {key: told[key] for key in ("teacher", "data", "transform", "view_seeds", "num_samples", "num_classes")} == {
        "teacher": "t" * 64,
        "data": "d" * 64,
        "transform": "f" * 64,
        "view_seeds": [11, 22, 33],
        "num_samples": 7,
        "num_classes": 5,
    }
    assert (told["dtype"], told["top_k"], told["precision"], len(told["files"])) == ("fp32", 2, "fp32", 9)
