"""Schemes: what is trained, for which family of runtimes. What a runtime wants beyond that is its dialect, an exact rewrite.

Weights are int8, symmetric, one scale an output channel, in every scheme; activations are per tensor and symmetric, for no
runtime computes anything else in INT8. The schemes differ in three things that no exact rewrite can change afterwards.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from targets.errors import RecipeError

PORTABLE = "portable"
CPU, SEVEN_BITS = "cpu-int8", "cpu-int8-w7"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """`signed`: activations are int8 with zero point 0 throughout; else unsigned where they are never negative, which
    gives such a tensor twice the steps. `both_branches`: both inputs of a residual addition carry a quantizer; else the
    identity branch only, so that the convolution of the other one can be fused with the addition. `weight_bits`: 7 keeps
    weights within -64..64, so that two products with 255 fit into 16 bits (2 * 64 * 255 = 32,640); depthwise ones have 8."""

    name: str
    signed: bool
    both_branches: bool
    weight_bits: Literal[7, 8] = 8
    why: str


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name=CPU,
            signed=False,
            both_branches=True,
            why="ONNX Runtime fuses an addition only between two quantized inputs; unsigned halves the step after a ReLU",
        ),
        Scheme(
            name=SEVEN_BITS,
            signed=False,
            both_branches=True,
            weight_bits=7,
            why="an x86 CPU without VNNI adds two products in 16 bits, and weights of 8 bits overflow there",
        ),
        Scheme(
            name="tensorrt-int8",
            signed=True,
            both_branches=False,
            why="TensorRT takes int8 with zero point 0 and fuses Conv + Add where the identity branch alone is quantized",
        ),
        Scheme(
            name=PORTABLE,
            signed=True,
            both_branches=True,
            why="one graph that every runtime takes; how much of it runs in INT8 where, and what it costs: docs/results/portable.json",
        ),
    )
}


def scheme_of(name: str) -> Scheme:
    """Raises RecipeError with the nearest known name."""
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, SCHEMES, n=1)
        advice = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(SCHEMES)}."
        raise RecipeError(f"scheme '{name}': nothing is quantized so. {advice}")
    return SCHEMES[name]


def dialect_of(scheme: str, target_dialect: str) -> str:
    """The portable scheme is written in one dialect for all; every other scheme in that of the target's runtime."""
    return PORTABLE if scheme == PORTABLE else target_dialect
