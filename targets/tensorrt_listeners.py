"""What TensorRT calls back: its log and its progress. Imported by the method that builds or loads, for a class that derives
from TensorRT's own needs TensorRT."""

from __future__ import annotations

import sys
from typing import Any

import tensorrt as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors, in order: a build that returns nothing says why only here."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(" ".join(msg.split()))

    def why(self) -> str:
        """The last errors, the newest first, or that there was none."""
        return "; ".join(reversed(self.errors[-3:]))[:400].rstrip(".") or "TensorRT gave no reason"


class Progress(trt.IProgressMonitor):  # type: ignore[misc]
    """One line on stderr when an outermost phase begins: a build takes from seconds to many minutes."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            print(f"tensorrt: {phase_name}, {num_steps} steps", file=sys.stderr, flush=True)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Whether to go on."""
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Nothing: the next phase's line tells."""
