"""Dialects: the list of exact rewrites that each runtime wants before it runs a Q/DQ graph in INT8.

ONNX Runtime on x86 wants one unsigned type all over, OpenVINO takes the graph as it was exported, TensorRT wants int8 with
zero point 0 and a float bias, ExecuTorch's XNNPACK rounds a bias to the accumulator's step by itself, so the graph says so;
`portable` is what all of them take. Reads and changes an `onnx_ir.Model`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import onnx_ir as ir

from pipeline.graphs import batchnorm, moves, rewrites
from targets.errors import ModelError

Rewrite = Callable[[ir.Model], int]

CLEAN: tuple[Rewrite, ...] = (
    rewrites.tidy,
    rewrites.fold_constants,
    rewrites.fold_padding,
    rewrites.integer_weights,
    batchnorm.fold_batchnorm,
)

DIALECTS: dict[str, tuple[Rewrite, ...]] = {
    "openvino": (*CLEAN, rewrites.tidy),
    "onnxruntime": (
        *CLEAN,
        rewrites.drop_redundant_activations,
        rewrites.quantize_before_clip,
        rewrites.unsigned_activations,
        moves.join_integers,
        moves.sink_dequantize,
        rewrites.integer_bias,
        rewrites.tidy,
    ),
    "tensorrt": (*CLEAN, rewrites.signed_activations, rewrites.float_bias, rewrites.tidy),
    "executorch": (*CLEAN, rewrites.integer_bias, rewrites.tidy),
    "portable": (*CLEAN, rewrites.signed_activations, moves.join_integers, moves.sink_dequantize, rewrites.tidy),
}


def rewrites_of(dialect: str) -> tuple[Rewrite, ...]:
    """The rewrites in their order. Raises ModelError for a dialect that nobody speaks."""
    if dialect not in DIALECTS:
        near = difflib.get_close_matches(dialect, DIALECTS, n=1)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(DIALECTS)}."
        raise ModelError(f"dialect '{dialect}': no target speaks it. {advice}")
    return DIALECTS[dialect]


def apply_dialect(model: ir.Model, dialect: str) -> int:
    """Rewrite `model` in place; returns the number of changes. Raises ModelError as `rewrites_of`."""
    return sum(rewrite(model) for rewrite in rewrites_of(dialect))
