"""The most that a machine multiplies through one runtime: measured on dense layers, once, and kept.

Reads and writes <cache>/peaks/<key>.json. Measured rather than looked up: it is the runtime's best kernel on these threads and
at these clocks, so what a model misses of it is the model's. The peak of a precision is refused where no dense layer ran in it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.dense import LEVELS, Level, write_dense
from benchmarks.device.environment import fingerprint
from benchmarks.device.record import MAX_PSI_PERCENT
from benchmarks.devices import Device, run_program
from targets import make_target
from targets.base import read_json, write_json
from targets.errors import EdgestillError, IntegrityError

VERSION = 1  # raised when the dense layers or the way they are timed change: peaks across it are not the same thing
LONG_ENOUGH_US = 10_000.0
FOLDER = "peaks"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a peak belongs to; every field is a part of its key. Threads are among the options."""

    hard_sha256: str
    target: str
    options: Mapping[str, Any]
    toolchain: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """`gops`: 2 x multiply-accumulates a second in units of 10^9, None where it was refused, for the reason in `why`."""

    precision: str
    gops: float | None
    layer: str = ""  # which dense layer it was
    utc: str = ""
    psi_cpu: float | None = None  # percent of the time in which other work waited for a CPU
    cached: bool = False
    tried: tuple[Mapping[str, Any], ...] = ()
    why: str = ""
    note: str = ""

    @property
    def quiet(self) -> bool:
        return self.psi_cpu is None or self.psi_cpu <= MAX_PSI_PERCENT


def peak_of(
    machine: Machine,
    precision: str,
    *,
    device: Device,
    program: str,
    fresh: bool = False,
    cache_dir: Path | None = None,
) -> Peak:
    """The peak of one precision: the kept one, or measured now and kept.

    What was measured on a busy machine is measured again, and the higher of the two is kept: a peak can only be missed. A
    kept file that cannot be read, or a folder that cannot be written, costs a measurement, not the answer.
    """
    path = _path(machine, precision, cache_dir or default_cache_dir())
    kept = None if fresh else _kept(path)
    if kept is not None and kept.quiet:
        return kept
    measured = measure_peak(machine, precision, device=device, program=program)
    if kept is not None and (measured.gops is None or (kept.gops or 0.0) > measured.gops):
        return kept
    return _keep(measured, machine, path)


def measure_peak(machine: Machine, precision: str, *, device: Device, program: str) -> Peak:
    """Dense layers, larger ones while they are over too soon; the best is the peak. Says why where there is none."""
    timed: list[dict[str, Any]] = []
    waited: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for level in LEVELS:
            try:
                answer = _profiled(machine, precision, level, device, program, Path(scratch) / level[0].name)
            except EdgestillError as error:
                if not timed:
                    return Peak(precision=precision, gops=None, why=str(error))
                break  # larger layers did not fit; what the smaller ones reached stands
            products = [layer for layer in answer["layers"] if layer["macs"]]
            timed += products
            waited += [answer["psi_cpu"]] if answer["psi_cpu"] is not None else []
            if max((layer["min_us"] for layer in products), default=LONG_ENOUGH_US) >= LONG_ENOUGH_US:
                break
    return replace(best_of(precision, timed), psi_cpu=max(waited, default=None))


def best_of(precision: str, timed: Sequence[Mapping[str, Any]]) -> Peak:
    """The fastest layer among those that ran in `precision`, by its least time; refused where none did."""
    tried = tuple(
        {
            "name": _dense_name(layer["name"]),
            "op": layer["op"],
            "precision": layer["precision"],
            "macs": layer["macs"],
            "time_us": layer["min_us"],
            "gops": 2 * layer["macs"] / layer["min_us"] / 1e3,
        }
        for layer in timed
        if layer["macs"] and layer["min_us"] > 0
    )
    proven = [layer for layer in tried if layer["precision"] == precision]
    utc = datetime.now(UTC).isoformat(timespec="seconds")
    if not proven:
        ran = ", ".join(sorted({str(layer["precision"]) for layer in tried})) or "nothing that was timed"
        why = f"dense layers that were built for {precision} ran in {ran}"
        return Peak(precision=precision, gops=None, utc=utc, tried=tried, why=why)
    best = max(proven, key=lambda layer: layer["gops"])
    return Peak(precision=precision, gops=best["gops"], layer=best["name"], utc=utc, tried=tried)


def default_cache_dir() -> Path:
    """Where a user's caches are, by the XDG base directory rule: an empty or relative XDG_CACHE_HOME does not count."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "edgestill"


def time_at_peak_us(macs: Mapping[str, int], peaks: Iterable[Peak]) -> float:
    """Microseconds that multiply-accumulates, by precision, would take at the peaks: sum of 2 x MACs / peak.

    Raises KeyError for a precision without a peak.
    """
    gops = {peak.precision: peak.gops for peak in peaks if peak.gops}
    return sum(2 * count / gops[precision] / 1e3 for precision, count in macs.items() if count)


def _profiled(
    machine: Machine, precision: str, level: Level, device: Device, program: str, scratch: Path
) -> dict[str, Any]:
    """Build the layers of a level for the target, compile and profile them there."""
    dialect = make_target(machine.target, machine.options).dialect
    exported = write_dense(scratch / "exported", level, precision=precision, dialect=dialect)
    compiled = device.scratch(scratch / "compiled")
    argv = ["compile", "--target", machine.target, "--options", json.dumps(dict(machine.options))]
    argv += ["--exported", device.put(exported.directory), "--precision", precision, "--out", compiled]
    run_program(device, program, argv)
    return run_program(device, program, ["profile", "--compiled", compiled])


def _dense_name(layer: str) -> str:
    """Ours, which is a part of whatever name the runtime gave to the layer that it made of it."""
    return next((dense.name for level in LEVELS for dense in level if dense.name in layer), layer)


def _path(machine: Machine, precision: str, cache_dir: Path) -> Path:
    key = {"version": VERSION, **asdict(machine), "precision": precision}
    return cache_dir / FOLDER / f"{fingerprint(key)[:16]}.json"


def _kept(path: Path) -> Peak | None:
    """None where there is none, or what is there is no peak."""
    try:
        values = read_json(path)["peak"]
        peak = Peak(**{**values, "tried": tuple(values["tried"]), "cached": True})
    except (IntegrityError, KeyError, TypeError):
        return None
    return peak if isinstance(peak.gops, float) and peak.gops > 0 else None


def _keep(peak: Peak, machine: Machine, path: Path) -> Peak:
    if peak.gops is None:
        return peak
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": VERSION, **asdict(machine), "peak": asdict(peak)})
    except OSError as error:
        return replace(peak, note=f"not kept: {path.parent}: {error.strerror}")
    return peak
