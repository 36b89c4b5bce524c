"""`edgestill profile`: a bundle, a compiled directory or an ONNX file, layer by layer against the peak of this machine.

Reads the model; writes the profile as JSON where that is asked for. Imports no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.device.verify import check_machine
from benchmarks.devices import Local
from benchmarks.pack import PROGRAM, pack_device_program
from benchmarks.profile import add_to_records, arms_of, profile_compiled
from benchmarks.profile_report import NUM_TOP, Profile
from pipeline.own_model import compiled_in
from pipeline.progress import Progress, Quiet
from pipeline.workbench import Workbench
from targets.base import CompiledModel, write_json
from targets.errors import RecipeError


def profile_model(
    model: Path,
    *,
    target: str = "onnxruntime-cpu",
    options: Mapping[str, Any] | None = None,
    precision: str | None = None,
    preset: str = "ci",
    fresh_peak: bool = False,
    num_top: int = NUM_TOP,
    out: Path | None = None,
    records: Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Profile a bundle, a compiled directory or an ONNX file on this machine.

    What is compiled already brings its own target, options and precision; these are then not looked at. An ONNX file is
    compiled first: a Q/DQ graph as INT8, a float graph in `precision` (None: fp32). `out` is a JSON file to write; `records`
    a measured directory whose record of the same model gets the profile beside it. Raises IntegrityError for a bundle whose
    files are not as written, TargetError for a target that times no layers, DataError for `records` without that model.
    """
    if out is not None and out.is_dir():
        raise RecipeError(f"--out {out} is a directory: the profile is one JSON file. Name a file in it.")
    progress = progress or Quiet()
    with tempfile.TemporaryDirectory() as scratch:
        compiled_dir = _compiled(model, target, options or {}, precision, Path(scratch), progress)
        arms = arms_of(CompiledModel.load(compiled_dir), records) if records is not None else {}
        device = Local()
        program = device.put(pack_device_program(Path(scratch) / PROGRAM))
        with progress.task(f"profile {model.name}") as task:
            found = profile_compiled(
                device,
                program,
                compiled_dir,
                preset=preset,
                fresh_peak=fresh_peak,
                strict=strict,
                say=lambda line: task.advance(1, line),
            )
    found = replace(found, num_top=num_top)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found.to_json())
    add_to_records(found, arms)
    return found


def _compiled(
    model: Path, target: str, options: Mapping[str, Any], precision: str | None, scratch: Path, progress: Progress
) -> Path:
    """The compiled directory that `model` is, holds, or becomes in `scratch`."""
    if (compiled_dir := compiled_in(model)) is not None:
        check_machine(CompiledModel.load(compiled_dir))
        return compiled_dir
    with progress.task(f"compile for {target}"):
        bench = Workbench.open(target, options, scratch)
        bench.compile_given(model, precision, scratch, scratch / "compiled")
    return scratch / "compiled"
