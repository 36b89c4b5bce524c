"""The ladder for anybody's ONNX: ptq -> equalized -> mixed. Each rung is linted, compiled, placed and compared with float;
the first that keeps to every gate ships. There are no labels to train with, so QAT is the recipe's (pipeline/stages/quantize.py).

ptq: ranges from the calibration samples. equalized: cross-layer equalization before that, and every bias corrected after it.
mixed: ptq again, with the layers in float that cost the most. What is chosen on the way is chosen on calibration samples; the
gates ask the held-out ones, and the artifact that ships.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.calibration import Calibration, Sample
from pipeline.differences import Answers, OutputDifference, differences
from pipeline.gates import Gate, first_failure, lint_gate, placement_gate
from pipeline.graphs.proof import REWRITES_FILE, node_by_node
from pipeline.learning.own_code import score
from pipeline.progress import Progress
from pipeline.workbench import Workbench
from targets.base import Exported, Placement, read_json
from targets.errors import RecipeError, TargetError
from targets.lint import Finding, lint

METHODS = ("ladder", "ptq", "equalized", "mixed")
NUM_SENSITIVITY_SAMPLES = 16  # a layer at a time goes back to float on them, node by node, which is slow
FLOAT_GRAPH, INT8_GRAPH, IN_ALL = "float graph", "INT8 graph", "INT8, compiled"
Metric = Callable[[Answers, Answers], float]


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What an INT8 graph must keep to before anybody asks how fast it is.

    `min_agreement`: share of held-out samples with float's largest class, where the graph has one output (N, K);
    `min_cosine`: mean cosine of each output, where it has others. `metric(float answers, INT8 answers)` is a person's own,
    larger is better, in place of both; it must reach `min_metric`.
    """

    method: str = "ladder"
    min_int8_share: float = 0.95
    min_agreement: float = 0.9
    min_cosine: float = 0.95
    metric: Metric | None = None
    min_metric: float = 0.0
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"--method {self.method}: there is no such method. Known: {', '.join(METHODS)}.")
        for name in ("min_int8_share", "min_agreement", "min_cosine"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise RecipeError(f"--{name.replace('_', '-')} {value}: it is a share. Give 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder and what became of it. `placement` is None where the target is not on this machine or refused."""

    rung: str
    gates: tuple[Gate, ...]
    findings: tuple[Finding, ...]
    differences: tuple[OutputDifference, ...]
    rewrites: tuple[Mapping[str, Any], ...]
    left_in_float: tuple[str, ...] = ()
    placement: Placement | None = None

    @property
    def passed(self) -> bool:
        return first_failure(self.gates) is None

    def to_json(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "passed": self.passed,
            "gates": [gate.to_json() for gate in self.gates],
            "left_in_float": list(self.left_in_float),
            "int8_share": None if self.placement is None else self.placement.int8_share,
            "differences": [asdict(one) for one in self.differences],
        }


@dataclass(frozen=True, kw_only=True)
class Climb:
    """What a rung is made from and judged by; `bench` is None for a target that is on another machine."""

    floats: Exported
    calibration: Calibration
    demands: Demands
    scheme: str
    dialect: str
    runtime: str  # whose rules the linter applies
    bench: Workbench | None
    progress: Progress

    @property
    def compared(self) -> Sequence[Sample]:
        return self.calibration.held_out or self.calibration.samples


def climb(job: Climb, out_dir: Path) -> tuple[list[Rung], Path]:
    """Try the rungs in their order, each in a directory of its own under `out_dir`; returns them and the last one's.

    The last is the first that passed or that a later rung could not mend, or, where there is none, the last of all.
    """
    with job.progress.task("ask the float graph"):
        expected = node_by_node(job.floats.model_path, job.compared)
    rungs: list[Rung] = []
    for name in ("ptq", "equalized", "mixed") if job.demands.method == "ladder" else (job.demands.method,):
        keep_float = _layers_to_leave(job) if name == "mixed" else job.demands.keep_float
        rungs.append(_try(job, name, keep_float, expected, out_dir / name))
        job.progress.say(_line(rungs[-1]))
        if (failed := first_failure(rungs[-1].gates)) is None or failed.name != "likeness":
            break  # what lint, compile or placement refuse, no later rung mends
    return rungs, out_dir / rungs[-1].rung


def _try(job: Climb, name: str, keep_float: tuple[str, ...], expected: Answers, out_dir: Path) -> Rung:
    int8 = _quantized(job, name, keep_float, out_dir)
    findings = tuple(lint(int8.half_model_path or int8.model_path, job.runtime))
    gates = [lint_gate([asdict(finding) for finding in findings])]
    with job.progress.task("compare with float"):
        graph = node_by_node(int8.model_path, job.compared)
    found = list(differences(INT8_GRAPH, FLOAT_GRAPH, expected, graph))
    compiled = None if job.bench is None else _compiled(job, job.bench, int8, out_dir / "compiled" / "int8")
    if isinstance(compiled, TargetError):
        gates.append(Gate(name="compile", passed=False, detail=str(compiled)))
    elif compiled is not None:
        gates.append(_placement_gate(job.demands, compiled.placement))
        found += differences(IN_ALL, INT8_GRAPH, graph, compiled.answers)
        found += differences(IN_ALL, FLOAT_GRAPH, expected, compiled.answers)
    if not isinstance(compiled, TargetError):
        gates.append(likeness_gate(job.demands, expected, compiled.answers if compiled else graph))
    return Rung(
        rung=name,
        gates=tuple(gates),
        findings=findings,
        differences=tuple(found),
        rewrites=tuple(read_json(out_dir / REWRITES_FILE)),
        left_in_float=keep_float,
        placement=compiled.placement if isinstance(compiled, _Compiled) else None,
    )


def _quantized(job: Climb, name: str, keep_float: tuple[str, ...], out_dir: Path) -> Exported:
    from pipeline.stages.quantize_onnx import quantize_onnx

    with job.progress.task(f"quantize ({name})"):
        return quantize_onnx(
            job.floats.model_path,
            job.calibration.samples,
            scheme=job.scheme,
            dialect=job.dialect,
            out_dir=out_dir,
            name=job.floats.name,
            preprocessing=job.calibration.preprocessing,
            equalized=name == "equalized",
            keep_float=keep_float,
        )


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    placement: Placement
    answers: Answers


def _compiled(job: Climb, bench: Workbench, int8: Exported, out_dir: Path) -> _Compiled | TargetError:
    """A compile that fails is a value: it is what the gate tells."""
    with job.progress.task(f"compile for {bench.target}"):
        try:
            placement = bench.compile(int8, "int8", out_dir)
            return _Compiled(placement=placement, answers=bench.answers(out_dir, job.compared))
        except TargetError as error:
            return error


def _placement_gate(demands: Demands, placement: Placement) -> Gate:
    return placement_gate(placement.int8_share, demands.min_int8_share)


def likeness_gate(demands: Demands, expected: Answers, answers: Answers) -> Gate:
    """Agreement, cosine or the person's own metric, on the samples that no range was set with."""
    if demands.metric is not None:
        value, limit = score(demands.metric, "--metric", expected, answers), demands.min_metric
        what = "the person's own metric"
    else:
        rows = differences(IN_ALL, FLOAT_GRAPH, expected, answers)
        if len(rows) == 1 and rows[0].agreement is not None:
            value, limit = rows[0].agreement, demands.min_agreement
            what = f"share of {rows[0].num_samples} held-out samples with float's largest class"
        else:
            worst = min(rows, key=lambda row: row.cosine_mean)
            value, limit = worst.cosine_mean, demands.min_cosine
            what = f"mean cosine of output '{worst.name}' with float, {worst.num_samples} held-out samples"
    return Gate(name="likeness", passed=value >= limit, value=value, limit=limit, detail=what)


def _layers_to_leave(job: Climb) -> tuple[str, ...]:
    """The fewest MACs in float with which the calibration samples pass; where no choice does, the worst layer of all.

    Then the rung is tried all the same, and its gate says in figures what was missed.
    """
    from pipeline.graphs.mixed_precision import choose, in_float, sensitivities
    from pipeline.graphs.proof import answers_of
    from pipeline.stages.quantize_onnx import prepare, quantize_prepared

    with job.progress.task("find the layers that cost the most"):
        floats, samples = prepare(job.floats.model_path, job.calibration.samples, job.demands.keep_float)
        quantized = quantize_prepared(floats, samples, job.scheme, keep_float=job.demands.keep_float)
        few = samples[:NUM_SENSITIVITY_SAMPLES]
        expected = answers_of(floats, few)

        def passes(names: frozenset[str]) -> bool:
            return likeness_gate(job.demands, expected, answers_of(in_float(quantized, floats, names), few)).passed

        layers = sensitivities(floats, quantized, few)
        worst = max(layers, key=lambda layer: layer.gain).name
        return (*job.demands.keep_float, *(choose(layers, passes) or (worst,)))


def _line(rung: Rung) -> str:
    """A rung in one line for people."""
    told = "; ".join(
        f"{gate.name} {'' if gate.value is None else f'{gate.value:.4g} '}{'passed' if gate.passed else 'missed'}"
        for gate in rung.gates
    )
    left = f"; in float: {', '.join(rung.left_in_float)}" if rung.left_in_float else ""
    return f"{rung.rung}: {told}{left}"
