"""The student of a finished run, found again: its float graph, the INT8 graph of each target, and its test accuracy there.

Reads runs/NAME: the published report, and by the digests of its inputs the stages that it was made from. What an unfinished
later run left beside them is not looked at. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.statistics import wilson_interval
from pipeline.artifacts import ExportedModel
from targets.base import read_json
from targets.errors import IntegrityError, ModelError

Stage = tuple[Path, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Student:
    """`int8` and `accuracies` are by the name of the target; the accuracies of a target by precision."""

    model: str
    data: str
    image: tuple[int, ...]
    floats: ExportedModel
    int8: Mapping[str, ExportedModel] = field(default_factory=dict)
    accuracies: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


def find_student(run_dir: Path) -> Student:
    """The student of the last finished run. Raises ModelError where there is none, or where its stages are gone."""
    report_dir = run_dir / "report"
    if not (report_dir / "stage.json").is_file():
        raise ModelError(f"{run_dir}: no finished run is there. Run its recipe first: edgestill run RECIPE.")
    try:
        summary = read_json(report_dir / "summary.json")
        return _student(run_dir, (report_dir, read_json(report_dir / "stage.json")), summary)
    except (IntegrityError, KeyError, TypeError, StopIteration) as error:
        reason = str(error) or "a stage that the report was made from is gone"
        raise ModelError(f"{run_dir} is no whole run: {reason}. Run its recipe again.") from None


def _student(run_dir: Path, report: Stage, summary: Mapping[str, Any]) -> Student:
    stages = dict(_stages(run_dir))
    floats: ExportedModel | None = None
    int8: dict[str, ExportedModel] = {}
    for verdict in _inputs(report, stages, "verdict-"):
        compiled = next(_inputs(verdict, stages, "compile-"))
        for export_dir, stage in _inputs(compiled, stages, "export-"):
            graph = ExportedModel(dir=export_dir, digest=stage["digest"])
            if stage["label"] == "export-student":
                floats = graph
            elif stage["label"] != "export-teacher":
                int8.setdefault(read_json(verdict[0] / "verdict.json")["target"], graph)
    if floats is None:
        raise IntegrityError("it compiled no student on this machine")
    return Student(
        model=next(model["name"] for model in summary["models"] if model["role"] == "student"),
        data=summary["data"]["source"],
        image=tuple(summary["data"]["image"]),
        floats=floats,
        int8=int8,
        accuracies=_accuracies(summary),
    )


def _stages(run_dir: Path) -> Iterator[tuple[str, Stage]]:
    """Every finished stage by its digest."""
    for path in run_dir.glob("*-????????/stage.json"):
        stage = read_json(path)
        yield stage["digest"], (path.parent, stage)


def _inputs(stage: Stage, stages: Mapping[str, Stage], label: str) -> Iterator[Stage]:
    """The stages that `stage` read whose label begins with `label`."""
    for digest in stage[1]["parts"]["inputs"]:
        if (found := stages.get(digest)) is not None and found[1]["label"].startswith(label):
            yield found


def _accuracies(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each float and INT8 student scored on the device, on the test split; a target that stands twice counts once."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for target in summary["targets"]:
        rows = [row for row in target["rows"] if row["role"] == "student"]
        found.setdefault(target["target"], {row["precision"]: _accuracy(row, summary["data"]) for row in rows})
    return found


def _accuracy(row: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    n = data["num_test"]
    return {
        "dataset": f"{data['source']}, test split",
        "n": n,
        "metric": "top-1",
        "value": row["top1"],
        "teacher": row["top1"] - row["delta_top1_teacher"],
        "delta": row["delta_top1_teacher"],
        "ci95": list(wilson_interval(round(row["top1"] * n), n)),
        "agreement": row["agreement_teacher"],
    }
