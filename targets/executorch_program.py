"""From an ONNX file to the bytes of an ExecuTorch program (.pte) whose operators XNNPACK runs.

Shapes are fixed: a program has one batch. Host only: imports torch, onnx and ExecuTorch's exporter, so the target imports
it when it compiles.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from targets.base import Array, Batch, TensorSpec
from targets.errors import TargetError, first_line
from targets.executorch_graph import OnnxModule

OUTPUT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


SEED = 0


@dataclass(frozen=True)
class Program:
    """A .pte, and what torch answers to one input before the exporter: whoever runs the program can see that it is the same."""

    pte: bytes
    sample: Batch
    answers: tuple[Array, ...]


def make_program(path: Path, inputs: Sequence[TensorSpec], name: str, *, half: bool = False) -> Program:
    """`half`: float16 between inputs and outputs. Raises TargetError with the node that cannot be, or with the exporter's
    own words."""
    module = OnnxModule(_read(path, name), torch.float16 if half else torch.float32).eval()
    sample = sample_of(inputs)
    example = tuple(torch.from_numpy(array) for array in sample.values())
    with _quiet(), torch.no_grad():
        try:
            answers = tuple(answer.numpy() for answer in module(*example))
            return Program(_lower(module, example), sample, answers)
        except TargetError as error:
            raise TargetError(f"{name}: {error}") from None
        except Exception as error:  # torch, its exporter and ExecuTorch have no base class in common
            raise TargetError(
                f"{name}: ExecuTorch cannot compile the graph: {first_line(error)}. "
                "Export with plainer operators, or take another target."
            ) from None


def sample_of(inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Seeded: any byte, floats of a normal distribution, other integers 0."""
    rng = np.random.default_rng(SEED)
    arrays = {}
    for spec in inputs:
        shape, kind = spec.fixed(1), np.dtype(spec.dtype)
        drawn = rng.normal(size=shape) if kind.kind == "f" else rng.integers(0, 256 if kind == np.uint8 else 1, shape)
        arrays[spec.name] = np.asarray(drawn).astype(kind)
    return arrays


def plain_answers(path: Path, name: str, sample: Batch) -> tuple[Array, ...]:
    """ONNX Runtime's answers, every optimization off: each operator as ONNX defines it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # the message below says it
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return tuple(np.asarray(answer) for answer in session.run(None, dict(sample)))
    except Exception as error:  # ORT's errors share no base class but Exception
        raise TargetError(
            f"{name}: ONNX Runtime cannot run the graph that a program is to be made of: {first_line(error)}. Mend the graph."
        ) from None


def _lower(module: OnnxModule, example: tuple[Tensor, ...]) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = torch.export.export(module, example)
    # The verifier knows core operators only, and Q/DQ are none.
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
    return bytes(edge.to_executorch().buffer)


def _read(path: Path, name: str) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
    except (OSError, DecodeError, ValueError) as error:
        raise TargetError(
            f"{name}: {path.name} cannot be read as ONNX: {first_line(error)}. Export it again."
        ) from None
    for value in model.graph.output:
        if value.type.tensor_type.elem_type not in OUTPUT_TYPES:
            raise TargetError(
                f"{name}: output '{value.name}' is not float. A program for XNNPACK gives floats: dequantize it in the graph, "
                "or take another target."
            )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's deprecations and notes, which nobody who compiles a model can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
