"""How a model of the matrix is prepared: what enters each step's key, and the one call that builds it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.device.environment import environment
from pipeline.artifacts import ExportedModel
from pipeline.calibration import Calibration
from pipeline.graphs.files import HALF_DIALECTS
from pipeline.matrix import cells, nets
from pipeline.matrix.cells import BuiltCells, Cell, Claims, Graphs, Wanted
from pipeline.matrix.recipe import PRETRAINED, InputConfig, MatrixRecipe, MatrixTarget, ModelEntry, threads_of
from pipeline.matrix.samples import SYNTHETIC, digest_of, samples_of
from pipeline.matrix.students import Student, find_student
from pipeline.onnx_ladder import Demands
from pipeline.progress import Progress
from pipeline.workspace import Workspace
from targets import make_target
from targets.base import sha256_file
from targets.errors import EdgestillError, ModelError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model whose cells are built. `refused` are those of a runtime that is not here, or of a model that cannot be had."""

    name: str
    source: str
    weights: str = ""
    image: str = ""
    built: tuple[BuiltCells, ...] = ()
    refused: tuple[Cell, ...] = field(default=())

    @property
    def compiled(self) -> list[tuple[Cell, Path]]:
        """The cells that can be measured, with where they lie."""
        return [(cell, one.dir / cell.folder) for one in self.built for cell in one.cells if cell.error is None]

    @property
    def missing(self) -> list[Cell]:
        """The cells that cannot, with their errors."""
        return [*self.refused, *(cell for one in self.built for cell in one.cells if cell.error is not None)]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of one recipe in one workspace."""

    recipe: MatrixRecipe
    workspace: Workspace
    progress: Progress
    offline: bool

    def prepare(self, entry: ModelEntry) -> Prepared:
        """Build every cell of a model; what cannot be is told, and raises nothing."""
        try:
            return self._student(entry, entry.run) if entry.run is not None else self._net(entry)
        except EdgestillError as error:
            self.progress.say(f"{entry.name}: left out: {error}")
            refused = [cell for target in self.recipe.targets for cell in self._wanted(target).refused(str(error))]
            return Prepared(name=entry.name, source=str(entry.model or entry.run), refused=tuple(refused))

    def _net(self, entry: ModelEntry) -> Prepared:
        digest = digest_of(self._samples_from(entry), self.workspace.dir / ".calibration-digests.json")
        floats = self._float(entry, digest)
        built, refused = self._on_each_target(lambda target: self._net_cells(entry, floats, digest, target))
        return Prepared(
            name=entry.name,
            source=str(entry.model),
            weights=self._weights(entry),
            image=_image(floats.exported.inputs[0].shape[1:]),
            built=built,
            refused=refused,
        )

    def _student(self, entry: ModelEntry, run: Path) -> Prepared:
        student = find_student(run)
        built, refused = self._on_each_target(lambda target: self._student_cells(entry, student, target))
        return Prepared(
            name=entry.name,
            source=f"{student.model} of {run}",
            weights=f"trained on {student.data}",
            image=_image(student.image),
            built=built,
            refused=refused,
        )

    def _on_each_target(
        self, build: Callable[[MatrixTarget], BuiltCells]
    ) -> tuple[tuple[BuiltCells, ...], tuple[Cell, ...]]:
        """A runtime that is not installed costs its own cells only."""
        built: list[BuiltCells] = []
        refused: list[Cell] = []
        for target in self.recipe.targets:
            try:
                built.append(build(target))
            except EdgestillError as error:
                refused += self._wanted(target).refused(str(error))
        return tuple(built), tuple(refused)

    def _float(self, entry: ModelEntry, digest: str) -> ExportedModel:
        pixels, file = self._pixels(entry), entry.file
        half = any(make_target(target.name, {}).dialect in HALF_DIALECTS for target in self.recipe.targets)
        if file is not None and not file.is_file():
            raise ModelError(
                f"{entry.name}: there is no file {file}. Write it first, or give its path from {Path.cwd()}."
            )
        return self.workspace.build(
            ExportedModel,
            f"float-{entry.name}",
            {**self._samples_key(entry), **_net_key(entry), "half": half, "seed": self.recipe.seed},
            [digest, *([sha256_file(file)] if file else [])],
            lambda out: nets.write_float(
                entry, pixels, self._samples(entry), out, seed=self.recipe.seed, offline=self.offline, half=half
            ),
            module="pipeline.matrix.nets",
        )

    def _net_cells(self, entry: ModelEntry, floats: ExportedModel, digest: str, target: MatrixTarget) -> BuiltCells:
        wanted, claims = self._wanted(target), self._claims(entry)
        config = {**wanted.key, **self._samples_key(entry), **_machine(), "quantize": _plain(self.recipe.quantize)}
        return self.workspace.build(
            BuiltCells,
            f"cells-{entry.name}-{target.name}",
            {**config, "asked_of": claims.asked_of, "unasked": claims.unasked},
            [digest, floats],
            lambda out: cells.build_net(
                wanted, floats.exported, self._samples(entry), self._demands(claims), claims, out, self.progress
            ),
            module="pipeline.matrix.cells",
        )

    def _student_cells(self, entry: ModelEntry, student: Student, target: MatrixTarget) -> BuiltCells:
        wanted, int8 = self._wanted(target), student.int8.get(target.name)
        accuracies = student.accuracies.get(target.name, {})
        absent = f"{entry.run} made no INT8 student for {target.name}"
        graphs = Graphs(floats=student.floats.exported, int8=absent if int8 is None else int8.exported)
        return self.workspace.build(
            BuiltCells,
            f"cells-{entry.name}-{target.name}",
            {**wanted.key, **_machine(), "name": entry.name, "accuracies": accuracies},
            [student.floats, *([int8] if int8 else [])],
            lambda out: cells.build_student(wanted, graphs, accuracies, entry.name, out, self.progress),
            module="pipeline.matrix.cells",
        )

    def _wanted(self, target: MatrixTarget) -> Wanted:
        threads = threads_of(target, self.recipe.threads)
        return Wanted(target=target, precisions=self.recipe.precisions, threads=threads)

    def _pixels(self, entry: ModelEntry) -> InputConfig:
        return entry.input or self.recipe.input

    def _samples_from(self, entry: ModelEntry) -> Path | None:
        return entry.calibration or self.recipe.calibration.images

    def _samples(self, entry: ModelEntry) -> Calibration:
        pixels, source = self._pixels(entry), self._samples_from(entry)
        inputs = nets.inputs_of(entry, pixels)
        return samples_of(source, inputs, pixels, self.recipe.calibration.samples, self.progress)

    def _samples_key(self, entry: ModelEntry) -> dict[str, Any]:
        return {"input": _plain(self._pixels(entry)), "samples": self.recipe.calibration.samples}

    def _weights(self, entry: ModelEntry) -> str:
        if entry.random_weights:
            seen = SYNTHETIC if self._samples_from(entry) is None else "images"
            return f"random weights, BatchNorm statistics from {seen}: no accuracy of it means anything"
        return f"{entry.weights} weights" if entry.by_name else "weights as in the file"

    def _claims(self, entry: ModelEntry) -> Claims:
        source = self._samples_from(entry)
        if entry.random_weights:
            return Claims(asked_of=None, unasked="the weights are random, so it would mean nothing")
        if source is None:
            return Claims(asked_of=None, unasked=f"{SYNTHETIC} stand for no data")
        return Claims(asked_of=f"{source.name}, held out")

    def _demands(self, claims: Claims) -> Demands:
        """Where answers mean nothing, a gate on them would send the ladder after layers to leave in float."""
        asked = self.recipe.quantize
        lowest = 0.0 if claims.asked_of is None else asked.min_agreement
        return Demands(
            method=asked.method, min_int8_share=asked.min_int8_share, min_agreement=lowest, min_cosine=lowest
        )


def _net_key(entry: ModelEntry) -> dict[str, Any]:
    """What decides a float graph beside its samples; a file counts by its content, not by where it lies."""
    known = {"name": entry.name, "random": entry.random_weights}
    named = {"model": entry.model, "args": entry.args, "num_classes": entry.num_classes} if entry.by_name else {}
    return {**known, **named, "pretrained": entry.weights == PRETRAINED}


def _plain(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _machine() -> dict[str, Any]:
    """What is compiled holds for one machine."""
    return {"machine": environment().hard}


def _image(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)
