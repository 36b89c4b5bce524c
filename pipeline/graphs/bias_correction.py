"""Empirical bias correction of a Q/DQ graph (Nagel et al., 2019, section 4.2, on calibration samples).

The same as `pipeline/learning/bias_correction.py` on a torch module, and for the same reason. NNCF's accurate correction
would do, but it fails on residual graphs: what it cuts out there is no valid graph. Changes an `onnx_ir.Model` in place,
before any dialect, for a dialect may store the bias as integers.
"""
# Shapes: N samples, C channels.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pipeline.graphs.mixed_precision import quantized_layers
from pipeline.graphs.rewrites import constant

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]


def correct_biases(quantized: ir.Model, float_model: ir.Model, samples: Sequence[Sample]) -> int:
    """Layer by layer, in the graph's order, each bias takes back the shift of its layer's mean from `float_model`'s.

    `float_model` is what was quantized and has tensors of the same names. Returns how many layers were corrected: those
    with a constant bias (C,) or (1, C) of their own. Costs a pass up to each layer; some hundred samples do, with some tens the
    shifts are noise (they are shrunk by their own sampling error).
    """
    known = {str(value.name) for node in float_model.graph for value in node.outputs}
    layers = [node for node in quantized_layers(quantized) if _has_own_bias(node) and node.outputs[0].name in known]
    names = [str(node.outputs[0].name) for node in layers]
    biases = {str(node.inputs[2].name): constant(node.inputs[2]) for node in layers}
    reference, corrected = _session(float_model, names), _session(quantized, names, tuple(biases))
    for node, name in zip(layers, names, strict=True):
        bias = str(node.inputs[2].name)
        shift_C = _shrunk_mean(_means(reference, name, samples) - _means(corrected, name, samples, biases))
        biases[bias] = (biases[bias] + shift_C).astype(np.float32)
        node.inputs[2].const_value = ir.tensor(biases[bias], name=bias)
    return len(layers)


def _has_own_bias(node: ir.Node) -> bool:
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None or bias.dtype != np.float32 or len(node.inputs[2].uses()) != 1:
        return False
    return bias.ndim > 0 and bias.size == bias.shape[-1]  # (C,), or (1, C) as a Gemm may have it


def _session(model: ir.Model, outputs: Sequence[str], inputs: Sequence[str] = ()) -> Any:
    """A session that gives these tensors too, and takes these constants from its caller; every optimization off."""
    import onnxruntime as ort

    proto = ir.to_proto(model)
    given = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in given)
    for initializer in proto.graph.initializer:
        if initializer.name in inputs:
            value = onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, initializer.dims)
            proto.graph.input.append(value)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _means(
    session: Any, name: str, samples: Sequence[Sample], constants: Mapping[str, Array | None] | None = None
) -> Array:
    """The mean (N, C) of a tensor (N, C, ...) over positions; only what leads to the tensor is run."""
    return np.concatenate([_over_positions(session.run([name], {**one, **(constants or {})})[0]) for one in samples])


def _over_positions(answer: Array) -> Array:
    means_NC: Array = answer.astype(np.float64).reshape(*answer.shape[:2], -1).mean(axis=2)
    return means_NC


def _shrunk_mean(shifts_NC: Array) -> Array:
    """Positive-part shrinkage, as there: the mean times max(0, 1 - v / mean^2), v = variance / N."""
    mean_C, error_C = shifts_NC.mean(axis=0), shifts_NC.var(axis=0) / len(shifts_NC)
    shrunk_C: Array = mean_C * np.maximum(1 - error_C / np.maximum(mean_C**2, np.finfo(np.float64).tiny), 0)
    return shrunk_C
