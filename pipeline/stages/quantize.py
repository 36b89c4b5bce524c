"""Stage 3, quantize: a ladder of four rungs; the first that passes the gate on validation ships, else the best one.

ptq         fold BatchNorm, set ranges on calibration samples
equalized   cross-layer equalization before that, and every bias corrected in order after it
qat         train on from the better of the two
mixed       from the best so far, the layers that cost the most go back to float: the fewest multiply-accumulates that pass

The float student teaches its quantized self at T = 1: a temperature that helps a float student destroys low-bit QAT
(facts of Distiller: 91.6 % at T = 1, 80.0 % at T = 5, CIFAR-10, w3a8). QAT is judged beside its controls: PTQ alone, QAT
without distillation, and the float student fine-tuned for as long, because part of QAT's gain is just more training.
Reads the data and the student. Writes the quantized model and quantize.json (rungs, controls, kernels).
"""
# Shapes: N samples, K classes.

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.graphs.mixed_precision import choose
from pipeline.how import How
from pipeline.learning.bias_correction import correct_biases
from pipeline.learning.data import Data
from pipeline.learning.fake_quantize import insert_fake_quantizers, kernels_in_use, pin_kernels, save_quantized
from pipeline.learning.losses import cross_entropy, kd_loss
from pipeline.learning.mixed_precision import QuantizedLayers, find_layers, in_float, sensitivities
from pipeline.learning.models import fold_batchnorm
from pipeline.learning.models.equalization import equalize
from pipeline.learning.soft_labels import validation_top1
from pipeline.learning.trained import describe, load_trained, open_data
from pipeline.learning.training import Loss, Trained, train
from pipeline.recipe import ModelConfig, QuantizeConfig
from pipeline.schemes import SEVEN_BITS, scheme_of
from pipeline.workspace import CHECKPOINT_DIR
from targets.base import write_json
from targets.errors import ModelError, RecipeError

RUNGS = {
    "ladder": ("ptq", "equalized", "qat", "mixed"),
    "ptq": ("ptq",),
    "equalized": ("ptq", "equalized"),
    "qat": ("ptq", "equalized", "qat"),
    "mixed": ("ptq", "equalized", "mixed"),
}
BATCH_SIZE = 64
NUM_PROBED_BATCHES = 2  # of the calibration samples, where each layer costs a pass of its own


@dataclass(frozen=True)
class _Job:
    """What every rung is made from and judged by."""

    config: QuantizeConfig
    scheme: str
    data: Data
    float_student: nn.Module
    float_top1: float | None
    out_dir: Path
    how: How


@dataclass(frozen=True)
class _Made:
    """A rung's model (None where there is no way to one), the float module that was quantized (None once it was trained),
    and what the rung has to say of itself."""

    model: nn.Module | None
    original: nn.Module | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class _Rung:
    """A rung that was tried. `passed` is None where there is no validation split to tell by."""

    name: str
    made: _Made
    top1: float | None
    passed: bool | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        judged = {"rung": self.name, "top1_validation": self.top1, "passed": self.passed, "seconds": self.seconds}
        return {**judged, **self.made.facts}


def quantize(
    config: QuantizeConfig, scheme: str, prepared: PreparedData, student: TrainedModel, out_dir: Path, how: How
) -> None:
    if scheme == SEVEN_BITS:
        how.progress.say(f"quantize: scheme {scheme}: {scheme_of(scheme).why}")
    data = open_data(prepared)
    pin_kernels(config.kernels)
    float_student = load_trained(student, data, allow_code=how.allow_code)
    job = _Job(config, scheme, data, float_student, validation_top1(float_student, data), out_dir, how)
    rungs = _climb(job)
    shipped = _shipped(rungs, config)
    controls = _controls(job, rungs) if config.controls else []
    if shipped.passed is False:
        how.progress.say(_missed(shipped, job))
    assert shipped.made.model is not None  # _shipped takes no other
    save_quantized(shipped.made.model, out_dir, example=_example(data), scheme=scheme)
    write_json(
        out_dir / "quantize.json",
        {
            **describe(float_student, ModelConfig(model=student.info["model"], args=student.info["args"]), data),
            "scheme": scheme,
            "kernels": kernels_in_use(),
            "method": config.method,
            "shipped_rung": shipped.name,
            "passed": shipped.passed,
            "top1_validation": shipped.top1,
            "top1_validation_float": job.float_top1,
            "rungs": [rung.to_json() for rung in rungs],
            "controls": controls,
            "training": next((rung.made.facts["training"] for rung in rungs if rung.name == "qat"), None),
        },
    )


def _climb(job: _Job) -> list[_Rung]:
    """Try the rungs in their order; the ladder ends with the first that passes."""
    names = RUNGS[job.config.method]
    if job.float_top1 is None:  # nothing tells which start is better
        names = tuple(name for name in names if name in ("ptq", job.config.method))
    if job.float_top1 is None and job.config.method == "mixed":
        raise RecipeError("quantize.method=mixed: data.validation=0 leaves nothing to choose layers by. Keep a share.")
    rungs: list[_Rung] = []
    for name in names:
        begun_s = time.perf_counter()
        made = _make(name, job, rungs)
        top1 = None if made.model is None else validation_top1(made.model, job.data)
        rungs.append(_Rung(name, made, top1, _passes(top1, job), time.perf_counter() - begun_s))
        job.how.progress.say(_line(rungs[-1], job))
        if job.config.method == "ladder" and rungs[-1].passed:
            break
    return rungs


def _make(name: str, job: _Job, rungs: Sequence[_Rung]) -> _Made:
    if name == "ptq":
        return _ptq(job)
    if name == "equalized":
        return _equalized(job)
    return _qat(job, _best(rungs)) if name == "qat" else _mixed(job, _best(rungs))


def _ptq(job: _Job) -> _Made:
    folded = fold_batchnorm(job.float_student)
    return _Made(_with_ranges(folded, job), folded, {})


def _equalized(job: _Job) -> _Made:
    """Where forward cannot be traced, the biases alone are corrected, and the rung says so."""
    original = fold_batchnorm(job.float_student)
    facts: dict[str, Any] = {}
    try:
        original, num_pairs = equalize(original)
        facts["equalized_pairs"] = num_pairs
    except ModelError as error:
        facts["not_equalized"] = str(error)
    quantized = _with_ranges(original, job)
    with job.how.progress.task("correct the biases"):
        facts["corrected_biases"] = correct_biases(quantized, original, _calibration(job.data)[:NUM_PROBED_BATCHES])
    return _Made(quantized, original, facts)


def _qat(job: _Job, start: _Rung) -> _Made:
    model = copy.deepcopy(start.made.model)
    assert model is not None  # _best takes no other
    trained = _train_on(model, job, "qat", job.config.kd_weight)
    return _Made(model, None, {"start": start.name, "training": trained.summary()})


def _mixed(job: _Job, start: _Rung) -> _Made:
    """A layer left in float has its weights as they are: the original ones, or those that QAT has trained."""
    quantized, original = start.made.model, start.made.original
    assert quantized is not None  # _best takes no other
    layers = find_layers(quantized, _example(job.data))
    with job.how.progress.task("ask each layer what it costs"):
        batches = _calibration(job.data)[:NUM_PROBED_BATCHES]
        asked = sensitivities(quantized, layers, job.float_student, batches, original)
    chosen: tuple[str, ...] | None = ()
    if not start.passed:
        with job.how.progress.task("choose the layers to leave in float"):
            chosen = choose(asked, partial(_passes_with, job, quantized, layers, original))
    facts: dict[str, Any] = {"start": start.name, "sensitivities": [asdict(layer) for layer in asked]}
    if chosen is None:
        return _Made(None, None, {**facts, "note": "missed even with every layer but one in float"})
    macs = sum(layers.macs[name] for name in chosen)
    share = macs / sum(layers.macs.values())
    facts |= {"layers_in_float": list(chosen), "macs_in_float": macs, "share_of_macs_in_float": share}
    return _Made(in_float(quantized, layers, chosen, original), None, facts)


def _passes_with(
    job: _Job, quantized: nn.Module, layers: QuantizedLayers, original: nn.Module | None, names: frozenset[str]
) -> bool:
    return bool(_passes(validation_top1(in_float(quantized, layers, names, original), job.data), job))


def _passes(top1: float | None, job: _Job) -> bool | None:
    """The gate of every rung, False for a rung without a model; None where there is no validation split."""
    if job.float_top1 is None:
        return None
    return top1 is not None and top1 >= job.float_top1 - job.config.max_drop


def _best(rungs: Sequence[_Rung]) -> _Rung:
    """The rung with the highest top-1 on validation; the earliest of equals, or where none was judged."""
    return max((rung for rung in rungs if rung.made.model is not None), key=lambda rung: rung.top1 or 0.0)


def _shipped(rungs: Sequence[_Rung], config: QuantizeConfig) -> _Rung:
    last = rungs[-1]
    forced = config.method != "ladder" and last.made.model is not None
    return last if last.passed or forced else _best(rungs)


def _with_ranges(folded: nn.Module, job: _Job) -> nn.Module:
    """Fake quantizers with ranges from the calibration samples, which come from the train split."""
    with job.how.progress.task("calibrate"):
        return insert_fake_quantizers(folded, _calibration(job.data), _example(job.data), job.scheme)


def _calibration(data: Data) -> list[torch.Tensor]:
    return [batch.x_NCHW for batch in data.plain_batches("calibration", batch_size=BATCH_SIZE)]


def _train_on(model: nn.Module, job: _Job, label: str, kd_weight: float) -> Trained:
    """Fine-tune `model` on the float student's soft labels; QAT and its FP32 control differ in nothing but the model. Without soft
    labels it learns from the samples that have a label."""
    return train(
        model,
        job.data if kd_weight else job.data.labelled(),
        _loss(job.config, kd_weight),
        job.config.train,
        seed=job.how.seed,
        checkpoint_dir=job.out_dir / CHECKPOINT_DIR / label.replace(" ", "-"),
        progress=job.how.progress,
        label=label,
        teacher=job.float_student if kd_weight else None,
    )


def _loss(config: QuantizeConfig, kd_weight: float) -> Loss:
    return partial(_soft_and_hard, kd_weight=kd_weight, label_smoothing=config.train.label_smoothing)


def _soft_and_hard(
    student_NK: torch.Tensor,
    teacher_NK: torch.Tensor | None,
    labels_N: torch.Tensor,
    *,
    kd_weight: float,
    label_smoothing: float,
) -> torch.Tensor:
    if teacher_NK is None:
        return cross_entropy(student_NK, labels_N, label_smoothing=label_smoothing)
    return kd_loss(student_NK, teacher_NK, labels_N, temperature=1.0, weight=kd_weight, label_smoothing=label_smoothing)


def _controls(job: _Job, rungs: Sequence[_Rung]) -> list[dict[str, Any]]:
    """What QAT must be compared with: no training, the same training without quantizers, and without the soft labels.

    None where there was no QAT.
    """
    names = [rung.name for rung in rungs]
    if "qat" not in names:
        return []
    fine_tuned = copy.deepcopy(job.float_student).requires_grad_(True)
    controls = [
        {"name": "PTQ only", "top1_validation": rungs[0].top1},
        _control("FP32 fine-tune of the same length", fine_tuned, job, "fp32 control", job.config.kd_weight),
    ]
    if job.config.kd_weight > 0 and job.data.num_labelled:
        start = copy.deepcopy(_best(rungs[: names.index("qat")]).made.model)
        assert start is not None  # _best takes no other
        controls.append(_control("QAT without distillation", start, job, "qat without distillation", 0.0))
    return controls


def _control(name: str, model: nn.Module, job: _Job, label: str, kd_weight: float) -> dict[str, Any]:
    trained = _train_on(model, job, label, kd_weight)
    return {"name": name, "top1_validation": validation_top1(model, job.data), "training": trained.summary()}


def _line(rung: _Rung, job: _Job) -> str:
    """A rung in one line for people."""
    told = f"quantize: {rung.name} in {rung.seconds:.1f} s"
    if rung.made.model is None:
        return f"{told}, {rung.made.facts['note']}"
    if "share_of_macs_in_float" in rung.made.facts:
        num_layers, share = len(rung.made.facts["layers_in_float"]), rung.made.facts["share_of_macs_in_float"]
        told += f", {num_layers} layers with {share:.1%} of the multiply-accumulates in float"
    if rung.top1 is None or job.float_top1 is None:
        return f"{told}, judged by nothing: there is no validation split"
    verdict = "passes" if rung.passed else "does not pass"
    return f"{told}, {rung.top1:.2%} on validation (float {job.float_top1:.2%}): {verdict}"


def _missed(rung: _Rung, job: _Job) -> str:
    return (
        f"quantize: {rung.name} has {rung.top1:.2%} on validation, the float student {job.float_top1:.2%}: "
        f"more than the {100 * job.config.max_drop:.2f} points that may be lost. The gate on the device decides."
    )


def _example(data: Data) -> torch.Tensor:
    return torch.zeros(1, data.channels, *data.image_size)
