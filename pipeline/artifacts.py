"""What the stages hand to each other: finished directories with typed names for what lies in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from targets.base import Exported, read_json


@dataclass(frozen=True)
class Artifact:
    """A finished stage on disk. `digest` is over the names and contents of its files."""

    dir: Path
    digest: str


@dataclass(frozen=True)
class PreparedData(Artifact):
    """Stage `data`: splits, statistics and the evaluation set (data.json says what they are)."""

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = read_json(self.dir / "data.json")
        return info

    @property
    def evaluation_dir(self) -> Path:
        return self.dir / "evaluation"


@dataclass(frozen=True)
class TrainedModel(Artifact):
    """Stages `teacher`, `distill`, `quantize`: weights and a JSON file of the stage's name."""

    stage: str

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = read_json(self.dir / f"{self.stage}.json")
        return info

    @property
    def weights_path(self) -> Path:
        return self.dir / "model.safetensors"


@dataclass(frozen=True)
class ExportedModel(Artifact):
    """Stage `export`: an ONNX graph and its specs."""

    @cached_property
    def exported(self) -> Exported:
        return Exported.load(self.dir)
