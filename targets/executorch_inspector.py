"""What an ExecuTorch program holds, and what ran of it: the .pte and XNNPACK's own event trace of a run, joined.

The .pte is a list of instructions: an operator of ExecuTorch's portable library, or a call of a delegate, whose graph names
every node with its shapes. The trace (ETDump) names every operator that XNNPACK executed with the types that it computed
in. So the multiply-accumulates come from the file and the precision from the run; a product that is in one of them only is an
error, never a zero. Both are flatbuffers: the `flatc` that ExecuTorch brings along makes JSON of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from targets.base import LayerPlacement, LayerTime
from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

Json = Mapping[str, Any]
PROGRAM_SCHEMA, XNNPACK_SCHEMA = "schema/program.fbs", "backends/xnnpack/serialization/schema.fbs"
TRACE_SCHEMA = "devtools/etdump/etdump_schema_flatcc.fbs"
PROGRAM_MAGIC, XNNPACK_MAGIC = b"eh00", b"XH00"

# Nodes of a delegate's graph with products, and the operators that XNNPACK makes of them (a matrix product of a 1x1 kernel).
KINDS = {
    "XNNConv2d": ("Convolution", "Fully Connected"),
    "XNNDepthwiseConv2d": ("Convolution",),
    "XNNConvTranspose2d": ("Deconvolution",),
    "XNNFullyConnected": ("Fully Connected",),
    "XNNBatchMatrixMultiply": ("Batch Matrix Multiply",),
}
PRODUCT_KINDS = frozenset(kind for kinds in KINDS.values() for kind in kinds)
KERNEL = "native_call_"  # begins the name of a portable operator in the trace
KERNEL_PRODUCTS = frozenset({"convolution", "addmm", "mm", "bmm", "linear"})
# "Convolution (NHWC, QC8) IGEMM #1", "Fully Connected (NC, QS8, QC8W) GEMM #1", "Transpose (ND, X32) #2"
EVENT = re.compile(r"^(?P<kind>[^(]+?) \((?:N[A-Z]*, )?(?P<types>[^)]+)\)")
# X8, X16, X32: a move of so many bits. Add (ND), Clamp (NC) and their like do not tell their type.
PRECISIONS = {
    "F32": "fp32",
    "PF32": "fp32",
    "X32": "fp32",
    "F16": "fp16",
    "PF16": "fp16",
    "X16": "fp16",
    "BF16": "bf16",
    **dict.fromkeys(("QC8", "QS8", "QU8", "QD8", "QDU8", "QP8", "X8"), "int8"),
}
NO_NUMBER = re.compile(
    r": -?(?:inf|nan)(?=,?$)", re.MULTILINE
)  # as flatc writes them; the bounds of a node that clamps nothing
UNKNOWN = "unknown"
SCALAR_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "CHAR": "int8", "BYTE": "int8"}


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of the file: what it may run as, and its multiply-accumulates a sample."""

    kinds: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Instruction:
    """One step of the program. `precision`: of a portable operator's first tensor; empty for a delegate."""

    kernel: str
    products: tuple[Product, ...]
    precision: str = ""


def read_program(data: bytes) -> tuple[Instruction, ...]:
    """The instructions of a .pte, in order. Raises TargetError for bytes that are none."""
    if data[8:12] != PROGRAM_MAGIC:
        raise TargetError("the file is no ExecuTorch program: its first bytes say so. Compile the model again.")
    size, base = (int.from_bytes(data[at : at + 8], "little") for at in (16, 24))
    program = decoded(data[:size], PROGRAM_SCHEMA)
    plan = program["execution_plan"][0]
    segments = [data[base + one["offset"] : base + one["offset"] + one["size"]] for one in program["segments"]]
    return tuple(_instruction(one["instr_args"], plan, segments) for one in plan["chains"][0]["instructions"])


def read_trace(data: bytes) -> list[list[Json]]:
    """The events of each run, in the order of the runs."""
    runs = decoded(data, TRACE_SCHEMA, "--size-prefixed")["run_data"]
    return [
        [event["profile_event"] for event in run["events"] if "profile_event" in event]
        for run in runs
        if run["name"] == "Execute"
    ]


def decoded(data: bytes, schema: str, *options: str) -> Any:
    """A flatbuffer as JSON."""
    spec = find_spec("executorch")
    root = Path(next(iter((spec and spec.submodule_search_locations) or ["."])))
    command = [str(root / "data/bin/flatc"), "--json", "--strict-json", "--raw-binary", "--defaults-json", *options]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.bin"
        path.write_bytes(data)
        done = subprocess.run([*command, "-o", folder, root / schema, "--", path], capture_output=True, check=False)
        if done.returncode != 0:
            raise TargetError(f"ExecuTorch's flatc cannot read what {schema} describes. Install ExecuTorch again.")
        return json.loads(NO_NUMBER.sub(": null", path.with_suffix(".json").read_text(encoding="utf-8")))


def placements(program: Sequence[Instruction], run: Sequence[Json], name: str) -> Iterator[LayerPlacement]:
    """Each product with the operator that ran it. Raises TargetError where file and trace do not tell the same story."""
    for index, instruction in enumerate(program):
        for event, macs in _joined(instruction, events_of(run, index), name):
            if macs is not None:
                kind, precision = _said(event, instruction)
                yield LayerPlacement(name=_title(event, index, program), op=kind, precision=precision, macs=macs)


def layer_times(program: Sequence[Instruction], runs: Sequence[Sequence[Json]], name: str) -> Iterator[LayerTime]:
    """Every operator that ran, in order, with the median of its microseconds over the runs."""
    for index, instruction in enumerate(program):
        events = [events_of(run, index) for run in runs]
        times_us = np.median([[(one["end_time"] - one["start_time"]) / 1e3 for one in run] for run in events], axis=0)
        for (event, macs), time_us in zip(_joined(instruction, events[0], name), times_us, strict=True):
            kind, precision = _said(event, instruction)
            title = _title(event, index, program)
            yield LayerTime(
                name=title, op=kind, precision=precision, macs=macs or 0, time_us=float(time_us), kernel=_kernel(event)
            )


def events_of(run: Sequence[Json], index: int) -> list[Json]:
    """What one instruction executed: the operators of a delegate, or one of the portable library."""
    return [
        event
        for event in run
        if event["instruction_id"] == index
        and event["chain_index"] == 0
        and ("delegate_debug_id_str" in event or event.get("name", "").startswith(KERNEL))
    ]


def _joined(instruction: Instruction, events: Sequence[Json], name: str) -> list[tuple[Json, int | None]]:
    """(event, its multiply-accumulates; None for one without products)."""
    counted = list(instruction.products)
    pairs: list[tuple[Json, int | None]] = []
    for event in events:
        kind = instruction.kernel or _kind(_kernel(event))
        is_product = kind in PRODUCT_KINDS or bool(instruction.kernel and instruction.products)
        if not is_product:
            pairs.append((event, None))
            continue
        if not counted or kind not in counted[0].kinds:
            raise _other_story(name, f"'{_kernel(event)}' ran, which the file does not hold there")
        pairs.append((event, counted.pop(0).macs))
    if counted:
        raise _other_story(name, f"a {counted[0].kinds[0]} of the file did not run")
    return pairs


def _other_story(name: str, what: str) -> TargetError:
    return TargetError(f"{name}: {what}, so no share of INT8 can be told. Report this model; nothing is assumed.")


def _kernel(event: Json) -> str:
    """In the trace's words: of a delegate's operator, or of the portable library."""
    text: str = event.get("delegate_debug_id_str") or event["name"].removeprefix(KERNEL)
    return text


def _kind(text: str) -> str:
    return match["kind"] if (match := EVENT.match(text)) else text.partition(" #")[0]


def _said(event: Json, instruction: Instruction) -> tuple[str, str]:
    """(operator, precision): XNNPACK writes the type of what comes in first, or the only one."""
    text = _kernel(event)
    if instruction.kernel:
        return instruction.kernel, instruction.precision
    match = EVENT.match(text)
    first = match["types"].split(",")[0].strip() if match else ""
    return _kind(text), PRECISIONS.get(first, UNKNOWN)


def _title(event: Json, index: int, program: Sequence[Instruction]) -> str:
    """Unique in a program: XNNPACK counts the operators of a delegate, not over delegates."""
    several = sum(not instruction.kernel for instruction in program) > 1
    return f"{_kernel(event)} @{index}" if several or program[index].kernel else _kernel(event)


def _instruction(arguments: Json, plan: Json, segments: Sequence[bytes]) -> Instruction:
    if "delegate_index" in arguments:
        place = plan["delegates"][arguments["delegate_index"]]["processed"]["index"]
        return Instruction("", tuple(_delegate_products(segments[place])))
    if "op_index" not in arguments:  # a jump or a copy of a value
        return Instruction("move", ())
    kernel = plan["operators"][arguments["op_index"]]["name"].partition("::")[2]
    values = [plan["values"][index] for index in arguments["args"]]
    tensors = [value["val"] for value in values if value.get("val_type") == "Tensor"]
    precision = SCALAR_TYPES.get(tensors[0]["scalar_type"], tensors[0]["scalar_type"].lower()) if tensors else "none"
    products = (Product((kernel,), _kernel_macs(kernel, values)),) if kernel in KERNEL_PRODUCTS else ()
    return Instruction(kernel, products, precision)


def _kernel_macs(kernel: str, values: Sequence[Json]) -> int:
    """From the arguments of a portable operator; its output stands last."""
    shapes = [tuple(value["val"]["sizes"]) for value in values if value.get("val_type") == "Tensor"]
    output = shapes[-1]
    if kernel == "convolution":
        transposed = bool(values[6]["val"].get("bool_val"))
        x, weight = shapes[0], shapes[1]
        return (
            transposed_convolution_macs(x, weight, x[1]) if transposed else convolution_macs(output, weight, weight[0])
        )
    return matmul_macs(output, shapes[1 if kernel == "addmm" else 0][-1])


def _delegate_products(blob: bytes) -> Iterator[Product]:
    if blob[4:8] != XNNPACK_MAGIC:
        raise TargetError(
            "the program calls another delegate than XNNPACK, of which nothing is known here. Report this model."
        )
    start, size = (int.from_bytes(blob[at : at + 4], "little") for at in (10, 14))
    graph = decoded(blob[start : start + size], XNNPACK_SCHEMA)
    shapes: dict[int, tuple[int, ...]] = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"].get("tensor_value", value["xvalue_union"])
        shapes[tensor["id_out"]] = tuple(tensor.get("dims", ()))
    for node in graph["xnodes"]:
        kind, fields = node["xnode_union_type"], node["xnode_union"]
        if kind == "XNNScaledDotProductAttention":
            raise TargetError(
                "the program holds an attention of which no products can be counted. Export it in plain operators."
            )
        if kind in KINDS:
            yield Product(KINDS[kind], _delegate_macs(kind, fields, shapes))


def _delegate_macs(kind: str, fields: Json, shapes: Mapping[int, tuple[int, ...]]) -> int:
    output = shapes[fields["output_id"]]
    if kind == "XNNFullyConnected":
        return matmul_macs(output, shapes[fields["filter_id"]][-1])
    if kind == "XNNBatchMatrixMultiply":
        return matmul_macs(output, shapes[fields["input1_id"]][-1])
    kernel = (fields["kernel_height"], fields["kernel_width"])
    if kind == "XNNConvTranspose2d":
        return transposed_convolution_macs(shapes[fields["input1_id"]], (*kernel, fields["group_output_channels"]), 1)
    return convolution_macs(output, (*kernel, fields["group_input_channels"]), 1)
