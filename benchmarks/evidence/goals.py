"""What was promised of INT8 on this project's CPU targets, and what a measurement reached. Pure functions over rows.

Ratios are medians over rounds of the launches' p25, paired by round (benchmarks/peers/ratios.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.candidates import OURS
from benchmarks.peers.comparison import FP32, Comparison, Row
from benchmarks.peers.ratios import faster, not_slower, paired_ratio

ORT, OPENVINO = "onnxruntime-cpu", "openvino-cpu"
ORT_DEFAULTS = "ONNX Runtime, defaults"
# convolutions in all, times as fast as FP32, times as fast as ONNX Runtime's own defaults
SPEED = {"resnet18": (20, 2.7, 3.0), "mobilenet_v2": (52, 1.55, 1.9)}
MAX_BEHIND_OPENVINO = 1.5
REAL_WEIGHTS, MIN_INT8_SHARE, MIN_AGREEMENT, MIN_P = "efficientnet_lite0", 0.95, 0.97, 0.05
NOT_FOR_ORT = "mobilenetv3_small_100"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """All but `met` are words for people."""

    model: str
    what: str
    goal: str
    reached: str
    met: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model: its rows, and benchmark_app's medians of ours and of NNCF's graph, in milliseconds by round."""

    comparison: Comparison
    app_ours_ms: Sequence[float]
    app_nncf_ms: Sequence[float]


def goals_of(measured: Mapping[str, Measured]) -> list[Goal]:
    """Every goal of the models that were measured, in a fixed order."""
    goals: list[Goal] = []
    for name, one in measured.items():
        if name in SPEED:
            goals += _speed(name, one.comparison)
        if name == REAL_WEIGHTS:
            goals += _real_weights(name, one.comparison)
        if name == NOT_FOR_ORT:
            goals += _ships(name, one.comparison)
        goals.append(_against_nncf(name, one))
    return goals


def _speed(model: str, comparison: Comparison) -> Iterator[Goal]:
    num_convolutions, over_float, over_defaults = SPEED[model]
    ours, on_openvino = comparison.row(ORT, OURS), comparison.row(OPENVINO, OURS)
    reached = f"{ours.num_int8_convolutions} of {ours.num_convolutions}"
    yield Goal(
        model=model,
        what=f"convolutions in INT8 on {ORT}",
        goal=f"{num_convolutions} of {num_convolutions}",
        reached=ours.error or reached,
        met=ours.num_int8_convolutions == ours.num_convolutions == num_convolutions,
    )
    yield _at_least(model, f"times as fast as FP32 on {ORT}", over_float, comparison.row(ORT, FP32), ours)
    yield _at_least(model, f"times as fast as {ORT_DEFAULTS}", over_defaults, comparison.row(ORT, ORT_DEFAULTS), ours)
    yield _at_most(model, f"{ORT} over {OPENVINO}, both ours (moonshot)", MAX_BEHIND_OPENVINO, ours, on_openvino)


def _real_weights(model: str, comparison: Comparison) -> Iterator[Goal]:
    for target in (ORT, OPENVINO):
        row = comparison.row(target, OURS)
        share, agreement, accuracy = row.int8_share or 0.0, row.agreement, row.accuracy
        yield Goal(
            model=model,
            what=f"MACs in INT8 on {target}",
            goal=f">= {MIN_INT8_SHARE:.0%}",
            reached=row.error or f"{share:.1%}",
            met=share >= MIN_INT8_SHARE,
        )
        yield Goal(
            model=model,
            what=f"same top-1 as float on {target}",
            goal=f">= {MIN_AGREEMENT:.0%}",
            reached=row.error
            or ("no classes" if agreement is None else f"{agreement['value']:.1%} of {agreement['n']}"),
            met=agreement is not None and agreement["value"] >= MIN_AGREEMENT,
        )
        yield Goal(
            model=model,
            what=f"paired difference of top-1 on {target} not significant",
            goal=f"McNemar p >= {MIN_P}",
            reached=row.error
            or ("no labels" if accuracy is None else f"{accuracy['difference']:+.1%}, p = {accuracy['mcnemar_p']:.2f}"),
            met=accuracy is not None and accuracy["mcnemar_p"] >= MIN_P,
        )


def _ships(model: str, comparison: Comparison) -> Iterator[Goal]:
    """Float must ship on ONNX Runtime, INT8 on OpenVINO: by placement, and by the fastest float of the target."""
    for target, wanted in ((ORT, "float"), (OPENVINO, "int8")):
        row, fastest = comparison.row(target, OURS), _fastest_float(comparison, target)
        yield Goal(
            model=model,
            what=f"what ships on {target}",
            goal=wanted,
            reached=row.error or f"{ships(row, fastest)} ({_against(row, fastest)})",
            met=ships(row, fastest) == wanted,
        )


def ships(row: Row, fastest_float: Row) -> str:
    """int8, where placement holds and it is faster than the fastest float of its target; else float."""
    if row.error is not None or (row.int8_share or 0.0) < MIN_INT8_SHARE:
        return "float"
    return "int8" if faster(row.p25s_us, fastest_float.p25s_us) else "float"


def _against_nncf(model: str, one: Measured) -> Goal:
    """Ours against NNCF's own post-training model on OpenVINO, by OpenVINO's benchmark_app."""
    told = {"model": model, "what": "not slower than NNCF under OpenVINO's benchmark_app", "goal": "not slower"}
    if not one.app_ours_ms:
        return Goal(**told, reached="no pair was measured", met=False)
    ratio = paired_ratio(one.app_nncf_ms, one.app_ours_ms)
    reached = f"{ratio.value:.3f} times as fast, {ratio.num_pairs} pairs"
    return Goal(**told, reached=reached, met=not_slower(one.app_ours_ms, one.app_nncf_ms))


def _at_least(model: str, what: str, goal: float, slow: Row, quick: Row) -> Goal:
    value, reached = _ratio(slow, quick)
    return Goal(model=model, what=what, goal=f">= {goal:g}", reached=reached, met=value is not None and value >= goal)


def _at_most(model: str, what: str, goal: float, slow: Row, quick: Row) -> Goal:
    value, reached = _ratio(slow, quick)
    return Goal(model=model, what=what, goal=f"<= {goal:g}", reached=reached, met=value is not None and value <= goal)


def _ratio(slow: Row, quick: Row) -> tuple[float | None, str]:
    if (error := slow.error or quick.error) is not None:
        return None, error
    ratio = paired_ratio(slow.p25s_us, quick.p25s_us)
    interval = "" if ratio.ci95 is None else f" ({ratio.ci95[0]:.2f} to {ratio.ci95[1]:.2f})"
    return ratio.value, f"{ratio.value:.2f}{interval}"


def _fastest_float(comparison: Comparison, target: str) -> Row:
    floats = [row for row in comparison.rows if row.target == target and row.precision != "int8"]
    return min(floats, key=lambda row: row.p25_us or float("inf"))


def _against(row: Row, fastest: Row) -> str:
    ratio = paired_ratio(fastest.p25s_us, row.p25s_us)
    return f"{row.int8_share:.0%} of MACs in INT8, {ratio.value:.2f} times as fast as {fastest.name}"
