"""What a TensorRT engine is bound to, and what decides it: the machine, the versions, the graph, the builder's flags.

Reads the installed package, libcudart, and on a Jetson the module's name and the power mode. Facts that cannot be read are left
out, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.base import CompiledModel, sha256_file
from targets.cuda import Cuda
from targets.errors import TargetError

MODULE, POWER_MODE = Path("/proc/device-tree/model"), Path("/var/lib/nvpmodel/status")


def machine(trt: Any, cuda: Cuda) -> dict[str, str]:
    """What an engine must meet again when it is loaded."""
    return {
        "arch": platform.machine(),
        "runtime": str(trt.__version__),
        "sm": cuda.compute_capability(),
        "gpu": cuda.device_name(),
    }


def built_for(trt: Any, cuda: Cuda, graph: Path, flags: str, unquantized: str) -> dict[str, str]:
    """The machine, and what else decides the engine of `graph`; `key` is the digest of it all.

    `unquantized`: the precision of whatever is not INT8.
    """
    facts = {
        **machine(trt, cuda),
        "cuda": cuda.version(),
        "module": _text(MODULE),
        "power_mode": _text(POWER_MODE),
        "graph": graph.name,
        "unquantized": unquantized,
        "onnx_sha256": _digest(graph),
        "flags": flags,
    }
    known = {name: value for name, value in facts.items() if value}
    return {**known, "key": hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}


def check_machine(compiled: CompiledModel, here: Mapping[str, str]) -> None:
    """Refuse an engine of another TensorRT, GPU or architecture with TargetError; another power mode only costs speed."""
    for fact, words in (("runtime", "TensorRT"), ("sm", "SM"), ("gpu", "the GPU"), ("arch", "the architecture")):
        if (built := compiled.built_for.get(fact)) != here[fact]:
            raise TargetError(
                f"{compiled.name}: the engine was built for {words} {built}, here is {here[fact]}. "
                "An engine runs only where it was built: compile the exported model on this machine."
            )


def _digest(graph: Path) -> str:
    """Of the ONNX file and of its external data `<file>.data`, where it has one."""
    data = graph.with_name(f"{graph.name}.data")
    return sha256_file(graph) + (f"+{sha256_file(data)}" if data.is_file() else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\x00\n ")
    except OSError:
        return ""
