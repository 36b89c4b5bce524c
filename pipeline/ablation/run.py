"""`edgestill ablate`: does the recipe help? The recipe and its controls at equal budget, over seeds, each against tuned plain KD.

data -> teacher -> plain KD tuned on validation -> every arm under every seed -> scores -> verdicts. Every training is a stage in the
workspace of the recipe's own runs: what is finished is not made again, and an ablation that was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.ablation.arms import BLIND_REPLAY, KD, NOT_TUNED, arms_of, chosen_arms, same_trainings, whole_log
from pipeline.ablation.document import document_of
from pipeline.ablation.processes import train_all
from pipeline.ablation.report import AblationReport, PlannedArm
from pipeline.ablation.steps import AblationSteps, Outcome, Training, looking
from pipeline.ablation.tuning import (
    Tuning,
    grid_of,
    pacing_log_of,
    pacing_training,
    trainings_of,
    tuned_by,
    tuning_trainings,
)
from pipeline.how import How
from pipeline.learning.own_code import PREFIX, own_factory
from pipeline.progress import Progress, Quiet
from pipeline.recipe import Recipe, load_recipe
from pipeline.workspace import Stopped, Workspace
from targets.base import check_folder_of, read_json, write_json
from targets.errors import EdgestillError, RecipeError

RESULT_FILE = "ablation.json"


def ablate_recipe(
    recipe: Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: int | None = None,
    processes: int = 1,
    runs_dir: Path = Path("runs"),
    dry_run: bool = False,
    offline: bool = False,
    allow_code: bool = False,
    export: Path | None = None,
    progress: Progress | None = None,
) -> AblationReport:
    """Train what is not yet trained, and judge. arms: some of them, by name; seeds: in place of the recipe's number.

    Raises an EdgestillError where nothing can be judged; a training that failed is in `failure`, and the others are judged all
    the same. The result is kept in the workspace, and in `export`.
    """
    if isinstance(recipe, Path):
        recipe = load_recipe(recipe, overrides)
    if seeds is not None:
        recipe = _with_seeds(recipe, seeds)
    names = chosen_arms(recipe, arms)
    _check_tuning(recipe)
    _check_code(recipe, allow_code)
    if export is not None:
        check_folder_of(export, "--export")
    progress = progress or Quiet()
    how = How(seed=recipe.seed, progress=progress, offline=offline, allow_code=allow_code)
    workspace = Workspace(runs_dir, recipe.name, progress)
    do = AblationSteps(recipe, workspace, how)
    look = looking(do)
    with workspace.locked():
        if dry_run:
            return AblationReport(run_dir=workspace.dir, plan=tuple(planned(look, names)))
        begun_s = time.monotonic()
        document, failed = _Ablation(do, look, processes).run(names)
        document["looks"] = looks_of(workspace.dir / RESULT_FILE, document)
        write_json(workspace.dir / RESULT_FILE, document)
        if export is not None:
            write_json(export, document)
    return AblationReport(
        run_dir=workspace.dir,
        document=document,
        seconds=time.monotonic() - begun_s,
        failure=_failure(failed),
    )


@dataclass(frozen=True)
class _Ablation:
    """`do` builds, `look` finds what is finished and builds nothing."""

    do: AblationSteps
    look: AblationSteps
    num_processes: int

    def run(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, EdgestillError]]:
        """The document of the arms of these names, and what failed."""
        recipe = self.do.recipe
        self.do.shared(recipe.distill)  # data and teacher, before anything else
        tuning, failed = self._tune()
        pacing_log, lost = self._pacing_log() if BLIND_REPLAY in names else ((), {})
        every = arms_of(recipe, tuning.tuned, pacing_log or whole_log(recipe))
        arms = {name: every[name] for name in names if name != BLIND_REPLAY or pacing_log}
        same_as = same_trainings(arms)
        trainings = trainings_of(recipe, {name: arms[name] for name in dict.fromkeys(same_as.values())})
        failed = {**failed, **lost, **self._train(trainings)}
        found = finished_of(self.look, trainings)
        return document_of(self.do, tuning, arms, same_as, found, failed), failed

    def _tune(self) -> tuple[Tuning, dict[str, EdgestillError]]:
        trainings = tuning_trainings(self.do.recipe)
        failed = self._train(list(trainings.values()))
        tuning = tuned_by(trainings, finished_of(self.look, list(trainings.values())), self.do.recipe)
        if tuning is None:
            raise next(iter(failed.values()))
        return tuning, failed

    def _pacing_log(self) -> tuple[tuple[float, ...], dict[str, EdgestillError]]:
        training = pacing_training(self.do.recipe)
        failed = self._train([training])
        return pacing_log_of(finished_of(self.look, [training])), failed

    def _train(self, trainings: Sequence[Training]) -> dict[str, EdgestillError]:
        """Those that are not finished; what they share is made before, by this process alone."""
        unfounded: dict[str, EdgestillError] = {}
        for arm, config in {training.arm: training.config for training in trainings}.items():
            try:
                self.do.shared(config)
            except EdgestillError as error:
                self.do.how.progress.say(f"{arm}: failed: {error}")
                unfounded |= {training.name: error for training in trainings if training.arm == arm}
        trainings = [training for training in trainings if training.name not in unfounded]
        finished = finished_of(self.look, trainings)
        waiting = [training for training in trainings if training.name not in finished]
        if finished:
            self.do.how.progress.say(f"{len(finished)} of {len(trainings)} trainings are finished")
        return unfounded | (train_all(self.do, waiting, self.num_processes) if waiting else {})


def planned(look: AblationSteps, names: Sequence[str]) -> list[PlannedArm]:
    """What would be trained and what is finished. Before the tuning is, nobody knows what plain KD will be: not finished. Raises what
    training would, where the data or the teacher of all arms are not there."""
    with suppress(Stopped):
        look.shared(look.recipe.distill)
    recipe, tunings = look.recipe, tuning_trainings(look.recipe)
    before = [*tunings.values(), *([pacing_training(recipe)] if BLIND_REPLAY in names else [])]
    found = finished_of(look, before)
    plan = [PlannedArm(arm="tuning", num_trainings=len(before), num_finished=len(found))] if before else []
    tuning = tuned_by(tunings, found, recipe) if len(found) == len(before) else None
    tuned = tuning.tuned if tuning is not None else NOT_TUNED
    every = arms_of(recipe, tuned, pacing_log_of(found) or whole_log(recipe))
    same_as = same_trainings({name: every[name] for name in names})
    for name in names:
        trainings = trainings_of(recipe, {name: every[name]})
        known = tuning is not None or name not in (KD, BLIND_REPLAY)
        plan.append(
            PlannedArm(
                arm=name,
                num_trainings=len(trainings),
                num_finished=len(finished_of(look, trainings)) if known else 0,
                same_as=same_as[name] if tuning is not None and same_as[name] != name else None,
            )
        )
    return plan


def finished_of(look: AblationSteps, trainings: Sequence[Training]) -> dict[str, Outcome]:
    """What came of the trainings that are finished, by their names."""
    found: dict[str, Outcome] = {}
    for training in trainings:
        try:
            found[training.name] = look.outcome(training)
        except (Stopped, EdgestillError):  # one that cannot even be looked for: whoever trains it says why
            continue
    return found


def looks_of(path: Path, document: Mapping[str, Any]) -> list[int]:
    """After how many seeds this ablation has been judged, the last of them now; an earlier result of another question, or one that
    cannot be read, is none."""
    now = len(document["seeds"])
    try:
        earlier = read_json(path)
        looks = earlier.get("looks") or [len(earlier["seeds"])]
        is_same = _question(earlier) == _question(document)
    except (EdgestillError, LookupError, TypeError, AttributeError):
        return [now]
    return [*(look for look in looks if is_same and look != now), now]


def _question(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked, of which data and which nets; how many seeds and which arms is not of it."""
    return {key: document["recipe"][key] for key in ("seed", "data", "teacher", "distill")}


def _with_seeds(recipe: Recipe, seeds: int) -> Recipe:
    if seeds < 2:
        raise RecipeError(f"--seeds {seeds}: fewer than two seeds have no spread to judge by. Give five or more.")
    return recipe.model_copy(update={"ablation": recipe.ablation.model_copy(update={"seeds": seeds})})


def _check_tuning(recipe: Recipe) -> None:
    num_pairs = len(grid_of(recipe))
    if recipe.data.validation == 0 and num_pairs > 1:
        raise RecipeError(
            f"data.validation=0 leaves nothing to tune plain KD by, and ablation asks for {num_pairs} pairs of temperature and "
            "weight.\nGive one of each: --set ablation.temperatures=[4] --set ablation.kd_weights=[0.5]."
        )


def _check_code(recipe: Recipe, allow_code: bool) -> None:
    """Refuse `python:` references of an arm before anything is trained, in the words of whoever would import them."""
    if allow_code:
        return
    for name, config in arms_of(recipe, grid_of(recipe)[0], whole_log(recipe)).items():
        section = f"ablation.arms.{name}" if name in recipe.ablation.arms else "distill"
        for key in ("loss", "model"):
            if (reference := getattr(config, key)) is not None and reference.startswith(PREFIX):
                own_factory(reference, f"{section}.{key}", allow_code=False)


def _failure(failed: Mapping[str, EdgestillError]) -> EdgestillError | None:
    if not failed:
        return None
    name, error = next(iter(failed.items()))
    trainings = "1 training" if len(failed) == 1 else f"{len(failed)} trainings"
    return type(error)(f"{trainings} failed, the others are judged. The first, {name}: {error}")
