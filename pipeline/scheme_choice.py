"""Which scheme a target gets where nobody asks for one: its own, with weights of 7 bits where the CPU here would overflow.

Apart from pipeline/schemes.py, so that no stage is built again when a rule of the linter changes.
"""

from __future__ import annotations

from pipeline.schemes import SEVEN_BITS
from targets.base import Target
from targets.lint import Platform

# Whose INT8 kernels add two products in 16 bits on an x86 CPU without VNNI; XNNPACK widens them first.
IN_16_BITS = frozenset({"onnxruntime-cpu", "openvino-cpu"})


def own_scheme(target: Target, *, here: bool) -> str:
    """`here`: it runs on this machine; whether another one overflows is not known, so there the target's own is kept."""
    overflows = here and target.name in IN_16_BITS and Platform().saturates
    return SEVEN_BITS if overflows else target.scheme
