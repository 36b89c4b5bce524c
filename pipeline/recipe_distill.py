"""The recipe's part on distillation: what is minimised, and the four axes on which it may change while the student learns.

samples (`curriculum`), temperature (`temperature_curriculum`), teacher (`teacher_curriculum`, `assistants`) and loss weights
(`weight_curriculum`), each off where it is null. Progress is the share of a training that is done, 0 to 1.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.recipe_losses import (
    LossConfig,
    SoftLoss,
    Temperature,
    Weight,
    not_below_zero,
)
from pipeline.recipe_training import Count, Fraction, ModelConfig, Positive, Section, TrainConfig

Order = Literal["easy_first", "hard_first", "random"]
# fmt: off
Difficulty = Literal[
    "teacher_loss", "teacher_doubt", "teacher_entropy", "margin",
    "self_paced", "el2n", "kl", "disagreement", "forgetting", "aum",
]
Pacing = Literal[
    "linear", "root", "quadratic", "competence", "step", "baby_step", "exponential", "log", "geometric", "adaptive", "replay",
]
# fmt: on
# What the student's own outputs say changes while it learns: these measures are only told by scoring again and again.
STUDENT_MEASURES = ("self_paced", "el2n", "kl", "disagreement", "forgetting", "aum")


AboveZero = Annotated[float, Field(gt=0.0, le=1.0)]


class CurriculumConfig(Section):
    """Which training samples are shown when: a difficulty measurer and a pacing function (Wang et al., 2021)."""

    difficulty: Difficulty = Field(
        "teacher_loss", description="from self_paced on told by the student, with rescore_every"
    )
    pacing: Pacing = Field(
        "root", description="adaptive: a plateau on validation shows more; replay: fractions, blind to validation"
    )
    order: Order = Field("easy_first", description="random and hard_first are the controls")
    start_fraction: AboveZero = Field(0.5, description="b: the share shown first")
    full_at: AboveZero = Field(0.5, description="a: share of the training after which all is shown")
    root_p: Positive = Field(2.0, description="competence: the root")
    num_steps: Count = Field(5, description="baby_step: equal steps from b to all")
    plateau: Fraction = Field(
        0.005, description="adaptive: validation top-1 within this of the best so far is a plateau"
    )
    advance: AboveZero = Field(0.1, description="adaptive: share of the data that a plateau adds")
    fractions: tuple[AboveZero, ...] = Field(
        (), description="replay: one an epoch, as pacing_log of distill.json has them"
    )
    epoch_length: Literal["shown", "all"] = Field(
        "shown", description="all: what is shown comes again, in other views, until an epoch is as long as all the data"
    )
    rescore_every: Count | None = Field(None, description="epochs after which difficulty is measured again; null: once")

    @property
    def least_fraction(self) -> float:
        """The smallest share of the data that is ever shown."""
        return min(self.fractions, default=self.start_fraction)

    @model_validator(mode="after")
    def _is_whole(self) -> CurriculumConfig:
        if self.difficulty in STUDENT_MEASURES and self.rescore_every is None:
            raise ValueError(
                f"difficulty: {self.difficulty} is told by the student as it learns: set rescore_every, in epochs"
            )
        if self.difficulty not in STUDENT_MEASURES and self.rescore_every is not None:
            raise ValueError(f"difficulty: {self.difficulty} is told by the teacher, once: drop rescore_every")
        if (self.pacing == "replay") != bool(self.fractions):
            raise ValueError("pacing: replay and fractions belong together: the share to show, one an epoch")
        return self


class _Scheduled(Section):
    schedule: str
    full_at: AboveZero = Field(1.0, description="progress from which `end` holds")
    num_steps: Count = Field(4, description="step: equal steps")
    values: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.schedule == "replay") != bool(self.values):
            raise ValueError("schedule: replay and values belong together, one an epoch")
        return self


class TemperatureCurriculumConfig(_Scheduled):
    """The temperature on its way from distill.temperature to `end`; or learned against the student (CTKD, Li et al., 2023)."""

    schedule: Literal["linear", "cosine", "step", "learned", "replay"] = "cosine"
    end: Temperature = 1.0
    lowest: Weight = Field(1.0, description="learned: T = lowest + span * sigmoid(theta), theta = 1 at first")
    span: Positive = Field(20.0, description="learned")
    reversal_epochs: Positive = Field(
        10.0, description="learned: epochs in which the gradient's factor goes from 0 to -1"
    )
    values: tuple[Temperature, ...] = Field(
        (), description="replay: one an epoch, as another training's curve has them"
    )


class WeightCurriculumConfig(_Scheduled):
    """A factor on all that the teacher says, from 1 to `end`; cross-entropy of a weight below 1 goes to 1 as far as it.
    And a weight a sample."""

    schedule: Literal["constant", "linear", "cosine", "step", "gap", "replay"] = Field(
        "constant", description="gap: the teacher's lead on validation against that after the first epoch"
    )
    end: Fraction = Field(0.0, description="gap: never below it")
    values: tuple[Fraction, ...] = Field((), description="replay: one an epoch, as another training's curve has them")
    per_sample: Literal["none", "correctness", "confidence", "superloss"] = Field(
        "none",
        description="p_T(y) or max p_T on what the teacher says; superloss (Castells et al., 2020) on all of the sample",
    )
    superloss_lambda: Positive = Field(1.0, description="superloss: the larger, the more alike are all weights")


class TeacherCurriculumConfig(Section):
    """The teacher's own way, checkpoint by checkpoint, then the teacher (route-constrained: Jin et al., 2019)."""

    order: Order = Field("easy_first", description="easy_first: as it learned; the others are the controls")
    full_at: AboveZero = Field(0.5, description="progress from which the finished teacher teaches")


class CacheConfig(Section):
    """How the teacher's logits are stored, a row a sample and a view (`pipeline/learning/label_cache.py`)."""

    dtype: Literal["fp16", "fp32"] = Field("fp16", description="fp16: 2 bytes a logit, within 1/2048 of it")
    top_k: Count | None = Field(
        None, description="so many of the largest logits a sample, the rest spread evenly; null: all"
    )


class AssistantConfig(ModelConfig):
    """A teacher assistant (Mirzadeh et al., 2020): learns from the one before it by plain KD, teaches the next."""

    train: TrainConfig = TrainConfig()
    temperature: Temperature = 4.0
    kd_weight: Annotated[Fraction, BeforeValidator(not_below_zero)] = 0.5


class DistillConfig(ModelConfig):
    """The student and how it learns from the teacher's soft labels (Hinton et al., 2015). With a checkpoint and
    `train: null` it is taken as it is: a student that was trained elsewhere, to be quantized and proved."""

    train: TrainConfig | None = TrainConfig()
    temperature: Temperature = 4.0
    kd_weight: Annotated[Fraction, BeforeValidator(not_below_zero)] = Field(
        0.5, description="alpha: the soft labels' share of the loss; 0 is plain training"
    )
    losses: tuple[LossConfig, ...] | None = Field(
        None, description="their sum in place of kd at kd_weight and cross_entropy at 1 - kd_weight"
    )
    loss: str | None = Field(
        None, description="python:package.module:factory instead of KD; label -1: the sample has none"
    )
    curriculum: CurriculumConfig | None = None
    temperature_curriculum: TemperatureCurriculumConfig | None = None
    weight_curriculum: WeightCurriculumConfig | None = None
    teacher_curriculum: TeacherCurriculumConfig | None = None
    assistants: tuple[AssistantConfig, ...] = Field((), description="from the teacher's size down to the student's")
    teacher_wrong: Literal["keep", "drop", "down_weight", "label_only"] = Field(
        "keep",
        description="a sample that the teacher takes for another class: learnt like all; left out; its soft losses weighted by "
        "p_T(y) / max p_T; or its label alone",
    )
    views: Count | None = Field(
        None, description="so many augmented views, shown in turn, an epoch each; null: a fresh one every epoch"
    )
    teacher_forward: Literal["auto", "online", "cached"] = Field(
        "auto",
        description="online: the teacher is asked in every step; cached: once a view, by stage soft_labels; auto: cached where "
        "views are fewer than the epochs of all rounds and a cache can serve",
    )
    cache: CacheConfig = CacheConfig()
    rounds: Count = Field(
        1, description="at most so many rounds; each begins with soft labels of the best model so far"
    )
    target_top1: Fraction | None = Field(None, description="validation top-1 at which no further round is begun")

    @property
    def uses_cache(self) -> bool:
        """Whether the teacher's answers are read from a cache."""
        return self.decided_teacher_forward[0] == "cached"

    @property
    def decided_teacher_forward(self) -> tuple[Literal["online", "cached"], str]:
        """What `teacher_forward` comes to, and why."""
        if self.teacher_forward != "auto":
            return self.teacher_forward, "the recipe says so"
        if self.train is None:
            return "online", "nothing is trained"
        if hindrance := self._uncacheable:
            return "online", hindrance
        if self.views is None:
            return "online", "views: null, so no view is seen twice"
        num_epochs, words = self.epochs_in_words
        told = f"{self.num_views} views for {words}"
        if self.num_views is not None and self.num_views >= num_epochs:
            return "online", f"{told}: a cache would save no pass of the teacher"
        return "cached", f"{told}: each is seen again"

    @property
    def num_views(self) -> int | None:
        """How many views are shown in turn, in each round again; None: a fresh one every epoch."""
        if self.train is None:
            return self.views
        if self.views is None:
            return self.train.epochs if self.uses_cache else None
        return self.views if self.num_passes > 1 else min(self.views, self.train.epochs)

    @property
    def num_passes(self) -> int:
        """How often an epoch shows the same sample at most, and about: in the first epochs of a curriculum."""
        samples = self.curriculum
        return 1 if samples is None or samples.epoch_length == "shown" else ceil(1 / samples.least_fraction)

    @property
    def epochs_in_words(self) -> tuple[int, str]:
        """How many epochs all rounds have, and how a person says it."""
        num_epochs = self.train.epochs if self.train is not None else 0
        told = f"{num_epochs} epochs" if self.rounds == 1 else f"{self.rounds} rounds of {num_epochs} epochs"
        return num_epochs * self.rounds, told

    @property
    def needs_validation(self) -> list[str]:
        """The keys whose choices are made on validation."""
        asks = {
            "target_top1": self.target_top1 is not None,
            "rounds": self.rounds > 1,
            "curriculum.pacing": self.curriculum is not None and self.curriculum.pacing == "adaptive",
            "weight_curriculum.schedule": self.weight_curriculum is not None
            and self.weight_curriculum.schedule == "gap",
        }
        return [key for key, asked in asks.items() if asked]

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a loss of ours reads the teacher's answers."""
        if self.losses is None:
            return self.kd_weight > 0
        return any(one.name != "cross_entropy" and one.weight > 0 for one in self.losses)

    @property
    def asks_teacher(self) -> bool:
        """Whether anything of the objective needs the teacher's answers."""
        return self.loss is not None or self.teacher_wrong == "drop" or self.learns_from_teacher

    @model_validator(mode="after")
    def _has_weights_or_learns(self) -> DistillConfig:
        if self.train is not None:
            return self
        if self.checkpoint is None and not self.pretrained:
            raise ValueError("train: null needs a checkpoint or pretrained: true; else the student has random weights")
        if idle := [key for key in _OF_A_TRAINING if getattr(self, key) != type(self).model_fields[key].default]:
            raise ValueError(f"train: null leaves nothing to {' and '.join(idle)}: drop them")
        return self

    @model_validator(mode="after")
    def _losses_are_whole(self) -> DistillConfig:
        if self.loss is not None:
            ours = (
                "losses",
                "temperature",
                "kd_weight",
                "temperature_curriculum",
                "weight_curriculum",
                "teacher_wrong",
            )
            if idle := [key for key in ours if getattr(self, key) != type(self).model_fields[key].default]:
                raise ValueError(f"loss is your own, which {' and '.join(idle)} cannot change: drop one or the other")
        if self.losses is None:
            return self
        if self.kd_weight != type(self).model_fields["kd_weight"].default:
            raise ValueError("kd_weight is the short form of losses: drop one, and give kd its weight in the list")
        if not any(one.weight for one in self.losses) and any(one.name == "cross_entropy" for one in self.losses):
            raise ValueError("losses: every weight is 0, so there is nothing to learn. Give one a weight above 0")
        if sum(one.name == "cross_entropy" for one in self.losses) > 1:
            raise ValueError("losses: cross_entropy stands there twice. Give it once, with the sum of the weights")
        return self

    @model_validator(mode="after")
    def _cache_can_serve(self) -> DistillConfig:
        if self.teacher_forward == "cached" and self.train is not None and (hindrance := self._uncacheable):
            raise ValueError(f"teacher_forward: cached: {hindrance}. Set online or auto, or drop it")
        if self.teacher_forward == "online" and self.cache != CacheConfig():
            raise ValueError("cache says how answers are stored, and teacher_forward: online stores none: drop one")
        return self

    @model_validator(mode="after")
    def _axes_fit(self) -> DistillConfig:
        if self.losses is not None and self.rounds > 1 and any(one.name == "features" for one in self.losses):
            raise ValueError(
                "rounds: a later round may learn from a student, which has no teacher_layer: drop features or rounds"
            )
        if self.teacher_curriculum is not None and self.assistants:
            raise ValueError(
                "teacher_curriculum: an assistant keeps no checkpoints of its way: drop it or the assistants"
            )
        if self.temperature_curriculum is not None and not self._has_a_loss_of_that_temperature:
            raise ValueError(
                "temperature_curriculum: no loss has distill.temperature: drop it, or a loss's own temperature"
            )
        weights = self.weight_curriculum
        if weights is not None and weights.per_sample in ("correctness", "confidence") and not self.learns_from_teacher:
            raise ValueError(
                f"weight_curriculum.per_sample: {weights.per_sample} weighs what the teacher says, and no loss has it"
            )
        for axis, values in self._replayed.items():
            if values and self.train is not None and len(values) != self.train.epochs:
                raise ValueError(f"{axis} has {len(values)} values for {self.train.epochs} epochs: give one an epoch")
        return self

    @property
    def _uncacheable(self) -> str | None:
        """Why a cache of logits cannot serve; None where it can."""
        if self.losses is not None and any(one.name == "features" and one.weight > 0 for one in self.losses):
            return "the loss features reads the teacher's layers, and a cache holds its logits"
        if self.teacher_curriculum is not None:
            return "teacher_curriculum changes the teacher on the way, and a cache holds the answers of one"
        if not self.asks_teacher:
            return "no loss asks the teacher"
        return None

    @property
    def _has_a_loss_of_that_temperature(self) -> bool:
        if self.losses is None:
            return self.kd_weight > 0
        return any(isinstance(one, SoftLoss) and one.temperature is None for one in self.losses)

    @property
    def _replayed(self) -> dict[str, tuple[float, ...]]:
        samples, temperature, weights = self.curriculum, self.temperature_curriculum, self.weight_curriculum
        return {
            "curriculum.fractions": samples.fractions if samples else (),
            "temperature_curriculum.values": temperature.values if temperature else (),
            "weight_curriculum.values": weights.values if weights else (),
        }


_OF_A_TRAINING = (
    *("curriculum", "temperature_curriculum", "weight_curriculum", "teacher_curriculum"),
    *("assistants", "rounds", "losses", "loss", "teacher_wrong", "views", "teacher_forward", "cache"),
)
