"""The matrix: every model of a recipe on every runtime, in every precision, on every number of threads.

Reads a matrix recipe, models and calibration images. Writes OUT/work (float, quantized and compiled graphs: keyed, whole and
resumed as the stages of a run), OUT/models/NAME (records, see measured.py) and report.json. All is prepared before anything is
measured, so that what remains is known. Started again, it goes on where it was; with nothing to do it imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.measure import PRESETS
from benchmarks.device.record import Record
from benchmarks.devices import Local
from pipeline.matrix.measured import estimate_s, kept, key_of, measure, num_disturbed, num_launches
from pipeline.matrix.recipe import MatrixRecipe, load_matrix_recipe, parse_matrix_recipe
from pipeline.matrix.report import MatrixReport, MatrixRow, Missing, ModelNote, matrix_row
from pipeline.matrix.steps import Prepared, Steps
from pipeline.progress import Progress, Quiet
from pipeline.workbench import REPORT_FILE
from pipeline.workspace import Workspace
from targets.base import write_json
from targets.errors import EdgestillError, MeasurementError, ModelError

WORK, MODELS = "work", "models"
Measured = Mapping[str, Mapping[str, Record] | str]  # model -> its records by arm, or why they could not be made


def run_matrix(
    recipe: Path | MatrixRecipe,
    *,
    out_dir: Path,
    images: Path | None = None,
    preset: str | None = None,
    launches: int | None = None,
    offline: bool = False,
    again: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> MatrixReport:
    """Measure what a matrix recipe names; `images`, `preset` and `launches` take the place of the recipe's.

    `again`: models with an untrustworthy cell are measured once more, and the less disturbed of both measurements stays.
    Raises RecipeError for what cannot be begun. A model that cannot be had, or that a runtime refuses, is told in `missing`;
    where a model that is not optional has no cell at all, `failure` says so (exit 2), and under `strict` an untrustworthy cell
    is in `failure` as well (exit 7). What was measured is written all the same.
    """
    recipe = _as_asked(recipe, images, preset, launches)
    progress = progress or Quiet()
    begun_s = time.monotonic()
    workspace = Workspace(out_dir, WORK, progress)
    with workspace.locked():
        steps = Steps(recipe=recipe, workspace=workspace, progress=progress, offline=offline)
        models = []
        for number, entry in enumerate(recipe.models, 1):
            progress.say(f"model {number} of {len(recipe.models)}: {entry.name}")
            models.append(steps.prepare(entry))
        measured, now = _measure_all(recipe, models, out_dir / MODELS, progress, again=again)
        report = _report(recipe, models, measured, now, out_dir, time.monotonic() - begun_s, strict=strict)
        write_json(out_dir / REPORT_FILE, report.to_json())
    return report


def _as_asked(
    recipe: Path | MatrixRecipe, images: Path | None, preset: str | None, launches: int | None
) -> MatrixRecipe:
    """The recipe with what was given beside it, checked as a whole."""
    loaded = load_matrix_recipe(recipe) if isinstance(recipe, Path) else recipe
    raw = loaded.model_dump()
    raw["calibration"].update({"images": images} if images else {})
    raw["bench"].update({"preset": preset} if preset else {})
    raw["bench"].update({"launches": launches} if launches else {})
    return parse_matrix_recipe(raw, str(recipe) if isinstance(recipe, Path) else loaded.name)


def _measure_all(
    recipe: MatrixRecipe, models: Sequence[Prepared], models_dir: Path, progress: Progress, *, again: bool
) -> tuple[Measured, set[str]]:
    """(the records of every model, those that were measured now); what was measured under the same key is kept."""
    found: dict[str, Mapping[str, Record] | str] = {}
    waiting: list[tuple[Prepared, dict[str, Any]]] = []
    for model in (model for model in models if model.compiled):
        key = key_of(model, recipe.bench, recipe.seed)
        records = kept(models_dir / model.name, key)
        if again and not isinstance(records, str) and (disturbed := num_disturbed(records)):
            records = f"measured again, {disturbed} of {len(records)} cells were disturbed"
        if isinstance(records, str):
            progress.say(f"{model.name}: {records}")
            waiting.append((model, key))
        else:
            found[model.name] = records
    num_waiting = sum(len(model.compiled) for model, _ in waiting)
    seconds = estimate_s([model for model, _ in waiting], recipe.bench)
    progress.say(f"{num_waiting} cells to measure, about {_minutes(seconds)}; {len(found)} models were measured before")
    found.update(_measure_waiting(recipe, waiting, models_dir, progress))
    return found, {model.name for model, _ in waiting}


def _measure_waiting(
    recipe: MatrixRecipe,
    waiting: Sequence[tuple[Prepared, Mapping[str, Any]]],
    models_dir: Path,
    progress: Progress,
) -> dict[str, Mapping[str, Record] | str]:
    """A model at a time, each a session of its own; what a runtime does not survive is told, and the next model begins."""
    found: dict[str, Mapping[str, Record] | str] = {}
    remaining, begun_s, num_done = sum(len(model.compiled) for model, _ in waiting), time.monotonic(), 0
    total = sum(num_launches(model, recipe.bench) for model, _ in waiting)
    with progress.task("measure", total=total) as task:
        for model, key in waiting:
            there = models_dir / model.name
            outcome = "measured"
            try:
                found[model.name] = measure(
                    model, recipe.bench, key, there, device=Local(), seed=recipe.seed, task=task
                )
            except EdgestillError as error:
                found[model.name] = outcome = f"not measured: {error}"
            num_done += len(model.compiled)
            remaining -= len(model.compiled)
            left_s = (time.monotonic() - begun_s) / num_done * remaining
            progress.say(f"{model.name}: {outcome}; {remaining} cells remain, about {_minutes(left_s)}")
    return found


def _report(
    recipe: MatrixRecipe,
    models: Sequence[Prepared],
    measured: Measured,
    now: set[str],
    out_dir: Path,
    seconds: float,
    *,
    strict: bool,
) -> MatrixReport:
    rows: list[MatrixRow] = []
    missing: list[Missing] = []
    for model in models:
        records = measured.get(model.name, {})
        cells = [*model.missing, *(cell for cell, _ in model.compiled if isinstance(records, str))]
        reason = records if isinstance(records, str) else ""
        missing += [
            Missing(
                model=model.name,
                target=cell.target,
                precision=cell.precision,
                num_threads=cell.num_threads,
                reason=cell.error or reason,
            )
            for cell in cells
        ]
        if not isinstance(records, str):
            rows += [matrix_row(model.name, cell, records[cell.arm]) for cell, _ in model.compiled]
    return MatrixReport(
        out_dir=out_dir,
        name=recipe.name,
        preset=recipe.bench.preset,
        num_launches=recipe.bench.launches or PRESETS[recipe.bench.preset].launches,
        models=tuple(_note(model, kept=model.name not in now) for model in models if model.name in measured),
        rows=tuple(rows),
        missing=tuple(missing),
        seconds=seconds,
        failure=_failure(recipe, rows, missing, strict=strict),
    )


def _note(model: Prepared, *, kept: bool) -> ModelNote:
    return ModelNote(name=model.name, source=model.source, weights=model.weights, image=model.image, kept=kept)


def _failure(
    recipe: MatrixRecipe, rows: Sequence[MatrixRow], missing: Sequence[Missing], *, strict: bool
) -> EdgestillError | None:
    """The first model that should be there and is not at all, then what cannot be trusted."""
    there = {row.model for row in rows}
    needed = [entry.name for entry in recipe.models if not entry.optional and entry.name not in there]
    if needed:
        why = next(one.reason for one in missing if one.model == needed[0])
        return ModelError(
            f"{', '.join(needed)}: no cell was measured. {needed[0]}: {why}\n"
            "Mend it, drop it from the recipe, or say optional: true."
        )
    disturbed = [f"{row.model} {row.target} {row.precision}" for row in rows if not row.valid]
    if strict and disturbed:
        return MeasurementError(
            f"{', '.join(disturbed[:3])}: half of the launches or more were disturbed, {len(disturbed)} of {len(rows)} cells. "
            "Measure again on a quiet machine; what was measured is kept."
        )
    return None


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
