"""A module of ours run as a command under torch's profiler: how long its named ranges took.

    python -m benchmarks.evidence.profiled_run OUT.json PREFIX pipeline run RECIPE ...

Writes the seconds and calls of every range whose name begins with PREFIX (`torch.profiler.record_function`), by the rest of the
name. Ranges of one process; one that lies within another is counted in both.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from targets.base import write_json


def main(argv: Sequence[str]) -> None:
    """Run the command to its end, and write the ranges where it went well."""
    from torch.profiler import ProfilerActivity, profile

    out, prefix, module, *arguments = argv
    sys.argv = [module, *arguments]
    code: object = 0
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    if code not in (0, None):
        raise SystemExit(code if isinstance(code, int) else 1)
    ranges = {
        event.key.removeprefix(prefix): {"seconds": event.cpu_time_total / 1e6, "calls": event.count}
        for event in profiled.key_averages()
        if event.key.startswith(prefix)
    }
    write_json(Path(out), ranges)


if __name__ == "__main__":
    main(sys.argv[1:])
