"""Parts of the recipe that all trainings share: what a section is, how one training goes, and a model by its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1)]


def _all_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number that can be written down")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _all_finite(item)
    return value


# Keyword arguments as a YAML file can hold them: numbers, words, lists, sections; no dates, no bytes, no NaN.
Arguments = Annotated[dict[str, JsonValue], AfterValidator(_all_finite)]


class Section(BaseModel):
    """A part of the recipe: unknown keys, NaN and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainConfig(Section):
    """One training: optimizer, schedule, length."""

    epochs: Count = 10
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0.0)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0.0)
    milestones: tuple[Count, ...] = Field((), description="step: epochs after which the rate is multiplied by gamma")
    gamma: Positive = 0.1
    label_smoothing: Fraction = 0.0
    ema_decay: Fraction | None = Field(None, description="weight EMA; the averaged weights are evaluated and kept")
    grad_clip: Positive | None = Field(None, description="largest gradient norm")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where a short measurement is faster"
    )
    channels_last: bool = True

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> TrainConfig:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule: step needs milestones, the epochs after which the rate falls")
        if self.milestones and self.schedule != "step":
            raise ValueError(f"milestones belong to schedule: step, not to schedule: {self.schedule}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} leaves nothing of epochs={self.epochs}")
        return self


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


class NormalizationConfig(Section):
    """(pixel - mean) / std on pixels of 0 to 255: one number for all channels, or one a channel."""

    mean: Annotated[tuple[float, ...], BeforeValidator(_listed), Field(min_length=1)]
    std: Annotated[tuple[Positive, ...], BeforeValidator(_listed), Field(min_length=1)]


class ModelConfig(Section):
    """An architecture and, optionally, its weights."""

    model: str = Field(description="resnet8 ... wrn_40_2, torchvision:NAME, timm:NAME or python:package.module:factory")
    args: Arguments = Field(default_factory=dict, description="keyword arguments of the model's constructor")
    pretrained: bool = Field(False, description="start from the library's published weights")
    checkpoint: Path | None = Field(None, description="safetensors, or a torch file that loads with weights_only")
