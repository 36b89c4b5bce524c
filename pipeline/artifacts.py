"""What the stages hand to each other: finished directories with typed names for what lies in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

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

    @property
    def last_weights_path(self) -> Path:
        """Stage `distill`, where it trained: the weights of the last epoch, those of `weights_path` being the best epoch's."""
        return self.dir / "last.safetensors"


@dataclass(frozen=True)
class SoftLabels(Artifact):
    """Stage `soft_labels`: a teacher's logits for each view of the train split (pipeline/learning/label_cache.py)."""

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = read_json(self.dir / "soft_labels.json")
        return info


@dataclass(frozen=True)
class ExportedModel(Artifact):
    """Stage `export`: an ONNX graph and its specs."""

    @cached_property
    def exported(self) -> Exported:
        return Exported.load(self.dir)


@dataclass(frozen=True)
class Scores(Artifact):
    """Stage `score`: logits (N, K) a hop."""

    def logits(self, hop: str) -> Any:
        return np.load(self.dir / f"{hop}.npy", allow_pickle=False)


@dataclass(frozen=True)
class CompiledArms(Artifact):
    """Stage `deploy`, first half: everything compiled for one target."""

    name: str

    @cached_property
    def arms(self) -> Sequence[Mapping[str, Any]]:
        arms: Sequence[Mapping[str, Any]] = read_json(self.dir / "arms.json")
        return arms

    @cached_property
    def findings(self) -> Sequence[Mapping[str, Any]]:
        findings: Sequence[Mapping[str, Any]] = read_json(self.dir / "lint.json")
        return findings


@dataclass(frozen=True)
class Measured(Artifact):
    """Stage `deploy`, second half: records and answers of every arm of one target."""

    @cached_property
    def records(self) -> Mapping[str, Mapping[str, Any]]:
        records: Mapping[str, Mapping[str, Any]] = read_json(self.dir / "records.json")
        return records

    def logits(self, folder: str, arm_dir: str) -> Any:
        """The answers (N, K) of an arm; `folder` is logits or raw_bytes."""
        return np.load(self.dir / folder / arm_dir / "logits.npy", allow_pickle=False)


@dataclass(frozen=True)
class Verdict(Artifact):
    """Stage `verdict`: the ledger, the gates and what ships, for one target."""

    @cached_property
    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = read_json(self.dir / "verdict.json")
        return info


@dataclass(frozen=True)
class Bundle(Artifact):
    """Stage `bundle`: the directory `bundle` is what a device gets."""

    @property
    def path(self) -> Path:
        return self.dir / "bundle"


@dataclass(frozen=True)
class Kit(Artifact):
    """Stage `kit`: what a device that is not connected needs for its first run, and the program."""


@dataclass(frozen=True)
class Report(Artifact):
    """Stage `report`: index.html, report.md and the summary.json that both are drawn from."""

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        summary: Mapping[str, Any] = read_json(self.dir / "summary.json")
        return summary
