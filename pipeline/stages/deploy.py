"""Stage 6, deploy: compile every arm for one target, on its device, and measure them against each other there.

The arms of a target are the INT8 student and, as the baseline that INT8 must beat, the float student and the float teacher
in each float precision that the runtime offers. Reads exported graphs. Writes arms.json, lint.json and the compiled models;
then records, logits and raw samples. A compile that fails is a value: the arm keeps its reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bench import Arm, measure_arms
from benchmarks.devices import Device, Local, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from pipeline.artifacts import CompiledArms, ExportedModel, PreparedData
from pipeline.how import How
from pipeline.recipe import BenchConfig, TargetConfig
from targets import make_target
from targets.base import Placement, write_json
from targets.errors import TargetError
from targets.lint import Platform, lint


def compile_arms(
    config: TargetConfig,
    int8: ExportedModel,
    floats: Mapping[str, ExportedModel],
    out_dir: Path,
    how: How,
    device: Device,
) -> None:
    """Compile the INT8 student and every float model in every float precision of the target.

    floats: role (teacher, student) -> exported graph. Raises TargetError where the target itself is missing, or where a
    float graph does not compile in fp32: then nothing could ship.
    """
    runtime = make_target(config.name, config.options).dialect  # whose rules hold, also for a portable graph
    graph_path = int8.exported.half_model_path or int8.exported.model_path
    findings = [asdict(finding) for finding in lint(graph_path, runtime, _platform(device))]
    write_json(out_dir / "lint.json", findings)
    program = device.put(pack_device_program(out_dir / PROGRAM))
    target = ["--target", config.name, "--options", json.dumps(config.options)]
    offered = run_program(device, program, ["probe", *target])
    if offered["missing"]:
        raise TargetError(f"{config.name} is not installed on {device.name}. Run there: {offered['missing']}.")
    wanted = [("student", "int8", int8)]
    wanted += [(role, precision, graph) for role, graph in floats.items() for precision in offered["float_precisions"]]
    arms = []
    with how.progress.task(f"compile for {config.name}", total=len(wanted)) as task:
        for role, precision, graph in wanted:
            arms.append(_compile_arm(role, precision, graph, out_dir, device, program, target))
            if arms[-1]["error"] is not None:
                how.progress.say(f"{arms[-1]['arm']} cannot be compiled: {arms[-1]['error']}")
            task.advance()
    write_json(out_dir / "arms.json", arms)


def _platform(device: Device) -> Platform:
    """Whose processor the linter judges for; that of a board does not tell whether it saturates, so nothing is said of that."""
    return Platform() if isinstance(device, Local) else Platform(machine=str(device.facts()["arch"]), vnni=None)


def _compile_arm(
    role: str,
    precision: str,
    graph: ExportedModel,
    out_dir: Path,
    device: Device,
    program: str,
    target: Sequence[str],
) -> dict[str, Any]:
    name = f"{role}-{precision}"
    arm: dict[str, Any] = {
        "arm": f"{role} {precision}",
        "role": role,
        "precision": precision,
        "dir": name,
        "error": None,
    }
    compiled = device.scratch(out_dir / name)
    try:
        exported = ["--exported", device.put(graph.dir), "--precision", precision]
        run_program(device, program, ["compile", *target, *exported, "--out", compiled])
        device.get(compiled, out_dir / name)
        arm["placement"] = run_program(device, program, ["placement", "--compiled", compiled])
    except TargetError as error:
        if precision == "fp32":
            raise
        arm["error"] = str(error)
    return arm


def measure_target(
    config: BenchConfig,
    compiled: CompiledArms,
    prepared: PreparedData,
    out_dir: Path,
    how: How,
    device: Device,
) -> None:
    """Let every compiled arm answer the test split on the device, then measure all of them interleaved.

    Writes logits/<arm>/*.npy, raw_bytes/<arm>/*.npy (the samples that come as encoded bytes) and records.json.
    """
    arms = [arm for arm in compiled.arms if arm["error"] is None]
    program = device.put(pack_device_program(out_dir / PROGRAM))
    with how.progress.task(f"evaluate {compiled.name}", total=len(arms)) as task:
        for arm in arms:
            for source, folder in (("shards", "logits"), ("encoded", "raw_bytes")):
                _evaluate(compiled, arm, prepared, source, out_dir / folder / arm["dir"], device, program)
            task.advance()
    to_measure = [
        Arm(arm["arm"], compiled.dir / arm["dir"], prepared.evaluation_dir, Placement.from_json(arm["placement"]))
        for arm in arms
    ]
    with how.progress.task(f"measure {compiled.name}") as task:
        records = measure_arms(
            device,
            to_measure,
            preset=config.preset,
            launches=config.launches,
            seed=how.seed,
            out_dir=out_dir,
            on_progress=lambda done, total, detail: task.advance(1, f"{detail} ({done}/{total})"),
        )
    write_json(
        out_dir / "records.json", {arm.name: record.to_json() for arm, record in zip(to_measure, records, strict=True)}
    )


def _evaluate(
    compiled: CompiledArms,
    arm: Mapping[str, Any],
    prepared: PreparedData,
    source: str,
    out_dir: Path,
    device: Device,
    program: str,
) -> None:
    there = device.scratch(out_dir)
    argv = [
        "evaluate",
        "--compiled",
        device.put(compiled.dir / arm["dir"]),
        "--evaluation",
        device.put(prepared.evaluation_dir),
    ]
    answer = run_program(device, program, [*argv, "--out", there, "--source", source])
    for name in answer["outputs"].values():
        device.get(f"{there}/{name}", out_dir / name)
