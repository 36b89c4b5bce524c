"""What the activations of a float graph really are on the calibration samples: a range of nothing but zeros, or with NaN in
it, would become a scale without a word. And the names by which nodes are told. Reads an `onnx_ir.Model`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline.graphs.rewrites import WEIGHTED, constant
from targets.errors import DataError, ModelError

Sample = Mapping[str, npt.NDArray[Any]]


def check_activations(model: ir.Model, samples: Sequence[Sample], keep_float: Sequence[str] = ()) -> None:
    """Raise DataError for the first node whose result is no number, or whose input or result, as a convolution or a matrix
    product, is zero on every sample: nothing says how far such a tensor may go. `keep_float`: nodes that need no range."""
    watched = _watched(model)
    largest = dict.fromkeys(_watched(model, keep_float), 0.0)
    session, names = _with_outputs(model, list(watched))
    for number, sample in enumerate(samples):
        given = {name: array for name, array in sample.items() if name in watched}
        for name, value in {**given, **dict(zip(names, session.run(names, dict(sample)), strict=True))}.items():
            if not np.isfinite(value).all():
                raise DataError(
                    f"{watched[name]}: '{name}' holds NaN or infinity on calibration sample {number}, so it has no range. "
                    "Look at the sample and at that node's weights."
                )
            if name in largest:
                largest[name] = max(largest[name], float(np.abs(value).max(initial=0.0)))
    for name, value in largest.items():
        if value == 0.0:
            raise DataError(
                f"{watched[name]}: '{name}' is zero on all {len(samples)} calibration samples, so nothing says what range it "
                "needs. Give samples that reach it, or leave that node in float: --keep-float."
            )


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, after its first output where it has none: what is said of it can be found."""
    taken: set[str] = set()
    for node in model.graph:
        name = base = str(node.name or f"{node.op_type}_{node.outputs[0].name}")
        number = 0
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        node.name = name
        taken.add(name)


def check_names(model: ir.Model, names: Sequence[str]) -> None:
    """Raise ModelError, with the nearest known one, for a node that the graph does not have."""
    known = [str(node.name) for node in model.graph]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"Did you mean '{near[0]}'?" if near else f"The first ones are {', '.join(known[:5])}."
            raise ModelError(f"node '{name}': the graph has none of that name. {advice}")


def _watched(model: ir.Model, keep_float: Sequence[str] = ()) -> dict[str, str]:
    """Float tensors that quantization gives a range, with the node that is named for them, in the graph's order."""
    found: dict[str, str] = {}
    for node in model.graph:
        weighted = node.op_type in WEIGHTED and any(constant(value) is not None for value in node.inputs[1:2])
        if not weighted or node.name in keep_float:
            continue
        for value in (node.inputs[0], node.outputs[0]):
            if value is not None and constant(value) is None:
                found.setdefault(str(value.name), f"node '{node.name}' ({node.op_type})")
    return found


def _with_outputs(model: ir.Model, names: Sequence[str]) -> tuple[Any, list[str]]:
    """A session that also gives the named tensors."""
    import onnxruntime as ort

    proto = ir.to_proto(model)
    given = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in proto.graph.input}
    return session, [name for name in names if name not in inputs]
