"""What a compiled model answers to samples of any form: any number of inputs, any shapes, no labels.

Reads a compiled model and an NPZ of inputs; writes an NPZ of outputs. In both, "i_s" is input or output number i of sample
number s, so that names that no archive may have do not matter and outputs may differ in size from sample to sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.evaluate import batch_of
from targets import make_target
from targets.base import Array, CompiledModel
from targets.errors import DataError


def answer(compiled_dir: Path, inputs_path: Path, out_path: Path) -> dict[str, Any]:
    """Run every sample; returns {"inputs": names, "outputs": names, "num_samples"}. Raises DataError for a foreign archive."""
    compiled = CompiledModel.load(compiled_dir)
    names = [spec.name for spec in compiled.inputs]
    outputs = [spec.name for spec in compiled.outputs]
    session = make_target(compiled.target, compiled.options).load(compiled, batch=batch_of(compiled.inputs, 1))
    answers: dict[str, Array] = {}
    with np.load(inputs_path, allow_pickle=False) as archive:
        num_samples = len(archive.files) // max(len(names), 1)
        for sample in range(num_samples):
            try:
                batch = {name: archive[f"{i}_{sample}"] for i, name in enumerate(names)}
            except KeyError as error:
                raise DataError(f"{inputs_path} has no array {error}: it was not written for this model.") from None
            values = session.run(batch)
            answers.update({f"{i}_{sample}": np.array(values[name]) for i, name in enumerate(outputs)})
    with out_path.open("wb") as file:
        np.savez(file, allow_pickle=False, **answers)
    return {"inputs": names, "outputs": outputs, "num_samples": num_samples}
