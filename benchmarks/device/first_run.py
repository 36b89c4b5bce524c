"""The first run of a kit on a device that its maker does not have: build, place, evaluate and measure, and one file to send back.

Reads a kit, a directory that the host wrote:

    kit.json        {"schema_version": 1, "name": "resnet20", "target": "tensorrt", "options": {},
                     "float": ["fp32", "fp16"] (absent or null: all that the target offers), "min_int8_share": 0.95}
    int8/           an exported directory (exported.json and its files): the quantized graph
    float/          an exported directory: the float graph
    evaluation/     optional: spec.json, x-000.npy, ..., y.npy
    expected.json   optional: {"metric": "top1" or "agreement", "value": 0.912, "n": 1000, "tolerance": 0.005}, what the host
                    computed for the INT8 graph; agreement is with the float graph's answers, n the samples of evaluation/

Writes the result, whole or not at all: also where a step failed, with the step's own words, for that is what its reader needs
most. Each step is a fresh process of this same program: nothing that one left behind (a CUDA context, a warm cache) is
measured by another. Exit codes: 5 the target cannot run it or not in INT8, 3 accuracy, 7 measurement.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.first_run_verdict import Check, accuracy_of, checks_of, exit_code_of, speed_of, summary_lines
from benchmarks.device.measure import PRESETS
from benchmarks.device.record import HARNESS_VERSION, Launch, validity_of
from benchmarks.device.typed_json import from_json
from targets import make_target
from targets.base import CompiledModel, Exported, read_json, sha256_file, write_json
from targets.errors import (
    DeviceError,
    EdgestillError,
    GateError,
    IntegrityError,
    MeasurementError,
    RecipeError,
    TargetError,
)

SCHEMA_VERSION = 1
STEP_TIMEOUT_S = 7200.0  # a build at the highest optimization level takes its time
ERRORS: dict[int, type[EdgestillError]] = {2: RecipeError, 3: GateError, 5: TargetError, 7: MeasurementError}
MIN_INT8_SHARE = 0.95

Ask = Callable[[Sequence[str]], dict[str, Any]]  # a command of the device program -> its JSON
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What is to be tried; `floats` None: every float precision that the target offers."""

    directory: Path
    name: str
    target: str
    options: dict[str, Any]
    floats: tuple[str, ...] | None
    min_int8_share: float
    expected: dict[str, Any] | None

    @property
    def evaluation_dir(self) -> Path | None:
        directory = self.directory / "evaluation"
        return directory if directory.is_dir() else None


@dataclass(kw_only=True)
class Arm:
    """One precision of the model, and what became of it so far; a failed step ends the arm, not the run."""

    precision: str
    exported_dir: Path
    compiled_dir: Path
    report: dict[str, Any] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)
    classes: Any = None  # (N,) the class that each sample got

    @property
    def built(self) -> bool:
        return "compiled" in self.report

    @property
    def measurable(self) -> bool:
        return self.built and all(error["step"] != "measure" for error in self.report.get("errors", []))

    def failed(self, step: str, error: EdgestillError) -> None:
        told = {"step": step, "message": str(error), "exit_code": error.exit_code}
        self.report.setdefault("errors", []).append(told)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a kit is tried: with what program, where, how often, and who hears of it."""

    kit: Kit
    work: Path
    preset: str
    num_launches: int
    ask: Ask
    say: Say


def first_run(
    kit_dir: Path,
    out_path: Path,
    *,
    target: str | None = None,
    preset: str = "smoke",
    launches: int | None = None,
    work_dir: Path | None = None,
    ask: Ask | None = None,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Try the kit on `target` (None: the kit's) and write the result; returns {"result", "checks"}.

    `launches` None: the preset's number. `work_dir` keeps engines, answers and raw samples; None: they go when the run ends.
    Raises the error of the first check that failed, after the result is written; before it, RecipeError and IntegrityError
    for a kit that cannot be tried, TargetError where the runtime is absent.
    """
    kit, out_path = load_kit(kit_dir.absolute(), target), out_path.absolute()
    _check_places(out_path, work_dir)
    with nullcontext(work_dir) if work_dir else tempfile.TemporaryDirectory(dir=out_path.parent) as work:
        trial = Trial(
            kit=kit,
            work=Path(work).absolute(),
            preset=preset,
            num_launches=launches or PRESETS[preset].launches,
            ask=ask or ask_this_program,
            say=say,
        )
        machine, probe, arms = _prepare(trial)
        for arm in arms:
            _try_arm(trial, arm)
        _measure(trial, arms, machine)
    result = _result(trial, arms, machine, probe)
    write_json(out_path, result)
    for line in summary_lines(result):
        say(line)
    say(f"result: {out_path} (send this file back)")
    _raise_failed(kit.name, [Check(**check) for check in result["checks"]], out_path)
    return {"result": str(out_path), "checks": result["checks"]}


def _raise_failed(name: str, checks: Sequence[Check], out_path: Path) -> None:
    if code := exit_code_of(checks):
        failed = next(check for check in checks if check.passed is False and check.exit_code == code)
        raise ERRORS[code](
            f"{name}: {failed.check}: {failed.detail.rstrip('.')}. {out_path} was written all the same: send it back."
        )


def load_kit(directory: Path, target: str | None = None) -> Kit:
    """Read kit.json and expected.json; raises IntegrityError for what is absent or odd, RecipeError for the target."""
    values = read_json(directory / "kit.json")
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError(
            f"{directory / 'kit.json'} is no kit of schema {SCHEMA_VERSION}. Use the program that came with it."
        )
    expected_path = directory / "expected.json"
    expected = read_json(expected_path) if expected_path.is_file() else None
    if expected is not None and not (
        isinstance(expected, dict)
        and expected.keys() >= {"value", "n", "tolerance"}
        and expected.get("metric") in ("top1", "agreement")
    ):
        raise IntegrityError(
            f"{expected_path} needs metric (top1 or agreement), value, n and tolerance. Make the kit again."
        )
    try:
        floats = values.get("float")
        kit = Kit(
            directory=directory,
            name=str(values["name"]),
            target=target or str(values["target"]),
            # Options belong to the kit's own target: another has others.
            options=dict(values.get("options") or {}) if target in (None, values["target"]) else {},
            floats=None if floats is None else tuple(map(str, floats)),
            min_int8_share=float(values.get("min_int8_share", MIN_INT8_SHARE)),
            expected=expected,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{directory / 'kit.json'} cannot be used: {error!r}. Make the kit again.") from None
    make_target(kit.target, kit.options)
    for part in ("int8", "float"):
        Exported.load(directory / part)
    return kit


def ask_this_program(argv: Sequence[str]) -> dict[str, Any]:
    """Run a command in a fresh process of the program that this is part of; raises its error. Its stderr is shown."""
    packed = Path(__file__).resolve().parents[2]
    program = ["-I", str(packed)] if packed.is_file() else ["-m", "benchmarks.device"]
    try:
        done = subprocess.run(
            [sys.executable, *program, *argv],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{argv[0]} did not end within {STEP_TIMEOUT_S:g} s. Take a smaller model.") from None
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else None
    except ValueError:
        document = None
    if done.returncode == 0 and isinstance(document, dict):
        return document
    if isinstance(document, dict) and "error" in document:
        raise ERRORS.get(done.returncode, DeviceError)(str(document["error"]))
    raise DeviceError(f"{argv[0]} ended with exit code {done.returncode} and no answer. Its last words stand above.")


def _check_places(out_path: Path, work_dir: Path | None) -> None:
    if not out_path.absolute().parent.is_dir():
        raise RecipeError(f"--out {out_path}: there is no directory {out_path.absolute().parent}. Make it first.")
    if work_dir is not None and work_dir.exists() and any(work_dir.iterdir()):
        raise RecipeError(f"--work {work_dir} is not empty. Name a new directory.")


def _prepare(trial: Trial) -> tuple[dict[str, Any], dict[str, Any], list[Arm]]:
    """(machine, probe, arms). Raises TargetError where the runtime is absent: there is nothing to report then."""
    kit = trial.kit
    machine = trial.ask(["environment"])
    probe = trial.ask(["probe", "--target", kit.target, "--options", json.dumps(kit.options)])
    if probe["missing"]:
        raise TargetError(f"target '{kit.target}' cannot run here yet. Run: {probe['missing']}")
    floats = probe["float_precisions"] if kit.floats is None else kit.floats
    precisions = [("int8", "int8"), *((name, "float") for name in floats)]
    arms = [
        Arm(
            precision=precision,
            exported_dir=kit.directory / part,
            compiled_dir=trial.work / "compiled" / precision,
            report={"precision": precision, "exported": _identity(Exported.load(kit.directory / part))},
        )
        for precision, part in precisions
    ]
    return machine, probe, arms


def _identity(exported: Exported) -> dict[str, Any]:
    paths = [path for path in (exported.model_path, exported.half_model_path) if path is not None]
    return {
        "name": exported.name,
        "scheme": exported.scheme,
        "half_note": exported.half_note,
        "sha256": {path.name: sha256_file(path) for path in paths},
    }


def _try_arm(trial: Trial, arm: Arm) -> None:
    """Compile, place, evaluate; each failure is kept with its step."""
    kit, ask, step = trial.kit, trial.ask, "compile"
    try:
        trial.say(f"{arm.precision}: compile")
        begin = time.monotonic()
        options = ["--target", kit.target, "--options", json.dumps(kit.options), "--precision", arm.precision]
        ask(["compile", "--exported", str(arm.exported_dir), *options, "--out", str(arm.compiled_dir)])
        arm.report["build_s"] = time.monotonic() - begin
        arm.report["compiled"], arm.report["details"] = _compiled(arm.compiled_dir)
        step = "placement"
        arm.report["placement"] = ask(["placement", "--compiled", str(arm.compiled_dir)])
    except EdgestillError as error:
        arm.failed(step, error)
        trial.say(f"{arm.precision}: {step} failed: {error}")
    if not arm.built or kit.evaluation_dir is None:
        return
    try:
        trial.say(f"{arm.precision}: evaluate")
        _evaluate(arm, kit.evaluation_dir, trial)
    except EdgestillError as error:
        arm.failed("evaluate", error)
        trial.say(f"{arm.precision}: evaluate failed: {error}")


def _compiled(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was built, what the runtime said of it): every JSON file of the compiled model, for a reader far away."""
    compiled = CompiledModel.load(directory)
    described = {
        "toolchain": compiled.toolchain,
        "options": dict(compiled.options),
        "built_for": dict(compiled.built_for),
        "files": dict(compiled.files),
        "bytes": {name: (directory / name).stat().st_size for name in compiled.files},
    }
    said = [name for name in compiled.files if name.endswith(".json")]
    return described, {name: json.loads((directory / name).read_text(encoding="utf-8"), strict=False) for name in said}


def _evaluate(arm: Arm, evaluation_dir: Path, trial: Trial) -> None:
    answers_dir = trial.work / "answers" / arm.precision
    paths = ["--compiled", str(arm.compiled_dir), "--evaluation", str(evaluation_dir), "--out", str(answers_dir)]
    answer = trial.ask(["evaluate", *paths])
    logits_NK = np.load(answers_dir / next(iter(answer["outputs"].values())), allow_pickle=False)
    arm.report["num_samples"] = int(answer["num_samples"])
    if logits_NK.ndim == 2:
        arm.classes = logits_NK.argmax(1)


def _measure(trial: Trial, arms: Sequence[Arm], machine: dict[str, Any]) -> None:
    """Rounds of one launch an arm, each round in an order of its own; an arm whose launch failed takes no further part."""
    (trial.work / "samples").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    common = ["--preset", trial.preset]
    if trial.kit.evaluation_dir is not None:
        common += ["--evaluation", str(trial.kit.evaluation_dir)]
    if (start_c := machine["soft"].get("temp_c")) is not None:
        common += ["--start-temp-c", str(start_c)]
    for index in range(trial.num_launches):
        for place in generator.permutation(len(arms)):
            if arms[place].measurable:
                trial.say(f"{arms[place].precision}: measure, launch {index + 1} of {trial.num_launches}")
                _launch(trial, arms[place], index, sum(len(arm.launches) for arm in arms), common)


def _launch(trial: Trial, arm: Arm, index: int, order: int, common: Sequence[str]) -> None:
    samples = f"samples/{arm.precision}-{index}.npy"
    argv = ["measure", "--compiled", str(arm.compiled_dir), "--out", str(trial.work / samples), *common]
    try:
        launch = trial.ask(argv)
    except EdgestillError as error:
        arm.failed("measure", error)
        trial.say(f"{arm.precision}: measure failed: {error}")
        return
    arm.launches.append({"i": index, "arm": arm.precision, "order": order, "samples_file": samples, **launch})


def _result(trial: Trial, arms: Sequence[Arm], machine: dict[str, Any], probe: dict[str, Any]) -> dict[str, Any]:
    kit = trial.kit
    labels_path = kit.directory / "evaluation" / "y.npy"
    labels_N = np.load(labels_path, allow_pickle=False) if labels_path.is_file() else None
    reports = [{"errors": [], **arm.report, **_latency(arm.launches)} for arm in arms]
    accuracy = accuracy_of({arm.precision: arm.classes for arm in arms}, labels_N, kit.expected)
    speed = speed_of(reports)
    checks = checks_of(reports, accuracy, speed, min_int8_share=kit.min_int8_share, trusted=trial.preset != "smoke")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "first-run",
        "name": kit.name,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "harness": HARNESS_VERSION,
        "target": kit.target,
        "options": kit.options,
        "preset": trial.preset,
        "probe": probe,
        "environment": machine,
        "arms": reports,
        "accuracy": accuracy,
        "speed": speed,
        "checks": [asdict(check) for check in checks],
        "exit_code": exit_code_of(checks),
    }


def _latency(launches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the launches, in microseconds, and whether they can be trusted; None where nothing was measured."""
    if not launches:
        return {"latency": None, "launches": []}
    records: list[Launch] = [
        from_json(Launch, launch, f"launch {launch['i']} of {launch['arm']}") for launch in launches
    ]
    validity = validity_of(records)
    medians = {name: float(np.median([getattr(record.lat_us, name) for record in records])) for name in ("p25", "p50")}
    load_ms = float(np.median([record.load_ms for record in records]))
    latency = {"p25_us": medians["p25"], "p50_us": medians["p50"], "load_ms": load_ms, "validity": asdict(validity)}
    return {"latency": latency, "launches": [asdict(record) for record in records]}
