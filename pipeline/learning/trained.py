"""A trained model on disk: `model.safetensors` (unfolded) and what is needed to build the same architecture again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.learning.data import Data
from pipeline.learning.distributed import process_state
from pipeline.learning.models import build_model, count_macs, count_parameters, load_weights, save_weights
from pipeline.learning.own_code import PREFIX, code_digest
from pipeline.recipe import ModelConfig
from targets.base import write_json


def open_data(prepared: PreparedData) -> Data:
    """The prepared data on the device that learns: a GPU where there is one."""
    return Data.load(prepared, str(process_state().device))


def new_model(config: ModelConfig, data: Data, *, allow_code: bool, offline: bool) -> nn.Module:
    """The architecture of `config` with the data's channels, image size and classes."""
    return build_model(
        config,
        channels=data.channels,
        image_size=data.image_size,
        num_classes=data.num_classes,
        allow_code=allow_code,
        offline=offline,
    )


def save_trained(model: nn.Module, config: ModelConfig, data: Data, out_dir: Path, stage: str, **facts: Any) -> None:
    """Write the weights and `<stage>.json`; `facts` are what the stage has to say of itself."""
    save_weights(model, out_dir / "model.safetensors")
    write_json(out_dir / f"{stage}.json", {**describe(model, config, data), **facts})


def describe(model: nn.Module, config: ModelConfig, data: Data) -> Mapping[str, Any]:
    """Architecture, parameters, and multiply-accumulates a sample. Of a model of the person's own its source as well: what is
    made of its weights depends on code that is imported again, so whoever keys by this file must see it change."""
    code = {"code": code_digest(config.model)} if config.model.startswith(PREFIX) else {}
    return {
        "model": config.model,
        "args": config.args,
        **code,
        "parameters": count_parameters(model),
        "macs": count_macs(model, (data.channels, *data.image_size)),
    }


def load_trained(trained: TrainedModel, data: Data, *, allow_code: bool) -> nn.Module:
    """Build the architecture again and load its weights, strictly; in evaluation mode."""
    config = ModelConfig(model=trained.info["model"], args=trained.info["args"])
    model = new_model(config, data, allow_code=allow_code, offline=True)
    load_weights(model, trained.weights_path)
    return model.to(data.device).eval()
