"""The recipe: everything that one run of the pipeline is told. What all trainings share stands in recipe_training.py, the
sections of distillation and ablation in recipe_distill.py, recipe_losses.py and recipe_ablation.py; how a file is read and refused in
recipe_file.py; the rest here.

Imports no torch, so that `edgestill recipe validate` answers at once. Unknown keys are refused with the nearest known
one; values are checked here and nowhere else. Lengths are epochs, learning rates are per step, accuracies are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.recipe_ablation import AblationConfig, ShiftConfig, checked_arms
from pipeline.recipe_distill import (
    AssistantConfig,
    CurriculumConfig,
    DistillConfig,
    TeacherCurriculumConfig,
    TemperatureCurriculumConfig,
    WeightCurriculumConfig,
)
from pipeline.recipe_file import explain, read_sections
from pipeline.recipe_losses import (
    CrossEntropyConfig,
    DistConfig,
    DkdConfig,
    FeaturesConfig,
    KdConfig,
    LossConfig,
    SoftLoss,
)
from pipeline.recipe_training import (
    Arguments,
    Count,
    Fraction,
    ModelConfig,
    NormalizationConfig,
    Positive,
    Section,
    TrainConfig,
)
from pipeline.recipe_unlabelled import check_labels, fault_without_labels
from pipeline.schemes import scheme_of
from targets import make_target
from targets.errors import RecipeError

__all__ = [
    "FIRST_RECIPE",
    "SCHEMA_VERSION",
    "AblationConfig",
    "Arguments",
    "AssistantConfig",
    "AugmentConfig",
    "BenchConfig",
    "BudgetConfig",
    "Count",
    "CrossEntropyConfig",
    "CurriculumConfig",
    "DataConfig",
    "DistConfig",
    "DistillConfig",
    "DkdConfig",
    "FeaturesConfig",
    "Fraction",
    "GateConfig",
    "KdConfig",
    "LossConfig",
    "ModelConfig",
    "NormalizationConfig",
    "Positive",
    "QatConfig",
    "QuantizeConfig",
    "Recipe",
    "Section",
    "ShiftConfig",
    "SoftLoss",
    "TargetConfig",
    "TeacherConfig",
    "TeacherCurriculumConfig",
    "TemperatureCurriculumConfig",
    "TrainConfig",
    "WeightCurriculumConfig",
    "fault_without_labels",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
    "write_first_recipe",
]

SCHEMA_VERSION = 1


class AugmentConfig(Section):
    """Random crop after `crop` pixels of zero padding, and a horizontal flip. None: what the data set allows."""

    crop: int | None = Field(None, ge=0, le=64)
    flip: bool | None = None
    erase: Fraction = Field(
        0.0, description="probability of erasing a random rectangle of up to a quarter of the image"
    )


class DataConfig(Section):
    """Where images and labels come from, and how the training part is divided. The test part is never touched by it."""

    source: str = Field(
        description="mnist_5k, digits, torchvision:NAME, npz:PATH, image_folder:PATH or python:package.module:factory"
    )
    root: Path = Field(Path("data"), description="where torchvision's sets are looked for and downloaded to")
    image_size: Count | None = Field(None, description="pixels; image_folder only: the side of the centre crop")
    validation: Fraction = Field(
        0.1, description="share of the training part held out for every choice; 0: no choice is made"
    )
    train_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="share of the train split that is kept, the same in every class; the others are used by nothing",
    )
    labelled_share: Fraction = Field(
        1.0,
        description="share of the train split that keeps its label, the same in every class, and the very samples that a train_share "
        "of that size keeps; the others are images without a label",
    )
    unlabelled: tuple[str, ...] = Field(
        (),
        description="more images without a label: sources whose training part, or all they have, joins the train split; an "
        "image_folder may be flat, an npz may hold x_train alone, and labels that are there are ignored",
    )
    label_noise: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the train labels replaced by another class, uniformly; other splits keep theirs"
    )
    calibration: Count = Field(512, description="training samples that set the quantizers' ranges")
    test: Fraction = Field(0.2, description="share held out for testing where the data have no test part of their own")
    max_unreadable: Fraction = Field(0.01, description="image_folder: refused above this share of unreadable images")
    workers: int = Field(2, ge=0, le=64, description="image_folder: processes that decode images")
    augment: AugmentConfig = AugmentConfig()

    @property
    def has_unlabelled(self) -> bool:
        """Whether there are train samples without a label."""
        return self.labelled_share < 1 or bool(self.unlabelled)

    @model_validator(mode="after")
    def _unlabelled_are_others(self) -> DataConfig:
        if self.source in self.unlabelled:
            raise ValueError(
                f"unlabelled: {self.source} is the data themselves. To learn from them without labels set labelled_share"
            )
        if twice := next((name for name in self.unlabelled if self.unlabelled.count(name) > 1), None):
            raise ValueError(f"unlabelled: {twice} stands there twice. Drop one")
        return self


class QatConfig(TrainConfig):
    """Quantization-aware fine-tuning. BatchNorm is folded, so rates are smaller and gradients clipped (at lr 0.01 without
    clipping a ResNet-8 fell to chance); fp32, because BF16 has too few bits to stand between 255 levels."""

    epochs: Count = 2
    lr: Positive = 0.001
    weight_decay: float = Field(1e-4, ge=0.0)
    grad_clip: Positive | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"


class TeacherConfig(ModelConfig):
    """The teacher. With a checkpoint and `train: null` it is taken as it is."""

    train: TrainConfig | None = TrainConfig()
    normalization: NormalizationConfig | None = Field(
        None,
        description="of the pixels, where its weights were trained on other data than these; null: as these data are",
    )
    keep_checkpoints: int = Field(
        0, ge=0, description="so many of its own way, evenly spaced: for distill.teacher_curriculum"
    )

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherConfig:
        if self.train is None and self.checkpoint is None and not self.pretrained:
            raise ValueError("train: null needs a checkpoint or pretrained: true; else the teacher has random weights")
        if self.normalization is not None and self.checkpoint is None and not self.pretrained:
            raise ValueError(
                "normalization is what a teacher was trained with elsewhere, and this one has no checkpoint: drop it"
            )
        if self.keep_checkpoints and self.keep_checkpoints >= (self.train.epochs if self.train else 1):
            raise ValueError(
                f"keep_checkpoints={self.keep_checkpoints} needs a training of more epochs than that: the last epoch is "
                "the teacher itself"
            )
        return self


class QuantizeConfig(Section):
    """The ladder PTQ -> equalization and bias correction -> QAT -> mixed precision: the first rung that passes the gate
    ships. Another method ships its own rung, tried after those that it starts from: only ladder and qat train."""

    method: Literal["ladder", "ptq", "equalized", "qat", "mixed"] = "ladder"
    max_drop: Fraction = Field(0.005, description="gate: validation top-1 that may be lost against the float student")
    train: QatConfig = QatConfig()
    kd_weight: Fraction = Field(0.9, description="share of the float student's soft labels, T = 1")
    kernels: Literal["torch", "extension"] = Field(
        "torch", description="NNCF's fake-quantize kernels: reference, or compiled C++"
    )
    controls: bool = Field(
        True, description="beside QAT: PTQ alone, QAT without distillation, and an FP32 fine-tune of the same length"
    )


class BudgetConfig(Section):
    """What the target must keep to. Exceeded is exit 4, unreadable is exit 7."""

    p50_ms: Positive | None = None
    p99_ms: Positive | None = None
    peak_rss_mib: Positive | None = None
    size_mib: Positive | None = None
    load_ms: Positive | None = None
    top1_min: Fraction | None = None


class TargetConfig(Section):
    """One target device: what to compile for, where it runs, what it must keep to."""

    name: str
    scheme: str | None = Field(
        None,
        description="what is trained, where not the target's own: portable is one graph for every runtime, cpu-int8-w7 has "
        "weights of 7 bits, for x86 CPUs without VNNI; where one is this machine, it is chosen unless cpu-int8 is asked for",
    )
    device: str = Field(
        "local",
        description="local, a name of devices.yaml, ssh://user@host[:port], or kit for one that is not connected",
    )
    options: Arguments = Field(default_factory=dict)
    budget: BudgetConfig = BudgetConfig()
    min_int8_share: Fraction = Field(0.95, description="placement gate: share of MACs that must run in INT8")
    on_failure: Literal["float", "error"] = Field("float", description="float: ship float and say why; error: stop")


class BenchConfig(Section):
    """How long each artifact is measured (benchmarks/device/measure.py holds the presets)."""

    preset: Literal["smoke", "ci", "release"] = "smoke"
    launches: Count | None = Field(None, description="fresh processes an artifact; None: the preset's number")


class GateConfig(Section):
    """The gate on the artifact that ships, against the float student, on the test samples."""

    max_drop: float = Field(0.01, ge=0.0, description="what may be lost between the float student and the artifact")
    metric: str | None = Field(
        None,
        description="python:package.module:factory; factory() gives a function of logits (N, K) and class ids (N,), larger is "
        "better: every hop is scored with it, and the gate holds it in place of top-1",
    )


class Recipe(Section):
    """From a teacher to every target device."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig
    teacher: TeacherConfig
    distill: DistillConfig
    quantize: QuantizeConfig = QuantizeConfig()
    targets: Annotated[tuple[TargetConfig, ...], Field(min_length=1)]
    gate: GateConfig = GateConfig()
    bench: BenchConfig = BenchConfig()
    ablation: AblationConfig = AblationConfig()

    @model_validator(mode="after")
    def _choices_have_data(self) -> Recipe:
        if self.data.validation == 0 and (method := self.quantize.method) in ("ladder", "mixed"):
            raise ValueError(
                f"data.validation=0 leaves method {method} nothing to choose by: set quantize.method to ptq, equalized or qat"
            )
        names = [(target.name, target.device, target.scheme, str(target.options)) for target in self.targets]
        if len(set(names)) != len(names):
            raise ValueError("targets: the same target stands there twice with the same device, scheme and options")
        distillations = {"distill": self.distill, **checked_arms(self.ablation.arms, self.distill)}
        for where, distill in distillations.items():
            self._check_has_what_it_asks_for(distill, where)
        if self.data.has_unlabelled:
            check_labels(self, distillations)
        return self

    def _check_has_what_it_asks_for(self, distill: DistillConfig, where: str) -> None:
        if self.data.validation == 0 and distill.needs_validation:
            asked = ", ".join(f"{where}.{key}" for key in distill.needs_validation)
            raise ValueError(f"data.validation=0 leaves nothing to choose by: drop {asked}")
        if distill.teacher_curriculum is not None and not self.teacher.keep_checkpoints:
            raise ValueError(
                f"{where}.teacher_curriculum needs checkpoints of the teacher's way: set teacher.keep_checkpoints"
            )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `a.b=c` overrides, check it. Raises RecipeError: what, why, what to do."""
    raw = read_sections(path, begin="Name a recipe, or write one: edgestill recipe init.")
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: Mapping[str, Any], origin: str) -> Recipe:
    """Check a recipe given as plain values; `origin` names it in messages."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain(error, origin, Recipe, see="`edgestill recipe schema`")) from None
    except RecursionError:
        raise RecipeError(f"{origin} nests values in themselves. Write them out.") from None
    for target in recipe.targets:
        make_target(target.name, target.options)  # refuses a name or an option that does not exist
        if target.scheme is not None:
            scheme_of(target.scheme)
    return recipe


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema."""
    return Recipe.model_json_schema()


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key; list items are addressed by their number (targets.0.device)."""
    key, separator, text = override.partition("=")
    if not separator or not key or "" in key.split("."):
        raise RecipeError(
            f"--set {override}: not of the form section.key=value. Example: --set distill.train.epochs=20."
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"--set {override}: '{text}' is not a YAML value. Quote it.") from None
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = _step(node, parent, override)
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise RecipeError(f"--set {override}: there is no '{key}' to set. See: edgestill recipe schema.")


def _step(node: Any, name: str, override: str) -> Any:
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
        return node[int(name)]
    raise RecipeError(f"--set {override}: '{name}' is not a section of the recipe. See: edgestill recipe schema.")


FIRST_RECIPE = """\
# Every key, its default and its meaning: edgestill recipe schema
schema_version: 1
name: {name}
data:
  source: "{source}"
teacher:
  model: resnet20
  train: {{epochs: 8, lr: 0.1}}
distill:
  model: resnet8
  train: {{epochs: 8, lr: 0.1}}
  temperature: 4.0
  kd_weight: 0.5
  # curriculum: {{order: easy_first}}  # where labels are right, none was shown to help; on your data: edgestill ablate
quantize:
  method: ladder
  train: {{epochs: 2}}
targets:
  - name: openvino-cpu
  - name: onnxruntime-cpu
bench: {{preset: smoke}}
"""


def write_first_recipe(path: Path, source: str) -> None:
    """Write a small, valid recipe to begin with. Raises RecipeError where a file stands there already."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem).strip("._-") or "recipe"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(FIRST_RECIPE.format(name=name[:64], source=source.replace("\\", "\\\\").replace('"', '\\"')))
    except FileExistsError:
        raise RecipeError(f"{path} exists already. Name another file, or delete it first.") from None
