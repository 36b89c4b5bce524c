"""The evidence on images without labels: its table by hand, the data that it writes, and arms of one length."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import unlabelled
from benchmarks.evidence.unlabelled_table import ALONE, LABELLED, by_unit, text
from benchmarks.statistics import mean_interval
from pipeline.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
REST = "KD, the rest without labels"


def students(*top1s: float, draws: int = 1) -> list[dict[str, Any]]:
    """As many students as there are values, in equal parts of so many draws."""
    a_draw = len(top1s) // draws
    return [
        {"draw": 10 * (1 + at // a_draw), "seed": at, "test_top1": top1, "images_shown": 300, "teacher_test_top1": 0.9}
        for at, top1 in enumerate(top1s)
    ]


def document(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    net = {"model": "resnet8", "parameters": 78_000}
    part = {
        "versions": {"torch": "2"},
        "machine": {"cpu": "a cpu", "cores": 2},
        "teacher": net,
        "student": net,
        "num_test": 397,
        "batch_size": 50,
        "rows": [
            {
                "row": row,
                "num_labelled": 50,
                "num_unlabelled": 0 if row != REST else 1350,
                "teacher": "a teacher",
                "students": found,
            }
            for row, found in rows.items()
        ],
    }
    return {"utc": "2026-01-01T00:00:00+00:00", "parts": {"digits": part}}


def test_a_mean_has_students_interval() -> None:
    values = [0.1, 0.4, 0.2, 0.6, 0.3]

    found = mean_interval(values, 0.9)

    expected = stats.t.interval(0.9, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx(expected)
    assert mean_interval([0.5]) is None


def test_students_of_several_draws_count_once_a_draw() -> None:
    assert by_unit(students(0.5, 0.7, 0.6, 1.0, draws=2)) == pytest.approx({10: 0.6, 20: 0.8})
    assert by_unit(students(0.5, 0.7)) == {0: 0.5, 1: 0.7}


def test_every_row_is_held_against_kd_on_the_labelled_images_pair_by_pair() -> None:
    told = text(
        document({ALONE: students(0.5, 0.5, 0.5), LABELLED: students(0.6, 0.62, 0.64), REST: students(0.7, 0.74, 0.72)})
    )

    lines = {line.split(" | ")[0].removeprefix("| "): line for line in told.splitlines() if line.startswith("| ")}
    low, high = (100 * bound for bound in mean_interval([0.1, 0.12, 0.08]) or ())
    assert lines[REST] == (
        f"| {REST} | 50 | 1,350 | 300 | 72.00 (67.03 to 76.97) | +10.00 ({low:+.2f} to {high:+.2f}) |"
    )
    assert lines[LABELLED].endswith(" | 62.00 (57.03 to 66.97) | - |")
    assert "-12.00" in lines[ALONE]
    assert lines["a teacher"] == "| a teacher |  |  |  | 90.00 |  |"
    assert "3 students of one draw, the same in every row" in told


def test_the_digits_are_divided_by_class_and_laid_out_as_mnists(tmp_path: Path) -> None:
    unlabelled.write_digits(tmp_path / "digits.npz")

    with np.load(tmp_path / "digits.npz") as found:
        assert found["x_train"].shape == (1400, 28, 28)
        assert np.bincount(found["y_train"]).tolist() == [140] * 10
        assert len(found["x_train"]) + len(found["x_test"]) == len(found["y_train"]) + len(found["y_test"]) == 1797
        assert not found["x_train"][:, :4].any()
        assert not found["x_train"][:, :, -4:].any()
        assert found["x_train"].max() == 255
        test_rows = {image.tobytes() for image in found["x_test"]}
        assert len(test_rows & {image.tobytes() for image in found["x_train"]}) <= 1


def test_the_foreign_images_have_no_labels_and_are_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlabelled, "NUM_FOREIGN", 7)
    images = np.arange(20 * 4, dtype=np.uint8).reshape(20, 2, 2)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=np.zeros(20))

    for name in ("a", "b"):
        unlabelled.write_foreign(tmp_path / "all.npz", tmp_path / f"{name}.npz")

    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert first.files == ["x_train"]
        assert np.array_equal(first["x_train"], second["x_train"])
        assert len(first["x_train"]) == 7


def asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """The recipes of all ablations of the whole measurement, as they would be run."""
    calls: list[Recipe] = []

    def ablate(arguments: Any, name: str, label: str, arms: Any, options: list[str], num_seeds: int) -> dict[str, Any]:
        calls.append(load_recipe(ROOT / "recipes" / "unlabelled" / f"{name}.yaml", options))
        assert set(arms) <= {"alone", "kd"}
        seeds = [{"seed": 1, "last": {"test_top1": 0.5}, "images_seen": 9}]
        labels = {"num_labelled": 5, "num_unlabelled": 4}
        return {
            "arms": [{"name": arm, "seeds": seeds} for arm in arms],
            "teacher": {"scores": {"test_top1": 0.9}, "model": "m", "parameters": 1},
            "student": {"model": "m", "parameters": 1},
            "data": {"labels": labels, "num_test": 3},
            "recipe": {"distill": {"train": {"batch_size": 1}}},
            "versions": {"torch": "2"},
            "machine": {"cpu": "a", "cores": 2},
        }

    monkeypatch.setattr(unlabelled, "_ablate", ablate)
    monkeypatch.setattr(unlabelled, "write_foreign", lambda source, path: None)
    given = [
        "teacher.checkpoint=t.safetensors",
        "teacher.normalization={mean: [1.5], std: [2.5]}",
    ]
    monkeypatch.setattr(unlabelled, "_teacher", lambda arguments, name, options: given)
    unlabelled.main(shlex.split(f"--out {tmp_path / 'out.json'} --work {tmp_path} --cifar10 npz:c.npz"))
    return calls


def test_all_arms_of_a_part_take_the_same_number_of_steps_on_as_many_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = asked_for(monkeypatch, tmp_path)

    lengths: dict[str, set[tuple[int, int, float]]] = {}
    for recipe in recipes:
        train, data = recipe.distill.train, recipe.data
        assert train is not None
        own = 1400 if recipe.name == "unlabelled_digits" else 50_000
        num_train = round(own * data.train_share) + (45_000 if data.unlabelled else 0)
        assert num_train % train.batch_size == 0
        steps = train.epochs * num_train // train.batch_size
        lengths.setdefault(recipe.name, set()).add((steps, train.batch_size, train.warmup_epochs * num_train))
        assert round(own * data.train_share * data.labelled_share) == (50 if own == 1400 else 5000)
        assert recipe.teacher.normalization is not None
    assert lengths == {"unlabelled_digits": {(336, 50, 1400.0)}, "unlabelled_cifar10": {(1000, 50, 5000.0)}}
    assert {recipe.seed for recipe in recipes if recipe.name == "unlabelled_digits"} == {10, 20, 30, 40, 50}
    assert "KD, CIFAR-100 without labels" in capsys.readouterr().out


def test_the_recipes_are_valid_and_named_after_their_files() -> None:
    for path in sorted((ROOT / "recipes" / "unlabelled").glob("*.yaml")):
        assert load_recipe(path).name == f"unlabelled_{path.stem}"
