"""Which arms a recipe is held against, that all of them have the same budget, and what the section `ablation` refuses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ablation.arms import AXES, Tuned, arm_names, arms_of, chosen_arms, same_trainings, whole_log
from pipeline.ablation.tuning import Tuning, judged_seeds, tuned_by, tuning_trainings
from pipeline.recipe import Recipe, parse_recipe
from pipeline.recipe_ablation import budget_of
from targets.errors import RecipeError

TUNED = Tuned(temperature=8.0, kd_weight=0.5)
CURRICULUM = {"order": "easy_first", "pacing": "root"}
ON: dict[str, dict[str, Any]] = {
    "samples": {"curriculum": CURRICULUM},
    "temperature": {"temperature_curriculum": {"end": 2.0}},
    "teacher": {"assistants": [{"model": "resnet20"}]},
    "weights": {"weight_curriculum": {"schedule": "linear"}},
    "teacher-wrong": {"teacher_wrong": "drop"},
}


def recipe_of(distill: dict[str, Any], **sections: Any) -> Recipe:
    raw = {
        "name": "r",
        "data": {"source": "digits"},
        "teacher": {"model": "resnet20"},
        "distill": {"model": "resnet8", "train": {"epochs": 6, "batch_size": 64}, **distill},
        "targets": [{"name": "onnxruntime-cpu"}],
        **sections,
    }
    return parse_recipe(raw, "r.yaml")


def arms(recipe: Recipe, tuned: Tuned = TUNED) -> dict[str, Any]:
    return arms_of(recipe, tuned, whole_log(recipe))


def test_a_plain_recipe_has_three_arms() -> None:
    assert arm_names(recipe_of({})) == ["alone", "kd", "recipe"]


@given(axes=st.sets(st.sampled_from(sorted(ON))), rounds=st.integers(1, 3), cached=st.booleans())
@settings(deadline=None, max_examples=40)
def test_every_arm_has_the_recipes_budget_and_each_axis_that_is_on_is_off_in_one(
    axes: set[str], rounds: int, cached: bool
) -> None:
    distill = {key: value for axis in axes for key, value in ON[axis].items()}
    views = {"views": 2, "teacher_forward": "cached"} if cached else {}
    recipe = recipe_of({**distill, **views, "rounds": rounds})

    found = arms(recipe)

    assert {str(budget_of(config)) for config in found.values()} == {str(budget_of(recipe.distill))}
    assert {name.removesuffix("-off") for name in found if name.endswith("-off")} == axes
    for axis in axes:
        off = {key: getattr(found[f"{axis}-off"], key) for key in AXES[axis]}
        assert off == {key: type(recipe.distill).model_fields[key].default for key in AXES[axis]}
        assert {
            key
            for key in type(recipe.distill).model_fields
            if getattr(found[f"{axis}-off"], key) != getattr(recipe.distill, key)
        } <= set(AXES[axis])
    assert ("one-round" in found) == (rounds > 1)


def test_an_arm_of_which_nothing_asks_the_teacher_reads_no_cache() -> None:
    asked = {"kd_weight": 0.0, "teacher_wrong": "drop", "teacher_forward": "cached", "cache": {"dtype": "fp32"}}

    found = arms(recipe_of(asked))

    assert found["recipe"].uses_cache
    assert not found["teacher-wrong-off"].uses_cache


def test_the_baselines_have_no_axis_and_plain_kd_is_as_tuned() -> None:
    everything = {key: value for axis in ON.values() for key, value in axis.items()}
    found = arms(recipe_of({**everything, "losses": [{"name": "dkd"}], "rounds": 2}))

    for name, weight in (("alone", 0.0), ("kd", 0.5)):
        config = found[name]
        assert (config.kd_weight, config.losses, config.rounds, config.train.epochs) == (weight, None, 1, 12)
        assert all(
            getattr(config, key) == type(config).model_fields[key].default for keys in AXES.values() for key in keys
        )
    assert found["kd"].temperature == 8.0


def test_the_samples_axis_has_its_controls_and_nothing_else_of_them_changes() -> None:
    recipe = recipe_of({"curriculum": {**CURRICULUM, "pacing": "adaptive"}})
    log = [0.5, 0.6, 0.6, 0.7, 0.8, 1.0]

    found = arms_of(recipe, TUNED, log)

    assert found["random-order"].curriculum == recipe.distill.curriculum.model_copy(update={"order": "random"})
    assert found["anti-curriculum"].curriculum == recipe.distill.curriculum.model_copy(update={"order": "hard_first"})
    assert (found["blind-replay"].curriculum.pacing, list(found["blind-replay"].curriculum.fractions)) == (
        "replay",
        log,
    )


@pytest.mark.parametrize("curriculum", [CURRICULUM, {**CURRICULUM, "pacing": "replay", "fractions": [1.0] * 6}])
def test_a_pacing_that_looks_at_nothing_needs_no_blind_replay(curriculum: dict[str, Any]) -> None:
    assert "blind-replay" not in arm_names(recipe_of({"curriculum": curriculum}))


def test_in_one_round_milestones_and_replayed_values_are_stretched() -> None:
    training = {"epochs": 3, "schedule": "step", "milestones": [1, 2]}
    distill = {"train": training, "rounds": 2, "curriculum": {"pacing": "replay", "fractions": [0.2, 0.5, 1.0]}}

    config = arms(recipe_of(distill))["one-round"]

    assert (config.rounds, config.train.epochs, config.train.milestones) == (1, 6, (2, 4))
    assert config.curriculum.fractions == (0.2, 0.2, 0.5, 0.5, 1.0, 1.0)


def test_in_one_round_what_is_told_in_epochs_is_stretched_for_the_baselines_too() -> None:
    found = arms(
        recipe_of(
            {
                "train": {"epochs": 3, "warmup_epochs": 0.5},
                "rounds": 2,
                "losses": [{"name": "dkd", "warmup_epochs": 1.5}],
                "temperature_curriculum": {"schedule": "learned", "reversal_epochs": 2},
            }
        )
    )

    assert {found[name].train.warmup_epochs for name in ("alone", "kd", "one-round")} == {1.0}
    assert found["one-round"].losses[0].warmup_epochs == 3.0
    assert found["one-round"].temperature_curriculum.reversal_epochs == 4
    assert (found["recipe"].train.warmup_epochs, found["recipe"].losses[0].warmup_epochs) == (0.5, 1.5)


def test_arms_that_are_the_same_share_their_trainings() -> None:
    recipe = recipe_of({"temperature": 8.0, "kd_weight": 0.5, "curriculum": {**CURRICULUM, "order": "random"}})

    same_as = same_trainings(arms(recipe))

    assert {name: first for name, first in same_as.items() if name != first} == {
        "random-order": "recipe",
        "samples-off": "kd",
    }


# --- arms of the recipe's own ------------------------------------------------------------------------------------------


def test_an_arm_of_ones_own_changes_what_it_names_and_nothing_else() -> None:
    own = {
        "dkd": {"losses": [{"name": "dkd"}], "curriculum": None},
        "late": {"curriculum": {"full_at": 1.0}},
        "soft": {"train": {"label_smoothing": 0.1}},
    }
    recipe = recipe_of({"curriculum": CURRICULUM, "kd_weight": 0.3}, ablation={"arms": own})

    found = arms(recipe)

    assert (found["dkd"].losses[0].name, found["dkd"].curriculum) == ("dkd", None)
    assert found["late"].curriculum == recipe.distill.curriculum.model_copy(update={"full_at": 1.0})
    assert found["soft"].train == recipe.distill.train.model_copy(update={"label_smoothing": 0.1})
    assert found["soft"].kd_weight == 0.3


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"x": {"temprature": 2}}, "ablation.arms.x: unknown key 'temprature'; did you mean 'temperature'?"),
        ({"x": {"temperature": 0}}, "ablation.arms.x: temperature='0': logits are divided by the temperature"),
        ({"x": {"train": {"epochs": 60}}}, "ablation.arms.x changes epochs: arms are compared at equal budget"),
        ({"x": {"rounds": 2}}, "ablation.arms.x changes epochs"),
        ({"x": {"model": "resnet20"}}, "ablation.arms.x changes model"),
        ({"x": {"train": None}}, "ablation.arms.x"),
        ({"X!": {}}, "ablation.arms.X!"),
        (
            {"x": {"teacher_curriculum": {}}},
            "ablation.arms.x.teacher_curriculum needs checkpoints of the teacher's way",
        ),
        (
            {"x": {"rounds": 3, "train": {"epochs": 2}, "curriculum": {"pacing": "adaptive"}}},
            "leaves nothing to choose by: drop ablation.arms.x.rounds, ablation.arms.x.curriculum.pacing",
        ),
        ({"x": {"weight_curriculum": {"schedule": "gap"}}}, "drop ablation.arms.x.weight_curriculum.schedule"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_with_its_name(own: dict[str, Any], words: str) -> None:
    unsplit = {"data": {"source": "digits", "validation": 0}, "quantize": {"method": "ptq"}}

    with pytest.raises(RecipeError) as refused:
        recipe_of({}, ablation={"arms": own}, **unsplit)

    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_an_arm_cannot_take_the_name_of_another() -> None:
    recipe = recipe_of({}, ablation={"arms": {"kd": {"temperature": 2.0}}})

    with pytest.raises(RecipeError, match=r"ablation\.arms\.kd: the ablation has an arm of that name already"):
        arm_names(recipe)


def test_a_student_that_is_taken_as_it_is_has_no_arms() -> None:
    recipe = recipe_of({"train": None, "checkpoint": "student.safetensors"})

    with pytest.raises(RecipeError, match=r"distill\.train is null"):
        arm_names(recipe)


# --- which of them -----------------------------------------------------------------------------------------------------


def test_some_arms_can_be_chosen_and_the_baseline_is_always_there() -> None:
    recipe = recipe_of({"curriculum": CURRICULUM})

    assert chosen_arms(recipe, ["recipe", "random-order"]) == ["kd", "recipe", "random-order"]
    assert chosen_arms(recipe, []) == arm_names(recipe)


def test_an_unknown_arm_is_refused_with_the_nearest_and_all_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"--arms random: .* Did you mean 'random-order'\?") as refused:
        chosen_arms(recipe_of({"curriculum": CURRICULUM}), ["random"])

    assert "alone, kd, recipe, random-order, anti-curriculum, samples-off" in str(refused.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"seeds": 1}, "fewer than two seeds have no spread to judge by"),
        ({"temperatures": []}, "at least 1 item"),
        ({"temperatures": [0]}, "above 0"),
        ({"kd_weights": [0]}, "greater than 0"),
        ({"shift": [{"corruption": "gaussian_nose"}]}, "gaussian_noise"),
        ({"shift": [{"corruption": "contrast", "severity": 6}]}, "less than or equal to 5"),
        ({"shift": [{"severity": 2}]}, "give one of corruption and source"),
        ({"shift": [{"corruption": "contrast"}, {"corruption": "contrast"}]}, "stands there twice"),
    ],
)
def test_values_that_cannot_be_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of({}, ablation=section)

    assert words in str(refused.value)


def test_the_sections_that_the_document_shows_are_valid() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "ablation.md").read_text(encoding="utf-8")
    sections: dict[str, Any] = {}
    for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        sections |= yaml.safe_load(block)

    recipe = recipe_of({"curriculum": CURRICULUM}, **{**sections, "data": {"source": "digits", **sections["data"]}})

    assert sections.keys() == {"ablation", "data"}
    assert arm_names(recipe)[-2:] == ["dkd", "smooth"]
    assert [one.name for one in recipe.ablation.shift] == ["gaussian_noise 3", "npz:drawn_later.npz"]
    named = re.findall(r"`([a-z-]+)`", text[text.index("| arm |") : text.index("All have the same")])
    everything = {key: value for axis in ON.values() for key, value in axis.items()}
    adaptive = {**everything, "curriculum": {**CURRICULUM, "pacing": "adaptive"}}
    known = {name for rounds in (1, 2) for name in arm_names(recipe_of({**adaptive, "rounds": rounds}))}
    assert set(named) == known


# --- what is tuned by --------------------------------------------------------------------------------------------------


def trained(top1: float) -> Any:
    return SimpleNamespace(last_round={"validation_top1_last": top1})


def test_the_best_pair_wins_the_first_of_equals_and_a_pair_that_failed_is_left_out() -> None:
    recipe = recipe_of({}, ablation={"temperatures": [2, 4], "kd_weights": [0.5, 0.9]})
    trainings = tuning_trainings(recipe)
    names = [training.name for training in trainings.values()]
    assert names == ["kd-t2-w0.5, seed 0", "kd-t2-w0.9, seed 0", "kd-t4-w0.5, seed 0", "kd-t4-w0.9, seed 0"]

    tuning = tuned_by(trainings, {names[0]: trained(0.7), names[2]: trained(0.8), names[3]: trained(0.8)}, recipe)

    assert tuning is not None
    assert tuning.tuned == Tuned(temperature=4.0, kd_weight=0.5)
    assert [one["validation_top1"] for one in tuning.grid] == [0.7, None, 0.8, 0.8]
    assert tuned_by(trainings, {}, recipe) is None


def test_one_pair_is_taken_as_it_is_and_the_seed_that_tunes_is_not_judged() -> None:
    recipe = recipe_of({}, seed=7, ablation={"seeds": 3, "temperatures": [3], "kd_weights": [1.0]})

    tuning = tuned_by(tuning_trainings(recipe), {}, recipe)

    assert tuning == Tuning(Tuned(temperature=3.0, kd_weight=1.0), 7, ())
    assert judged_seeds(recipe) == [8, 9, 10]
