"""What an ablation found, as one JSON document: the raw figures of every arm under every seed, and what they hold for.

Schema 1. Accuracies are fractions; nothing in it is an average: whoever reads it computes means, intervals and verdicts anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from benchmarks.device.environment import environment
from pipeline.ablation.steps import AblationSteps, Outcome, Training
from pipeline.ablation.tuning import Tuning, judged_seeds
from pipeline.artifacts import TrainedModel
from pipeline.recipe import DistillConfig
from targets.errors import EdgestillError

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy")
DATA_KEYS = ("source", "num_classes", "num_train", "num_validation", "num_test", "condition", "labels")


def document_of(
    do: AblationSteps,
    tuning: Tuning,
    arms: Mapping[str, DistillConfig],
    same_as: Mapping[str, str],
    found: Mapping[str, Outcome],
    failed: Mapping[str, EdgestillError],
) -> dict[str, Any]:
    """same_as: arm -> the arm whose trainings it shares; found: what came of the trainings, by their names."""
    data, teacher, teacher_scores = do.given
    seeds = judged_seeds(do.recipe)
    outcomes = {
        name: {seed: found[told] for seed in seeds if (told := _name(same_as[name], seed, arms[name])) in found}
        for name in arms
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": "ablate",
        "name": do.recipe.name,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "edgestill": metadata.version("edgestill"),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "machine": _machine(),
        "recipe": do.recipe.model_dump(mode="json"),
        "data": {key: data.info[key] for key in DATA_KEYS},
        "seeds": seeds,
        "tuning": tuning.to_json(),
        "teacher": {**_net(teacher), "scores": dict(teacher_scores.info)},
        "student": next((_net(one.student) for by_seed in outcomes.values() for one in by_seed.values()), None),
        "arms": [
            {
                "name": name,
                "same_as": same_as[name] if same_as[name] != name else None,
                "config": config.model_dump(mode="json"),
                "seeds": [{"seed": seed, **_figures(outcome)} for seed, outcome in outcomes[name].items()],
            }
            for name, config in arms.items()
        ],
        "failed": [{"training": name, "error": str(error)} for name, error in failed.items()],
    }


def _name(arm: str, seed: int, config: DistillConfig) -> str:
    return Training(arm=arm, seed=seed, config=config).name


def _figures(outcome: Outcome) -> dict[str, Any]:
    """One seed of one arm. `images_seen` counts what every epoch of every round has shown."""
    assert outcome.scores is not None  # judged arms are scored
    rounds = outcome.student.info["rounds"]
    epochs = [epoch for one in rounds for epoch in one["epochs"]]
    return {
        "last": dict(outcome.scores.info["last"]),
        "best": dict(outcome.scores.info["best"]),
        "best_epoch": outcome.student.info["weights"]["model.safetensors"]["epoch"],
        "validation_top1_last": rounds[-1]["validation_top1_last"],
        "num_rounds": len(rounds),
        "images_seen": sum(epoch["num_images"] for epoch in epochs),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 2),
        "precision": rounds[-1]["precision"],
    }


def _net(model: TrainedModel) -> dict[str, Any]:
    return {key: model.info[key] for key in ("model", "args", "parameters", "macs")}


def _machine() -> dict[str, Any]:
    hard = environment().hard
    return {"cpu": hard.get("cpu"), "cores": len(hard["cpus_allowed"]), "python": hard.get("python")}
