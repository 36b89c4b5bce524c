"""Stage 3, quantize: a ladder. Fold BatchNorm, set ranges on calibration samples (PTQ), and train on (QAT) where that
does not pass the gate; the first rung that passes ships.

The float student teaches its quantized self at T = 1: a temperature that helps a float student destroys low-bit QAT
(facts of Distiller: 91.6 % at T = 1, 80.0 % at T = 5, CIFAR-10, w3a8). QAT is judged beside two controls: PTQ alone, and
the float student fine-tuned for as long, because part of QAT's gain is just more training.
Reads the data and the student. Writes the quantized model and quantize.json (rungs, controls, kernels).
"""
# Shapes: N samples, K classes.

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.data import Data
from pipeline.learning.fake_quantize import insert_fake_quantizers, kernels_in_use, pin_kernels, save_quantized
from pipeline.learning.losses import kd_loss
from pipeline.learning.models import fold_batchnorm
from pipeline.learning.soft_labels import validation_top1
from pipeline.learning.trained import describe, load_trained, open_data
from pipeline.learning.training import Loss, train
from pipeline.recipe import ModelConfig, QuantizeConfig
from pipeline.workspace import CHECKPOINT_DIR
from targets.base import write_json


def quantize(
    config: QuantizeConfig, scheme: str, prepared: PreparedData, student: TrainedModel, out_dir: Path, how: How
) -> None:
    data = open_data(prepared)
    pin_kernels(config.kernels)
    float_student = load_trained(student, data, allow_code=how.allow_code)
    float_top1 = validation_top1(float_student, data)
    quantized = _ptq(float_student, data, how)
    rungs = [_rung("ptq", validation_top1(quantized, data), float_top1, config)]
    controls: list[dict[str, Any]] = []
    training: dict[str, Any] | None = None
    if config.method == "qat" or (config.method == "ladder" and not rungs[0]["passed"]):
        trained = _train_on(quantized, float_student, data, config, out_dir, how, "qat")
        training = trained.summary()
        rungs.append(_rung("qat", validation_top1(quantized, data), float_top1, config))
        if config.controls:
            controls = _controls(float_student, rungs[0], data, config, out_dir, how)
    if rungs[-1]["passed"] is False:
        how.progress.say(_missed(rungs[-1], float_top1, config))
    save_quantized(quantized, out_dir, example=_example(data))
    write_json(
        out_dir / "quantize.json",
        {
            **describe(float_student, ModelConfig(model=student.info["model"], args=student.info["args"]), data),
            "scheme": scheme,
            "kernels": kernels_in_use(),
            "method": config.method,
            "shipped_rung": rungs[-1]["rung"],
            "passed": rungs[-1]["passed"],
            "top1_validation": rungs[-1]["top1_validation"],
            "top1_validation_float": float_top1,
            "rungs": rungs,
            "controls": controls,
            "training": training,
        },
    )


def _ptq(float_student: nn.Module, data: Data, how: How) -> nn.Module:
    """Fold, then set the ranges; calibration samples come from the train split."""
    folded = fold_batchnorm(float_student)
    with how.progress.task("calibrate"):
        batches = [batch.x_NCHW for batch in data.plain_batches("calibration", batch_size=64)]
        return insert_fake_quantizers(folded, batches, _example(data))


def _train_on(
    model: nn.Module,
    float_student: nn.Module,
    data: Data,
    config: QuantizeConfig,
    out_dir: Path,
    how: How,
    label: str,
) -> Any:
    """Fine-tune `model` on the float student's soft labels; QAT and its FP32 control differ in nothing but the model."""
    return train(
        model,
        data,
        _loss(config),
        config.train,
        seed=how.seed,
        checkpoint_dir=out_dir / CHECKPOINT_DIR / label.replace(" ", "-"),
        progress=how.progress,
        label=label,
        teacher=float_student,
    )


def _loss(config: QuantizeConfig) -> Loss:
    return partial(_soft_and_hard, kd_weight=config.kd_weight, label_smoothing=config.train.label_smoothing)


def _soft_and_hard(
    student_NK: torch.Tensor,
    teacher_NK: torch.Tensor | None,
    labels_N: torch.Tensor,
    *,
    kd_weight: float,
    label_smoothing: float,
) -> torch.Tensor:
    assert teacher_NK is not None  # _train_on always gives the float student
    return kd_loss(student_NK, teacher_NK, labels_N, temperature=1.0, weight=kd_weight, label_smoothing=label_smoothing)


def _controls(
    float_student: nn.Module,
    ptq: dict[str, Any],
    data: Data,
    config: QuantizeConfig,
    out_dir: Path,
    how: How,
) -> list[dict[str, Any]]:
    """What QAT must be compared with: the same start without training, and the same training without quantizers."""
    fine_tuned = copy.deepcopy(float_student).requires_grad_(True)
    trained = _train_on(fine_tuned, float_student, data, config, out_dir, how, "fp32 control")
    return [
        {"name": "PTQ only", "top1_validation": ptq["top1_validation"]},
        {
            "name": "FP32 fine-tune of the same length",
            "top1_validation": validation_top1(fine_tuned, data),
            "training": trained.summary(),
        },
    ]


def _rung(name: str, top1: float | None, float_top1: float | None, config: QuantizeConfig) -> dict[str, Any]:
    """A rung of the ladder and whether it keeps to the gate: None where there is no validation split to tell by."""
    passed = None if top1 is None or float_top1 is None else top1 >= float_top1 - config.max_drop
    return {"rung": name, "top1_validation": top1, "passed": passed}


def _missed(rung: dict[str, Any], float_top1: float | None, config: QuantizeConfig) -> str:
    return (
        f"quantize: {rung['rung']} has {rung['top1_validation']:.2%} on validation, the float student {float_top1:.2%}: "
        f"more than the {100 * config.max_drop:.2f} points that may be lost. The gate on the device decides."
    )


def _example(data: Data) -> torch.Tensor:
    return torch.zeros(1, data.channels, *data.image_size)
