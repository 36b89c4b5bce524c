"""The first step of a model in the matrix: its float graph, once for all runtimes.

Reads a net that a library builds, or an ONNX file. Writes model.onnx and exported.json. Random weights are seeded and their
BatchNorms have seen the samples, else activations would grow from layer to layer and no quantizer would stand a chance. A net
that trains with branches side by side (RepVit, FastViT) is folded to the form that it runs in.
"""
# Shapes: N samples, C channels, H height, W width.

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.evidence.models import INPUT, calibrate_batchnorm, export_net
from pipeline.calibration import Calibration
from pipeline.graphs.files import describe
from pipeline.matrix.recipe import PRETRAINED, InputConfig, ModelEntry
from pipeline.own_graph import check_runs, float_graph, import_float
from pipeline.recipe import ModelConfig
from targets.base import TensorSpec

if TYPE_CHECKING:
    from torch import nn


def inputs_of(entry: ModelEntry, pixels: InputConfig) -> Sequence[TensorSpec]:
    """What the model takes, before anything is built. Raises ModelError for a file that is no float ONNX graph."""
    if entry.by_name:
        return (replace(INPUT, shape=(None, 3, pixels.size, pixels.size)),)
    path = Path(entry.model or "")
    return describe(float_graph(path), name=entry.name, out_dir=path.parent).inputs


def write_float(
    entry: ModelEntry,
    pixels: InputConfig,
    calibration: Calibration,
    out_dir: Path,
    *,
    seed: int,
    offline: bool,
    half: bool,
) -> None:
    """Write the float graph of `entry` as the targets take it. Raises ModelError where it cannot be built, loaded or run."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(entry.model or "")
        if entry.by_name:
            path = Path(scratch) / "net.onnx"
            export_net(_net(entry, pixels, calibration, seed=seed, offline=offline), path, size=pixels.size)
        exported = replace(import_float(path, calibration, out_dir, half=half), name=entry.name)
    exported.save()
    check_runs(exported, calibration.samples[0])


def _net(entry: ModelEntry, pixels: InputConfig, calibration: Calibration, *, seed: int, offline: bool) -> nn.Module:
    import torch
    from timm.utils import reparameterize_model

    from pipeline.learning.models import build_model

    config = ModelConfig(
        model=str(entry.model), args=entry.args, pretrained=entry.weights == PRETRAINED, checkpoint=entry.file
    )
    torch.manual_seed(seed)
    size = (pixels.size, pixels.size)
    net = build_model(config, channels=3, image_size=size, num_classes=entry.num_classes, offline=offline)
    if entry.random_weights:
        _open_closed_branches(net)
        calibrate_batchnorm(net, np.concatenate([sample[INPUT.name] for sample in calibration.samples]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded: nn.Module = reparameterize_model(net.eval())
    return folded


def _open_closed_branches(net: nn.Module) -> None:
    """Norms that begin at zero (the last of a residual branch, in RepVit and timm's ResNets) begin at one: else their branch
    is all zeros, the exporter keeps one copy of such weights, and the file is smaller than the trained net's."""
    import torch

    for name, parameter in net.named_parameters():
        if name.endswith("weight") and parameter.ndim == 1 and not parameter.any():
            torch.nn.init.ones_(parameter)
