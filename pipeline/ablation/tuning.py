"""What an ablation trains before its arms: plain KD over the grid, and adaptive pacing once, under the recipe's own seed.

That seed is not among the judged ones, and only validation is asked: nothing that is judged has chosen anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from pipeline.ablation.arms import KD, RECIPE, Tuned, arms_of, whole_log
from pipeline.ablation.steps import Outcome, Training
from pipeline.recipe import DistillConfig, Recipe


@dataclass(frozen=True)
class Tuning:
    """How plain KD came to its temperature and weight. `grid` holds validation top-1 after the last epoch, None where a pair
    failed; it is empty where the recipe gives one pair."""

    tuned: Tuned
    seed: int
    grid: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {"tuned": asdict(self.tuned), "seed": self.seed, "grid": [dict(one) for one in self.grid]}


def judged_seeds(recipe: Recipe) -> list[int]:
    """Those after the recipe's own."""
    return [recipe.seed + number for number in range(1, recipe.ablation.seeds + 1)]


def trainings_of(recipe: Recipe, arms: Mapping[str, DistillConfig]) -> list[Training]:
    """Seed after seed, so that an ablation that is stopped has whole seeds."""
    return [
        Training(arm=name, seed=seed, config=config) for seed in judged_seeds(recipe) for name, config in arms.items()
    ]


def grid_of(recipe: Recipe) -> list[Tuned]:
    """The pairs that plain KD is tuned over."""
    pairs = product(dict.fromkeys(recipe.ablation.temperatures), dict.fromkeys(recipe.ablation.kd_weights))
    return [Tuned(temperature=temperature, kd_weight=weight) for temperature, weight in pairs]


def tuning_trainings(recipe: Recipe) -> dict[Tuned, Training]:
    """One a pair; none where there is nothing to choose between."""
    pairs = grid_of(recipe)
    return {pair: _tuning_training(recipe, pair) for pair in pairs} if len(pairs) > 1 else {}


def _tuning_training(recipe: Recipe, pair: Tuned) -> Training:
    config = arms_of(recipe, pair, whole_log(recipe))[KD]
    name = f"kd-t{pair.temperature:g}-w{pair.kd_weight:g}"
    return Training(arm=name, seed=recipe.seed, config=config, scored=False)


def tuned_by(trainings: Mapping[Tuned, Training], found: Mapping[str, Outcome], recipe: Recipe) -> Tuning | None:
    """The pair with the best validation top-1 after the last epoch, the first of equals; None where none of them is finished."""
    if not trainings:
        return Tuning(grid_of(recipe)[0], recipe.seed, ())
    top1 = {
        pair: found[training.name].last_round["validation_top1_last"]
        for pair, training in trainings.items()
        if training.name in found
    }
    if not top1:
        return None
    grid = [{**asdict(pair), "validation_top1": top1.get(pair)} for pair in trainings]
    return Tuning(max(top1, key=top1.__getitem__), recipe.seed, tuple(grid))


def pacing_training(recipe: Recipe) -> Training:
    """The recipe itself, for the schedule that its adaptive pacing takes.

    A judged seed that replays its own schedule is the same training again, bit for bit: nothing but the share that is shown
    depends on validation. To be blind, the schedule has to come from another training.
    """
    return Training(arm=RECIPE, seed=recipe.seed, config=recipe.distill, scored=False)


def pacing_log_of(found: Mapping[str, Outcome]) -> tuple[float, ...]:
    """Empty where that training is not finished."""
    logs = [
        outcome.last_round.get("pacing_log", ()) for name, outcome in found.items() if name.startswith(f"{RECIPE}, ")
    ]
    return tuple(logs[0]) if logs else ()
