"""Does an arm help? Paired differences over seeds, an interval, and one of four words.

`helps` and `hurts`: the paired t test (Holm over all arms of the ablation) gives p < 0.05. `no difference`: the 95 % interval
lies within half a point. `too few seeds`: neither, or fewer than three seeds, and how many would decide. Differences are fractions,
not points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from benchmarks.statistics import Interval, holm
from targets.errors import RecipeError

HELPS, HURTS, NO_DIFFERENCE, TOO_FEW = "helps", "hurts", "no difference", "too few seeds"
ALPHA = 0.05
NEGLIGIBLE = 0.005  # half a point of accuracy: gains below it are within seed noise or selection in published logs
MAX_SEEDS = 1000
MIN_SEEDS = 3  # accuracies are counts: of two seeds the differences are often equal, and equal ones look as if they had no spread
# Of what lies evenly within one step of a count: a spread below it is not seen, and taken to be there.
SD_OF_A_STEP = 12**-0.5


@dataclass(frozen=True, kw_only=True)
class ArmVerdict:
    """One arm against the baseline, over the seeds that both have."""

    arm: str
    num_seeds: int
    mean: float
    ci95: Interval
    p: float  # Holm's, two-sided
    verdict: str
    seeds_needed: int | None  # too few seeds: this many would decide, if the spread stays as it is

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(differences: Mapping[str, Sequence[float]], *, resolution: float = 0.0) -> list[ArmVerdict]:
    """Arm -> its accuracy minus the baseline's, a value a seed. `resolution`: the step between two accuracies, one over the number
    of test images. Raises RecipeError for an arm of fewer than two seeds."""
    if lonely := [arm for arm, values in differences.items() if len(values) < 2]:
        raise RecipeError(
            f"arm '{lonely[0]}' has fewer than two seeds: there is no spread to judge by. Give five or more."
        )
    least_sd = resolution * SD_OF_A_STEP
    adjusted = holm([_p(values, least_sd) for values in differences.values()])
    return [
        _judged(arm, values, p, len(adjusted), least_sd)
        for (arm, values), p in zip(differences.items(), adjusted, strict=True)
    ]


def _half_widths(sd: float, num_seeds: npt.NDArray[np.int64], alpha: float) -> npt.NDArray[np.float64]:
    """Of t intervals that miss in a share `alpha`, for so many seeds each."""
    reach: npt.NDArray[np.float64] = special.stdtrit(num_seeds - 1, 1 - alpha / 2) * sd / np.sqrt(num_seeds)
    return reach


def _judged(arm: str, values: Sequence[float], p: float, num_arms: int, least_sd: float) -> ArmVerdict:
    n, mean, sd = len(values), float(np.mean(values)), max(float(np.std(values, ddof=1)), least_sd)
    half_width = float(_half_widths(sd, np.array(n), ALPHA))
    low, high = mean - half_width, mean + half_width
    if n < MIN_SEEDS:
        verdict = TOO_FEW
    elif p < ALPHA:
        verdict = HELPS if mean > 0 else HURTS
    elif low > -NEGLIGIBLE and high < NEGLIGIBLE:
        verdict = NO_DIFFERENCE
    else:
        verdict = TOO_FEW
    needed = _seeds_needed(mean, sd, n, num_arms) if verdict == TOO_FEW else None
    return ArmVerdict(arm=arm, num_seeds=n, mean=mean, ci95=(low, high), p=p, verdict=verdict, seeds_needed=needed)


def _p(values: Sequence[float], least_sd: float) -> float:
    """Two-sided, of the paired t test. Without any spread the mean decides."""
    largest = float(np.max(np.abs(values)))
    if largest == 0:
        return 1.0
    scaled = np.asarray(values) / largest  # t has no scale, and tiny differences have no squares
    sd = 0.0 if len(set(values)) == 1 else float(np.std(scaled, ddof=1))
    if (sd := max(sd, least_sd / largest)) == 0:
        return 0.0
    t = np.mean(scaled) * np.sqrt(len(values)) / sd
    return float(2 * special.stdtr(len(values) - 1, -abs(t)))


def _seeds_needed(mean: float, sd: float, num_seeds: int, num_arms: int) -> int | None:
    """The fewest that decide, were mean and spread the true ones, so that about half of such ablations would: an interval within
    half a point, or one that excludes zero even at Holm's hardest share of errors, alpha over the number of arms."""
    more = np.arange(max(num_seeds + 1, MIN_SEEDS), MAX_SEEDS + 1)
    is_apart = _half_widths(sd, more, ALPHA / num_arms) < abs(mean)
    is_level = _half_widths(sd, more, ALPHA) < NEGLIGIBLE - abs(mean)
    deciding = more[is_apart | is_level]
    return int(deciding[0]) if len(deciding) else None
