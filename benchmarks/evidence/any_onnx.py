"""A detector and a segmenter through `edgestill quantize`: several outputs, no labels, a metric of one's own.

    python -m benchmarks.evidence.any_onnx --images DIR --out docs/results/any_onnx.json

DIR: photographs. torchvision's ssdlite320_mobilenet_v3_large (its heads, without NMS) and lraspp_mobilenet_v3_large, at 320
pixels, with seeded random weights whose BatchNorms have seen the photographs: nothing here says how well they detect. It says
that the way holds: lint, placement, each output's cosine and largest difference hop by hop, latency (preset smoke).
"""
# Shapes: N batch, C channels, H height, W width, K classes, A anchors.

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.evidence.models import calibrate_batchnorm, photographs
from benchmarks.evidence.script import quantize
from targets.base import Array, Preprocessing, read_json, write_json

if TYPE_CHECKING:
    from torch import nn

SIZE, SEED, OPSET = 320, 0, 17
PREPROCESSING = Preprocessing(
    resize=SIZE, crop=(SIZE, SIZE), mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
)
TARGETS = ("openvino-cpu", "onnxruntime-cpu")
OUTPUTS = {"ssdlite320_mobilenet_v3_large": ("boxes", "scores"), "lraspp_mobilenet_v3_large": ("segmentation",)}
METRICS = {"lraspp_mobilenet_v3_large": "python:benchmarks.evidence.any_onnx:mean_iou"}
KEPT = ("rungs", "findings", "differences", "rewrites", "placement", "rows", "ships", "why", "error", "exit_code")

Answers = Mapping[str, Sequence[Array]]


def mean_iou() -> Callable[[Answers, Answers], float]:
    """For `edgestill quantize --metric`: intersection over union of float's and INT8's class maps (K, H, W), mean over the
    classes that float has seen."""
    return _mean_iou


def _mean_iou(expected: Answers, got: Answers) -> float:
    (name,) = expected
    before = np.concatenate([scores.argmax(1).reshape(-1) for scores in expected[name]])
    after = np.concatenate([scores.argmax(1).reshape(-1) for scores in got[name]])
    shares = [
        float(((before == k) & (after == k)).sum() / ((before == k) | (after == k)).sum()) for k in np.unique(before)
    ]
    return float(np.mean(shares))


def main(argv: Sequence[str]) -> None:
    """Export both nets, run the command for each target, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print a stored result")
    arguments = parser.parse_args(argv)
    if arguments.show:
        print(text(read_json(arguments.show)["models"]))
        return
    if not (arguments.images and arguments.out):
        parser.error("--images and --out are needed, or --show FILE")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in OUTPUTS:
            path = Path(folder) / f"{name}.onnx"
            export(name, arguments.images, path)
            found[name] = {target: quantize_net(path, target, arguments.images, Path(folder)) for target in TARGETS}
    weights = "random, seeded; BatchNorm statistics from the photographs"
    write_json(arguments.out, {"schema_version": 1, "weights": weights, "size": SIZE, "models": found})
    print(text(found))


def export(name: str, images: Path, path: Path) -> None:
    """Write the net as ONNX: normalised float (1, 3, 320, 320) to its raw outputs."""
    import torch

    torch.manual_seed(SEED)
    model = _net(name)
    calibrate_batchnorm(model, photographs(images, PREPROCESSING))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the tracing exporter
        torch.onnx.export(
            model.eval(),
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS[name]),
        )


def _net(name: str) -> nn.Module:
    import torchvision
    from torch import Tensor, nn

    built = torchvision.models.get_model(name, weights=None, weights_backbone=None)

    class Heads(nn.Module):
        """Boxes (N, A, 4) and scores (N, A, K) of the detector, class maps (N, K, H, W) of the segmenter."""

        def __init__(self) -> None:
            super().__init__()
            self.net = built

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            if "segmentation" in OUTPUTS[name]:
                return (self.net(x)["out"],)
            heads = self.net.head(list(self.net.backbone(x).values()))
            return heads["bbox_regression"], heads["cls_logits"]

    return Heads()


def quantize_net(path: Path, target: str, images: Path, folder: Path) -> dict[str, Any]:
    """What the report of the command says of it."""
    options = ["--samples", "100"]
    if metric := METRICS.get(path.stem):
        options += ["--metric", metric, "--min-metric", "0.2", "--allow-code"]
    else:  # random weights: whether INT8 is like float is told, and not gated
        options += ["--min-cosine", "0"]
    report = quantize(path, PREPROCESSING, target, images, folder / f"{path.stem}-{target}", *options)
    return {key: report.get(key) for key in KEPT}


def text(found: Mapping[str, Any]) -> str:
    """A line an output, in Markdown."""
    lines = [
        "| net | target | INT8 MACs | output | cosine | max delta | ships |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, targets in found.items():
        for target, report in targets.items():
            for row in report["differences"] or []:
                if (row["hop"], row["against"]) != ("INT8, compiled", "float graph"):
                    continue
                share = f"{report['placement']['int8_share']:.1%}"
                cells = [name, target, share, row["name"], f"{row['cosine_mean']:.4f}", f"{row['max_abs_delta']:.3g}"]
                lines.append(f"| {' | '.join([*cells, report['ships'] or 'no INT8'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
