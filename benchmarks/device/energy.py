"""How much energy the packages of this machine took: RAPL's counters around the timed window.

Reads /sys/class/powercap/intel-rapl:N (AMD's processors stand there too; usually readable by root only). The counters
integrate by themselves and wrap at max_energy_range_uj, so two readings are enough for a window below one wrap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.device.record import Energy

POWERCAP = Path("/sys/class/powercap")
MIN_WINDOW_S = 30.0
MOST_W = 500.0  # of one package: the TDP of AMD's EPYC 9965, the most that is sold; no counter may wrap twice in a window at that


@dataclass(frozen=True)
class Reading:
    """Microjoules a rail, and where each counter wraps."""

    uj: dict[str, int]
    wraps_uj: dict[str, int]

    def since(self, before: Reading) -> dict[str, int]:
        """Microjoules a rail from `before` to this reading, over at most one wrap."""
        return {
            rail: uj - before.uj[rail] + (before.wraps_uj[rail] + 1 if uj < before.uj[rail] else 0)
            for rail, uj in self.uj.items()
        }


def read_rails(flags: list[str], root: Path = POWERCAP) -> Reading | None:
    """All top-level package rails, or None with the reason in `flags`. psys contains the packages and is left out."""
    uj: dict[str, int] = {}
    wraps: dict[str, int] = {}
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            if zone.name.count(":") == 1 and name.startswith("package"):
                uj[name] = int((zone / "energy_uj").read_text())
                wraps[name] = int((zone / "max_energy_range_uj").read_text())
    except (OSError, ValueError) as error:
        flags.append(f"energy: RAPL is not readable ({getattr(error, 'strerror', None) or error})")
        return None
    if not uj:
        flags.append("energy: this machine shows no RAPL package counter")
        return None
    return Reading(uj, wraps)


def idle_watts(seconds: float, flags: list[str], sleep: Callable[[float], None] = time.sleep) -> float | None:
    """Mean power of all packages while this process sleeps."""
    before = read_rails(flags)
    if before is None:
        return None
    sleep(seconds)
    after = read_rails(flags)
    known = after is not None and after.uj.keys() == before.uj.keys()
    return sum(after.since(before).values()) / 1e6 / seconds if after is not None and known else None


def energy_of(
    before: Reading | None,
    after: Reading | None,
    *,
    num_queries: int,
    wall_s: float,
    idle_w: float | None,
    flags: list[str],
) -> Energy:
    """Millijoules an inference over a window of `wall_s`; net is above `idle_w`, None where idle was not measured.

    A window below MIN_WINDOW_S is told: the counters step every millisecond, and what else the machine does is in them.
    """
    if before is None or after is None or before.uj.keys() != after.uj.keys():
        return Energy(source=None, rails={}, gross_mj=None, idle_w=None, net_mj=None)
    if wall_s < MIN_WINDOW_S:
        flags.append(f"energy: over {wall_s:.3g} s only, {MIN_WINDOW_S:g} s are needed. Take --preset release")
    surely_once_s = min(before.wraps_uj.values()) / 1e6 / MOST_W
    if wall_s > surely_once_s:
        flags.append(f"energy: the counter may wrap twice in {wall_s:.3g} s, and below {surely_once_s:.3g} s it cannot")
        return Energy(source=None, rails={}, gross_mj=None, idle_w=None, net_mj=None)
    rails = after.since(before)
    gross_mj = sum(rails.values()) / 1e3
    net_mj = None if idle_w is None else (gross_mj - idle_w * wall_s * 1e3) / num_queries
    return Energy(source="rapl package", rails=rails, gross_mj=gross_mj / num_queries, idle_w=idle_w, net_mj=net_mj)
