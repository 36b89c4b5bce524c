"""Stage 7, verdict: the ledger of one target, its gates, and what ships there.

Reads logits and records, computes, decides. Writes verdict.json: nothing here runs a model. A latency that proves nothing (taken
under emulation, slowed on purpose, disturbed under another preset than smoke) decides nothing: what ships is decided by the
other gates, and the verdict says that speed was not judged, and why.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import compare_speed
from benchmarks.device.disturbances import positive
from benchmarks.device.record import Record, validate
from benchmarks.recording import NEVER_VALID
from benchmarks.statistics import mcnemar_exact_p, paired_difference
from pipeline.artifacts import CompiledArms, Measured, PreparedData, Scores, TrainedModel
from pipeline.gates import (
    Gate,
    accuracy_gate,
    budget_error,
    budget_gates,
    first_failure,
    gate_error,
    lint_gate,
    placement_gate,
    speed_gate,
    why_not,
)
from pipeline.how import How
from pipeline.learning.own_code import called, own_factory, score
from pipeline.ledger import Hop, hop_that_lost_most, ledger
from pipeline.recipe import GateConfig, TargetConfig
from targets.base import Placement, read_json, write_json
from targets.errors import EdgestillError, MeasurementError

MIB = 2**20
NUM_ECDF_POINTS = 200
# What the machine has no sensor for stands in the record; the flags of a row are about its own figures.
SENSORS = ("cgroup_peak_mib:", "energy:", "throttle_delta:", "temp_c:", "clk_mhz:", "psi_cpu:")
Arm = Mapping[str, Any]


def judge(
    target: TargetConfig,
    gate: GateConfig,
    prepared: PreparedData,
    models: tuple[TrainedModel, TrainedModel],
    scores: tuple[Scores, Scores],
    compiled: CompiledArms,
    measured: Measured,
    out_dir: Path,
    how: How,
) -> None:
    """Decide what ships; models: teacher, student; scores: of the torch models, of the exported graph.

    Writes the decision also where it is an error: `exit` then holds message and code.
    """
    records = {name: validate(values) for name, values in measured.records.items()}
    labels_N = np.load(prepared.evaluation_dir / "y.npy", allow_pickle=False)
    arms = [arm for arm in compiled.arms if arm["error"] is None]
    own = own_factory(gate.metric, "gate.metric", allow_code=how.allow_code) if gate.metric else None
    metric = None if own is None else called(own, "gate.metric")
    answers = {arm["arm"]: measured.logits("logits", arm["dir"]) for arm in arms}
    top1s = {arm: float((logits_NK.argmax(1) == labels_N).mean()) for arm, logits_NK in answers.items()}
    gated = top1s if metric is None else {a: score(metric, "gate.metric", x, labels_N) for a, x in answers.items()}
    baseline = _fastest_float_student(arms, records)
    unjudged = _why_speed_is_not_judged(arms, records, baseline)
    gates = _int8_gates(target, gate, compiled, records, gated, baseline, unjudged)
    failed = first_failure(gates)
    shipped = baseline if failed else next(arm for arm in arms if arm["precision"] == "int8")
    rows = ledger(_hops(prepared, models, scores, measured, arms, shipped), labels_N, metric)
    table = [_row(arm, records[arm["arm"]], compiled, measured, scores[0], labels_N, top1s) for arm in arms]
    budgets = budget_gates(target.budget, _trusted(next(row for row in table if row["arm"] == shipped["arm"]), records))
    error = _end(target, shipped["arm"], failed, unjudged, budgets)
    write_json(
        out_dir / "verdict.json",
        {
            "target": target.name,
            "shipped": shipped["precision"],
            "shipped_arm": shipped["arm"],
            "shipped_dir": shipped["dir"],
            "why": why_not(failed) if failed else _why_int8(unjudged),
            "float_reason": why_not(failed) if failed else None,
            "exit": {"message": str(error), "code": error.exit_code} if error else None,
            "gates": _told(gates, unjudged, budgets),
            "rows": table,
            "placement": shipped["placement"],
            "int8_placement": next((arm["placement"] for arm in arms if arm["precision"] == "int8"), None),
            "ledger": rows,
            "lost_most": hop_that_lost_most(rows),
            "accuracy": _accuracy(rows, prepared, shipped),
            "int8_against_float": _int8_against_float(arms, answers, scores[0], labels_N),
        },
    )


def _int8_against_float(
    arms: Sequence[Arm], answers: Mapping[str, Any], torch_scores: Scores, labels_N: Any
) -> dict[str, Any] | None:
    """What all hops together cost: INT8 on the device and the float student, paired on the test split; None without INT8."""
    int8 = next((arm["arm"] for arm in arms if arm["precision"] == "int8"), None)
    if int8 is None:
        return None
    floats_NK = torch_scores.logits("preprocessing")
    was_right_N, right_N = floats_NK.argmax(1) == labels_N, answers[int8].argmax(1) == labels_N
    difference, interval = paired_difference(was_right_N, right_N)
    lost, won = int((was_right_N & ~right_N).sum()), int((~was_right_N & right_N).sum())
    return {
        "n": len(labels_N),
        "float_top1": float(was_right_N.mean()),
        "int8_top1": float(right_N.mean()),
        "difference": difference,
        "ci95": list(interval),
        "mcnemar_p": mcnemar_exact_p(lost, won),
        "agreement": float((floats_NK.argmax(1) == answers[int8].argmax(1)).mean()),
    }


def _int8_gates(
    target: TargetConfig,
    gate: GateConfig,
    compiled: CompiledArms,
    records: Mapping[str, Record],
    gated: Mapping[str, float],
    baseline: Arm,
    unjudged: str | None,
) -> list[Gate]:
    """lint, compile, placement, accuracy, faster than float; those after a failed compile, and the last where it is
    `unjudged`, cannot be asked."""
    int8 = next(arm for arm in compiled.arms if arm["precision"] == "int8")
    gates = [
        lint_gate(compiled.findings),
        Gate(name="compile", passed=int8["error"] is None, detail=int8["error"] or ""),
    ]
    if int8["error"] is not None:
        return gates
    gates += [
        placement_gate(Placement.from_json(int8["placement"]).int8_share, target.min_int8_share),
        accuracy_gate(gated[int8["arm"]], gated[_float_student(compiled.arms)], gate.max_drop, gate.metric or "top-1"),
    ]
    if unjudged is not None:
        return gates
    speed = compare_speed(records[int8["arm"]], records[baseline["arm"]])
    ratio = 1 / speed.ratio
    # A difference that the test does not believe is no gain: the gate then stands at its limit.
    believed = ratio if speed.faster else max(ratio, 1.0)
    return [*gates, speed_gate(believed, baseline["arm"], speed.basis)]


def _why_speed_is_not_judged(arms: Sequence[Arm], records: Mapping[str, Record], baseline: Arm) -> str | None:
    """Which of the two records proves nothing, and why; None where both do, or there is no INT8 to judge."""
    int8 = [arm for arm in arms if arm["precision"] == "int8"]
    for name in [arm["arm"] for arm in (*int8, baseline)] if int8 else []:
        if (why := _why_no_proof(records[name])) is not None:
            return f"{name}: {why}"
    return None


def _why_no_proof(record: Record) -> str | None:
    """Why its times decide nothing, None where they may. Preset smoke makes no claim to trust, so its noise is let pass."""
    first = record.validity.flags[0] if record.validity.flags else ""
    if first.startswith(NEVER_VALID):
        return first.removeprefix(NEVER_VALID)
    if record.validity.ok or record.scenario.preset == "smoke":
        return None
    disturbed = sum(bool(launch.disturbances) for launch in record.launches)
    return f"{disturbed} of {len(record.launches)} launches were disturbed"


def _why_int8(unjudged: str | None) -> str:
    if unjudged is None:
        return "INT8 passed every gate"
    return f"INT8 passed every gate but that of speed, which was not judged ({unjudged})"


def _told(gates: Sequence[Gate], unjudged: str | None, budgets: Sequence[Gate]) -> list[dict[str, Any]]:
    """The gates in their order as JSON; one that could not be asked has null for `passed`."""
    open_gates = []
    if unjudged is not None:
        asked = speed_gate(1.0, "the fastest float", f"not judged: {unjudged}")
        open_gates = [{**asked.to_json(), "passed": None, "value": None}]
    return [*(one.to_json() for one in gates), *open_gates, *(one.to_json() for one in budgets)]


def _trusted(row: Mapping[str, Any], records: Mapping[str, Record]) -> Mapping[str, Any]:
    """The row with what a measurement that proves nothing says as unreadable: its times, under emulation the memory too."""
    record = records[row["arm"]]
    if _why_no_proof(record) is None:
        return row
    memory = ("peak_rss_mib",) if "emulated_on" in record.env.hard else ()
    return {**row, **dict.fromkeys(("p50_ms", "p99_ms", "load_ms", *memory))}


def _fastest_float_student(arms: Sequence[Arm], records: Mapping[str, Record]) -> Arm:
    """The baseline that INT8 must beat, by p25 of the launches; the first that the runtime offers where these are the times of
    no such machine."""
    floats = [arm for arm in arms if arm["role"] == "student" and arm["precision"] != "int8"]
    if any("emulated_on" in records[arm["arm"]].env.hard for arm in floats):
        return floats[0]
    return min(floats, key=lambda arm: records[arm["arm"]].summary.p25_us)


def _float_student(arms: Sequence[Arm]) -> str:
    """The arm that accuracy is held against: the float student as it was trained, whichever float is the fastest. A runtime that does
    not offer fp32 is held against the first float that it does."""
    floats = [arm for arm in arms if arm["role"] == "student" and arm["precision"] != "int8" and arm["error"] is None]
    return str(next((arm for arm in floats if arm["precision"] == "fp32"), floats[0])["arm"])


def _end(
    target: TargetConfig, shipped: str, failed: Gate | None, unjudged: str | None, budgets: Sequence[Gate]
) -> EdgestillError | None:
    """What the run ends with: a gate that failed or was not judged where the recipe says `error`, else a broken budget."""
    if failed and target.on_failure == "error":
        return gate_error(target.name, failed)
    if unjudged is not None and target.on_failure == "error":
        return MeasurementError(
            f"{target.name}: whether INT8 is faster than float was not judged ({unjudged}). "
            "Measure again on a quiet machine of that kind, or let it ship without: on_failure: float."
        )
    return budget_error(target.name, shipped, budgets)


def _hops(
    prepared: PreparedData,
    models: tuple[TrainedModel, TrainedModel],
    scores: tuple[Scores, Scores],
    measured: Measured,
    arms: Sequence[Arm],
    shipped: Arm,
) -> list[Hop]:
    """The way of the INT8 student, and where float ships, of that as well."""
    teacher_name, student_name = (model.info["model"] for model in models)
    torch_scores, onnx_scores = scores
    pixels = read_json(torch_scores.dir / "pixels.json")["max_abs_delta_levels"]
    hops = [
        Hop(hop="teacher", model=teacher_name, precision="fp32", logits_NK=torch_scores.logits("teacher")),
        Hop(hop="student", model=student_name, precision="fp32", logits_NK=torch_scores.logits("student")),
        Hop(
            hop="preprocessing",
            model=student_name,
            precision="fp32",
            logits_NK=torch_scores.logits("preprocessing"),
            note=f"the device's decode and resize in place of training's: pixels differ by at most {pixels:.0f} of 255 levels",
        ),
        Hop(hop="quantized", model=student_name, precision="fake int8", logits_NK=torch_scores.logits("quantized")),
        Hop(
            hop="onnx",
            model=student_name,
            precision="int8",
            logits_NK=onnx_scores.logits("onnx"),
            note=f"the exported graph, no kernel fused; {_moved(read_json(onnx_scores.dir / 'rewrites.json'))}",
        ),
    ]
    encoded_index = np.asarray(read_json(prepared.evaluation_dir / "spec.json")["encoded_index"], dtype=np.int64)
    for arm in arms:
        if arm["role"] == "student" and (arm["precision"] == "int8" or arm is shipped):
            hops += _device_hops(arm, student_name, measured, encoded_index)
    return hops


def _moved(rewrites: Sequence[Mapping[str, Any]]) -> str:
    """What the dialect's rewrites did to the logits of real samples, in a sentence."""
    exact = [one for one in rewrites if one["exact"]]
    told = [
        f"{len(exact)} exact rewrites moved a logit by at most {max((o['max_abs_delta'] for o in exact), default=0):.2g}"
    ]
    told += [f"{o['rewrite']} rounds: {o['max_abs_delta']:.2g}" for o in rewrites if not o["exact"]]
    return "; ".join(told)


def _device_hops(arm: Arm, model: str, measured: Measured, encoded_index: Any) -> list[Hop]:
    """The compiled model on the device, and the same from encoded bytes."""
    int8 = arm["precision"] == "int8"
    compiled = Hop(
        hop="compiled" if int8 else f"compiled {arm['precision']}",
        model=model,
        precision=arm["precision"],
        logits_NK=measured.logits("logits", arm["dir"]),
        after=None if int8 else "preprocessing",
        note="the step to the runtime's own optimized kernels, on the device",
    )
    raw = Hop(
        hop="raw bytes" if int8 else f"raw bytes {arm['precision']}",
        model=model,
        precision=arm["precision"],
        logits_NK=measured.logits("raw_bytes", arm["dir"]),
        index_N=encoded_index,
        note="from encoded bytes: decode, resize, model",
    )
    return [compiled, raw]


def _row(
    arm: Arm,
    record: Record,
    compiled: CompiledArms,
    measured: Measured,
    scores: Scores,
    labels_N: Any,
    top1s: Mapping[str, float],
) -> dict[str, Any]:
    """One line of the target's table; milliseconds, MiB, fractions; null where the record has null."""
    summary = record.summary
    teacher_N = scores.logits("teacher").argmax(1)
    answers_N = measured.logits("logits", arm["dir"]).argmax(1)
    return {
        "arm": arm["arm"],
        "role": arm["role"],
        "precision": arm["precision"],
        "p50_ms": summary.p50_us / 1e3,
        "p50_ci95": [bound / 1e3 for bound in summary.ci95] if summary.ci95 else None,
        "p90_ms": _ms(summary.es_p90_us),
        "p99_ms": _ms(summary.es_p99_us),
        "fps": summary.fps,
        "throughput_fps": record.throughput.fps if record.throughput else None,
        "load_ms": summary.load_ms,
        "first_ms": summary.first_ms,
        "peak_rss_mib": record.memory.vmhwm_mib,
        "size_mib": record.model.bytes / MIB,
        "host_e2e_p50_ms": record.host_e2e.p50_us / 1e3 if record.host_e2e else None,
        "top1": top1s[arm["arm"]],
        "delta_top1_teacher": top1s[arm["arm"]] - float((teacher_N == labels_N).mean()),
        "agreement_teacher": float((answers_N == teacher_N).mean()),
        "int8_share": arm["placement"]["int8_share"],
        "valid": record.validity.ok,
        "flags": [
            flag for flag in record.validity.flags if flag not in record.env.flags and not flag.startswith(SENSORS)
        ],
        "latency_ecdf_ms": _ecdf(measured, record),
    }


def _ms(value_us: float | None) -> float | None:
    return None if value_us is None else value_us / 1e3


def _ecdf(measured: Measured, record: Record) -> list[float]:
    """Quantiles of all launches' samples that a clock can have measured, evenly spaced, in ms."""
    samples_ns = np.concatenate([positive(np.load(measured.dir / one.samples_file)) for one in record.launches])
    points = np.linspace(0, 1, min(NUM_ECDF_POINTS, len(samples_ns)))
    return [float(value) for value in np.quantile(samples_ns, points) / 1e6]


def _accuracy(rows: Sequence[Mapping[str, Any]], prepared: PreparedData, shipped: Arm) -> dict[str, Any]:
    """What the bundle says of its accuracy: the shipped artifact's own row, on the device."""
    hop = "compiled" if shipped["precision"] == "int8" else f"compiled {shipped['precision']}"
    row = next(row for row in rows if row["hop"] == hop)
    teacher = rows[0]
    return {
        "metric": "top1",
        "dataset": f"{prepared.info['source']} test",
        "value": row["top1"],
        "n": row["n"],
        "ci95": row["ci95"],
        "teacher": teacher["top1"],
        "delta": row["top1"] - teacher["top1"],
        "agreement": row["agreement_teacher"],
    }
