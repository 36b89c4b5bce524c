"""Residual additions: which of the two quantized inputs of an Add is the identity branch.

The other one, the main branch, ends in a convolution that only the addition reads; where both do (a shortcut with a
convolution of its own), the main branch is the deeper one. Works on names and edges alone, so that an ONNX graph and the
graph of a torch model are judged alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One quantized input of an addition: its quantizer, what is quantized, and whether that is a convolution (or a
    matrix product) whose result nothing but this addition reads."""

    quantizer: str
    source: str
    fusible: bool


def main_branch(branches: Sequence[Branch], depth: Mapping[str, int]) -> Branch | None:
    """The branch whose quantizer has to go; None where neither can be fused with the addition."""
    fusible = [branch for branch in branches if branch.fusible]
    return max(fusible, key=lambda branch: depth[branch.source]) if len(branches) == 2 and fusible else None


def depths(inputs_of: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Longest way from any start to each node; `inputs_of` is in topological order."""
    found: dict[str, int] = {}
    for node, inputs in inputs_of.items():
        found[node] = 1 + max((found[name] for name in inputs), default=-1)
    return found
