"""The models: building them by name, their weights on disk, BatchNorm folding, and what is read off a finished one."""

from pipeline.learning.models.build import build_model
from pipeline.learning.models.folding import fold_batchnorm
from pipeline.learning.models.inference import Normalized, Renormalized, accuracy, as_named, predict
from pipeline.learning.models.size import count_macs, count_parameters
from pipeline.learning.models.weights import load_weights, save_weights

__all__ = [
    "Normalized",
    "Renormalized",
    "accuracy",
    "as_named",
    "build_model",
    "count_macs",
    "count_parameters",
    "fold_batchnorm",
    "load_weights",
    "predict",
    "save_weights",
]
