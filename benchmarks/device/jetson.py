"""What a Jetson tells without root: its power mode, its clocks' limits, its power rails, its over-current counters.

Reads /etc/nvpmodel.conf, /var/lib/nvpmodel/status, /sys/class/devfreq and /sys/class/hwmon, of Orin and Thor, as JetPack 6 and 7
lay them out; nothing is set. What only root may read (the memory's clock) is not asked for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.energy import MIN_WINDOW_S
from benchmarks.device.record import Energy
from benchmarks.device.sampler import INTERVAL_S, Probe, Reading, gpu_clocks

ROOT = Path("/")
TOTALS = ("VDD_IN", "VIN")  # the rail that feeds the whole module: Orin Nano and NX; Thor
METERS = ("ina3221", "ina238")  # Thor's VIN may hang on the latter
SUM_OF_SHUNTS = "7"  # an INA3221's seventh voltage is the sum of the others' shunt voltages
MILLIVOLT, MILLIAMPERE = "mV ", "mA "  # begin the sampler's kinds of a rail
# Orin counts under-voltage, average and instantaneous over-current; after the first two its clocks are cut for long.
SERIOUS, PASSING = ("oc1", "oc2"), ("oc3",)


def is_jetson(root: Path = ROOT) -> bool:
    return (root / "etc/nv_tegra_release").exists() or "nvidia,tegra" in (
        _text(root / "proc/device-tree/compatible") or ""
    )


def hard_facts(root: Path, flags: list[str]) -> dict[str, Any]:
    """The keys that two measurements on Jetsons must share besides the others; none on another machine."""
    if not is_jetson(root):
        return {}
    limits = gpu_limits_mhz(root)
    if limits is None:
        flags.append("gpu_max_mhz: /sys/class/devfreq shows no GPU")
    return {"power_mode": power_mode(root, flags), "gpu_max_mhz": None if limits is None else limits[1]}


def power_mode(root: Path, flags: list[str]) -> str | None:
    """The name of the mode that nvpmodel set last, else of its default. Numbers mean another mode on every board.

    On an Orin Nano Super the modes 0, 1, 2, 3 are 15W, 25W, MAXN_SUPER and 7W.
    """
    modes, default = _modes(_text(root / "etc/nvpmodel.conf") or "")
    status = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    number = int(status[1]) if status else default
    if number is None or number not in modes:
        flags.append("power_mode: neither /var/lib/nvpmodel/status nor /etc/nvpmodel.conf names the mode")
        return None
    return modes[number]


def _modes(conf: str) -> tuple[dict[int, str], int | None]:
    """Names by number, and the number of the default; lines that are commented out do not count."""
    lines = [line for line in conf.splitlines() if line.startswith("<")]
    found = [re.match(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", line) for line in lines]
    defaults = [re.match(r"<\s*PM_CONFIG\s+DEFAULT=(\d+)", line) for line in lines]
    modes = {int(one[1]): one[2] for one in found if one}
    return modes, next((int(one[1]) for one in defaults if one), None)


def gpu_limits_mhz(root: Path = ROOT) -> tuple[float, float] | None:
    """The least and the most that the power mode allows the GPU."""
    limits = [
        (low / 1e6, high / 1e6)
        for folder in gpu_clocks(root)
        if (low := _number(folder / "min_freq")) is not None and (high := _number(folder / "max_freq")) is not None
    ]
    return max(limits, default=None)


def over_currents(root: Path, names: Sequence[str]) -> int | None:
    """How often since boot these events were counted; None where the board has no such counters."""
    for folder in _sensors(root, "soctherm_oc"):
        counts = [_number(folder / f"{name}_event_cnt") for name in names]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None
    return None


@dataclass(frozen=True)
class Rail:
    """One supply that is metered; where its millivolts and milliamperes stand."""

    name: str
    voltage: Path
    current: Path


def rails(root: Path = ROOT) -> list[Rail]:
    """All metered rails by the labels of the board, unconnected inputs and sums left out."""
    found = []
    for folder in (folder for chip in METERS for folder in _sensors(root, chip)):
        for label in sorted(folder.glob("in*_label")):
            number, name = label.name[2:].partition("_")[0], _text(label) or ""
            rail = Rail(name, folder / f"in{number}_input", folder / f"curr{number}_input")
            unconnected = number == SUM_OF_SHUNTS or name in ("", "NC")
            if not unconnected and _number(rail.voltage) is not None and _number(rail.current) is not None:
                found.append(rail)
    return found


def rail_probes(root: Path = ROOT) -> list[Probe]:
    """What the sampler is to read beside clocks and temperatures."""
    pairs = [((MILLIVOLT + rail.name, rail.voltage), (MILLIAMPERE + rail.name, rail.current)) for rail in rails(root)]
    return [Probe(kind, path, 1.0) for pair in pairs for kind, path in pair]


def rail_watts(reading: Reading) -> dict[str, float]:
    """Power by rail at one moment."""
    values = reading.highest
    names = [kind.removeprefix(MILLIVOLT) for kind in values if kind.startswith(MILLIVOLT)]
    return {
        name: values[MILLIVOLT + name] * values[MILLIAMPERE + name] / 1e6
        for name in names
        if MILLIAMPERE + name in values
    }


def sampled_energy(
    readings: Sequence[Reading], *, num_queries: int, wall_s: float, idle_w: float | None, flags: list[str]
) -> Energy | None:
    """Energy by the rails over a window of `wall_s`, from the mean of what was sampled in it; None without any rail.

    The gross is that of the rail that feeds the module. AGX Orin meters none: its rails overlap, and no sum of them is the board.
    """
    watts = [found for reading in readings if (found := rail_watts(reading))]
    if not watts:
        return None
    if wall_s < MIN_WINDOW_S:
        flags.append(f"energy: over {wall_s:.3g} s only, {MIN_WINDOW_S:g} s are needed. Take --preset release")
    names = [name for name in watts[0] if all(name in one for one in watts)]
    mean_w = {name: sum(one[name] for one in watts) / len(watts) for name in names}
    total = next((name for name in TOTALS if name in mean_w), None)
    if total is None:
        flags.append(f"energy: no rail of this board is the whole ({', '.join(names)}), so there is no total")
    gross_mj = None if total is None else mean_w[total] * wall_s * 1e3 / num_queries
    net_mj = None if gross_mj is None or idle_w is None else gross_mj - idle_w * wall_s * 1e3 / num_queries
    return Energy(
        source=f"INA3221, {total}" if total else "INA3221",
        rails={name: round(power * wall_s * 1e6) for name, power in mean_w.items()},
        gross_mj=gross_mj,
        idle_w=idle_w,
        net_mj=net_mj,
        hz=len(watts) / wall_s if wall_s > 0 else None,
    )


def idle_watts(seconds: float, root: Path = ROOT, sleep: Callable[[float], None] = time.sleep) -> float | None:
    """Mean power of the whole module while this process sleeps, read as often as the sampler reads."""
    readings = []
    for _ in range(max(round(seconds / INTERVAL_S), 1)):
        sleep(INTERVAL_S)
        values = {probe.kind: _number(probe.path) for probe in rail_probes(root)}
        readings.append(Reading(0.0, {kind: float(value) for kind, value in values.items() if value is not None}))
    watts = [rail_watts(reading) for reading in readings]
    total = next((name for name in TOTALS if all(name in one for one in watts)), None)
    return None if total is None else sum(one[total] for one in watts) / len(watts)


def _sensors(root: Path, chip: str) -> list[Path]:
    """The hwmon folders of a chip. Their numbers differ from boot to boot."""
    folders = sorted((root / "sys/class/hwmon").glob("hwmon*"))
    return [folder for folder in folders if _text(folder / "name") == chip]


def _text(path: Path) -> str | None:
    """None for what is absent or refuses to be read: an unpowered sensor answers with "try again"."""
    try:
        return path.read_text(errors="replace").strip("\x00\n ") or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
