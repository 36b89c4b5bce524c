"""A trained model on disk: `model.safetensors` (unfolded) and what is needed to build the same architecture again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.learning.data import Data
from pipeline.learning.distributed import process_state
from pipeline.learning.models import (
    Renormalized,
    build_model,
    count_macs,
    count_parameters,
    load_weights,
    save_weights,
)
from pipeline.learning.own_code import PREFIX, code_digest
from pipeline.recipe import ModelConfig, NormalizationConfig, TeacherConfig
from targets.base import write_json
from targets.errors import RecipeError


def open_data(prepared: PreparedData) -> Data:
    """The prepared data on the device that learns: a GPU where there is one."""
    return Data.load(prepared, str(process_state().device))


def new_model(config: ModelConfig, data: Data, *, allow_code: bool, offline: bool) -> nn.Module:
    """The architecture of `config` with the data's channels, image size and classes; a teacher takes the data's normalization, whatever
    its own is."""
    model = build_model(
        config,
        channels=data.channels,
        image_size=data.image_size,
        num_classes=data.num_classes,
        allow_code=allow_code,
        offline=offline,
    )
    return model if (own := _normalization(config)) is None else _renormalized(model, own, data)


def save_trained(model: nn.Module, config: ModelConfig, data: Data, out_dir: Path, stage: str, **facts: Any) -> None:
    """Write the weights and `<stage>.json`; `facts` are what the stage has to say of itself."""
    save_weights(model, out_dir / "model.safetensors")
    write_json(out_dir / f"{stage}.json", {**describe(model, config, data), **facts})


def describe(model: nn.Module, config: ModelConfig, data: Data) -> Mapping[str, Any]:
    """Architecture, parameters, and multiply-accumulates a sample. Of a model of the person's own its source as well: what is
    made of its weights depends on code that is imported again, so whoever keys by this file must see it change."""
    code = {"code": code_digest(config.model)} if config.model.startswith(PREFIX) else {}
    own = _normalization(config)
    return {
        "model": config.model,
        "args": config.args,
        **code,
        **({"normalization": own.model_dump(mode="json")} if own is not None else {}),
        "parameters": count_parameters(model),
        "macs": count_macs(model, (data.channels, *data.image_size)),
    }


def load_trained(trained: TrainedModel, data: Data, *, allow_code: bool) -> nn.Module:
    """Build the architecture again and load its weights, strictly; in evaluation mode."""
    config = ModelConfig(model=trained.info["model"], args=trained.info["args"])
    model = new_model(config, data, allow_code=allow_code, offline=True)
    if (own := trained.info.get("normalization")) is not None:
        model = _renormalized(model, NormalizationConfig(**own), data)
    load_weights(model, trained.weights_path)
    return model.to(data.device).eval()


def _normalization(config: ModelConfig) -> NormalizationConfig | None:
    return config.normalization if isinstance(config, TeacherConfig) else None


def _renormalized(model: nn.Module, own: NormalizationConfig, data: Data) -> nn.Module:
    """`own` is what the model was trained with. Raises RecipeError where it is not of the data's channels."""
    for name, values in (("mean", own.mean), ("std", own.std)):
        if len(values) not in (1, data.channels):
            raise RecipeError(
                f"teacher.normalization.{name} has {len(values)} numbers, and the images have {data.channels} "
                f"channel{'s' if data.channels > 1 else ''}. Give one number for all channels, or one for each."
            )
    return Renormalized(model, mean=own.mean, std=own.std, given_mean=data.mean, given_std=data.std)
