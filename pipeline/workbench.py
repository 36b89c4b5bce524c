"""Where the verbs on a person's own model work: one target on this machine, and a directory that is written whole or not.

Compiling and proving run in the device program, in a fresh process: a runtime that crashes takes no work along.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.devices import Device, Local, run_program
from benchmarks.pack import PROGRAM, pack_device_program
from pipeline.graphs.files import HALF_DIALECTS
from pipeline.own_graph import import_fixed
from targets import make_target
from targets.base import Array, CompiledModel, Exported, Placement, read_json
from targets.errors import IntegrityError, RecipeError, TargetError

REPORT_FILE = "report.json"
INT8, FP32 = "int8", "fp32"


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """A target with its options on a device; `float_precisions` is what its runtime offers there, fp32 first."""

    target: str
    options: Mapping[str, Any]
    device: Device
    program: str
    float_precisions: tuple[str, ...]

    @classmethod
    def open(cls, target: str, options: Mapping[str, Any], scratch_dir: Path) -> Workbench:
        """Pack the device program into `scratch_dir` and ask the target; raises TargetError where it is not installed."""
        make_target(target, options)
        device = Local()
        program = device.put(pack_device_program(scratch_dir / PROGRAM))
        offered = run_program(device, program, ["probe", "--target", target, "--options", json.dumps(dict(options))])
        if offered["missing"]:
            raise TargetError(f"{target} is not installed on {device.name}. Run there: {offered['missing']}.")
        precisions = tuple(offered["float_precisions"])
        return cls(target=target, options=options, device=device, program=program, float_precisions=precisions)

    def compile_given(
        self, model: Path, precision: str | None, scratch_dir: Path, out_dir: Path
    ) -> tuple[Exported, str, Placement]:
        """Compile anybody's ONNX file: a Q/DQ graph as INT8, a float graph in `precision` (None: fp32). Returns what was
        taken in, the precision, and where each layer runs."""
        exported = self.take_in(model, scratch_dir)
        wanted = precision or (INT8 if exported.scheme else FP32)
        return exported, wanted, self.compile(exported, wanted, out_dir)

    def take_in(self, model: Path, scratch_dir: Path) -> Exported:
        """Anybody's graph as it is, with its float16 twin where the runtime computes in the types of the graph."""
        half = make_target(self.target, self.options).dialect in HALF_DIALECTS
        return import_fixed(model, scratch_dir / "exported", half=half)

    def compile_floats(self, exported: Exported, out_dir: Path) -> tuple[dict[str, Placement], tuple[str, ...]]:
        """Compile a float graph into out_dir/<precision> for each of `float_precisions`: (placements, what could not be).

        A graph may hold what a shorter type does not; only where it does not compile in fp32 there is nothing to compare
        with: raises TargetError.
        """
        placements: dict[str, Placement] = {}
        refused = []
        for precision in self.float_precisions:
            try:
                placements[precision] = self.compile(exported, precision, out_dir / precision)
            except TargetError as error:
                if precision == FP32:
                    raise
                refused.append(f"{precision} is not among the baselines: {error}")
        return placements, tuple(refused)

    def compile(self, exported: Exported, precision: str, out_dir: Path) -> Placement:
        """Compile into `out_dir` and read where each layer runs. Raises TargetError in the runtime's own words."""
        argv = ["compile", "--target", self.target, "--options", json.dumps(dict(self.options))]
        argv += ["--exported", self.device.put(exported.directory), "--precision", precision]
        there = self.device.scratch(out_dir)
        run_program(self.device, self.program, [*argv, "--out", there])
        self.device.get(there, out_dir)
        return self.placement(out_dir)

    def placement(self, compiled_dir: Path) -> Placement:
        argv = ["placement", "--compiled", self.device.put(compiled_dir)]
        return Placement.from_json(run_program(self.device, self.program, argv))

    def answers(self, compiled_dir: Path, samples: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
        """What a compiled model answers there to samples of any form: output -> one array a sample."""
        inputs = [spec.name for spec in CompiledModel.load(compiled_dir).inputs]
        with tempfile.TemporaryDirectory() as folder:
            sent, got = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
            arrays = {f"{i}_{s}": sample[name] for s, sample in enumerate(samples) for i, name in enumerate(inputs)}
            np.savez(sent, allow_pickle=False, **arrays)
            there = f"{self.device.scratch(Path(folder))}/{got.name}"
            argv = ["answer", "--compiled", self.device.put(compiled_dir), "--inputs", self.device.put(sent)]
            told = run_program(self.device, self.program, [*argv, "--out", there])
            self.device.get(there, got)
            with np.load(got, allow_pickle=False) as archive:
                return {
                    name: [archive[f"{i}_{s}"] for s in range(len(samples))] for i, name in enumerate(told["outputs"])
                }


@contextmanager
def whole_directory(out_dir: Path, verb: str, *, keep: Sequence[Path]) -> Iterator[Path]:
    """An empty directory that takes the place of `out_dir` at the end; after an error `out_dir` is as it was.

    Only what the same verb wrote before is replaced, and never what holds a path of `keep`. Raises RecipeError.
    """
    out_dir = out_dir.resolve()  # a link stays, and what it points to is replaced
    if out_dir.is_mount():
        raise RecipeError(f"--out {out_dir}: it is a mount point, which nothing can replace. Name a directory in it.")
    if any(path.resolve().is_relative_to(out_dir) for path in keep) or not _replaceable(out_dir, verb):
        raise RecipeError(
            f"--out {out_dir}: it holds files that 'edgestill {verb}' did not write. Name another directory, or empty it."
        )
    partial, before = (out_dir.with_name(f".{out_dir.name}.{os.getpid()}.{kind}") for kind in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out_dir.exists():
            out_dir.rename(before)
        try:
            partial.rename(out_dir)
        except OSError:
            if before.exists():
                before.rename(out_dir)
            raise
    finally:
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)


def _replaceable(out_dir: Path, verb: str) -> bool:
    if not out_dir.exists():
        return True
    if not out_dir.is_dir():
        return False
    if not any(out_dir.iterdir()):
        return True
    try:
        return bool(read_json(out_dir / REPORT_FILE)["verb"] == verb)
    except (IntegrityError, KeyError, TypeError):
        return False
