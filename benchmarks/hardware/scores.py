"""Normalised scores: how many times as fast as a named baseline, in the geometric mean over the models that both have.

The geometric mean is the only one of ratios whose ranking does not depend on the baseline (Fleming and Wallace 1986, How not
to lie with statistics). A configuration without some of the baseline's models is marked: another set of models is another
benchmark.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.hardware.identity import Configuration, varying
from benchmarks.hardware.rows import HardwareRow
from targets.errors import RecipeError

ByModel = Mapping[str, HardwareRow]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One configuration against the baseline. `speed` is the geometric mean of `ratios` (baseline p50 over own p50);
    `per_joule` the same of inferences a joule, over the models whose energy both know by the same meter: that of a CPU's package knows
    nothing of the rest of a board."""

    configuration: Configuration
    rows: ByModel
    ratios: Mapping[str, float]
    speed: float | None
    per_joule: float | None
    num_energy: int
    missing: tuple[str, ...]  # models of the baseline that stand not here
    beyond: tuple[str, ...]  # models here that the baseline has not
    doubtful: tuple[str, ...]  # models of whose two measurements one is not valid

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def num_valid(self) -> int:
        return len(self.ratios) - len(self.doubtful)

    @property
    def valid_speed(self) -> float | None:
        """The geometric mean over the models that are valid on both sides: what may be quoted."""
        return geometric_mean(ratio for model, ratio in self.ratios.items() if model not in self.doubtful)


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """exp(mean(ln r)), None over nothing; all ratios are above zero."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def by_configuration(rows: Sequence[HardwareRow]) -> dict[Configuration, dict[str, HardwareRow]]:
    """The rows of each configuration by the model's name, its input's shape with it where one model has several."""
    names = varying(row.identity for row in rows)
    found: dict[Configuration, dict[str, HardwareRow]] = {}
    for row in rows:
        found.setdefault(row.identity.configuration, {})[row.identity.model_label(names)] = row
    return found


def choose_baseline(rows: Sequence[HardwareRow], given: str | None = None) -> Configuration:
    """The configuration called `given`: its name, or words that only one name holds. Without: the one that covers most
    models, fp32 before others, then the fewest threads.

    Raises RecipeError for a name that none or several have.
    """
    found = by_configuration(rows)
    labels = {one.label(varying(row.identity for row in rows)): one for one in found}
    if given is None:
        return min(found, key=lambda one: (-len(found[one]), one.precision != "fp32", one.threads or 0, str(one)))
    if given in labels:
        return labels[given]
    words = set(given.casefold().replace(",", " ").split())
    fitting = [label for label in labels if words and words <= set(label.casefold().replace(",", " ").split())]
    if len(fitting) == 1:
        return labels[fitting[0]]
    raise RecipeError(_about_baseline(given, list(labels), fitting))


def scores_of(rows: Sequence[HardwareRow], baseline: Configuration) -> list[Score]:
    """One score a configuration: those with all of the baseline's models first, the fastest of them first."""
    found = by_configuration(rows)
    scores = [_score(one, models, found[baseline]) for one, models in found.items()]
    return sorted(scores, key=lambda one: (not one.is_complete, -(one.speed or 0.0)))


def _score(configuration: Configuration, own: ByModel, base: ByModel) -> Score:
    shared = [model for model in base if model in own]
    ratios = {model: base[model].p50_ms / own[model].p50_ms for model in shared}
    per_joule = [
        theirs / mine
        for model in shared
        if own[model].energy_source == base[model].energy_source
        and (mine := own[model].gross_mj)
        and (theirs := base[model].gross_mj)
    ]
    return Score(
        configuration=configuration,
        rows=own,
        ratios=ratios,
        speed=geometric_mean(ratios.values()),
        per_joule=geometric_mean(per_joule),
        num_energy=len(per_joule),
        missing=tuple(model for model in base if model not in own),
        beyond=tuple(model for model in own if model not in base),
        doubtful=tuple(model for model in shared if not (own[model].valid and base[model].valid)),
    )


def _about_baseline(given: str, labels: Sequence[str], fitting: Sequence[str]) -> str:
    if fitting:
        return f"baseline '{given}': {len(fitting)} configurations fit: {'; '.join(fitting)}. Give more words of one of them."
    near = difflib.get_close_matches(given, labels, n=3, cutoff=0.3)
    advice = f"Did you mean: {'; '.join(near)}?" if near else f"There are: {'; '.join(labels[:20])}."
    return f"baseline '{given}': no configuration here is called so. {advice}"
