"""The stages of an ablation, in the workspace of the recipe's own runs: what all arms share is made once, and each arm under each
seed is a stage `distill` and a stage `ablation_score` of its own. Imports no torch before there is something to build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from pipeline import stages
from pipeline.artifacts import Artifact, PreparedData, SoftLabels, TrainedModel
from pipeline.fleet import Named
from pipeline.how import How
from pipeline.learning.sources import data_digest, locate
from pipeline.progress import Quiet
from pipeline.recipe import DistillConfig, Recipe
from pipeline.steps import Steps, own_digests, reader_digests
from pipeline.workspace import Workspace
from targets.base import read_json


@dataclass(frozen=True, kw_only=True)
class Training:
    """One arm under one seed. What only tunes is never `scored` on the test split."""

    arm: str
    seed: int
    config: DistillConfig
    scored: bool = True

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "seed": self.seed,
            "config": self.config.model_dump(mode="json"),
            "scored": self.scored,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Training:
        return cls(**{**raw, "config": DistillConfig.model_validate(raw["config"])})


@dataclass(frozen=True)
class ArmScores(Artifact):
    """Stage `ablation_score`: scores.json."""

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = read_json(self.dir / "scores.json")
        return info


@dataclass(frozen=True)
class Outcome:
    """A finished training. No scores where it only tuned."""

    student: TrainedModel
    scores: ArmScores | None

    @property
    def last_round(self) -> Mapping[str, Any]:
        told: Mapping[str, Any] = self.student.info["rounds"][-1]
        return told


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What trainings of one config read: `tutor` is the teacher, or the last of the recipe's assistants."""

    data: PreparedData
    teacher: TrainedModel
    teacher_scores: ArmScores
    tutor: TrainedModel
    labels: SoftLabels | None


@dataclass(frozen=True)
class AblationSteps:
    """The stages of one recipe's ablation in one workspace."""

    recipe: Recipe
    workspace: Workspace
    how: How

    @cached_property
    def given(self) -> tuple[PreparedData, TrainedModel, ArmScores]:
        """Data, teacher, and the teacher's scores: of every arm, and looked for once."""
        do = Steps(self.recipe, self.workspace, self.how)
        data = do.prepare_data()
        teacher = do.train_teacher(data)
        return data, teacher, self._score_teacher(data, teacher)

    def shared(self, config: DistillConfig) -> Shared:
        """Made with the recipe's seed, whatever the student's."""
        data, teacher, scores = self.given
        do = Steps(self.recipe.model_copy(update={"distill": config}), self.workspace, self.how)
        tutor = do.train_assistants(data, teacher)
        return Shared(
            data=data, teacher=teacher, teacher_scores=scores, tutor=tutor, labels=do.soft_labels(data, tutor)
        )

    def train(self, training: Training, shared: Shared) -> TrainedModel:
        """The student's own seed is the training's; stored views are of the recipe's, and the same for all."""
        config, how = training.config, replace(self.how, progress=Named(self.how.progress, training.name))
        given: list[Artifact] = [shared.data, shared.tutor, *([shared.labels] if shared.labels is not None else [])]
        return self.workspace.build(
            partial(TrainedModel, stage="distill"),
            f"ablate-{training.arm}-{training.seed}",
            {**config.model_dump(mode="json"), "seed": self.recipe.seed, "student_seed": training.seed},
            [*given, *own_digests(config.checkpoint, config.model, config.loss)],
            lambda out: stages.distill.distill(
                config, shared.data, shared.tutor, out, how, shared.labels, seed=training.seed
            ),
            module="pipeline.stages.distill",
        )

    def score(self, training: Training, shared: Shared, student: TrainedModel) -> ArmScores:
        shift, how = self.recipe.ablation.shift, replace(self.how, progress=Named(self.how.progress, training.name))
        return self.workspace.build(
            ArmScores,
            f"ablation-score-{training.arm}-{training.seed}",
            self._shift_key(),
            [shared.data, shared.teacher_scores, student],
            lambda out: stages.ablation_score.score_arm(
                shift, self.recipe.data, shared.data, shared.teacher_scores, student, out, how
            ),
            module="pipeline.stages.ablation_score",
        )

    def outcome(self, training: Training) -> Outcome:
        """Train and score; raises Stopped where that is still to do and the workspace builds nothing."""
        shared = self.shared(training.config)
        student = self.train(training, shared)
        return Outcome(student, self.score(training, shared, student) if training.scored else None)

    def _score_teacher(self, data: PreparedData, teacher: TrainedModel) -> ArmScores:
        shift = self.recipe.ablation.shift
        return self.workspace.build(
            ArmScores,
            "ablation-score-teacher",
            self._shift_key(),
            [data, teacher],
            lambda out: stages.ablation_score.score_teacher(shift, self.recipe.data, data, teacher, out, self.how),
            module="pipeline.stages.ablation_score",
        )

    def _shift_key(self) -> dict[str, Any]:
        """The corruptions by their names, what is drawn elsewhere by its content."""
        digests = {
            one.source: data_digest(
                locate(self.recipe.data.model_copy(update={"source": one.source}), offline=self.how.offline),
                self.workspace.dir / ".data-digests.json",
            )
            for one in self.recipe.ablation.shift
            if one.source is not None
        }
        readers = reader_digests(*digests)
        return {"shift": [one.name for one in self.recipe.ablation.shift], "sources": digests, "readers": readers}


def looking(do: AblationSteps) -> AblationSteps:
    """The same stages in a workspace that builds nothing, and says nothing."""
    workspace = Workspace(do.workspace.dir.parent, do.recipe.name, Quiet(), dry_run=True)
    return AblationSteps(do.recipe, workspace, replace(do.how, progress=Quiet()))
