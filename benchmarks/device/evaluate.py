"""What a compiled model answers on the evaluation set, sample by sample.

Reads a compiled model and an evaluation set (uint8 shards, or the encoded samples). Writes one .npy an output, N first.
The device computes no metric: the host does, over the same arrays for every hop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.preprocess import Evaluation, decode, geometric, load_evaluation, to_input
from targets import make_target
from targets.base import Array, CompiledModel, Preprocessing, Session, TensorSpec
from targets.errors import DataError, ModelError


def evaluate(
    compiled_dir: Path, evaluation_dir: Path, out_dir: Path, *, batch: int = 1, source: str = "shards"
) -> dict[str, Any]:
    """Run every sample and save each output as `<output>.npy`; returns {"outputs": {name: file}, "num_samples", "batch"}.

    `batch` counts where the graph leaves it free: at 1 the same kernels answer that latency is measured on. `source`:
    shards, or encoded, the way from raw bytes (the samples of `encoded_index`).
    """
    compiled = CompiledModel.load(compiled_dir)
    evaluation = evaluation_for(compiled, evaluation_dir)
    size = batch_of(compiled.inputs, batch)
    session = make_target(compiled.target, compiled.options).load(compiled, batch=size)
    batches = _encoded_batches(evaluation, session.inputs[0]) if source == "encoded" else None
    outputs = _run_all(session, batches or evaluation.batches(size, session.inputs[0]), size)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = _file_names(list(outputs))
    for name, values in outputs.items():
        np.save(out_dir / files[name], values)
    return {"outputs": files, "num_samples": len(next(iter(outputs.values()))), "batch": size}


def evaluation_for(compiled: CompiledModel, evaluation_dir: Path) -> Evaluation:
    """The evaluation set as this model takes it: the set's geometry, the model's mean and std (None: its graph normalises).

    Raises ModelError for a model of several inputs: an evaluation set feeds one.
    """
    if len(compiled.inputs) != 1:
        raise ModelError(
            f"{compiled.name} has {len(compiled.inputs)} inputs, an evaluation set feeds one. "
            "Measure it on synthetic values: leave the evaluation set away."
        )
    evaluation = load_evaluation(evaluation_dir)
    model = compiled.preprocessing or Preprocessing()
    return replace(evaluation, preprocessing=replace(evaluation.preprocessing, mean=model.mean, std=model.std))


def pixels_of(encoded: bytes, preprocessing: Preprocessing) -> Array:
    """Encoded bytes -> uint8 (1, C, H, W)."""
    image_HWC = geometric(decode(encoded, preprocessing.mode), preprocessing)
    return np.ascontiguousarray(image_HWC.transpose(2, 0, 1))[None]


def batch_of(inputs: Sequence[TensorSpec], wanted: int) -> int:
    """`wanted` where every input leaves its first axis free, else the size that the graph fixes."""
    fixed = [spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None]
    return fixed[0] if fixed else wanted


def padded(x: Array, batch: int) -> Array:
    """`x` with its last sample repeated up to `batch` samples."""
    missing = batch - len(x)
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing > 0 else x


def _run_all(session: Session, batches: Iterator[Array], size: int) -> dict[str, Array]:
    """Every output over all samples, (N, ...). Session outputs are views that the next call overwrites: copied."""
    parts: dict[str, list[Array]] = {spec.name: [] for spec in session.outputs}
    for x in batches:
        outputs = session.run({session.inputs[0].name: padded(x, size)})
        for name, collected in parts.items():
            if len(outputs[name]) != size:
                raise ModelError(
                    f"output '{name}' has {len(outputs[name])} rows for {size} samples: it is not one answer a sample. "
                    "Evaluate a model whose outputs keep the batch axis first."
                )
            collected.append(np.array(outputs[name][: len(x)]))
    if not all(parts.values()):
        raise DataError("the evaluation set has no sample to run. Prepare the data again.")
    return {name: np.concatenate(collected) for name, collected in parts.items()}


def _encoded_batches(evaluation: Evaluation, spec: TensorSpec) -> Iterator[Array]:
    for encoded in evaluation.encoded():
        yield to_input(pixels_of(encoded, evaluation.preprocessing), evaluation.preprocessing, spec)


def _file_names(outputs: Sequence[str]) -> dict[str, str]:
    """A file an output; names that no file may have are replaced, and numbered so that they stay apart."""
    plain = {name: re.sub(r"[^A-Za-z0-9._-]", "_", name) for name in outputs}
    clash = len({name.lower() for name in plain.values()}) < len(plain)
    return {name: f"{f'{i}-' if clash else ''}{plain[name]}.npy" for i, name in enumerate(outputs)}
