"""What ONNX Runtime's own profile says: which operators ran, on which types and shapes, for how long, with how many products.

Reads the JSON that a session writes under `enable_profiling`. Python 3.10, stdlib and numpy.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from targets.base import Array
from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

Shapes = list[tuple[int, ...]]
Event = dict[str, Any]  # of ORT's profile: ts and dur are whole microseconds
Node = tuple[str, str]  # name and index in the optimized graph: names alone may stand twice
Product = tuple[Node, Event, int]  # its multiply-accumulates

# Operators with products: how to count them from the shapes of their inputs and of their first output.
Count = Callable[[Shapes, tuple[int, ...]], int]


def _convolution(weight: int) -> Count:
    return lambda inputs, output: convolution_macs(output, inputs[weight], inputs[weight][0])


def _transposed(inputs: Shapes, output: tuple[int, ...]) -> int:
    return transposed_convolution_macs(inputs[0], inputs[1], inputs[1][0])


def _matmul(inputs: Shapes, output: tuple[int, ...]) -> int:
    return matmul_macs(output, inputs[0][-1])


def _gemm(weight: int) -> Count:
    return lambda inputs, output: matmul_macs(output, inputs[weight][0] * inputs[weight][1] // output[-1])


def _recurrent(inputs: Shapes, output: tuple[int, ...]) -> int:
    """LSTM, GRU, RNN: every step of every sample multiplies with all of W and R, whichever of the two comes first."""
    return inputs[0][0] * inputs[0][1] * (prod(inputs[1]) + prod(inputs[2]))


def _attention(inputs: Shapes, output: tuple[int, ...]) -> int:
    """Of queries, keys and values: Q K' and its product with V. Of hidden states and one matrix for all three: these, too."""
    x, second = inputs[:2]
    if len(second) == 2:
        num_values = output[-1]
        num_keys = (second[1] - num_values) // 2
        return prod(x[:2]) * (prod(second) + x[1] * (num_keys + num_values))
    return (prod(x) + prod(output)) * second[-2]


COUNTS: dict[str, Count] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "FusedMatMulActivation": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm(1),
    "FusedGemm": _gemm(1),
    "QGemm": _gemm(3),
    "MatMulNBits": _matmul,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DynamicQuantizeLSTM": _recurrent,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
COUNTED_ATTENTION = ((3, 2, 1), (3, 3, 3), (4, 4, 4))  # ranks of the first three inputs; packed forms are others
# What has products all the same, by the names that ONNX and ONNX Runtime give them.
UNCOUNTED = re.compile("Attention|Conv|Einsum|GRU|Gemm|LSTM|MatMul|MoE|RNN")
INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "QLinearConv",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "DynamicQuantizeLSTM",
    }
)
WITH_SUBGRAPH = frozenset({"If", "Loop", "Scan"})
TYPE_NAMES = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "uint8": "int8",
    "int8": "int8",
}


def profiling(folder: Path) -> dict[str, Any]:
    return {"enable_profiling": True, "profile_file_prefix": str(folder / "profile")}


def read_profile(session: Any) -> list[Event]:
    """End the profiling of a session and take what it wrote; the file goes."""
    path = Path(session.end_profiling())
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return events


def operators(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def op_of(event: Event) -> str:
    op: str = event["args"]["op_name"]
    return op


def node_of(event: Event) -> Node:
    return event["name"].removesuffix("_kernel_time"), event["args"].get("node_index", "")


def precision_of(event: Event) -> str:
    """Of the arithmetic; of its first input for an operator without products."""
    if op_of(event) in INTEGER_OPS:
        return "int8"
    types = _types_and_shapes(event["args"]["input_type_shape"])[0]
    return TYPE_NAMES.get(types[0], types[0]) if types else "none"


def products_of(events: Sequence[Event]) -> Iterator[Product]:
    """Every execution of an operator with products."""
    for event in operators(events):
        if (count := COUNTS.get(op_of(event))) is not None and not is_uncounted(event):
            inputs = _types_and_shapes(event["args"]["input_type_shape"])[1]
            output = _types_and_shapes(event["args"]["output_type_shape"])[1][0]
            yield node_of(event), event, count(inputs, output)


def is_uncounted(event: Event) -> bool:
    """Whether an operator has products that its types and shapes do not tell: an equation, keys of earlier runs."""
    op = op_of(event)
    if op not in ATTENTION:
        return op not in COUNTS and UNCOUNTED.search(op) is not None
    inputs = _types_and_shapes(event["args"]["input_type_shape"])[1]
    ranks = tuple(len(shape) for shape in inputs[:3])
    return ranks not in COUNTED_ATTENTION or len(event["args"]["output_type_shape"]) > 1


def check_counted(events: Sequence[Event], name: str) -> None:
    """Raise TargetError for an operator whose products cannot be counted: a share of the others would hide them."""
    for event in operators(events):
        if is_uncounted(event):
            raise TargetError(
                f"{name}: the multiply-accumulates of '{node_of(event)[0]}' ({op_of(event)}) cannot be counted, so no share of "
                "INT8 can be told. Export it as convolutions and matrix products, or stay with float."
            )


def counted(macs: Mapping[Node, int], node: Node, event: Event) -> int:
    if op_of(event) in COUNTS and not is_uncounted(event) and node not in macs:
        raise TargetError(
            f"ONNX Runtime ran '{node[0]}' when it was timed, but not when its products were counted on the same input, so its "
            "GOP/s cannot be told. Report this model; nothing is assumed."
        )
    return macs.get(node, 0)


def node_times(events: Sequence[Event], num_warm: int) -> Iterator[tuple[Node, Event, float]]:
    """Each node that ran after the first `num_warm` runs, with its first event and its median microseconds a run."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[num_warm:]
    first: dict[Node, Event] = {}
    spent: dict[Node, Array] = {}
    for event, own_us in _own_times(operators(events)):
        if (run := bisect_right(starts, event["ts"]) - 1) >= 0:
            node = node_of(event)
            first.setdefault(node, event)
            spent.setdefault(node, np.zeros(len(starts)))[run] += own_us
    for node, event in first.items():
        yield node, event, float(np.median(spent[node]))


def _own_times(operators: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """Durations without those of nested operators: an If or a Loop spans what its subgraph runs. In order of time."""
    ordered = sorted(operators, key=lambda event: (event["ts"], -event["dur"]))
    own_us = [event["dur"] for event in ordered]
    around: list[int] = []
    for i, event in enumerate(ordered):
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around and op_of(ordered[around[-1]]) in WITH_SUBGRAPH:
            own_us[around[-1]] -= event["dur"]
        around.append(i)
    return zip(ordered, own_us, strict=True)


def _types_and_shapes(described: list[dict[str, list[int]]]) -> tuple[list[str], Shapes]:
    """From the profile's form, one {type: shape} a tensor."""
    pairs = [next(iter(tensor.items())) for tensor in described]
    return [kind for kind, _ in pairs], [tuple(shape) for _, shape in pairs]
