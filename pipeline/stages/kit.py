"""Stage 6, kit: for a device that is not connected here, everything that its first run needs (benchmarks/device/first_run.py).

Reads exported graphs, an evaluation set and the accuracy to expect. Writes kit/ (kit.json, int8/, float/, evaluation/,
expected.json) and edgestill-device.pyz. Nothing was compiled or measured for it: the kit says so by what it holds.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.first_run import SCHEMA_VERSION
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.statistics import wilson_interval
from pipeline.artifacts import ExportedModel, PreparedData, Scores
from pipeline.calibration import layout_of
from pipeline.recipe import TargetConfig
from targets.base import Array, Exported, Preprocessing, TensorSpec, read_json, write_json

KIT = "kit"


def kit_of_run(
    target: TargetConfig,
    int8: ExportedModel,
    floats: ExportedModel,
    onnx_scores: Scores,
    prepared: PreparedData,
    out_dir: Path,
) -> None:
    """A recipe's kit: the student, the whole test split, and the top-1 that its INT8 graph reached node by node."""
    write_kit(
        out_dir,
        name=int8.exported.name,
        target=target.name,
        options=target.options,
        min_int8_share=target.min_int8_share,
        int8_dir=int8.dir,
        float_dir=floats.dir,
        evaluation_dir=prepared.evaluation_dir,
        expected=read_json(onnx_scores.dir / "expected.json"),
    )


def kit_of_graph(
    out_dir: Path,
    *,
    target: TargetConfig,
    floats: Exported,
    samples: Sequence[Mapping[str, Array]],
    preprocessing: Preprocessing | None,
    agreement: float | None,
) -> None:
    """A kit for the INT8 graph that lies in `out_dir`; `agreement` with float on `samples` is what the device has to reach.

    Without `preprocessing` the samples are no images, and nothing is asked of the device but to build, place and measure.
    """
    expected = None
    with tempfile.TemporaryDirectory() as scratch:
        evaluation_dir = None if preprocessing is None else Path(scratch) / "evaluation"
        if preprocessing is not None and evaluation_dir is not None:
            spec = replace(floats.inputs[0], layout=layout_of(floats.inputs[0]) or "")
            write_evaluation(evaluation_dir, samples, spec, preprocessing)
            if agreement is not None:
                expected = {"metric": "agreement", **_reached(agreement, sum(len(one[spec.name]) for one in samples))}
        int8_dir = Path(scratch) / "int8"
        shutil.copytree(out_dir, int8_dir)
        write_kit(
            out_dir,
            name=floats.name,
            target=target.name,
            options=target.options,
            min_int8_share=target.min_int8_share,
            int8_dir=int8_dir,
            float_dir=floats.directory,
            evaluation_dir=evaluation_dir,
            expected=expected,
        )


def _reached(share: float, num_samples: int) -> dict[str, Any]:
    """A share with the half width of its 95 % interval as tolerance."""
    low, high = wilson_interval(round(share * num_samples), num_samples)
    return {"value": share, "n": num_samples, "tolerance": (high - low) / 2}


def write_kit(
    out_dir: Path,
    *,
    name: str,
    target: str,
    options: Mapping[str, Any],
    min_int8_share: float,
    int8_dir: Path,
    float_dir: Path,
    evaluation_dir: Path | None = None,
    expected: Mapping[str, Any] | None = None,
) -> Path:
    """Write kit and program into `out_dir`; returns the kit. `expected`: metric, value, n, tolerance of the INT8 graph."""
    kit_dir = out_dir / KIT
    shutil.copytree(int8_dir, kit_dir / "int8", ignore=shutil.ignore_patterns("stage.json"))
    shutil.copytree(float_dir, kit_dir / "float", ignore=shutil.ignore_patterns("stage.json"))
    if evaluation_dir is not None:
        shutil.copytree(evaluation_dir, kit_dir / "evaluation")
    if expected is not None:
        write_json(kit_dir / "expected.json", dict(expected))
    told = {"schema_version": SCHEMA_VERSION, "name": name, "target": target, "options": dict(options)}
    write_json(kit_dir / "kit.json", {**told, "min_int8_share": min_int8_share})
    pack_device_program(out_dir / PROGRAM)
    return kit_dir


def write_evaluation(
    directory: Path, samples: Sequence[Mapping[str, Array]], spec: TensorSpec, preprocessing: Preprocessing
) -> None:
    """Samples of one image input back to pixels, as an evaluation set without labels: what a kit for anybody's model asks.

    Each sample is (1, C, H, W) or (1, H, W, C) of normalised floats or of pixels; (pixel - mean) / std is undone exactly, for
    pixels are whole numbers.
    """
    directory.mkdir(parents=True)
    x = np.concatenate([sample[spec.name] for sample in samples])
    x_NCHW = x.transpose(0, 3, 1, 2) if spec.layout == "NHWC" else x
    if preprocessing.mean is not None and preprocessing.std is not None:
        mean, std = (np.asarray(values).reshape(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        x_NCHW = x_NCHW * std + mean
    np.save(directory / "x-000.npy", np.ascontiguousarray(np.rint(x_NCHW).clip(0, 255).astype(np.uint8)))
    told = {"num_samples": len(x), "classes": [], "preprocessing": asdict(preprocessing), "shards": ["x-000.npy"]}
    write_json(directory / "spec.json", {**told, "encoded": [], "encoded_index": []})
