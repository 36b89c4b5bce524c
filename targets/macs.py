"""Multiply-accumulates of one layer from the shapes that a runtime reports. Stdlib only; shapes are without units.

Fused activations, additions and the bias are not counted: the share of INT8 work is about products.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def convolution_macs(output: Sequence[int], weight: Sequence[int], num_outputs: int) -> int:
    """Convolution, any layout of output and weight (grouped ones too): each output sees weight/num_outputs inputs."""
    return prod(output) * prod(weight) // num_outputs if num_outputs else 0


def transposed_convolution_macs(x: Sequence[int], weight: Sequence[int], num_inputs: int) -> int:
    """Transposed convolution: each input element is spread over weight/num_inputs outputs."""
    return prod(x) * prod(weight) // num_inputs if num_inputs else 0


def matmul_macs(output: Sequence[int], inner: int) -> int:
    """Matrix product (..., M, K) x (..., K, N) with `inner` = K."""
    return prod(output) * inner
