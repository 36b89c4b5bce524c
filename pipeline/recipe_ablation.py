"""The recipe's part on its ablation: how many seeds, over what plain KD is tuned, more arms than the recipe has by itself, and
which test sets stand beside its own. What is left out gets a default, so that any recipe can be ablated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.recipe_distill import AboveZero, DistillConfig
from pipeline.recipe_file import explain
from pipeline.recipe_losses import Temperature
from pipeline.recipe_training import Arguments, Count, Section

Corruption = Literal["gaussian_noise", "gaussian_blur", "brightness", "contrast", "translate"]
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]


def _two_or_more(value: int) -> int:
    if value < 2:
        raise ValueError("fewer than two seeds have no spread to judge by. Give five or more")
    return value


Seeds = Annotated[Count, AfterValidator(_two_or_more)]


class ShiftConfig(Section):
    """One test set that the training data are not drawn like: the recipe's own, corrupted, or another source."""

    corruption: Corruption | None = None
    severity: Annotated[Count, Field(le=5)] = Field(
        3, description="1 to 5, as pipeline/learning/corruptions.py has them"
    )
    source: str | None = Field(
        None, description="as data.source; its test part is taken, or its training part where it has none"
    )

    @property
    def name(self) -> str:
        """What tables and documents call it."""
        return self.source or f"{self.corruption} {self.severity}"

    @model_validator(mode="after")
    def _is_one(self) -> ShiftConfig:
        if (self.corruption is None) == (self.source is None):
            raise ValueError("give one of corruption and source")
        return self


USUAL_SHIFT = tuple(
    ShiftConfig(corruption=name) for name in ("gaussian_noise", "gaussian_blur", "brightness", "contrast")
)


class AblationConfig(Section):
    """`edgestill ablate`: the recipe against its controls, at equal budget, over seeds."""

    seeds: Seeds = Field(5, description="judged seeds: the recipe's seed + 1, + 2 ...; the recipe's own seed tunes")
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = Field(
        (2.0, 4.0, 8.0), description="plain KD, the baseline, is tuned on validation over these ..."
    )
    kd_weights: Annotated[tuple[AboveZero, ...], Field(min_length=1)] = Field(
        (0.5, 0.9), description="... with each of these; one of both: nothing is tuned"
    )
    arms: dict[ArmName, Arguments] = Field(
        default_factory=dict, description="more arms: name -> what it changes in the section distill"
    )
    shift: tuple[ShiftConfig, ...] = USUAL_SHIFT

    @model_validator(mode="after")
    def _is_whole(self) -> AblationConfig:
        names = [one.name for one in self.shift]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"shift: {twice} stands there twice. Drop one")
        return self


def checked_arms(arms: Mapping[str, Mapping[str, Any]], distill: DistillConfig) -> dict[str, DistillConfig]:
    """Where each arm stands in the recipe -> the section distill that it is. Raises ValueError for an arm that is none, or that has
    more to learn with than the recipe."""
    if arms and distill.train is None:
        raise ValueError("ablation.arms: distill.train is null, so that no arm has anything to learn. Drop them")
    found = {}
    for name, changes in arms.items():
        where = f"ablation.arms.{name}"
        found[where] = overridden(distill, changes, where)
        unequal = [key for key, value in budget_of(distill).items() if budget_of(found[where])[key] != value]
        if unequal:
            raise ValueError(
                f"{where} changes {', '.join(unequal)}: arms are compared at equal budget. Give that in distill"
            )
    return found


def overridden(base: DistillConfig, changes: Mapping[str, Any], where: str) -> DistillConfig:
    """`base` with `changes`, section in section; null drops one. `losses` and `kd_weight` take each other's place, and
    a `loss` of one's own that of `kd_weight` and `temperature`.

    Raises ValueError in the words of a recipe's fault; `where` names the arm.
    """
    raw = {key: value for key, value in base.model_dump().items() if key in base.model_fields_set}
    if changes.get("losses") is not None:
        raw.pop("kd_weight", None)
    elif "kd_weight" in changes:
        raw.pop("losses", None)
    if changes.get("loss") is not None:
        raw = {key: value for key, value in raw.items() if key not in ("temperature", "kd_weight")}
    try:
        return DistillConfig.model_validate(_merged(raw, changes))
    except ValidationError as error:
        raise ValueError(explain(error, where, DistillConfig, see="`edgestill recipe schema`").rstrip(".")) from None


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return merged


def budget_of(config: DistillConfig) -> dict[str, Any]:
    """What every arm of an ablation has the same: the student, where it begins, and how long and in what steps it learns."""
    train = config.train
    return {
        **{key: getattr(config, key) for key in ("model", "args", "pretrained", "checkpoint")},
        "epochs": train.epochs * config.rounds if train else 0,
        "batch_size": train.batch_size if train else None,
        "schedule": train.schedule if train else None,
    }
