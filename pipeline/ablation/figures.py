"""The figures of an ablation's tables, from the raw ones of its document: means over seeds, intervals, comparisons, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.statistics import mean_interval
from pipeline.ablation.arms import ALONE, KD, RECIPE
from pipeline.ablation.verdict import TOO_FEW, ArmVerdict, verdicts

FEW_SEEDS = 5
TUNED = {"temperature": "temperature", "kd_weight": "weight"}  # the keys of a grid's pair, and what people call them
BASIC = (ALONE, KD, RECIPE)
Document = Mapping[str, Any]
BySeed = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against its baseline: plain KD, and for plain KD the student alone. No verdict where `why` says so."""

    arm: str
    against: str
    verdict: ArmVerdict | None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        told = self.verdict.to_json() if self.verdict is not None else None
        return {"arm": self.arm, "against": self.against, "judged_on": "last epoch", "verdict": told, "why": self.why}


def comparisons(document: Document) -> list[Comparison]:
    """Every arm but the student alone; Holm's p over all of them together, each training counted once."""
    arms = {arm["name"]: arm for arm in document["arms"]}
    pairs = {name: KD for name in arms if name not in (ALONE, KD)} | ({KD: ALONE} if ALONE in arms else {})
    reasons = {name: _unjudged(arms[name], arms[against], against) for name, against in pairs.items()}
    judged = {
        name: list(_differences(arms[name], arms[pairs[name]]).values()) for name, why in reasons.items() if not why
    }
    resolution = 1 / document["data"]["num_test"]
    found = {verdict.arm: verdict for verdict in verdicts(judged, resolution=resolution)} if judged else {}
    ordered = [name for name in arms if name in pairs]
    return [Comparison(arm=name, against=pairs[name], verdict=found.get(name), why=reasons[name]) for name in ordered]


def _unjudged(arm: Mapping[str, Any], baseline: Mapping[str, Any], against: str) -> str:
    """Why there is no verdict; empty where there is one."""
    if arm["same_as"] is not None:
        return f"the same training as {arm['same_as']}"
    num_common = len(_differences(arm, baseline))
    return f"{num_common} of its seeds are {against}'s too" if num_common < 2 else ""


def _differences(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[int, float]:
    """Test top-1 of the last epoch, arm minus baseline, for the seeds that both have."""
    ours, theirs = by_seed(arm, "last", "test_top1"), by_seed(baseline, "last", "test_top1")
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def by_seed(arm: Mapping[str, Any], which: str, figure: str) -> dict[int, float]:
    """which: last or best (epoch)."""
    return {one["seed"]: one[which][figure] for one in arm["seeds"]}


def gains(document: Document) -> list[dict[str, str]]:
    """A row an arm: accuracy, and what it gains over its baseline."""
    judged = {one.arm: one for one in comparisons(document)}
    seen = {arm["name"]: _mean([one["images_seen"] for one in arm["seeds"]]) for arm in document["arms"]}
    most = max((images for images in seen.values() if images is not None), default=None)
    return [
        {
            "arm": arm["name"],
            "seeds": str(len(arm["seeds"])),
            "last epoch, %": _with_interval(by_seed(arm, "last", "test_top1")),
            "best epoch, %": _percent(_mean(list(by_seed(arm, "best", "test_top1").values())), 2),
            "images, %": _percent(None if most is None or (images := seen[arm["name"]]) is None else images / most, 0),
            **_gain(judged.get(arm["name"])),
        }
        for arm in document["arms"]
    ]


def _gain(one: Comparison | None) -> dict[str, str]:
    if one is None:
        return {"against": "-", "points (95 % CI)": "-", "p": "-", "verdict": "-"}
    if one.verdict is None:
        return {"against": one.against, "points (95 % CI)": "-", "p": "-", "verdict": one.why}
    found = one.verdict
    low, high = found.ci95
    return {
        "against": one.against,
        "points (95 % CI)": f"{found.mean * 100:+z.2f} ({low * 100:+z.2f} to {high * 100:+z.2f})",
        "p": "< 0.001" if found.p < 0.001 else f"{found.p:.3f}",
        "verdict": found.verdict if found.verdict != TOO_FEW else _how_many(found),
    }


def _how_many(found: ArmVerdict) -> str:
    needed = f"{found.seeds_needed} would decide" if found.seeds_needed is not None else "1,000 would not decide"
    return f"{TOO_FEW}: {needed}"


def overview(document: Document) -> dict[str, str]:
    """One row for the whole ablation: the student alone, plain KD and the recipe after the last epoch, and the recipe's verdict."""
    arms = {arm["name"]: arm for arm in document["arms"]}
    told = {name: _with_interval(by_seed(arms[name], "last", "test_top1")) for name in BASIC if name in arms}
    gain = _gain(next((one for one in comparisons(document) if one.arm == RECIPE), None))
    return {
        "data": ", ".join([dataset_name(document), *_asked(document)]),
        **{f"{name}, %": told.get(name, "-") for name in BASIC},
        "recipe against kd, points (95 % CI)": gain["points (95 % CI)"],
        "verdict": gain["verdict"],
    }


def dataset_name(document: Document) -> str:
    """What people call the data: without the scheme and the folder of a source."""
    source: str = document["data"]["source"]
    return source.rpartition(":")[2].rpartition("/")[2].removesuffix(".npz")


def generalization(document: Document) -> list[dict[str, str]]:
    """A row an arm and one of the teacher: means over seeds, after the last epoch."""
    teacher = document["teacher"]["scores"]
    rows = {"teacher": [teacher]} | {arm["name"]: [one["last"] for one in arm["seeds"]] for arm in document["arms"]}
    return [{"arm": name, **_generalization(scores, list(teacher["shift"]))} for name, scores in rows.items()]


def _generalization(scores: Sequence[Mapping[str, Any]], shifts: Sequence[str]) -> dict[str, str]:
    """scores: one a seed; shifts: the names of the shifted test sets."""
    return {
        "train, %": _percent(_mean(_known(scores, "train_top1")), 2),
        "test, %": _percent(_mean([one["test_top1"] for one in scores]), 2),
        "gap, points": _percent(_mean(_known(scores, "gap")), 2),
        "ECE, %": _percent(_mean([one["ece"] for one in scores]), 2),
        "NLL, nats": _cell(_mean([one["nll"] for one in scores]), ".4f"),
        **{f"{shift}, %": _percent(_mean([one["shift"][shift] for one in scores]), 2) for shift in shifts},
        "as the teacher, %": _percent(_mean(_known(scores, "agreement")), 2),
    }


def _known(scores: Sequence[Mapping[str, Any]], figure: str) -> list[float]:
    """A figure of those that have it: the teacher agrees with nobody, and without labels nothing is known of the train split."""
    return [one[figure] for one in scores if one.get(figure) is not None]


def failed_lines(document: Document) -> list[str]:
    """The trainings that failed, and the first line of why."""
    return [f"failed: {one['training']}: {one['error'].splitlines()[0]}" for one in document["failed"]]


def tuning_line(document: Document) -> str:
    """How plain KD came to its temperature and weight."""
    tuning, grid = document["tuning"], document["tuning"]["grid"]
    tuned = f"T = {tuning['tuned']['temperature']:g}, weight {tuning['tuned']['kd_weight']:g}"
    if not grid:
        return f"Plain KD: {tuned}, as the recipe gives them, not tuned."
    tried = ", ".join(
        f"T {one['temperature']:g} w {one['kd_weight']:g}: {_percent(one['validation_top1'], 2)}" for one in grid
    )
    told = f"Plain KD: {tuned}, the best of {len(grid)} on validation under seed {tuning['seed']} ({tried})."
    at_edge = [word for key, word in TUNED.items() if _at_the_edge(tuning, key)]
    return " ".join([told, *(f"Its best {word} is at the edge of the grid." for word in at_edge)])


def _at_the_edge(tuning: Mapping[str, Any], key: str) -> bool:
    """A weight of 1 is no edge: there is none above."""
    tried, best = sorted({one[key] for one in tuning["grid"]}), tuning["tuned"][key]
    return len(tried) > 1 and best in (tried[0], tried[-1]) and not (key == "kd_weight" and best == 1)


def doubts(document: Document) -> list[str]:
    """What makes the verdicts weaker than they look."""
    trained = [one for arm in document["arms"] for one in arm["seeds"]]
    precisions = sorted({one["precision"] for one in trained})
    few = len(document["seeds"]) < FEW_SEEDS
    return [
        *_shown_fewer(document),
        *_looked_before(document),
        *([f"Fewer than {FEW_SEEDS} seeds: their spread is hardly known."] if few else []),
        *([f"Some trained in {' and some in '.join(precisions)}: give one train.precision."] if precisions[1:] else []),
    ]


def _shown_fewer(document: Document) -> list[str]:
    """Without labels for all, the student alone has a shorter way than plain KD."""
    arms = {arm["name"]: arm for arm in document["arms"]}
    seen = [_mean([one["images_seen"] for one in arms[name]["seeds"]]) for name in (ALONE, KD) if name in arms]
    if len(seen) < 2 or not seen[0] or not seen[1] or seen[0] > 0.9 * seen[1]:
        return []
    return [
        f"{ALONE} is shown the images with a label, {seen[0] / seen[1]:.0%} of what {KD} is shown, in as many epochs: what {KD} gains "
        "over it is by more steps too."
    ]


def _looked_before(document: Document) -> list[str]:
    """Whoever looks, adds seeds and looks again is wrong more often than once in twenty."""
    earlier = (document.get("looks") or [])[:-1]
    if not earlier:
        return []
    return [
        f"Judged before, after {' and '.join(map(str, earlier))} seeds: who chooses the number of seeds by the verdict tells arms that "
        "are alike apart more often than once in twenty."
    ]


def condition(document: Document) -> str:
    """Which data, which nets, how long."""
    data, student, teacher = document["data"], document["student"], document["teacher"]
    told = f" ({', '.join(asked)})" if (asked := _asked(document)) else ""
    distill, seeds = document["recipe"]["distill"], document["seeds"]
    nets = f"{_net(student)} from {_net(teacher)}" if student is not None else f"from {_net(teacher)}"
    return (
        f"{data['source']}: {data['num_train']:,} train{told}, {data['num_validation']:,} validation, {data['num_test']:,} test "
        f"images; {nets}, {distill['train']['epochs'] * distill['rounds']} epochs an arm; seeds {seeds[0]} to {seeds[-1]}; judged on "
        "the last epoch."
    )


def _asked(document: Document) -> list[str]:
    """What the recipe took away from the train split."""
    data = document["data"]
    labels = data.get("labels", {})  # not in documents of before
    share, noise = data["condition"]["train_share"], data["condition"]["label_noise"]
    asked = [
        f"{share:.0%} of the train split" if share < 1 else "",
        f"{noise:.0%} of the labels wrong" if noise else "",
        f"{labels['num_labelled']:,} with a label" if labels.get("num_unlabelled") else "",
    ]
    return list(filter(None, asked))


def _net(net: Mapping[str, Any]) -> str:
    return f"{net['model']} ({net['parameters'] / 1e3:,.0f} K)"


def provenance(document: Document) -> str:
    """Who trained what with what, and how long."""
    machine, versions = document["machine"], document["versions"]
    trained = [one for arm in document["arms"] if arm["same_as"] is None for one in arm["seeds"]]
    minutes = sum(one["seconds"] for one in trained) / 60
    return (
        f"{document['utc'][:10]}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {versions['torch']}; {len(trained)} trainings took {minutes:,.0f} minutes."
    )


def _with_interval(values: BySeed) -> str:
    """Mean and 95 % t interval, in percent."""
    found = list(values.values())
    if (interval := mean_interval(found)) is None:
        return _percent(_mean(found), 2)
    low, high = interval
    return f"{np.mean(found) * 100:.2f} ± {(high - low) / 2 * 100:.2f}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percent(value: float | None, digits: int) -> str:
    return _cell(None if value is None else value * 100, f".{digits}f")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
