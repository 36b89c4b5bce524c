"""The verdict on trainings whose answer is known: a help and a harm that were planted, and an arm against itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from pipeline.ablation.figures import by_seed
from pipeline.ablation.verdict import HELPS, HURTS, verdicts
from targets.base import read_json

SPREAD = Path(__file__).resolve().parents[1] / "fixtures" / "seed_spread.json"
NUM_DRAWS = 500
SHUFFLED = """
import torch


def shuffled():
    # What the teacher says, of another image each: a permutation that is the same in every step of that size.
    def loss(student_NK, teacher_NK, labels_N):
        order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
        log_p_NK, log_q_NK = (teacher_NK[order_N] / 4).log_softmax(1), (student_NK / 4).log_softmax(1)
        return 16 * torch.nn.functional.kl_div(log_q_NK, log_p_NK, reduction="batchmean", log_target=True)

    return loss
"""
NARROW: dict[str, Any] = {"model": "resnet8", "args": {"widths": [16, 16, 32, 32]}}
TRAINING = {"epochs": 20, "batch_size": 16, "lr": 0.05, "precision": "fp32"}
TEACHER: dict[str, Any] = {
    "name": "teacher",
    "data": {"source": "digits", "test": 0.5, "calibration": 64, "augment": {"crop": 0}},
    "teacher": {
        "model": "resnet8",
        "args": {"widths": [16, 16, 32, 64]},
        "train": {**TRAINING, "lr": 0.1, "batch_size": 32},
    },
    "distill": NARROW,
    "targets": [{"name": "onnxruntime-cpu"}],
}


@pytest.mark.system  # half a minute of training
def test_a_help_and_a_harm_that_were_planted_are_found(
    edgestill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher has learned from all the data, the student has a fifth of them; then what is said of each image is of another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    Path("planted.py").write_text(SHUFFLED)
    Path("teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    assert edgestill("run", "teacher.yaml", "--until", "teacher").code == 0
    (weights,) = Path("runs/teacher").glob("teacher-*/model.safetensors")
    recipe = {
        **TEACHER,
        "name": "planted",
        "data": {**TEACHER["data"], "train_share": 0.2},
        "teacher": {**TEACHER["teacher"], "checkpoint": str(weights), "train": None},
        "distill": {**NARROW, "train": TRAINING},
        "ablation": {
            "seeds": 7,
            "temperatures": [4.0],
            "kd_weights": [0.9],
            "shift": [],
            "arms": {"shuffled": {"loss": "python:planted:shuffled"}},
        },
    }
    Path("planted.yaml").write_text(yaml.safe_dump(recipe))

    ended = edgestill("ablate", "planted.yaml", "--arms", "alone,kd,shuffled", "--allow-code", "--json")

    assert ended.code == 0, ended.err
    found = {one["arm"]: one for one in json.loads(ended.out)["comparisons"]}
    assert (found["kd"]["against"], found["kd"]["verdict"]["verdict"]) == ("alone", HELPS)
    assert (found["shuffled"]["against"], found["shuffled"]["verdict"]["verdict"]) == ("kd", HURTS)


@pytest.mark.parametrize(("arm", "num_seeds"), [("alone", 5), ("kd", 3)])
def test_an_arm_is_no_other_under_other_seeds(arm: str, num_seeds: int) -> None:
    """Two halves that share no seed, drawn again and again from real trainings (tests/fixtures/seed_spread.yaml says how)."""
    top1 = np.array(
        list(by_seed({one["name"]: one for one in read_json(SPREAD)["arms"]}[arm], "last", "test_top1").values())
    )
    rng = np.random.default_rng(0)

    wrong = 0
    for _ in range(NUM_DRAWS):
        one, other = rng.permutation(top1)[: 2 * num_seeds].reshape(2, num_seeds)
        (judged,) = verdicts({arm: (one - other).tolist()})
        wrong += judged.verdict in (HELPS, HURTS)

    assert len(top1) == 40
    assert stats.binomtest(wrong, NUM_DRAWS, 0.05, alternative="greater").pvalue > 1e-3
