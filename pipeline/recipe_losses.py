"""The recipe's losses: what each is called, whose it is, and its numbers. Logits are divided by a temperature, weights are factors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.recipe_training import Section


def _above_zero(value: Any) -> Any:
    if isinstance(value, int | float) and value <= 0:
        raise ValueError("logits are divided by the temperature: it is above 0. 1 leaves them as they are, 4 is usual")
    return value


def not_below_zero(value: Any) -> Any:
    """For pydantic: a weight below 0 in words that say why. Raises ValueError."""
    if isinstance(value, int | float) and value < 0:
        raise ValueError("a weight below 0 teaches the opposite. 0 leaves the loss out")
    return value


Temperature = Annotated[float, BeforeValidator(_above_zero), Field(gt=0.0)]
Weight = Annotated[float, BeforeValidator(not_below_zero), Field(ge=0.0)]


class _Loss(Section):
    weight: Weight = 1.0
    warmup_epochs: float = Field(0.0, ge=0.0, description="epochs in which the weight grows from 0 in a line")


class CrossEntropyConfig(_Loss):
    """Cross-entropy on the labels. A list of losses without it has it at weight 1."""

    name: Literal["cross_entropy"] = "cross_entropy"


class _LogitLoss(_Loss):
    temperature: Temperature | None = Field(None, description="its own; null: distill.temperature and its curriculum")
    standardize: bool = Field(False, description="z-score both logits first (Sun et al., 2024); published with T = 2")


class KdConfig(_LogitLoss):
    """Hinton et al., 2015. With standardize published at weight 9, beside cross-entropy at 0.1."""

    name: Literal["kd"] = "kd"


class DkdConfig(_LogitLoss):
    """Zhao et al., 2022: target class and other classes apart. Published with T = 4 and 20 warm-up epochs of 240."""

    name: Literal["dkd"] = "dkd"
    alpha: Weight = Field(1.0, description="of the target class against all others")
    beta: Weight = Field(8.0, description="of the other classes among themselves")


class DistConfig(_LogitLoss):
    """Huang et al., 2022: correlation in place of KL. Published at weight 2 with T = 4."""

    name: Literal["dist"] = "dist"
    beta: Weight = Field(1.0, description="of the classes of a sample")
    gamma: Weight = Field(1.0, description="of the samples of a class")


class FeaturesConfig(_Loss):
    """Romero et al., 2015: a layer of the student is led to a layer of the teacher, through a projector where shapes differ."""

    name: Literal["features"] = "features"
    student_layer: str = Field(description="as torch's named_modules calls it; its last output in a forward pass")
    teacher_layer: str


LOSSES: dict[str, type[_Loss]] = {
    "cross_entropy": CrossEntropyConfig,
    "kd": KdConfig,
    "dkd": DkdConfig,
    "dist": DistConfig,
    "features": FeaturesConfig,
}


def _known_loss(value: Any) -> Any:
    """Refuse a loss or a key that does not exist with the nearest that does: a union's own message is a list of tags."""
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"there is no loss '{name}'{_nearest(name, LOSSES)} Losses: {', '.join(LOSSES)}")
    keys = LOSSES[name].model_fields
    for key in value:
        if key not in keys:
            raise ValueError(f"loss {name} has no key '{key}'{_nearest(key, keys)} Its keys: {', '.join(keys)}")
    return value


def _nearest(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "."


SoftLoss = KdConfig | DkdConfig | DistConfig
LossConfig = Annotated[
    Annotated[CrossEntropyConfig | SoftLoss | FeaturesConfig, Field(discriminator="name")], BeforeValidator(_known_loss)
]
