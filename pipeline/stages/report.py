"""Stage 9, report: everything that was found, as one JSON document and one page drawn from it.

Reads the JSON of the other stages. Writes summary.json, index.html and report.md.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.device.environment import environment
from benchmarks.report import render_report
from pipeline.artifacts import Measured, PreparedData, TrainedModel, Verdict
from pipeline.recipe import Recipe

LIBRARIES = ("torch", "torchvision", "timm", "nncf", "onnx", "onnxruntime", "openvino", "numpy")
DATA_KEYS = ("source", "num_classes", "num_train", "num_validation", "num_calibration", "num_test")


def write_report(
    recipe: Recipe,
    prepared: PreparedData,
    trained: Mapping[str, TrainedModel],
    verdicts: Mapping[str, Verdict],
    measured: Mapping[str, Measured],
    out_dir: Path,
    *,
    seconds: float,
) -> None:
    """trained: stage (teacher, distill, or a scheme's name for its quantized student) -> model; seconds: what all stages took."""
    render_report(summarize(recipe, prepared, trained, verdicts, measured, seconds), out_dir)


def summarize(
    recipe: Recipe,
    prepared: PreparedData,
    trained: Mapping[str, TrainedModel],
    verdicts: Mapping[str, Verdict],
    measured: Mapping[str, Measured],
    seconds: float,
) -> dict[str, Any]:
    """The report's document, schema 1: what `benchmarks/report.py` draws."""
    info = prepared.info
    return {
        "schema_version": 1,
        "name": recipe.name,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "edgestill": metadata.version("edgestill"),
        "marked": "smoke" if recipe.bench.preset == "smoke" else None,
        "machine": _machine(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            **{key: info[key] for key in DATA_KEYS},
            "image": [info["channels"], info["height"], info["width"]],
        },
        "models": [_model(role, trained[stage]) for role, stage in (("teacher", "teacher"), ("student", "distill"))],
        "ledgers": {name: verdict.info["ledger"] for name, verdict in verdicts.items()},
        "lost_most": {name: verdict.info["lost_most"] for name, verdict in verdicts.items()},
        "targets": [_target(name, verdict) for name, verdict in verdicts.items()],
        "quantized": [
            _quantized(scheme, trained[scheme]) for scheme in trained if scheme not in ("teacher", "distill")
        ],
        "training": [curve for stage, model in trained.items() for curve in _training(stage, model)],
        "rounds": [_round(one) for one in trained["distill"].info["rounds"]],
    }


def _machine() -> dict[str, Any]:
    """CPU, cores, memory, system: what the measurements hold for."""
    hard = environment().hard
    memory = hard.get("ram_mib")
    return {
        "cpu": hard.get("cpu"),
        "cores": len(hard["cpus_allowed"]),
        "memory_gib": round(memory / 1024, 1) if memory else None,
        "os": _system(),
        "python": hard.get("python"),
    }


def _system() -> str:
    """Name and version of the system, as it calls itself."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _model(role: str, model: TrainedModel) -> dict[str, Any]:
    info = model.info
    return {
        "role": role,
        "name": info["model"],
        "parameters": info["parameters"],
        "macs": info["macs"],
        "top1_validation": info.get("top1_validation"),
    }


def _target(name: str, verdict: Verdict) -> dict[str, Any]:
    info = verdict.info
    return {
        "target": name,
        **{key: info[key] for key in ("shipped", "why", "gates", "rows", "placement", "int8_against_float")},
        "bundle": f"bundles/{name}" if info["exit"] is None else None,
    }


def _training(stage: str, model: TrainedModel) -> list[dict[str, Any]]:
    """The training curves of a stage: one a round of distillation, one for QAT; none where nothing was trained."""
    info = model.info
    if stage == "distill":
        several = len(info["rounds"]) > 1
        return [_curve(f"distill, round {one['round']}" if several else "distill", one, info) for one in info["rounds"]]
    if info["training"] is None:
        return []
    return [_curve("teacher" if stage == "teacher" else "quantize", info["training"], info)]


def _quantized(scheme: str, model: TrainedModel) -> dict[str, Any]:
    """The ladder of a scheme, rung by rung, and the controls beside it; all of it on the validation split."""
    info = model.info
    return {
        "scheme": scheme,
        "shipped_rung": info["shipped_rung"],
        "float_top1_validation": info["top1_validation_float"],
        "rungs": info["rungs"],
        "controls": [{key: control[key] for key in ("name", "top1_validation")} for control in info["controls"]],
    }


def _curve(stage: str, training: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    controls = [{key: control[key] for key in ("name", "top1_validation")} for control in info.get("controls", [])]
    notes = [f"trained in {training['precision']}"]
    if training.get("warning"):
        notes.append(training["warning"])
    if "kernels" in info:
        notes.append(f"fake-quantize kernels: {info['kernels']}; the rung that ships: {info['shipped_rung']}")
    return {
        "stage": stage,
        "epochs": training["epochs"],
        "best_epoch": training["best_epoch"],
        "controls": controls,
        "notes": notes,
    }


def _round(one: Mapping[str, Any]) -> dict[str, Any]:
    return {key: one[key] for key in ("round", "validation_top1", "soft_labels_from")}
