"""A record as one row of the comparison: what was measured, and for what is absent, why.

Reads stored records. Milliseconds, MiB, millijoules an inference; shares and accuracies are fractions. Percentiles are
MLPerf's early-stopping estimates over all queries, above the true ones with 99 % confidence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.device.record import MIN_QUERIES, Record
from benchmarks.hardware.identity import Identity, identity_of
from benchmarks.records import Stored
from benchmarks.report_tables import reason_of
from targets.errors import MeasurementError

MIB = 2**20
NUM_REASONS = 6
INT8_FLAG = "int8: "  # a gate that was missed: `edgestill matrix` measures such a model all the same
Interval = tuple[float, float]

# What a flag of the record calls a value that has another name here.
_FLAG_KEYS = {"peak_rss_mib": "vmhwm_mib", "gross_mj": "energy", "net_mj": "energy", "per_joule": "energy"}
_UNSAID = {
    "threads": "the runtime has no such option",
    "num_cpus": "the CPUs that it was let to use are not recorded",
    "power_mode": "neither a power mode nor a governor was readable",
    "p50_ci95_ms": "fewer than 6 launches",
    "p90_ms": f"n too small: fewer than {MIN_QUERIES[90.0]} queries",
    "p99_ms": f"n too small: fewer than {MIN_QUERIES[99.0]} queries",
    "own_clock_p50_ms": "not read from the runtime's own clock",
    "host_e2e_p50_ms": "not measured: it takes encoded samples",
    "throughput_fps": "offline throughput was not asked for",
    "arena_off_rss_mib": "not measured without the runtime's arena",
    "gpu_mib": "no GPU memory was read",
    "net_mj": "idle power was not measured",
    "accuracy": "no accuracy stands in the record",
    "accuracy_ci95": "no interval stands in the record",
    "delta": "no teacher stands in the record",
    "delta_ci95": "no interval stands in the record",
    "agreement": "no teacher stands in the record",
    "int8_share": "no placement was read",
    "num_fallback": "no placement was read",
}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One metric on one data set; higher is better. `delta` is value - teacher."""

    dataset: str
    metric: str
    n: int | None
    value: float
    ci95: Interval | None
    delta: float | None
    delta_ci95: Interval | None
    agreement: float | None

    @property
    def name(self) -> str:
        """Rows are compared only where it is the same."""
        return f"{self.metric} on {self.dataset}"


@dataclass(frozen=True, kw_only=True)
class HardwareRow:
    """One record. `shares` are MACs by the precision that was executed; `reasons` say what disturbed it, `notes` what an
    INT8 model missed on its way here; `absent` holds why a value is None, by its name."""

    key: str
    identity: Identity
    stored: Stored
    p50_ms: float
    p50_ci95_ms: Interval | None
    p90_ms: float | None
    p99_ms: float | None
    own_clock_p50_ms: float | None
    host_e2e_p50_ms: float | None
    fps: float
    throughput_fps: float | None
    load_ms: float | None
    first_ms: float | None
    peak_rss_mib: float | None
    arena_off_rss_mib: float | None
    gpu_mib: float | None
    net_mj: float | None
    gross_mj: float | None
    per_joule: float | None
    energy_source: str | None
    size_mib: float
    accuracy: Accuracy | None
    shares: Mapping[str, float]
    int8_share: float | None
    fallback_ops: tuple[str, ...] | None
    num_launches: int
    num_disturbed: int
    valid: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    absent: Mapping[str, str]

    @property
    def model(self) -> str:
        return self.identity.model

    @property
    def precision(self) -> str:
        return self.identity.configuration.precision

    def flat(self) -> dict[str, Any]:
        """Every value by its name: what tables, CSV and JSON show."""
        accuracy = self.accuracy
        return {
            **self.identity.fields(),
            **{name: getattr(self, name) for name in _MEASURED},
            "dataset": accuracy.dataset if accuracy else None,
            "metric": accuracy.metric if accuracy else None,
            "n": accuracy.n if accuracy else None,
            "accuracy": accuracy.value if accuracy else None,
            "accuracy_ci95": accuracy.ci95 if accuracy else None,
            "delta": accuracy.delta if accuracy else None,
            "delta_ci95": accuracy.delta_ci95 if accuracy else None,
            "agreement": accuracy.agreement if accuracy else None,
            "int8_share": self.int8_share,
            "num_fallback": None if self.fallback_ops is None else len(self.fallback_ops),
            "num_launches": self.num_launches,
            "num_disturbed": self.num_disturbed,
            "valid": self.valid,
        }


_MEASURED = (
    "p50_ms",
    "p50_ci95_ms",
    "p90_ms",
    "p99_ms",
    "own_clock_p50_ms",
    "host_e2e_p50_ms",
    "fps",
    "throughput_fps",
    "load_ms",
    "first_ms",
    "peak_rss_mib",
    "arena_off_rss_mib",
    "gpu_mib",
    "net_mj",
    "gross_mj",
    "per_joule",
    "energy_source",
    "size_mib",
)


def rows_of(stored: Sequence[Stored]) -> tuple[list[HardwareRow], list[Stored]]:
    """One row an identity, ordered by model and p50; and the records that another one of the same identity stands for.

    Two artifacts that one session held against each other are two rows, also where both are called alike. A valid record
    stands before one that is not: a disturbed run is taken again, not believed. Then one whose launches last longer stands
    before a shorter look, then the newer. Raises MeasurementError for a p50 that is not above zero.
    """
    found: dict[Identity, list[Stored]] = {}
    for identity, one in _identities(stored):
        found.setdefault(identity, []).append(one)
    best = {identity: max(same, key=_rank) for identity, same in found.items()}
    for one in best.values():
        _check(one)
    keys = _keys([one.record.run_id for one in best.values()])
    rows = [_row(key, identity, one) for key, (identity, one) in zip(keys, best.items(), strict=True)]
    older = [one for identity, same in found.items() for one in same if one is not best[identity]]
    return sorted(rows, key=lambda row: (row.model.casefold(), row.identity.shape, row.p50_ms)), older


def _identities(stored: Sequence[Stored]) -> list[tuple[Identity, Stored]]:
    """Who each record is. `compare v1/model.onnx v2/model.onnx` writes two that are called `model`: the arm tells them apart."""
    artifacts: dict[tuple[Identity, Path], set[str]] = {}
    for one in stored:
        artifacts.setdefault((identity_of(one.record), one.file), set()).add(one.record.model.sha256)
    named = []
    for one in stored:
        identity = identity_of(one.record)
        if len(artifacts[identity, one.file]) > 1:
            identity = replace(identity, model=f"{identity.model} ({one.arm})")
        named.append((identity, one))
    return named


def _check(stored: Stored) -> None:
    if not stored.record.summary.p50_us > 0:
        raise MeasurementError(
            f"{stored.file}: '{stored.arm}' says p50_us={stored.record.summary.p50_us}, and no call takes no time. Measure it again."
        )


def _rank(stored: Stored) -> tuple[bool, float, str]:
    return stored.record.validity.ok, stored.record.scenario.min_s, stored.record.utc


def _keys(run_ids: Sequence[str]) -> list[str]:
    """Short names that stay the same when the page is made again, for a view that is shared."""
    short = [run_id[:8] for run_id in run_ids]
    return [f"{key}-{place}" if short.count(key) > 1 else key for place, key in enumerate(short)]


def _row(key: str, identity: Identity, stored: Stored) -> HardwareRow:
    record = stored.record
    values = {
        **_latency(record),
        **_resources(record),
        **_placed(stored),
        "accuracy": accuracy_of(record.accuracy),
        "num_launches": len(record.launches),
        "num_disturbed": sum(bool(launch.disturbances) for launch in record.launches),
        "valid": record.validity.ok,
        "reasons": tuple(reasons_of(record)),
        "notes": tuple(flag for flag in record.validity.flags if flag.startswith(INT8_FLAG)),
    }
    row = HardwareRow(key=key, identity=identity, stored=stored, absent={}, **values)
    absent = {name: _reason(name, record) for name, value in row.flat().items() if value is None}
    return HardwareRow(key=key, identity=identity, stored=stored, absent=absent, **values)


def _latency(record: Record) -> dict[str, Any]:
    summary, end_to_end, throughput = record.summary, record.host_e2e, record.throughput
    return {
        "p50_ms": summary.p50_us / 1e3,
        "p50_ci95_ms": (summary.ci95[0] / 1e3, summary.ci95[1] / 1e3) if summary.ci95 else None,
        "p90_ms": _ms(summary.es_p90_us),
        "p99_ms": _ms(summary.es_p99_us),
        "own_clock_p50_ms": record.device.p50_us / 1e3 if record.device else None,
        "host_e2e_p50_ms": end_to_end.p50_us / 1e3 if end_to_end else None,
        "fps": summary.fps,
        "throughput_fps": throughput.fps if throughput else None,
        "load_ms": summary.load_ms,
        "first_ms": summary.first_ms,
    }


def _resources(record: Record) -> dict[str, Any]:
    energy = record.energy
    return {
        "peak_rss_mib": record.memory.vmhwm_mib,
        "arena_off_rss_mib": _arena_off_mib(record),
        "gpu_mib": record.memory.gpu_mib,
        "net_mj": energy.net_mj,
        "gross_mj": energy.gross_mj,
        "per_joule": 1e3 / energy.gross_mj if energy.gross_mj else None,
        "energy_source": energy.source,
        "size_mib": record.model.bytes / MIB,
    }


def _arena_off_mib(record: Record) -> float | None:
    """Peak memory where the runtime gives back what it allocated, for a record that was taken both ways."""
    both = [record.memory, record.other_arena] if record.other_arena else []
    return next((memory.vmhwm_mib for memory in both if memory and memory.arena is False), None)


def _placed(stored: Stored) -> dict[str, Any]:
    """Shares and ops from the placement beside the record, else from the record itself."""
    macs, fallback_ops = dict(stored.record.runtime.ops_per_unit or {}), stored.record.runtime.fallback_ops
    if stored.placement is not None:
        layers, macs = stored.placement.layers, {}
        for layer in layers:
            macs[layer.precision] = macs.get(layer.precision, 0) + layer.macs
        fallback_ops = tuple(layer.name for layer in layers if layer.precision != stored.record.model.precision)
    total = sum(macs.values())
    shares = (
        {precision: part / total for precision, part in sorted(macs.items(), key=lambda it: -it[1])} if total else {}
    )
    return {
        "shares": shares,
        "int8_share": shares.get("int8", 0.0) if shares else None,
        "fallback_ops": fallback_ops,
    }


def accuracy_of(values: Mapping[str, Any] | None) -> Accuracy | None:
    """The record's accuracy, None without a value.

    `ci95` belongs to the value or to the delta: to whichever lies in it, the value first.
    """
    if not values or not is_number(values.get("value")):
        return None
    value, teacher, delta = float(values["value"]), _number(values.get("teacher")), _number(values.get("delta"))
    if delta is None and teacher is not None:
        delta = value - teacher
    interval, delta_interval = _interval(values.get("ci95")), _interval(values.get("delta_ci95"))
    if interval and not interval[0] <= value <= interval[1]:
        if delta_interval is None and delta is not None and interval[0] <= delta <= interval[1]:
            delta_interval = interval
        interval = None
    return Accuracy(
        dataset=str(values.get("dataset") or "unnamed data"),
        metric=str(values.get("metric") or "accuracy"),
        n=values.get("n"),
        value=value,
        ci95=interval,
        delta=delta,
        delta_ci95=delta_interval,
        agreement=_number(values.get("agreement")),
    )


def reasons_of(record: Record) -> list[str]:
    """What disturbed the launches, alike ones told once; the record's own flags where no launch says why it is invalid."""
    alike: dict[str, list[str]] = {}
    for launch in record.launches:
        for disturbance in launch.disturbances:
            alike.setdefault(re.sub(r"[-+]?\d+(\.\d+)?", "#", disturbance), []).append(disturbance)
    total = len(record.launches)
    told = [f"{same[0]} ({len(same)} of {total} launches)" if total > 1 else same[0] for same in alike.values()]
    if not told and not record.validity.ok:
        told = list(record.validity.flags)
    more = len(told) - NUM_REASONS
    return told if more <= 0 else [*told[:NUM_REASONS], f"and {more} more, in report.json"]


def _reason(name: str, record: Record) -> str:
    if name in ("dataset", "metric", "n", "accuracy_ci95", "delta", "delta_ci95", "agreement"):
        given = record.accuracy or {}
        if not is_number(given.get("value")):
            name = "accuracy"
    if name == "accuracy" and (why := (record.accuracy or {}).get("why")):
        return str(why)
    if name == "net_mj" and record.energy.gross_mj is not None:
        return _UNSAID[name]
    said = None
    if name not in ("p90_ms", "p99_ms", "p50_ci95_ms"):  # those flags count the queries of each launch; the rule is one
        key = _FLAG_KEYS.get(name, name)
        said = (reason_of({"flags": record.validity.flags}, key) or "").removeprefix(f"{key}: ")
    return said or _UNSAID.get(name, "not recorded")


def _interval(values: Any) -> Interval | None:
    if not isinstance(values, (list, tuple)) or len(values) != 2 or not all(map(is_number, values)):
        return None
    return float(values[0]), float(values[1])


def is_number(value: Any) -> bool:
    """Whether JSON's number, and a finite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _ms(value_us: float | None) -> float | None:
    return None if value_us is None else value_us / 1e3
