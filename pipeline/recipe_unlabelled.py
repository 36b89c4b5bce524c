"""What a recipe cannot ask for where train samples have no label. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.recipe_distill import DistillConfig
from pipeline.recipe_losses import DkdConfig

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

OF_LABELS = ("teacher_loss", "teacher_doubt", "margin", "self_paced", "el2n", "forgetting", "aum")  # difficulty
TRAINS = ("ladder", "qat")


def check_labels(recipe: Recipe, distillations: Mapping[str, DistillConfig]) -> None:
    """Raise ValueError, in the words of a recipe's fault, where a recipe with unlabelled samples needs their labels, or where nothing
    would learn from them. `distillations`: the section distill and the ablation's arms, by where they stand."""
    if recipe.data.labelled_share == 0:
        _check_no_label_at_all(recipe)
    if recipe.data.unlabelled and _asks_no_teacher(recipe.distill):  # an arm may: it is a control
        raise ValueError(
            "data.unlabelled: no loss of distill asks the teacher, so nothing learns from these images: drop them, or set "
            "distill.kd_weight above 0"
        )
    for where, distill in distillations.items():
        if _asks_no_teacher(distill) and (recipe.data.labelled_share == 0 or distill.teacher_wrong == "drop"):
            instead = (
                f"drop {where}.teacher_wrong"
                if recipe.data.labelled_share == 1
                else "take fewer images by data.train_share"
            )
            raise ValueError(
                f"data.labelled_share={recipe.data.labelled_share:g}: no loss of {where} asks the teacher, so nothing learns from "
                f"images without a label: set {where}.kd_weight above 0, or {instead}"
            )
        if fault := fault_without_labels(distill):
            raise ValueError(f"{where}.{fault}")


def _asks_no_teacher(distill: DistillConfig) -> bool:
    return distill.train is not None and distill.loss is None and not distill.learns_from_teacher


def fault_without_labels(config: DistillConfig) -> str | None:
    """The first key of a distillation that needs every sample's label, why, and what does without; None where none does.

    A student that no teacher helps is shown the labelled samples alone, and may ask for anything.
    """
    if config.loss is None and not config.learns_from_teacher:
        return None
    if any(isinstance(one, DkdConfig) and one.weight > 0 for one in config.losses or ()):
        return "losses: dkd takes the label's class apart, and train samples have no label. Give kd or dist"
    if config.curriculum is not None and config.curriculum.difficulty in OF_LABELS:
        return (
            f"curriculum.difficulty: {config.curriculum.difficulty} is told by the label, and train samples have none. Give "
            "teacher_entropy, kl or disagreement"
        )
    weights = config.weight_curriculum
    if weights is not None and weights.per_sample in ("correctness", "superloss"):
        return (
            f"weight_curriculum.per_sample: {weights.per_sample} is told by the label, and train samples have none. Give "
            "confidence or none"
        )
    return None


def _check_no_label_at_all(recipe: Recipe) -> None:
    if recipe.teacher.train is not None:
        raise ValueError(
            "data.labelled_share=0 leaves the teacher nothing to learn from: give teacher.checkpoint and set teacher.train to null"
        )
    if recipe.data.validation == 0:
        raise ValueError(
            "data.labelled_share=0 and data.validation=0 leave no label to check the teacher by: keep a validation"
        )
    if recipe.quantize.method in TRAINS and recipe.quantize.kd_weight == 0:
        raise ValueError(
            "data.labelled_share=0 and quantize.kd_weight=0 leave QAT nothing to learn from: set quantize.kd_weight above 0"
        )
