"""From Python: a trained `nn.Module` and the loader that fed it become an INT8 model, proved on a target.

Traces the module to float ONNX, whose inputs take what the loader yields (normalised as it was trained), and goes on as
`edgestill quantize` does. The module itself is left as it is, mode and device included.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.bring_your_own import Order, quantize_with
from pipeline.calibration import NUM_HELD_OUT, divide, split_batches
from pipeline.onnx_ladder import Demands
from pipeline.progress import Progress, Quiet
from pipeline.verb_reports import QuantizeReport
from targets.base import Array
from targets.errors import DataError, ModelError, first_line

OPSET = 17


def quantize_module(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    target: str,
    options: Mapping[str, Any] | None = None,
    out_dir: Path,
    num_samples: int = 128,
    scheme: str | None = None,
    demands: Demands | None = None,
    preset: str = "smoke",
    launches: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a trained module for a target; `calibration` yields batches, as a DataLoader does.

    A batch is a tensor, or a tuple or list whose first elements are what `forward` requires: of (images, labels) a forward
    of one argument takes the images. Inputs are named after forward's arguments, outputs `output`, `output_0`, ... or by
    the keys of a dict. Raises ModelError (cannot be traced), DataError (no batches, no tensors) and as `quantize_model`.
    """
    order = Order(
        target=target,
        out_dir=out_dir,
        options=options or {},
        preset=preset,
        launches=launches,
        progress=progress or Quiet(),
        keep=(),
    )
    arrays = _rows(calibration, _input_names(model), num_samples + NUM_HELD_OUT)
    samples = divide(
        split_batches(arrays, 1, num_samples + NUM_HELD_OUT), num_samples, how="batches of the loader, as they are"
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{type(model).__name__}.onnx"
        with order.progress.task("export to ONNX"):
            _export(model, {name: torch.from_numpy(array[:1]) for name, array in arrays.items()}, path)
        return quantize_with(path, samples, order, scheme=scheme, demands=demands)


def _input_names(model: nn.Module) -> tuple[str, ...]:
    """The arguments that `forward` requires, by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = tuple(
        one.name
        for one in parameters
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and one.default is one.empty
    )
    if not names:
        raise ModelError(
            f"{type(model).__name__}.forward names no argument that it requires, so its inputs are not known. "
            "Wrap it in a module whose forward does."
        )
    return names


def _rows(batches: Iterable[Any], names: Sequence[str], limit: int) -> dict[str, Array]:
    """The first `limit` rows of each input."""
    taken: dict[str, list[Array]] = {name: [] for name in names}
    num_rows = 0
    for number, batch in enumerate(batches):
        tensors = _tensors(batch, names, number)
        for name, tensor in tensors.items():
            taken[name].append(tensor.detach().cpu().numpy())
        num_rows += len(next(iter(tensors.values())))
        if num_rows >= limit:
            break
    if num_rows == 0:
        raise DataError("calibration yields no batch: ranges cannot be set. Give some hundred real inputs.")
    return {name: np.concatenate(arrays)[:limit] for name, arrays in taken.items()}


def _tensors(batch: Any, names: Sequence[str], number: int) -> dict[str, Tensor]:
    elements = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    found = elements[: len(names)]
    lengths = {len(one) if isinstance(one, Tensor) and one.ndim else 0 for one in found}
    if len(found) < len(names) or len(lengths) != 1 or 0 in lengths:
        kinds = ", ".join(
            f"{type(one).__name__}{list(one.shape) if isinstance(one, Tensor) else ''}" for one in elements
        )
        raise DataError(
            f"calibration batch {number} holds {kinds}; forward requires {', '.join(names)}. "
            "Yield one tensor for each of these, batch first, in this order."
        )
    return dict(zip(names, found, strict=True))


class _Positional(nn.Module):
    """Hides the arguments that have a default: the exporter would make inputs of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


def _export(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    """Trace a copy, in evaluation mode on the CPU, with a free batch."""
    try:
        traced = _Positional(copy.deepcopy(model).cpu().eval())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of the tracing exporter, and of constants in traced code
            output_names = _output_names(traced(*example.values()))
            torch.onnx.export(
                traced,
                tuple(example.values()),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(example),
                output_names=output_names,
                dynamic_axes={name: {0: "N"} for name in (*example, *output_names)},
            )
    except Exception as error:  # the model's own code runs here
        raise ModelError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {first_line(error)}. "
            "Use operators that ONNX knows, and yield batches that the model takes."
        ) from error


def _output_names(outputs: Any) -> list[str]:
    if isinstance(outputs, Mapping):
        return [str(key) for key in outputs]
    return ["output"] if isinstance(outputs, Tensor) else [f"output_{i}" for i in range(len(outputs))]
