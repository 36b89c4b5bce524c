"""Two models against each other: two fresh processes that are both alive and take turns on the same CPUs, a slice each.

What the machine does for longer than a slice befalls both: the difference of the two does not hold it, while launches one
after the other differ by it. Bulej et al. 2020, "Duet benchmarking: improving measurement accuracy in the cloud", run both at
the same time on two cores; here only one runs at a time, so that a model may use all cores and none is in the other's way.
Who begins a round is decided by chance, each round anew: nothing that comes back at regular times always meets the same one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.device.affinity import allowed_cpus, choose_cpus
from benchmarks.device.disturbances import drift_apart
from benchmarks.device.measure import PRESETS, Preset, cool_down
from benchmarks.device.window import Length
from targets.base import CompiledModel
from targets.errors import DeviceError, EdgestillError, MeasurementError, TargetError

SLICE_S = 0.05
QUERIES_A_SLICE = 10  # of the slower model, at least
MIN_ROUNDS, MAX_ROUNDS = 8, 1000
PATIENCE_S = 120.0  # beyond what a preset allows, for a model that takes long to load or to run
# Seconds that each process is timed for, and pairs of processes. Pairs differ by about 0.5 % on a quiet machine.
LENGTHS = {"smoke": (1.0, 10), "ci": (2.0, 20), "release": (5.0, 40)}
SCRIPT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from benchmarks.device.__main__ import run; sys.exit(run())"
NAMES = ("A", "B")


def in_turns(name: str) -> Preset:
    """A preset as pairs of processes take it: shorter, and more often."""
    min_s, pairs = LENGTHS[name]
    return replace(PRESETS[name], min_s=min_s, min_queries=64, max_s=10 * min_s, launches=pairs, idle_s=0.0)


def measure_duet(
    compiled_dirs: Sequence[Path],
    preset: Preset,
    *,
    options: Sequence[Sequence[str]],
    start_temp_c: float | None = None,
    chance: random.Random,
    same_cpus: bool = True,
) -> dict[str, Any]:
    """One pair. `options` are those of either process's `take-turns`; returns {"launches": [A's, B's], "first": 0 or 1}.

    Raises the error with which one of the two ended, in its own words, and DeviceError where it was killed or fell silent;
    in any case neither is left behind.
    """
    flags: list[str] = []
    cool_down(start_temp_c, preset.cool_down_s, flags)
    cpus = _cpus([CompiledModel.load(path) for path in compiled_dirs], chance) if same_cpus else None
    held = [] if cpus is None else ["--cpus", ",".join(str(cpu) for cpu in cpus)]
    commands = [
        _command(["--compiled", str(path), "--preset", preset.name, *held, *own])
        for path, own in zip(compiled_dirs, options, strict=True)
    ]
    patience_s = PATIENCE_S + preset.warmup_cap_s + preset.max_s
    launches, first = play(commands, preset.length, chance, patience_s=patience_s)
    apart = drift_apart(log_ratios(launches[0]["turns"], launches[1]["turns"]))
    for launch in launches:
        launch["flags"] += flags
        launch["disturbances"] += [] if apart is None else [apart]
    return {"launches": launches, "first": first}


def _cpus(compiled: Sequence[CompiledModel], chance: random.Random) -> tuple[int, ...] | None:
    """None, which holds neither, where a target does not say in how many threads it runs."""
    threads = [one.options.get("num_threads") for one in compiled]
    known = [one for one in threads if isinstance(one, int) and one > 0]
    return choose_cpus(max(known), allowed_cpus(), chance) if len(known) == len(threads) else None


def log_ratios(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[float]:
    """ln B - ln A of the p25 of each round, of two launches' turns."""
    return [math.log(ours / theirs) for theirs, ours in zip(a["p25_us"], b["p25_us"], strict=True)]


def play(
    commands: Sequence[Sequence[str]], length: Length, chance: random.Random, *, patience_s: float
) -> tuple[list[dict[str, Any]], int]:
    """Start both, one after the other, let them take turns, and end them; returns their answers, and who was first."""
    players: dict[int, Player] = {}
    first = chance.randrange(2)
    try:
        for place in (first, 1 - first):
            players[place] = Player(NAMES[place], commands[place], patience_s)
            players[place].hear()  # that it is ready
        take_rounds(players, length, chance)
        return [players[place].ask({"end": True}) for place in (0, 1)], first
    finally:
        for player in players.values():
            player.dismiss()


def take_rounds(players: Mapping[int, Player], length: Length, chance: random.Random) -> None:
    """Rounds of a slice each until both have enough. One round before them is not timed: from it, how long a slice is.

    A slice holds QUERIES_A_SLICE calls of the slower model, unless MIN_ROUNDS of them were longer than the preset allows.
    """
    order: dict[str, Any] = {"slice_s": SLICE_S, "timed": False}
    slowest_s = max(players[place].ask(order)["p25_us"] for place in (0, 1)) / 1e6
    slice_s = max(SLICE_S, min(QUERIES_A_SLICE * slowest_s, length.max_s / MIN_ROUNDS))
    order = {"slice_s": slice_s, "timed": True}
    for _ in range(MAX_ROUNDS):
        begins = chance.randrange(2)
        for place in (begins, 1 - begins):
            players[place].take(order)
        if _enough(list(players.values()), length):
            return


def _enough(players: Sequence[Player], length: Length) -> bool:
    if players[0].num_slices < MIN_ROUNDS:
        return False
    if max(player.own_ns for player in players) >= length.max_s * 1e9:
        return True
    return all(player.own_ns >= length.min_s * 1e9 and player.num_queries >= length.min_queries for player in players)


class Player:
    """A process that takes turns, seen by its conductor. It speaks when it is spoken to, once after its start, and at its end."""

    def __init__(self, name: str, command: Sequence[str], patience_s: float) -> None:
        self.name, self.patience_s = name, patience_s
        self.num_slices, self.num_queries, self.own_ns = 0, 0, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.heard = b""

    def take(self, order: Mapping[str, Any]) -> None:
        answer = self.ask(order)
        self.num_slices += 1
        self.num_queries += answer["n"]
        self.own_ns += answer["own_ns"]

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said at its end is still to be heard
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Its next line. Raises its error, and DeviceError where it ended without one or says nothing."""
        assert self.process.stdout is not None
        until_s = time.monotonic() + self.patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.heard:
                if not selector.select(max(until_s - time.monotonic(), 0.0)):
                    raise DeviceError(
                        f"{self.name}: did not answer within {self.patience_s:g} s and was stopped. Take a smaller model, or measure it "
                        "alone: edgestill bench."
                    )
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died()
                self.heard += chunk
        line, _, self.heard = self.heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _error(answer["exit_code"])(f"{self.name}: {answer['error']}")
        return answer

    def dismiss(self) -> None:
        """Nothing of it is left afterwards."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _died(self) -> DeviceError:
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DeviceError(
            f"{self.name}: its process {how} without an answer, so the pair was given up. Measure it alone to see more: edgestill bench."
        )


def _error(exit_code: int) -> type[EdgestillError]:
    return {5: TargetError, 7: MeasurementError}.get(exit_code, DeviceError)


def _command(argv: Sequence[str]) -> list[str]:
    root = str(Path(__file__).resolve().parents[2])  # a folder, or the packed program
    return [sys.executable, "-I", "-c", SCRIPT, root, "take-turns", *argv]
