"""One graph on one target: compiled, where its layers run, what it answers on held-out images against float.

Everything runs in the device program, in fresh processes: a graph that crashes a runtime is a row with an error. Writes
compiled/ (what is measured later), answers/ (one .npy an output) and exported.json.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.devices import Device, Local, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.peers.images import Images
from benchmarks.statistics import mcnemar_exact_p, paired_difference, wilson_interval
from targets.base import Array, CompiledModel, Exported, Placement, Preprocessing, TensorSpec
from targets.errors import ModelError

INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where graphs are tried: a device with the packed program, and the threads that a runtime may use there."""

    device: Device
    program: str
    num_threads: int

    def ask(self, command: str, *arguments: str) -> dict[str, Any]:
        return run_program(self.device, self.program, [command, *arguments])

    def float_precisions(self, target: str) -> tuple[str, ...]:
        return tuple(self.ask("probe", "--target", target)["float_precisions"])


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one graph on one target; `outputs` are the answers, (N, ...) an output."""

    compiled_dir: Path
    placement: Placement
    num_bytes: int
    outputs: Mapping[str, Array]

    @property
    def convolutions(self) -> tuple[int, int]:
        """(in INT8, all): ConvInteger and QLinearConv of ONNX Runtime, INT8 Convolution of OpenVINO."""
        layers = [layer for layer in self.placement.layers if "onv" in layer.op]
        return sum(layer.precision == INT8 for layer in layers), len(layers)


@contextmanager
def local_bench(num_threads: int) -> Iterator[Bench]:
    """This machine."""
    with tempfile.TemporaryDirectory() as folder:
        program = pack_device_program(Path(folder) / PROGRAM)
        yield Bench(device=Local(), program=str(program), num_threads=num_threads)


def specs_of(model: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a float ONNX graph; a free axis is None. Raises ModelError where it cannot be read."""
    import onnx

    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:  # protobuf's own class, OSError
        raise ModelError(f"{model} cannot be read as ONNX: {error}. Name a float ONNX file.") from None
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_spec(value) for value in graph.input if value.name not in weights)
    return inputs, tuple(_spec(value) for value in graph.output)


def try_graph(
    bench: Bench,
    model: Path,
    floats: Path,
    *,
    target: str,
    precision: str,
    preprocessing: Preprocessing,
    images: Images,
    out_dir: Path,
) -> Trial:
    """Compile `model` (ONNX, or OpenVINO's IR on that target), read its placement, ask it every held-out image.

    `floats` is the graph that it was made from and gives the names and shapes of its tensors. Raises TargetError or
    DeviceError in the runtime's words.
    """
    inputs, outputs = specs_of(floats)
    exported = Exported(
        name=model.parent.name,
        onnx_path=str(model.absolute()),
        inputs=inputs,
        outputs=outputs,
        scheme="as given" if precision == INT8 else None,
        preprocessing=preprocessing,
        directory=out_dir,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    exported.save()
    compiled = out_dir / "compiled"
    options = json.dumps({"num_threads": bench.num_threads})
    where = ["--target", target, "--options", options, "--exported", str(out_dir), "--precision", precision]
    bench.ask("compile", *where, "--out", str(compiled))
    placement = Placement.from_json(bench.ask("placement", "--compiled", str(compiled)))
    evaluation = ["--evaluation", str(images.evaluation_dir), "--out", str(out_dir / "answers")]
    answer = bench.ask("evaluate", "--compiled", str(compiled), *evaluation)
    return Trial(
        compiled_dir=compiled,
        placement=placement,
        num_bytes=CompiledModel.load(compiled).size_bytes,
        outputs={name: np.load(out_dir / "answers" / file) for name, file in answer["outputs"].items()},
    )


def cosines(floats: Mapping[str, Array], others: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """An output: mean and minimum over the samples of the cosine with float; nan is told as 0.0 (a vector of zeros)."""
    return {name: _cosine(floats[name], others[name]) for name in floats}


def agreement(floats_NK: Array, others_NK: Array) -> dict[str, Any]:
    """Share of samples with the same top-1 as float."""
    return share(floats_NK.argmax(1) == others_NK.argmax(1))


def accuracy(floats_NK: Array, others_NK: Array, labels_N: Array) -> dict[str, Any]:
    """Top-1 of both on the same samples, their difference with its interval, and McNemar's exact two-sided p."""
    right_N, right_float_N = others_NK.argmax(1) == labels_N, floats_NK.argmax(1) == labels_N
    difference, interval = paired_difference(right_float_N, right_N)
    lost, won = int((right_float_N & ~right_N).sum()), int((right_N & ~right_float_N).sum())
    return {
        "float": share(right_float_N),
        "int8": share(right_N),
        "difference": difference,
        "difference_ci95": list(interval),
        "mcnemar_p": mcnemar_exact_p(lost, won),
    }


def share(hits_N: Array | Sequence[bool]) -> dict[str, Any]:
    """A proportion with its Wilson interval."""
    num_hits, n = int(np.sum(hits_N)), len(hits_N)
    return {"value": num_hits / n, "n": n, "ci95": list(wilson_interval(num_hits, n))}


def _cosine(floats: Array, others: Array) -> dict[str, float]:
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (floats, others))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine_N = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    return {"mean": float(cosine_N.mean()), "min": float(cosine_N.min())}


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
