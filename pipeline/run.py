"""The whole pipeline, read once, top to bottom: straight calls, and each finished stage is kept.

data -> teacher -> (soft labels ->) student -> quantized -> exported -> scored -> compiled -> measured -> verdict -> bundle -> report
A target whose device is not connected ends with a kit in place of what only the device can do. What boards do stands in
`deploy`, and runs on all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.devices import Device
from benchmarks.inventory import KIT, LOCAL, open_device
from benchmarks.pack import FIRST_RUN
from pipeline.artifacts import Bundle, ExportedModel, Kit, Measured, PreparedData, Report, Scores, TrainedModel, Verdict
from pipeline.fleet import Job, look_at_boards, on_devices
from pipeline.how import How
from pipeline.processes import led_by_first
from pipeline.progress import Progress, Quiet
from pipeline.recipe import Recipe, TargetConfig, load_recipe
from pipeline.scheme_choice import own_scheme
from pipeline.schemes import dialect_of
from pipeline.signing import signer_of
from pipeline.steps import Steps
from pipeline.workspace import Stopped, Workspace
from targets import make_target
from targets.base import write_json
from targets.errors import BudgetError, EdgestillError, GateError, MeasurementError, RecipeError, TargetError

STAGES = (
    *("data", "teacher", "assistant", "soft_labels", "distill", "quantize", "export", "score"),
    *("kit", "compile", "measure", "verdict", "bundle", "report"),
)
ERROR_OF_CODE = {error.exit_code: error for error in (GateError, BudgetError, TargetError, MeasurementError)}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a whole run ends with, by the names of its targets."""

    report: Report
    verdicts: Mapping[str, Verdict]
    bundles: Mapping[str, Bundle]
    kits: Mapping[str, Kit]
    failures: Mapping[str, EdgestillError]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A target of the recipe under a name that is unique in the run. Targets of one scheme share one quantized student, those of one
    dialect too share one graph."""

    name: str
    target: TargetConfig
    scheme: str
    dialect: str


@dataclass(frozen=True, kw_only=True)
class Made:
    """What one target's device is given: graphs, samples, and what the host knows of them."""

    name: str
    target: TargetConfig
    data: PreparedData
    int8: ExportedModel
    floats: Mapping[str, ExportedModel]
    trained: Mapping[str, TrainedModel]
    scores: tuple[Scores, Scores]


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What came of one target; no bundle where something forbids it."""

    measured: Measured
    verdict: Verdict
    bundle: Bundle | None


def pipeline(recipe: Recipe, workspace: Workspace, how: How) -> Finished:
    """From data to a report, and for each target a verdict and, where nothing forbids it, a bundle; or a kit."""
    do = Steps(recipe, workspace, how)
    data = do.prepare_data()
    teacher = do.train_teacher(data)
    tutor = do.train_assistants(data, teacher)  # the teacher itself where the recipe has none
    labels = do.soft_labels(data, tutor)  # None where the teacher is asked in every step
    student = do.distill(data, tutor, labels)
    # Stage by stage, not target by target, so that `--until` finds a stage whole.
    wanted = wanted_of(recipe.targets)
    schemes = dict.fromkeys(one.scheme for one in wanted)
    quantized = {scheme: do.quantize(scheme, data, student) for scheme in schemes}
    floats = {role: do.export_float(role, model, data) for role, model in (("student", student), ("teacher", teacher))}
    int8 = {
        one.name: do.export_quantized(one.scheme, one.dialect, quantized[one.scheme], student, data) for one in wanted
    }
    scores = {scheme: do.score(scheme, data, teacher, student, quantized[scheme]) for scheme in schemes}
    onnx_scores = {one.name: do.score_onnx(one.scheme, one.dialect, int8[one.name], data) for one in wanted}
    kits = {
        one.name: do.kit(one.name, one.target, int8[one.name], floats["student"], onnx_scores[one.name], data)
        for one in wanted
        if one.target.device == KIT
    }
    jobs: list[Job[Deployed]] = []
    for one in wanted:
        if one.target.device == KIT:
            continue
        made = Made(
            name=one.name,
            target=one.target,
            data=data,
            int8=int8[one.name],
            floats=floats,
            trained={"teacher": teacher, "student": student, "quantized": quantized[one.scheme]},
            scores=(scores[one.scheme], onnx_scores[one.name]),
        )
        jobs.append(Job(one.name, one.target.device, partial(deploy, do, made)))
    deployed, failures = on_devices(jobs, how.progress)
    if failures and not deployed and not kits:
        raise next(iter(failures.values()))
    measured = {name: one.measured for name, one in deployed.items()}
    verdicts = {name: one.verdict for name, one in deployed.items()}
    bundles = {name: one.bundle for name, one in deployed.items() if one.bundle is not None}
    report = do.report(data, teacher, student, quantized, verdicts, measured)
    return Finished(report=report, verdicts=verdicts, bundles=bundles, kits=kits, failures=failures)


def deploy(do: Steps, made: Made, device: Device, progress: Progress) -> Deployed:
    """Compile and measure one target on its device, decide what ships, and bundle it."""
    do = replace(do, how=replace(do.how, progress=progress))
    compiled = do.compile(made.name, made.target, made.int8, made.floats, device)
    measured = do.measure(made.name, compiled, made.data, device)
    models = (made.trained["teacher"], made.trained["student"])
    verdict = do.judge(made.name, made.target, made.data, models, made.scores, compiled, measured)
    bundle = None
    if verdict.info["exit"] is None:
        bundle = do.bundle(made.name, verdict, compiled, measured, made.data, made.trained, device)
    return Deployed(measured=measured, verdict=verdict, bundle=bundle)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where everything is, what ships, and the error that the command ends with (after the report is written)."""

    run_dir: Path
    built: tuple[str, ...]
    seconds: float
    report_path: Path | None = None
    bundles: Mapping[str, Path] = field(default_factory=dict)
    kits: Mapping[str, Path] = field(default_factory=dict)
    shipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, EdgestillError] = field(default_factory=dict)  # targets whose device could not do its part
    summary: Mapping[str, Any] | None = None
    stopped: str | None = None
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            "built": list(self.built),
            "seconds": round(self.seconds, 2),
            "report": str(self.report_path) if self.report_path else None,
            "bundles": {target: str(path) for target, path in self.bundles.items()},
            "kits": {target: str(path) for target, path in self.kits.items()},
            "shipped": dict(self.shipped),
            "failed": {target: str(error) for target, error in self.failed.items()},
            "stopped": self.stopped,
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        if self.summary is None:
            return self.stopped or ""
        from benchmarks.report import headline_rows, verdict

        built = f"{len(self.built)} stages built" if self.built else "nothing to do"
        lines = [*_aligned(headline_rows(self.summary)), "", verdict(self.summary)]
        lines += [f"{target}: {what}" for target, what in self.shipped.items()]
        lines += [f"{target}: failed: {error}" for target, error in self.failed.items()]
        lines += [f"bundle  {path}" for path in self.bundles.values()]
        lines += [
            f"kit     {path}, not compiled or measured here; on the device: {FIRST_RUN}" for path in self.kits.values()
        ]
        return "\n".join([*lines, f"report  {self.report_path}", f"{built}, {self.seconds:.1f} s"])


@led_by_first
def run_recipe(
    recipe: Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    until: str | None = None,
    force: str | None = None,
    dry_run: bool = False,
    offline: bool = False,
    allow_code: bool = False,
    include_samples: bool = False,
    sign_key: Path | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run a recipe (a path, or a Recipe made in Python) and return what came of it.

    Raises an EdgestillError where a stage cannot go on; an artifact that breaks its budget or gate is in `failure`, because
    the report that shows it has been written all the same. Several processes (docs/distributed.md) call it together.
    """
    if isinstance(recipe, Path):
        recipe = load_recipe(recipe, overrides)
    for option, stage in (("--until", until), ("--force", force)):
        if stage is not None and stage not in stages_of(recipe):
            reason = "this recipe has" if stage in STAGES else "there is"
            raise RecipeError(f"{option} {stage}: {reason} no such stage. Stages: {', '.join(stages_of(recipe))}.")
    if sign_key is not None:
        signer_of(sign_key)  # a key that cannot be used is refused before anything is trained
    check_targets(recipe.targets)
    progress = progress or Quiet()
    how = How(
        seed=recipe.seed,
        progress=progress,
        offline=offline,
        allow_code=allow_code,
        include_samples=include_samples,
        sign_key=sign_key,
    )
    beyond = STAGES[STAGES.index(until) + 1 :] if until is not None else ()
    workspace = Workspace(
        runs_dir, recipe.name, progress, force=force, until=until, beyond=frozenset(beyond), dry_run=dry_run
    )
    begun_s = time.monotonic()
    with workspace.locked():
        write_json(workspace.dir / "recipe.json", recipe.model_dump(mode="json"))
        if not dry_run:
            look_at_boards(recipe.targets, workspace.dir, progress.say)
        try:
            done = pipeline(recipe, workspace, how)
        except Stopped as stop:
            seconds = time.monotonic() - begun_s
            return RunResult(run_dir=workspace.dir, built=tuple(workspace.built), seconds=seconds, stopped=str(stop))
        report_dir = workspace.publish("report", done.report.dir)
        paths = workspace.publish_all("bundles", {name: bundle.path for name, bundle in done.bundles.items()})
        kits = workspace.publish_all("kits", {name: kit.dir for name, kit in done.kits.items()})
    return RunResult(
        run_dir=workspace.dir,
        built=tuple(workspace.built),
        seconds=time.monotonic() - begun_s,
        report_path=report_dir / "index.html",
        bundles=paths,
        kits=kits,
        shipped={name: f"{one.info['shipped']} ships: {one.info['why']}" for name, one in done.verdicts.items()},
        summary=done.report.summary,
        failed=done.failures,
        failure=_first_failure(done.verdicts) or next(iter(done.failures.values()), None),
    )


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a run of this recipe comes to."""
    absent = {
        "assistant": not recipe.distill.assistants,
        "soft_labels": not recipe.distill.uses_cache,
        "kit": not any(target.device == KIT for target in recipe.targets),
    }
    return [stage for stage in STAGES if not absent.get(stage)]


def wanted_of(targets: Sequence[TargetConfig]) -> list[Wanted]:
    """What each target wants made, in the recipe's order."""
    wanted: list[Wanted] = []
    num_seen: dict[str, int] = {}
    for target in targets:
        num_seen[target.name] = num_seen.get(target.name, 0) + 1
        name = target.name if num_seen[target.name] == 1 else f"{target.name}-{num_seen[target.name]}"
        made = make_target(target.name, target.options)
        scheme = target.scheme or own_scheme(made, here=target.device == LOCAL)
        wanted.append(Wanted(name=name, target=target, scheme=scheme, dialect=dialect_of(scheme, made.dialect)))
    return wanted


def check_targets(targets: Sequence[TargetConfig]) -> None:
    """Raise RecipeError for a target, an option or a device that does not exist, and TargetError for a runtime that is not
    installed here, before anything is trained for it."""
    for target in targets:
        missing = make_target(target.name, target.options).missing()
        if target.device == KIT:
            continue
        device = device_of(target)
        if missing is not None and target.device == LOCAL:
            raise TargetError(
                f"target '{target.name}' is not installed on {device.name}. Install it: {missing};\n"
                f"or write a kit for a device that has it: device: {KIT}."
            )


def device_of(target: TargetConfig) -> Device:
    """The device that a target of the recipe names; not connected yet."""
    try:
        return open_device(target.device)
    except RecipeError as error:
        raise RecipeError(f"target '{target.name}': {error}") from None


def _aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows of one set of columns as lines of text."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))] if table else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _first_failure(verdicts: Mapping[str, Verdict]) -> EdgestillError | None:
    ends = [verdict.info["exit"] for verdict in verdicts.values() if verdict.info["exit"] is not None]
    return ERROR_OF_CODE[ends[0]["code"]](ends[0]["message"]) if ends else None
