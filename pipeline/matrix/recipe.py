"""The matrix recipe: which models are measured against each other, on which runtimes, in which precisions, on how many threads.

Imports no torch. Unknown keys are refused with the nearest known one, as in a run's recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.recipe import Arguments, BenchConfig, Count, Fraction, Positive, Section
from pipeline.recipe_file import explain, read_sections
from targets import TARGETS, make_target
from targets.errors import RecipeError

GUIDE = "docs/hardware.md"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
LIBRARIES = ("torchvision", "timm")
RANDOM, PRETRAINED = "random", "pretrained"


class InputConfig(Section):
    """What an image becomes before the network: pixels 0..255 are resized, cropped to the middle and normalised."""

    size: Count = Field(224, description="pixels a side, of a net that is built by name; an ONNX file has its own")
    resize: Count | None = Field(256, description="the shorter side before the crop; null: the size")
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] = (123.675, 116.28, 103.53)
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)] = (58.395, 57.12, 57.375)


class ModelEntry(Section):
    """One model: a net built by name, an ONNX file, or the student of a finished run."""

    name: Name
    model: str | None = Field(None, description="torchvision:NAME, timm:NAME, or a float ONNX file")
    weights: str | None = Field(
        None,
        description="a net by name: random (the default), pretrained, or a file of weights; an ONNX file: random, where its "
        "weights are",
    )
    args: Arguments = Field(default_factory=dict, description="keyword arguments of the net's constructor")
    num_classes: Count = 1000
    run: Path | None = Field(None, description="runs/NAME of a finished run: its float and its INT8 student")
    input: InputConfig | None = Field(None, description="null: the matrix's own")
    calibration: Path | None = Field(None, description="images or an NPZ file; null: the matrix's own")
    optional: bool = Field(False, description="where it cannot be had it is left out, told, and the command succeeds")

    @model_validator(mode="after")
    def _is_one_thing(self) -> ModelEntry:
        if (self.model is None) == (self.run is None):
            raise ValueError("give either model (a net by name, an ONNX file) or run (a finished run)")
        if self.run is not None and (self.weights or self.args or self.input or self.calibration):
            raise ValueError("weights, args, input and calibration are the run's own: drop them")
        if self.model is not None and not self.by_name and not self.model.endswith(".onnx"):
            raise ValueError(f"'{self.model}' is neither torchvision:NAME, timm:NAME nor a file that ends in .onnx")
        if self.model is not None and not self.by_name and (self.args or self.weights not in (None, RANDOM)):
            raise ValueError("an ONNX file holds its weights: drop args and weights, or say weights: random")
        return self

    @property
    def by_name(self) -> bool:
        """Whether a library builds the net."""
        return self.model is not None and self.model.partition(":")[0] in LIBRARIES

    @property
    def file(self) -> Path | None:
        """What of it lies on disk: the ONNX file, or a file of weights."""
        named = self.weights if self.by_name else self.model
        return None if named in (None, RANDOM, PRETRAINED) else Path(named or "")

    @property
    def random_weights(self) -> bool:
        """Whether no accuracy of it means anything."""
        return self.weights == RANDOM or (self.by_name and self.weights is None)


class MatrixTarget(Section):
    """A runtime; its threads are the matrix's."""

    name: str
    options: Arguments = Field(default_factory=dict)


class CalibrationConfig(Section):
    """What sets the ranges of INT8 and BatchNorm's statistics of random weights; up to 64 more are held out for agreement."""

    images: Path | None = Field(None, description="a folder of images; null: synthetic ones, and no agreement is told")
    samples: Annotated[Count, Field(ge=2)] = 100


class MatrixQuantize(Section):
    """As `edgestill quantize`; gates are told, and stop nothing."""

    method: Literal["ladder", "ptq", "equalized", "mixed"] = "ladder"
    min_int8_share: Fraction = 0.95
    min_agreement: Fraction = Field(0.9, description="not asked of random weights")


class MatrixBench(BenchConfig):
    """How long each cell is measured. Six launches are the fewest with an interval around the median."""

    launches: Count | None = 6
    throughput: bool = Field(False, description="offline throughput as well, in a quarter of the window")


class MatrixRecipe(Section):
    """Models x targets x precisions x threads."""

    schema_version: Literal[1] = 1
    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    targets: Annotated[tuple[MatrixTarget, ...], Field(min_length=1)]
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32", "bf16", "int8")
    threads: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    input: InputConfig = InputConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    quantize: MatrixQuantize = MatrixQuantize()
    bench: MatrixBench = MatrixBench()

    @model_validator(mode="after")
    def _nothing_twice(self) -> MatrixRecipe:
        named = {
            "models": [entry.name for entry in self.models],
            "targets": [target.name for target in self.targets],
            "precisions": self.precisions,
            "threads": self.threads,
        }
        for section, values in named.items():
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                raise ValueError(f"{section}: {', '.join(twice)} stands there twice")
        return self


def load_matrix_recipe(path: Path) -> MatrixRecipe:
    """Read a YAML matrix recipe and check it. Raises RecipeError: what, why, what to do."""
    return parse_matrix_recipe(read_sections(path, begin=f"Name a matrix recipe; {GUIDE} has one."), str(path))


def parse_matrix_recipe(raw: Mapping[str, Any], origin: str) -> MatrixRecipe:
    """Check a matrix recipe given as plain values; `origin` names it in messages."""
    try:
        recipe = MatrixRecipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain(error, origin, MatrixRecipe, see=GUIDE)) from None
    for target in recipe.targets:
        make_target(target.name, target.options)  # refuses a name or an option that does not exist
        if "num_threads" in target.options:
            raise RecipeError(
                f"{origin}: target '{target.name}': options.num_threads is what `threads` of the matrix says. Drop it."
            )
    return recipe


def threads_of(target: MatrixTarget, threads: tuple[int, ...]) -> tuple[int | None, ...]:
    """The matrix's threads; (None,) for a target without such an option."""
    return threads if "num_threads" in {field.name for field in fields(TARGETS[target.name])} else (None,)
