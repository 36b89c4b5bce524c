"""A history as series: runs of one hard fingerprint in the order of their dates, and what the rule says of each.

Runs of two fingerprints never meet: each has a series of its own, which says in what it differs from the one before it.
A run that is not valid, or dated in the future (its clock was wrong, so its place is), is shown and not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any

import numpy as np

from benchmarks.change_rule import (
    MIN_SHIFT,
    MIN_WINDOW,
    NEEDED,
    SUSPECTS,
    WINDOW,
    Change,
    Course,
    follow,
    shift_between,
)
from benchmarks.history_store import CLOCK_TOLERANCE, AcceptedRow, History, RunRow, utc_text
from targets.errors import RecipeError

SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "no change", "cannot tell"
ACCEPTED, BACK = "accepted", "back"
NOT_VALID, FUTURE = "not valid", "dated in the future"
SHORT = 8  # characters of a fingerprint or a run id that a person reads
MIN_PREFIX = 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement. `why_not`: it is not judged, and why; `mark`: what begins with it."""

    run_id: str
    utc: str
    p25_us: float
    p50_us: float
    p99_us: float | None
    peak_rss_mib: float | None
    size_bytes: int
    preset: str
    git_sha: str | None
    why_not: str | None = None
    mark: str | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A change that the rule saw, by the ids of its runs; `ratio` is new over old."""

    kind: str
    ratio: float
    first_run: str
    confirmed_run: str
    ended_run: str | None
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A level that a person accepted, from `run_id` on; `ratio` to the level before, where both have runs enough."""

    run_id: str
    who: str
    note: str
    utc: str
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The series before this one, and the hard keys in which they differ: [its, ours]."""

    series: str
    changed: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Runs that may be compared, oldest first, and the verdict on the newest.

    `level_us` is the p25 that new runs are held against, `beyond_us` the one beyond which a run is suspect, `floor` the
    ratio beyond which a shift counts; None where it cannot be told. The level begins at `runs[level_from]`, with the last
    accepted change or improvement, and has had `num_runs` valid runs.
    """

    hard_sha256: str
    title: str
    name: str
    target: str
    precision: str
    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    accepted: tuple[Accepted, ...]
    verdict: str
    ratio: float | None
    level_from: int
    num_runs: int
    level_us: float | None
    beyond_us: float | None
    floor: float | None
    before: Difference | None
    notes: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.hard_sha256[:SHORT]

    @property
    def open(self) -> Step | None:
        """The slow-down that is neither over nor accepted."""
        return self.steps[-1] if self.verdict == SLOWER else None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def read_series(history: History, now: datetime) -> list[Series]:
    """All series of a history: by model, runtime and precision, oldest first."""
    groups: dict[str, list[RunRow]] = {}
    for row in history.runs():
        groups.setdefault(row.hard_sha256, []).append(row)
    hards = {key: history.hard(rows[-1].run_id) for key, rows in groups.items()}
    marks = history.accepted()
    found = [
        _series(rows, hards[key], [mark for mark in marks if mark.hard_sha256 == key], _before(key, groups, hards), now)
        for key, rows in groups.items()
    ]
    return sorted(found, key=lambda one: (one.name, one.target, one.precision, one.runs[0].utc, one.hard_sha256))


def select_series(series: Sequence[Series], wanted: str | None) -> list[Series]:
    """Those whose fingerprint begins with `wanted` or whose title holds it; all for None. Raises RecipeError for none."""
    if wanted is None:
        return list(series)
    by_id = [one for one in series if len(wanted) >= MIN_PREFIX and one.hard_sha256.startswith(wanted)]
    found = by_id or [one for one in series if wanted.casefold() in one.title.casefold()]
    if not found:
        known = "; ".join(f"{one.id} {one.title}" for one in series[:5])
        raise RecipeError(f"series '{wanted}': there is none of this id or title. There are: {known or 'none'}.")
    return found


def points_by_series(series: Iterable[Series]) -> dict[str, list[dict[str, Any]]]:
    """What the hardware report draws: {utc, p50_ms, mark} of the valid runs, by title and id of the series."""
    return {
        f"{one.title} ({one.id})": [
            {"utc": run.utc, "p50_ms": run.p50_us / 1e3, "mark": run.mark} for run in one.runs if run.why_not is None
        ]
        for one in series
    }


def sentence(series: Series) -> str:
    """The verdict on a series in one sentence."""
    needed = f"{series.num_runs} of {NEEDED} valid runs"
    if series.verdict == UNKNOWN:
        since = " since the accepted change" if series.accepted else ""
        return f"cannot tell: {needed}{since} ({MIN_WINDOW} to hold against, {SUSPECTS} to judge)."
    if series.verdict in (SLOWER, FASTER):
        step = series.steps[-1]
        first = next(run for run in series.runs if run.run_id == step.first_run)
        told = f"{step.kind}: {step.ratio - 1:+.1%} from run {named(first)} on"
        if series.verdict == FASTER:
            return f"{told}. This is the new level; {needed} to hold others against it."
        ratio = series.ratio or step.ratio
        return f"{told}; the last {SUSPECTS} runs are {ratio - 1:+.1%} on the {_ms(series.level_us)} ms of before."
    floor, ratio = series.floor or 1.0, series.ratio or 1.0
    window = min(WINDOW, series.num_runs - SUSPECTS)
    return f"no change beyond {floor - 1:.1%}: the last {SUSPECTS} runs are {ratio - 1:+.1%} from the {window} before."


def before_line(difference: Difference) -> str:
    """Why a series is a new one, in one sentence."""
    told = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in difference.changed.items())
    return f"not compared with series {difference.series[:SHORT]}, they differ in {told}"


def named(run: Run) -> str:
    sha = f", git {run.git_sha[:SHORT]}" if run.git_sha else ""
    return f"{run.run_id[:SHORT]} ({run.utc[:10]}{sha})"


def _ms(value_us: float | None) -> str:
    return "-" if value_us is None else f"{value_us / 1e3:#.4g}"


def _series(
    rows: Sequence[RunRow],
    hard: Mapping[str, Any],
    marks: Sequence[AcceptedRow],
    before: Difference | None,
    now: datetime,
) -> Series:
    latest = utc_text(now + CLOCK_TOLERANCE)
    why_not = {row.run_id: _why_not(row, latest) for row in rows}
    judged = [row for row in rows if why_not[row.run_id] is None]
    logs = [math.log(row.p25_us) for row in judged]
    place = {row.run_id: index for index, row in enumerate(judged)}
    begins = {place[mark.run_id]: mark for mark in marks if mark.run_id in place}
    course = follow(logs, begins)
    steps = tuple(_step(change, judged) for change in course.changes)
    starts = sorted({*begins, *(change.first for change in course.changes if change.shift < 0)})
    return Series(
        hard_sha256=rows[0].hard_sha256,
        title=_title(rows[-1], hard),
        name=rows[-1].name,
        target=rows[-1].target,
        precision=rows[-1].precision,
        runs=tuple(_run(row, why_not[row.run_id], _marks(steps, marks).get(row.run_id)) for row in rows),
        steps=steps,
        accepted=tuple(_accepted(mark, index, starts, logs) for index, mark in sorted(begins.items())),
        verdict=_verdict(course),
        ratio=None if course.shift is None else math.exp(course.shift),
        level_from=rows.index(judged[course.begin]) if judged else 0,
        num_runs=course.num_runs,
        level_us=None if course.median is None else math.exp(course.median),
        beyond_us=_beyond_us(course),
        floor=None if course.sigma is None else math.exp(max(MIN_SHIFT, 3 * course.sigma)),
        before=before,
        notes=tuple(_notes(rows, why_not)),
    )


def _why_not(row: RunRow, latest: str) -> str | None:
    if row.utc > latest:
        return FUTURE
    return None if row.valid else NOT_VALID


def _verdict(course: Course) -> str:
    """An improvement is told until there are runs enough to judge others against it."""
    if course.open:
        return SLOWER
    if course.shift is not None:
        return SAME
    return FASTER if course.changes and course.changes[-1].first == course.begin else UNKNOWN


def _beyond_us(course: Course) -> float | None:
    if course.median is None or course.sigma is None:
        return None
    return math.exp(course.median + 2 * course.sigma)


def _step(change: Change, judged: Sequence[RunRow]) -> Step:
    return Step(
        kind=SLOWER if change.shift > 0 else FASTER,
        ratio=math.exp(change.shift),
        first_run=judged[change.first].run_id,
        confirmed_run=judged[change.confirmed].run_id,
        ended_run=None if change.ended is None else judged[change.ended].run_id,
        accepted=change.accepted,
    )


def _accepted(mark: AcceptedRow, index: int, starts: Sequence[int], logs: Sequence[float]) -> Accepted:
    start = max((start for start in starts if start < index), default=0)
    window, newest = logs[max(start, index - WINDOW) : index], logs[index : index + SUSPECTS]
    told = len(window) >= MIN_WINDOW and len(newest) == SUSPECTS
    ratio = math.exp(float(shift_between(np.array(window), np.array(newest)))) if told else None
    return Accepted(run_id=mark.run_id, who=mark.who, note=mark.note, utc=mark.utc, ratio=ratio)


def _marks(steps: Iterable[Step], accepted: Iterable[AcceptedRow]) -> dict[str, str]:
    """What begins with which run; where a person accepted, that is said."""
    marks = {step.ended_run: BACK for step in steps if step.ended_run is not None}
    marks |= {step.first_run: step.kind for step in steps}
    return marks | {mark.run_id: ACCEPTED for mark in accepted}


def _run(row: RunRow, why_not: str | None, mark: str | None) -> Run:
    return Run(
        run_id=row.run_id,
        utc=row.utc,
        p25_us=row.p25_us,
        p50_us=row.p50_us,
        p99_us=row.p99_us,
        peak_rss_mib=row.peak_rss_mib,
        size_bytes=row.size_bytes,
        preset=row.preset,
        git_sha=row.git_sha,
        why_not=why_not,
        mark=mark,
    )


def _title(row: RunRow, hard: Mapping[str, Any]) -> str:
    given = hard.get("flags")
    flags = ", ".join(f"{key}={value}" for key, value in sorted(given.items())) if isinstance(given, Mapping) else ""
    words = (
        f"{row.name} {row.precision}",
        str(hard.get("runtime") or row.target),
        _shapes(hard.get("shapes")),
        f"batch {hard.get('batch', '?')}",
        flags,
    )
    return ", ".join(word for word in words if word)


def _shapes(shapes: Any) -> str:
    """Nx3x32x32, one an input."""
    if not isinstance(shapes, (list, tuple)) or not all(isinstance(shape, (list, tuple)) for shape in shapes):
        return ""
    return " + ".join("x".join("N" if size is None else str(size) for size in shape) for shape in shapes)


def _notes(rows: Sequence[RunRow], why_not: Mapping[str, str | None]) -> list[str]:
    notes = []
    newest = list(takewhile(lambda row: why_not[row.run_id] == NOT_VALID, reversed(rows)))
    if newest:
        told = f"newest {len(newest)} runs are" if len(newest) > 1 else "newest run is"
        notes.append(f"the {told} not valid and not judged")
    if future := [row.run_id[:SHORT] for row in rows if why_not[row.run_id] == FUTURE]:
        notes.append(f"dated in the future and not judged: {', '.join(future[:3])}. The clock there was wrong")
    presets = sorted({row.preset for row in rows if row.valid})
    if len(presets) > 1:
        notes.append(f"runs of several presets ({', '.join(presets)}) vary differently: keep to one")
    return notes


def _before(
    key: str, groups: Mapping[str, Sequence[RunRow]], hards: Mapping[str, Mapping[str, Any]]
) -> Difference | None:
    """Among the series of this model, runtime and precision that began earlier: the one most like it, then the latest."""
    first = groups[key][0]
    earlier = [
        other
        for other, rows in groups.items()
        if (rows[0].utc, other) < (first.utc, key)
        and (rows[0].name, rows[0].target, rows[0].precision) == (first.name, first.target, first.precision)
    ]
    if not earlier:
        return None
    changed = {other: _changed(hards[other], hards[key]) for other in earlier}
    nearest = min(earlier, key=lambda other: (len(changed[other]), -list(groups).index(other)))
    return Difference(series=nearest, changed=changed[nearest])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys that differ, one level of mappings opened: flags.num_threads."""
    flat_old, flat_new = _flat(old), _flat(new)
    keys = sorted({*flat_old, *flat_new})
    return {key: [flat_old.get(key), flat_new.get(key)] for key in keys if flat_old.get(key) != flat_new.get(key)}


def _flat(hard: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in hard.items():
        flat |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat
