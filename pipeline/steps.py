"""One method a stage: what enters its key, and the one call that builds it. `run.py` says in which order.

Imports no torch: the stage's module is imported inside the lambda, so only when there is something to build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.devices import Device
from pipeline import stages
from pipeline.artifacts import (
    Artifact,
    Bundle,
    CompiledArms,
    ExportedModel,
    Kit,
    Measured,
    PreparedData,
    Report,
    Scores,
    SoftLabels,
    TrainedModel,
    Verdict,
)
from pipeline.fleet import facts_of, runtime_of
from pipeline.how import How
from pipeline.learning.own_code import PREFIX, code_digest
from pipeline.learning.sources import data_digest, factory, locate, locate_unlabelled
from pipeline.processes import learn
from pipeline.recipe import AssistantConfig, ModelConfig, Recipe, TargetConfig
from pipeline.signing import signer_of
from pipeline.workspace import Workspace
from targets.base import sha256_file
from targets.errors import RecipeError


@dataclass(frozen=True)
class Steps:
    """The stages of one recipe in one workspace."""

    recipe: Recipe
    workspace: Workspace
    how: How

    def prepare_data(self) -> PreparedData:
        config = self.recipe.data
        offline, known = self.how.offline, self.workspace.dir / ".data-digests.json"
        digests = [data_digest(locate(config, offline=offline), known)]
        digests += [data_digest(locate_unlabelled(config, name, offline=offline), known) for name in config.unlabelled]
        digests += reader_digests(config.source, *config.unlabelled)
        return self.workspace.build(
            PreparedData,
            "data",
            self._key(config),
            digests,
            lambda out: stages.data.prepare_data(
                config,
                self.recipe.seed,
                out,
                offline=self.how.offline,
                allow_code=self.how.allow_code,
                progress=self.how.progress,
            ),
            module="pipeline.stages.data",
        )

    def train_teacher(self, data: PreparedData) -> TrainedModel:
        config = self.recipe.teacher
        return self.workspace.build(
            partial(TrainedModel, stage="teacher"),
            "teacher",
            self._key(config),
            [data, *own_digests(config.checkpoint, config.model)],
            lambda out: learn(partial(stages.teacher.train_teacher, config, data), out, self.how),
            module="pipeline.stages.teacher",
        )

    def train_assistants(self, data: PreparedData, teacher: TrainedModel) -> TrainedModel:
        """The last of the chain, which teaches the student: the teacher itself where the recipe has no assistants."""
        tutor = teacher
        for number, config in enumerate(self.recipe.distill.assistants, 1):
            tutor = self._train_assistant(number, config, data, tutor)
        return tutor

    def _train_assistant(
        self, number: int, config: AssistantConfig, data: PreparedData, tutor: TrainedModel
    ) -> TrainedModel:
        student = ModelConfig(model=self.recipe.distill.model, args=self.recipe.distill.args)
        return self.workspace.build(
            partial(TrainedModel, stage="distill"),
            f"assistant-{number}",
            self._key(config),
            [data, tutor, *own_digests(config.checkpoint, config.model)],
            lambda out: learn(partial(stages.distill.train_assistant, config, student, data, tutor), out, self.how),
            module="pipeline.stages.distill",
        )

    def soft_labels(self, data: PreparedData, tutor: TrainedModel) -> SoftLabels | None:
        """None where the recipe asks the teacher online. What the student is like is no part of the key: students share them."""
        config = self.recipe.distill
        if not config.uses_cache or config.train is None:
            return None
        precision = {"precision": config.train.precision, "channels_last": config.train.channels_last}
        return self.workspace.build(
            SoftLabels,
            "soft_labels",
            {**self._key(config.cache), "num_views": config.num_views, **precision},
            [data, tutor],
            lambda out: stages.soft_labels.cache_teacher(config, data, tutor, out, self.how),
            module="pipeline.stages.soft_labels",
        )

    def distill(self, data: PreparedData, teacher: TrainedModel, labels: SoftLabels | None) -> TrainedModel:
        config = self.recipe.distill
        given: list[Artifact] = [data, teacher, *([labels] if labels is not None else [])]
        return self.workspace.build(
            partial(TrainedModel, stage="distill"),
            "distill",
            self._key(config),
            [*given, *own_digests(config.checkpoint, config.model, config.loss)],
            lambda out: learn(partial(stages.distill.distill, config, data, teacher, labels=labels), out, self.how),
            module="pipeline.stages.distill",
        )

    def quantize(self, scheme: str, data: PreparedData, student: TrainedModel) -> TrainedModel:
        config = self.recipe.quantize
        return self.workspace.build(
            partial(TrainedModel, stage="quantize"),
            f"quantize-{scheme}",
            {**self._key(config), "scheme": scheme},
            [data, student],
            lambda out: learn(partial(stages.quantize.quantize, config, scheme, data, student), out, self.how),
            module="pipeline.stages.quantize",
        )

    def export_float(self, role: str, trained: TrainedModel, data: PreparedData) -> ExportedModel:
        return self.workspace.build(
            ExportedModel,
            f"export-{role}",
            {"role": role},
            [trained, data],
            lambda out: stages.export.export_trained(role, trained, data, out, self.how),
            module="pipeline.stages.export",
        )

    def export_quantized(
        self, scheme: str, dialect: str, quantized: TrainedModel, student: TrainedModel, data: PreparedData
    ) -> ExportedModel:
        return self.workspace.build(
            ExportedModel,
            f"export-{scheme}-{dialect}",
            {"scheme": scheme, "dialect": dialect},
            [quantized, student, data],
            lambda out: stages.export.export_student_int8(scheme, dialect, quantized, student, data, out, self.how),
            module="pipeline.stages.export",
        )

    def score(
        self, scheme: str, data: PreparedData, teacher: TrainedModel, student: TrainedModel, quantized: TrainedModel
    ) -> Scores:
        return self.workspace.build(
            Scores,
            f"score-{scheme}",
            {},
            [data, teacher, student, quantized],
            lambda out: stages.score.score_torch(data, teacher, student, quantized, out, self.how),
            module="pipeline.stages.score",
        )

    def score_onnx(self, scheme: str, dialect: str, int8: ExportedModel, data: PreparedData) -> Scores:
        return self.workspace.build(
            Scores,
            f"score-onnx-{scheme}-{dialect}",
            {},
            [int8, data],
            lambda out: stages.score.score_onnx(int8, data, out, self.how),
            module="pipeline.stages.score",
        )

    def compile(
        self,
        name: str,
        target: TargetConfig,
        int8: ExportedModel,
        floats: Mapping[str, ExportedModel],
        device: Device,
    ) -> CompiledArms:
        return self.workspace.build(
            partial(CompiledArms, name=name),
            f"compile-{name}",
            {
                "target": target.name,
                "options": target.options,
                **self._machine(device),
                "runtime": runtime_of(device, target, self.workspace.dir),
            },
            [int8, *floats.values()],
            lambda out: stages.deploy.compile_arms(target, int8, floats, out, self.how, device),
            module="pipeline.stages.deploy",
        )

    def measure(self, name: str, compiled: CompiledArms, data: PreparedData, device: Device) -> Measured:
        config = self.recipe.bench
        return self.workspace.build(
            Measured,
            f"measure-{name}",
            {**self._key(config), **self._machine(device)},
            [compiled, data],
            lambda out: stages.deploy.measure_target(config, compiled, data, out, self.how, device),
            module="pipeline.stages.deploy",
        )

    def judge(
        self,
        name: str,
        target: TargetConfig,
        data: PreparedData,
        models: tuple[TrainedModel, TrainedModel],
        scores: tuple[Scores, Scores],
        compiled: CompiledArms,
        measured: Measured,
    ) -> Verdict:
        """models: teacher, student; scores: of the torch models, of the exported graph."""
        return self.workspace.build(
            Verdict,
            f"verdict-{name}",
            {"target": _plain(target), "gate": _plain(self.recipe.gate)},
            [data, *models, *scores, compiled, measured, *own_digests(None, self.recipe.gate.metric)],
            lambda out: stages.verdict.judge(
                target, self.recipe.gate, data, models, scores, compiled, measured, out, self.how
            ),
            module="pipeline.stages.verdict",
        )

    def kit(
        self,
        name: str,
        target: TargetConfig,
        int8: ExportedModel,
        floats: ExportedModel,
        onnx_scores: Scores,
        data: PreparedData,
    ) -> Kit:
        return self.workspace.build(
            Kit,
            f"kit-{name}",
            {"target": _plain(target)},
            [int8, floats, onnx_scores, data],
            lambda out: stages.kit.kit_of_run(target, int8, floats, onnx_scores, data, out),
            module="pipeline.stages.kit",
        )

    def bundle(
        self,
        name: str,
        verdict: Verdict,
        compiled: CompiledArms,
        measured: Measured,
        data: PreparedData,
        trained: Mapping[str, TrainedModel],
        device: Device,
    ) -> Bundle:
        provenance = {
            "recipe": _plain(self.recipe),
            "data": {"source": self.recipe.data.source, "digest": data.digest},
            **{role: {"model": model.info["model"], "digest": model.digest} for role, model in trained.items()},
        }
        return self.workspace.build(
            Bundle,
            f"bundle-{name}",
            {"include_samples": self.how.include_samples, "provenance": provenance, **self._signed_by()},
            [verdict, compiled, measured, data],
            lambda out: stages.bundle.bundle_shipped(
                verdict, compiled, measured, data, provenance, out, self.how, device=device, sign_key=self.how.sign_key
            ),
            module="pipeline.stages.bundle",
        )

    def _signed_by(self) -> dict[str, str]:
        """Whose signature a bundle has is part of what it is; the public key's digest tells nothing of the private one."""
        return {"signed_by": signer_of(self.how.sign_key)} if self.how.sign_key is not None else {}

    def report(
        self,
        data: PreparedData,
        teacher: TrainedModel,
        student: TrainedModel,
        quantized: Mapping[str, TrainedModel],
        verdicts: Mapping[str, Verdict],
        measured: Mapping[str, Measured],
    ) -> Report:
        return self.workspace.build(
            Report,
            "report",
            {"recipe": _plain(self.recipe)},
            [data, teacher, student, *quantized.values(), *verdicts.values()],
            lambda out: stages.report.write_report(
                self.recipe,
                data,
                {"teacher": teacher, "distill": student, **quantized},
                verdicts,
                measured,
                out,
                seconds=sum(self.workspace.seconds.values()),
            ),
            module="pipeline.stages.report",
        )

    def _machine(self, device: Device) -> dict[str, Any]:
        """What is compiled and measured holds for one machine."""
        return {"device": device.name, "machine": facts_of(device, self.workspace.dir)}

    def _key(self, config: BaseModel) -> dict[str, Any]:
        return {**_plain(config), "seed": self.recipe.seed}


def _plain(config: BaseModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def reader_digests(*sources: str) -> list[str]:
    """The code of every reader of a person's own among these sources, with what it imports."""
    return [code_digest(source) for source in sources if source.startswith(PREFIX)]


def own_digests(checkpoint: Path | None, *references: str | None) -> list[str]:
    """What a person brings enters the key by its content: a checkpoint, and the file of a `python:` module."""
    if checkpoint is not None and not checkpoint.is_file():
        raise RecipeError(f"checkpoint {checkpoint}: there is no such file. Give its path from {Path.cwd()}.")
    code = [reference for reference in references if reference and reference.startswith(PREFIX)]
    for reference in code:
        factory.locate(reference.removeprefix(PREFIX))  # one that is not there is refused before it is hashed
    return [*([sha256_file(checkpoint)] if checkpoint else []), *map(code_digest, code)]
