"""A trained model as it is deployed: on pixels, with the normalisation inside, in evaluation mode."""

from __future__ import annotations

from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.learning.data import Data
from pipeline.learning.fake_quantize import load_quantized
from pipeline.learning.models import Normalized, fold_batchnorm
from pipeline.learning.trained import load_trained
from targets.base import Preprocessing, preprocessing_from_json


def float_model(trained: TrainedModel, data: Data, *, allow_code: bool) -> nn.Module:
    """uint8 pixels (N, C, H, W) -> logits (N, K), BatchNorm folded."""
    return on_pixels(fold_batchnorm(load_trained(trained, data, allow_code=allow_code)), data)


def quantized_model(quantized: TrainedModel, student: TrainedModel, data: Data, *, allow_code: bool) -> nn.Module:
    """The student with its fake quantizers on normalised input (N, C, H, W), weights as they were saved."""
    folded = fold_batchnorm(load_trained(student, data, allow_code=allow_code))
    return load_quantized(folded, quantized.dir).eval()


def on_pixels(net: nn.Module, data: Data) -> nn.Module:
    """`net` behind the data's normalisation."""
    return Normalized(net, data.mean, data.std).eval()


def preprocessing_of(prepared: PreparedData) -> Preprocessing:
    """What the device does to an image before the graph, which normalises by itself."""
    return preprocessing_from_json(prepared.info["preprocessing"])
