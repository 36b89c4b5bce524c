"""The arms of an ablation: what the recipe is held against, each a section `distill` of the same budget.

alone       no teacher and no axis: what the student reaches by itself, on the samples that have a label; absent where none has
kd          plain KD, its temperature and weight tuned on validation: the baseline that every other arm must beat
recipe      the recipe as it is written
random-order, anti-curriculum    the samples axis with the same pacing, in no order and in the opposite one
blind-replay    adaptive pacing without its eyes: the schedule that it took under the tuning seed, whatever validation says
samples-off, temperature-off, teacher-off, weights-off, teacher-wrong-off    the recipe without one of its axes
one-round   all rounds as one, of as many epochs
and the arms that the recipe's section `ablation` adds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.recipe import CurriculumConfig, DistillConfig, Recipe, TrainConfig
from pipeline.recipe_ablation import overridden
from targets.errors import RecipeError

S = TypeVar("S", bound=BaseModel)
ALONE, KD, RECIPE, BLIND_REPLAY = "alone", "kd", "recipe", "blind-replay"
OPPOSITE = {"easy_first": "hard_first", "hard_first": "easy_first", "random": "hard_first"}
# Axis -> the keys of `distill` that are it; set to their defaults, it is off.
AXES: dict[str, tuple[str, ...]] = {
    "samples": ("curriculum",),
    "temperature": ("temperature_curriculum",),
    "teacher": ("teacher_curriculum", "assistants"),
    "weights": ("weight_curriculum",),
    "teacher-wrong": ("teacher_wrong",),
}
CACHE = ("teacher_forward", "cache")
OWN_LOSSES = ("loss", "losses", "temperature", "kd_weight")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Plain KD's temperature and weight."""

    temperature: float
    kd_weight: float


# Which arms there are does not depend on the pair.
NOT_TUNED = Tuned(temperature=4.0, kd_weight=0.5)


def arms_of(recipe: Recipe, tuned: Tuned, pacing_log: Sequence[float]) -> dict[str, DistillConfig]:
    """Every arm by its name, the baselines first. `pacing_log`: one fraction an epoch, for blind-replay.

    Raises RecipeError where there is nothing to ablate, or an arm of the recipe's own takes a name of these.
    """
    config = recipe.distill
    if config.train is None:
        raise RecipeError("distill.train is null: the student is taken as it is, and no arm has anything to learn.")
    alone = {ALONE: plain(_without(config, CACHE), kd_weight=0.0)}
    arms = {
        **(alone if recipe.data.labelled_share > 0 else {}),
        KD: plain(config, temperature=tuned.temperature, kd_weight=tuned.kd_weight),
        RECIPE: config,
        **_samples_controls(config, pacing_log),
        **{f"{axis}-off": _without(config, keys) for axis, keys in AXES.items() if _is_on(config, keys)},
    }
    if config.rounds > 1:
        arms["one-round"] = in_one_round(config)
    for name, changes in recipe.ablation.arms.items():
        if name in arms:
            raise RecipeError(f"ablation.arms.{name}: the ablation has an arm of that name already. Give it another.")
        arms[name] = overridden(config, changes, f"ablation.arms.{name}")
    return arms


def arm_names(recipe: Recipe) -> list[str]:
    """Which arms the recipe has, before anything is trained or tuned."""
    return list(arms_of(recipe, NOT_TUNED, whole_log(recipe)))


def whole_log(recipe: Recipe) -> list[float]:
    """A pacing log that shows all the data, where none is known yet."""
    return [1.0] * (recipe.distill.train.epochs if recipe.distill.train else 1)


def chosen_arms(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    """The arms of those names, in the ablation's own order, and always the baseline; all for none. Raises RecipeError."""
    known = arm_names(recipe)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            meant = f" Did you mean '{near[0]}'?" if near else ""
            raise RecipeError(
                f"--arms {name}: the ablation of this recipe has no such arm.{meant}\nIts arms: {', '.join(known)}."
            )
    return [name for name in known if not wanted or name in (KD, *wanted)]


def same_trainings(arms: Mapping[str, DistillConfig]) -> dict[str, str]:
    """Arm -> the first arm that is trained as it is: for most, itself."""
    first: dict[str, str] = {}
    return {name: first.setdefault(fingerprint(config), name) for name, config in arms.items()}


def fingerprint(config: DistillConfig) -> str:
    """Equal for sections that say the same."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def plain(config: DistillConfig, **changes: float) -> DistillConfig:
    """The student and its training in one round, without any axis and with no loss but cross-entropy and plain KD."""
    every_axis = [key for keys in AXES.values() for key in keys]
    return _with(_without(in_one_round(config), [*every_axis, *OWN_LOSSES]), changes)


def in_one_round(config: DistillConfig) -> DistillConfig:
    """As many epochs in one round as the recipe has in all; what stands for epochs of a round is stretched with it."""
    rounds, train = config.rounds, config.train
    if rounds == 1 or train is None:
        return config
    changes: dict[str, Any] = {"rounds": 1, "target_top1": None, "train": _stretched(train, rounds)}
    if config.losses is not None:
        changes["losses"] = tuple(
            one.model_copy(update={"warmup_epochs": one.warmup_epochs * rounds}) for one in config.losses
        )
    if config.curriculum is not None:
        changes["curriculum"] = _repeated(config.curriculum, "fractions", rounds)
    if (temperature := config.temperature_curriculum) is not None:
        reversal_epochs = temperature.reversal_epochs * rounds
        longer = temperature.model_copy(update={"reversal_epochs": reversal_epochs})
        changes["temperature_curriculum"] = _repeated(longer, "values", rounds)
    if config.weight_curriculum is not None:
        changes["weight_curriculum"] = _repeated(config.weight_curriculum, "values", rounds)
    return _with(config, changes)


def _repeated(section: S, replayed: str, rounds: int) -> S:
    """Each value that stands for an epoch, so often."""
    values = tuple(value for value in getattr(section, replayed) for _ in range(rounds))
    return section.model_copy(update={replayed: values})


def _stretched(train: TrainConfig, rounds: int) -> TrainConfig:
    milestones = tuple(epoch * rounds for epoch in train.milestones)
    warmup_epochs = train.warmup_epochs * rounds
    return train.model_copy(
        update={"epochs": train.epochs * rounds, "milestones": milestones, "warmup_epochs": warmup_epochs}
    )


def _samples_controls(config: DistillConfig, pacing_log: Sequence[float]) -> dict[str, DistillConfig]:
    curriculum = config.curriculum
    if curriculum is None:
        return {}
    controls = {
        "random-order": _ordered(config, curriculum, "random"),
        "anti-curriculum": _ordered(config, curriculum, OPPOSITE[curriculum.order]),
    }
    if curriculum.pacing == "adaptive" and config.rounds == 1:  # of several rounds each has a log of its own
        replay = curriculum.model_copy(update={"pacing": "replay", "fractions": tuple(pacing_log)})
        controls[BLIND_REPLAY] = _with(config, {"curriculum": replay})
    return controls


def _ordered(config: DistillConfig, curriculum: CurriculumConfig, order: str) -> DistillConfig:
    return _with(config, {"curriculum": curriculum.model_copy(update={"order": order})})


def _is_on(config: DistillConfig, keys: Iterable[str]) -> bool:
    return any(getattr(config, key) != DistillConfig.model_fields[key].default for key in keys)


def _without(config: DistillConfig, keys: Iterable[str]) -> DistillConfig:
    """With these keys as they are where the recipe does not say, and with no cache where nothing is left that asks the teacher."""
    changes = {key: DistillConfig.model_fields[key].default for key in keys}
    if config.asks_teacher and not config.model_copy(update=changes).asks_teacher:
        changes |= {key: DistillConfig.model_fields[key].default for key in CACHE}
    return _with(config, changes)


def _with(config: DistillConfig, changes: Mapping[str, Any]) -> DistillConfig:
    """A copy that is checked as a whole, as if the recipe had said it."""
    raw = {**{key: getattr(config, key) for key in DistillConfig.model_fields}, **changes}
    return DistillConfig.model_validate(raw)
