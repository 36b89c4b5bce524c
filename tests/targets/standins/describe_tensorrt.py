"""What the installed TensorRT bindings offer, as JSON: run in a process of its own, with the stand-in libraries to load.

Nothing is constructed but what needs no library: a Runtime or a Builder would end the process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_bindings as trt


def described(member: Any) -> dict[str, Any]:
    if isinstance(member, type):
        return {"kind": "class", "members": members(member)}
    if isinstance(member, property):
        return {"kind": "property", "doc": member.fget.__doc__ or "", "settable": member.fset is not None}
    if callable(member):
        return {"kind": "method", "doc": member.__doc__ or ""}
    return {"kind": "value", "type": type(member).__qualname__}


def members(cls: type) -> dict[str, Any]:
    """All members, inherited ones too; __init__ is the constructor."""
    names = [name for name in dir(cls) if not name.startswith("_") or name == "__init__"]
    return {name: described(getattr(cls, name)) for name in names}


def tried(source: str) -> dict[str, Any]:
    """What the target's own code does with the real classes."""
    sys.modules["tensorrt"] = trt
    sys.path.insert(0, source)
    from targets.tensorrt import DTYPES, _strongly_typed
    from targets.tensorrt_listeners import Log, Progress

    log, progress = Log(), Progress()
    for severity in (trt.ILogger.Severity.WARNING, trt.ILogger.Severity.ERROR):
        log.log(severity, f"said with  {severity.name}")
    return {
        "why": log.why(),
        "is_logger": isinstance(log, trt.ILogger),
        "goes_on": progress.step_complete("Tactics", 1),
        "is_monitor": isinstance(progress, trt.IProgressMonitor),
        "flags": _strongly_typed(trt),
        "strongly_typed": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "dims": [int(size) for size in trt.Dims((1, 3, 8, 8))],
        "types": sorted(DTYPES.keys() & trt.DataType.__members__.keys()),
    }


def main() -> None:
    names = {name: described(getattr(trt, name)) for name in dir(trt) if not name.startswith("_")}
    names["__version__"] = {"kind": "value", "type": "str"}
    print(json.dumps({"version": trt.__version__, "names": names, "tried": tried(sys.argv[1])}))


main()
