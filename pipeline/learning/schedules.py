"""How far a scheduled value has gone from its start to its end."""

from __future__ import annotations

import math

ROUNDING = 1e-9  # 6 / 10 / 0.8 * 4 is 2.9999999999999996, and the third step is due


def way_done(schedule: str, progress: float, *, full_at: float, num_steps: int) -> float:
    """0 at the start, 1 from `full_at` on, never falling; with x = progress / full_at: linear x; cosine (1 - cos(pi x)) / 2;
    step floor(x num_steps) / num_steps."""
    x = min(max(progress, 0.0) / full_at, 1.0)
    if schedule == "cosine":
        return (1 - math.cos(math.pi * x)) / 2
    if schedule == "step":
        return math.floor(x * num_steps + ROUNDING) / num_steps
    return x
