"""What the harness adds to a measurement, and whether it gives back a slow-down of a known size.

    python -m benchmarks.evidence.overhead --out docs/results/overhead.json

One Relu over eight numbers on each CPU runtime: as it is, and with a busy wait of 100 us and of 1 ms inside each call; rounds of
fresh processes, interleaved, exactly as every measurement is made. What each launch said stands in the result, and `--show FILE`
prints the table from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Arm, measure_arms
from benchmarks.device.overhead import MAX_CLOSURE_US, MAX_NULL_US, MAX_NULL_WALL_US, MAX_SPIN_ERROR
from benchmarks.device.record import Launch, Record
from benchmarks.devices import Local
from benchmarks.evidence.graphs import exported_of, relu
from benchmarks.evidence.script import parse_out_or_show
from targets import TARGETS, make_target
from targets.base import read_json, write_json

WAITS_US = (100.0, 1000.0)
MAX_GAP_US = 10.0
PLAIN = "as it is"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table; `holds` is None where nothing could be read."""

    what: str
    measured: str
    limit: str
    holds: bool | None


def main(argv: Sequence[str]) -> None:
    """Measure, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    with tempfile.TemporaryDirectory() as folder:
        document = measure(Path(folder), preset=arguments.preset, launches=arguments.launches)
    write_json(arguments.out, document)
    print(text(document))


def measure(folder: Path, *, preset: str, launches: int) -> dict[str, Any]:
    """Every launch of every arm, by runtime and wait."""
    exported = exported_of(relu(folder / "relu.onnx"), folder / "exported")
    names = [name for name in sorted(TARGETS) if name.endswith("-cpu") and make_target(name, {}).missing() is None]
    compiled = {name: make_target(name, {}).compile(exported, folder / name, "fp32") for name in names}
    arms = {
        (name, wait_us): Arm(f"{name} {arm_name(wait_us)}", compiled[name].directory, injected_us=wait_us)
        for name in names
        for wait_us in (None, *WAITS_US)
    }
    (folder / "session").mkdir()
    records = measure_arms(
        Local(),
        list(arms.values()),
        preset=preset,
        launches=launches,
        out_dir=folder / "session",
        throughput=False,
        retries=0,
        on_progress=lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr, flush=True),
    )
    found = dict(zip(arms, records, strict=True))
    return {
        "schema_version": 1,
        "preset": preset,
        "machine": {key: records[0].env.hard[key] for key in ("cpu", "isa", "cpus_online", "kernel", "python")},
        "utc": records[0].utc,
        "runtimes": {
            name: {
                "toolchain": compiled[name].toolchain,
                "arms": {arm_name(wait_us): _launches(found[name, wait_us]) for wait_us in (None, *WAITS_US)},
            }
            for name in names
        },
    }


def arm_name(wait_us: float | None) -> str:
    return PLAIN if wait_us is None else f"wait {wait_us:g} us"


def _launches(record: Record) -> list[dict[str, Any]]:
    return [_launch(launch) for launch in record.launches]


def _launch(launch: Launch) -> dict[str, Any]:
    own = launch.device
    return {
        "p25_us": launch.lat_us.p25,
        "p50_us": launch.lat_us.p50,
        "n": launch.n,
        "overhead": asdict(launch.overhead) if launch.overhead else None,
        "own_clock": None if own is None else {"clock": own.clock, "p50_us": own.lat_us.p50, "gap_us": own.gap_us},
        "why_not": next((flag for flag in launch.flags if flag.startswith("device: ")), None),
        "disturbances": list(launch.disturbances),
    }


def claims(document: Mapping[str, Any]) -> list[Claim]:
    """The harness's promises, each with what was measured: medians over launches."""
    launches = [one for runtime in document["runtimes"].values() for arm in runtime["arms"].values() for one in arm]
    told = [
        _below("a null session, p50", [one["overhead"]["null_us"] for one in launches], MAX_NULL_US),
        _below(
            "a null session, an iteration on the wall",
            [one["overhead"]["null_wall_us"] for one in launches],
            MAX_NULL_WALL_US,
        ),
        _below(
            "closure: (wall - sum of samples) / n", [one["overhead"]["closure_us"] for one in launches], MAX_CLOSURE_US
        ),
    ]
    for wait_us in WAITS_US:
        measured_us = float(np.median([one["overhead"][f"spin_{wait_us:.0f}_us"] for one in launches]))
        told.append(_recovered(f"a null session with a wait of {wait_us:g} µs", measured_us, wait_us))
    for name, runtime in document["runtimes"].items():
        told.append(_gap(name, runtime["arms"][PLAIN]))
        told += [
            _recovered(f"{name}: an injected wait of {wait_us:g} µs", _added_us(wait_us, runtime["arms"]), wait_us)
            for wait_us in WAITS_US
        ]
    return told


def _below(what: str, values_us: Sequence[float], limit_us: float) -> Claim:
    median = float(np.median(values_us))
    return Claim(what=what, measured=f"{median:.2f} µs", limit=f"< {limit_us:g} µs", holds=median < limit_us)


def _gap(name: str, launches: Sequence[Mapping[str, Any]]) -> Claim:
    what = f"{name}: a Relu by our stop watch, less its own clock"
    own = [one["own_clock"] for one in launches if one["own_clock"] is not None]
    if len(own) < len(launches) or not own:
        why = next((one["why_not"] for one in launches if one["why_not"]), "no launch")
        return Claim(what=what, measured=f"null ({why})", limit=f"< {MAX_GAP_US:g} µs", holds=None)
    return _below(f"{what} ({own[0]['clock']})", [one["gap_us"] for one in own], MAX_GAP_US)


def _added_us(wait_us: float, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """By rounds, of the p25, which is what comparisons are made of: what slowed a round slowed both of its launches."""
    pairs = zip(arms[arm_name(wait_us)], arms[PLAIN], strict=True)
    return float(np.median([slowed["p25_us"] - plain["p25_us"] for slowed, plain in pairs]))


def _recovered(what: str, measured_us: float, wait_us: float) -> Claim:
    error = measured_us / wait_us - 1
    return Claim(
        what=what,
        measured=f"{measured_us:.1f} µs ({error:+.2%})",
        limit=f"± {MAX_SPIN_ERROR:.0%}",
        holds=abs(error) <= MAX_SPIN_ERROR,
    )


def text(document: Mapping[str, Any]) -> str:
    """Markdown: each claim, what was measured, and whether it holds."""
    words = {True: "yes", False: "**no**", None: "not known"}
    lines = ["| what | measured | limit | holds |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {one.what} | {one.measured} | {one.limit} | {words[one.holds]} |" for one in claims(document)]
    arms = [arm for runtime in document["runtimes"].values() for arm in runtime["arms"].values()]
    launches = [one for arm in arms for one in arm]
    disturbed = sum(bool(one["disturbances"]) for one in launches)
    toolchains = ", ".join(runtime["toolchain"] for runtime in document["runtimes"].values())
    lines += [
        "",
        f"{len(launches)} launches in {len(arms[0])} interleaved rounds, preset {document['preset']}, of which {disturbed} were "
        f"disturbed; medians over launches. {toolchains}; {document['machine']['cpu']}, Python "
        f"{document['machine']['python']}, {document['utc'][:10]}.",
    ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launches", type=int, default=7, help="rounds of six launches, about 15 s each with smoke")
    parser.add_argument("--preset", default="smoke")
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
