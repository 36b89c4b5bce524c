"""What images without labels add to a distillation, on two pairs of real sets, at equal numbers of steps.

    python -m benchmarks.evidence.unlabelled --mnist ROOT --cifar10 npz:FILE --cifar100 npz:FILE --out docs/results/unlabelled.json

digits: a teacher that learned MNIST; scikit-learn's digits as the new domain, 5 labels a class, the other 1,350 train images without.
It teaches as it is, and after it was tuned on the 50 labelled images.
cifar10: a teacher of a tenth of CIFAR-10; the student has that tenth, and beside it the rest of CIFAR-10 or 45,000 images of CIFAR-100
without labels. The recipes are recipes/unlabelled/*.yaml, trained and scored by `edgestill ablate` in processes of its own; what is
finished in --runs is not made again. --parts takes one of both, --draws and --seeds fewer of each; `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.script import newest_stage, parse_out_or_show
from benchmarks.evidence.unlabelled_table import ALONE, LABELLED, text
from targets.base import read_json, write_json

RECIPES = Path("recipes/unlabelled")
PARTS = ("digits", "cifar10")
DIGITS_A_CLASS, LABELS_A_CLASS = 140, 5
NUM_FOREIGN = 45_000  # as many as CIFAR-10 has without a label
BORDER = 4  # MNIST's: its digits are 20 x 20 pixels within 28 x 28


@dataclass(frozen=True)
class Arm:
    """Rows of one ablation: which of its arms under which name, what it changes in the recipe, and who teaches."""

    rows: Mapping[str, str]
    changes: Sequence[str]
    teacher: str


def main(argv: Sequence[str]) -> None:
    """Train what is missing, write one JSON file, print the tables."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    make = {"digits": _digits, "cifar10": _cifar10}
    found = {name: make[name](arguments) for name in arguments.parts}
    document = {"schema_version": 1, "utc": datetime.now(UTC).isoformat(timespec="seconds"), "parts": found}
    write_json(arguments.out, document)
    print(text(document))


def _digits(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row is a mean over draws of the labels; of each draw over students."""
    source = arguments.work / "digits.npz"
    write_digits(source)
    teacher = _teacher(arguments, "mnist", [f"data.root={arguments.mnist}"])
    as_it_is = "the MNIST teacher as it is"
    tuned = "the MNIST teacher, tuned on the labelled images"
    share = LABELS_A_CLASS / DIGITS_A_CLASS
    few, all_epochs = round(1 / share), 12
    labelled = [
        f"data.train_share={share}",
        f"distill.train.epochs={few * all_epochs}",
        f"distill.train.warmup_epochs={few}",
    ]
    arms = [
        Arm({"alone": ALONE, "kd": LABELLED}, labelled, tuned),
        Arm({"kd": "KD, the rest without labels"}, [f"data.labelled_share={share}"], tuned),
        Arm({"kd": "KD from the teacher as it is"}, [f"data.labelled_share={share}", "teacher.train=null"], as_it_is),
    ]
    given = [f"data.source=npz:{source}", *teacher]
    seeds = [10 * draw for draw in range(1, arguments.draws + 1)]
    return _part(arguments, "digits", arms, given, seeds, num_seeds=2)


def _cifar10(arguments: argparse.Namespace) -> dict[str, Any]:
    """One draw of the labels and one teacher; a row is a mean over students."""
    foreign = arguments.work / "cifar100.npz"
    write_foreign(Path(arguments.cifar100.partition(":")[2]), foreign)
    source = f"data.source={arguments.cifar10}"
    given = [source, *_teacher(arguments, "cifar10", [source]), "teacher.train=null"]
    teacher = "the teacher, of the labelled images"
    epochs = arguments.epochs
    of_few, of_all = (
        [f"distill.train.epochs={times * epochs}", f"distill.train.warmup_epochs={times * epochs / 10}"]
        for times in (10, 1)
    )
    rest = ["data.train_share=1", "data.labelled_share=0.1"]
    arms = [
        Arm({"alone": ALONE, "kd": LABELLED}, of_few, teacher),
        Arm({"kd": "KD, the rest without labels"}, [*rest, *of_all], teacher),
        Arm({"kd": "KD, CIFAR-100 without labels"}, [f"data.unlabelled=['npz:{foreign}']", *of_all], teacher),
    ]
    return _part(arguments, "cifar10", arms, given, [0], num_seeds=arguments.seeds)


def _part(
    arguments: argparse.Namespace,
    name: str,
    arms: Sequence[Arm],
    given: Sequence[str],
    draws: Sequence[int],
    *,
    num_seeds: int,
) -> dict[str, Any]:
    """draws: the recipe's seeds, each of which draws other labels; num_seeds: students of each."""
    rows: dict[str, dict[str, Any]] = {}
    for draw in draws:
        for number, arm in enumerate(arms):
            print(f"{name}, draw {draw}, {', '.join(arm.rows.values())}", file=sys.stderr, flush=True)
            options = [f"seed={draw}", *given, *arm.changes]
            document = _ablate(arguments, name, f"{name}-{draw}-{number}", list(arm.rows), options, num_seeds)
            for told, row in arm.rows.items():
                students = rows.setdefault(row, {**_labels(told, document), "teacher": arm.teacher, "students": []})[
                    "students"
                ]
                students += _students(told, draw, document)
    return {**_context(document), "rows": [{"row": row, **figures} for row, figures in rows.items()]}


def _labels(arm: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """How many images the arm has: without a teacher it is shown those with a label alone."""
    labels = document["data"]["labels"]
    return {"num_labelled": labels["num_labelled"], "num_unlabelled": 0 if arm == "alone" else labels["num_unlabelled"]}


def _students(arm: str, draw: int, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    (found,) = [one for one in document["arms"] if one["name"] == arm]
    teacher_top1 = document["teacher"]["scores"]["test_top1"]
    return [
        {
            "draw": draw,
            "seed": one["seed"],
            "test_top1": one["last"]["test_top1"],
            "images_shown": one["images_seen"],
            "teacher_test_top1": teacher_top1,
        }
        for one in found["seeds"]
    ]


def _context(document: Mapping[str, Any]) -> dict[str, Any]:
    """What all arms of a part share."""
    return {
        **{key: document[key] for key in ("versions", "machine", "teacher", "student")},
        "num_test": document["data"]["num_test"],
        "batch_size": document["recipe"]["distill"]["train"]["batch_size"],
    }


def _ablate(
    arguments: argparse.Namespace, name: str, label: str, arms: Sequence[str], options: Sequence[str], num_seeds: int
) -> dict[str, Any]:
    """What `edgestill ablate` exports."""
    export = arguments.work / f"{label}.json"
    argv = [sys.executable, "-m", "pipeline", "ablate", str(RECIPES / f"{name}.yaml"), "--runs", str(arguments.runs)]
    argv += ["--arms", ",".join(arms), "--seeds", str(num_seeds), "--processes", str(arguments.processes)]
    argv += ["--export", str(export), *(f"--set={option}" for option in options)]
    subprocess.run(argv, check=True, stdout=sys.stderr)
    document: dict[str, Any] = read_json(export)
    return document


def _teacher(arguments: argparse.Namespace, name: str, options: Sequence[str]) -> list[str]:
    """Train the teacher of a recipe; how another recipe begins with it, and with the normalization that it learned with."""
    run = f"unlabelled_{name}_teacher"  # apart from the arms, which have data and a teacher of their own
    argv = [sys.executable, "-m", "pipeline", "run", str(RECIPES / f"{name}.yaml"), "--runs", str(arguments.runs)]
    subprocess.run(
        [*argv, "--until", "teacher", f"--set=name={run}", *(f"--set={option}" for option in options)],
        check=True,
        stdout=sys.stderr,
    )
    run_dir = arguments.runs / run
    weights = arguments.work / f"{name}.safetensors"
    shutil.copyfile(newest_stage(run_dir, "teacher") / "model.safetensors", weights)
    data = read_json(newest_stage(run_dir, "data") / "data.json")
    mean, std = ([255 * value for value in data[key]] for key in ("mean", "std"))
    return [f"teacher.checkpoint={weights}", f"teacher.normalization={{mean: {mean}, std: {std}}}"]


def write_digits(path: Path) -> None:
    """scikit-learn's digits as MNIST has its own: 8 x 8 pixels brought to 20 x 20, in the middle of 28 x 28. The first so many of
    each class are for training, the others for the test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    small_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = 28 - 2 * BORDER
    resized = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BILINEAR)) for one in small_NHW]
    images_NHW = np.pad(np.stack(resized), ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
    labels_N = digits.target.astype(np.int64)
    place_N = np.array([(labels_N[:index] == label).sum() for index, label in enumerate(labels_N)])  # within its class
    train = place_N < DIGITS_A_CLASS
    _save(path, x_train=images_NHW[train], y_train=labels_N[train], x_test=images_NHW[~train], y_test=labels_N[~train])


def write_foreign(source: Path, path: Path) -> None:
    """NUM_FOREIGN of the train images, chosen by a seed, and no labels."""
    with np.load(source, allow_pickle=False) as archive:
        images = archive["x_train"]
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:NUM_FOREIGN])
    _save(path, x_train=images[chosen])


def _save(path: Path, **arrays: Any) -> None:
    """Written once: a file that is there is the same, and keeps its time."""
    if not path.is_file():
        np.savez(path, **arrays)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", type=Path, default=Path("data"), help="where torchvision finds MNIST")
    parser.add_argument("--cifar10", default="torchvision:CIFAR10", help="npz:FILE or torchvision:CIFAR10")
    parser.add_argument("--cifar100", default="npz:data/cifar100.npz", help="npz:FILE with x_train")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--draws", type=int, default=5, help="digits: other labelled images, each with 2 students")
    parser.add_argument("--seeds", type=int, default=5, help="cifar10: students a row")
    parser.add_argument(
        "--epochs", type=int, default=1, help="cifar10: over all images; ten times as many over the labelled"
    )
    parser.add_argument("--processes", type=int, default=2, help="trainings at once")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--work", type=Path, default=Path("build/unlabelled"), help="data and weights made on the way")
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
