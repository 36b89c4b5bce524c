"""Several devices at once: a thread for each board, one target after another on it; this machine before them, alone.

Two targets of one device never measure at the same time, and this machine does not measure while it serves boards. What
fails on one device is kept as that target's outcome, and the others go on.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.device.verify import runtime_facts
from benchmarks.devices import Device
from benchmarks.inventory import KIT, LOCAL, open_device
from benchmarks.ssh import Ssh
from pipeline.progress import Progress, Task
from pipeline.recipe import TargetConfig
from pipeline.workspace import Stopped
from targets import make_target
from targets.base import read_json, write_json
from targets.errors import DeviceError, EdgestillError, TargetError

T = TypeVar("T")
STOP_S = 15.0  # how long an interrupted run waits for its boards to be left clean


@dataclass(frozen=True)
class Job(Generic[T]):
    """What is to be done for one target on the device that its recipe names."""

    name: str
    device: str
    work: Callable[[Device, Progress], T]


def on_devices(jobs: Sequence[Job[T]], progress: Progress) -> tuple[dict[str, T], dict[str, EdgestillError]]:
    """Do every job; returns what came of them and what failed, by their names, in their order.

    An exception that is not an EdgestillError is raised once all have ended; that a run stops where it was told to is no news where
    something failed on the way. An interrupt stops the boards first.
    """
    outcomes: dict[str, T | Exception] = {}
    of_device: dict[str, list[Job[T]]] = {}
    for job in jobs:
        of_device.setdefault(job.device, []).append(job)
    devices = {name: open_device(name, say=progress.say) for name in of_device}
    if LOCAL in of_device:
        _one_after_another(of_device[LOCAL], devices[LOCAL], progress, outcomes)
    threads = [
        threading.Thread(
            target=_one_after_another, args=(of_device[name], device, Named(progress, name), outcomes), daemon=True
        )
        for name, device in devices.items()
        if name != LOCAL
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        _stop(threads, devices.values())
        raise
    ordered = {job.name: outcomes[job.name] for job in jobs}
    errors = {name: error for name, error in ordered.items() if isinstance(error, EdgestillError)}
    for outcome in ordered.values():
        if isinstance(outcome, Stopped) and errors:
            raise next(iter(errors.values()))
        if isinstance(outcome, Exception) and not isinstance(outcome, EdgestillError):
            raise outcome
    done = {name: outcome for name, outcome in ordered.items() if not isinstance(outcome, Exception)}
    return done, errors


def _one_after_another(
    jobs: Sequence[Job[T]], device: Device, progress: Progress, outcomes: dict[str, T | Exception]
) -> None:
    try:
        for job in jobs:
            try:
                outcomes[job.name] = job.work(device, progress)
            except Exception as error:  # the caller raises it, or tells it as what became of this target
                outcomes[job.name] = error
    finally:
        device.close()


def _stop(threads: Sequence[threading.Thread], devices: Sequence[Device] | Any) -> None:
    for device in devices:
        device.close()
    for thread in threads:
        if thread.is_alive():
            thread.join(STOP_S)


def look_at_boards(targets: Sequence[TargetConfig], run_dir: Path, say: Callable[[str], None]) -> None:
    """Ask every board of a recipe, before anything is trained for it, whether it is there and has the runtime.

    Raises TargetError for a runtime that is not installed there. A board that cannot be reached now may be there later: it is
    told, and an error only where no target can be worked for at all. Boards that an earlier run knew count as able.
    """
    unreachable: dict[str, DeviceError] = {}
    wanted = [target for target in targets if target.device not in (LOCAL, KIT)]
    for target in wanted:
        if target.device in unreachable:
            continue
        try:
            _look(target, say)
        except DeviceError as error:
            unreachable[target.device] = error
    lost = [
        target for target in wanted if target.device in unreachable and not _memory(run_dir, target.device).exists()
    ]
    if lost and len(lost) == len(targets):
        raise unreachable[lost[0].device]
    for why in unreachable.values():
        say(f"{why}\nThe run goes on without it; its targets are tried when all else is done.")


def _look(target: TargetConfig, say: Callable[[str], None]) -> None:
    device = open_device(target.device, say=say)
    if not isinstance(device, Ssh):
        return
    with device:
        missing = device.ask("probe", "--target", target.name)["missing"]
        device.facts()
    if missing is not None:
        raise TargetError(f"target '{target.name}' is not installed on {device.name}. Install it there: {missing}.")


def facts_of(device: Device, run_dir: Path) -> Mapping[str, Any]:
    """What holds for results from there: asked, or, where it cannot be reached now, what it said in an earlier run.

    So what was measured on a board stays finished while the board is away; whatever is to be built there still needs it.
    """
    memory = _memory(run_dir, device.name)
    try:
        facts = dict(device.facts())
    except DeviceError:
        if not memory.exists():
            raise
        known: Mapping[str, Any] = read_json(memory)
        return known
    if isinstance(device, Ssh):
        write_json(memory, facts)
    return facts


def runtime_of(device: Device, target: TargetConfig, run_dir: Path) -> Mapping[str, Any]:
    """The target's runtime there, and its GPU: asked, or what was known in an earlier run, as `facts_of`."""
    if not isinstance(device, Ssh):
        return runtime_facts(make_target(target.name, target.options))
    memory = _memory(run_dir, f"{device.name}-{target.name}")
    try:
        facts: Mapping[str, Any] = device.ask("probe", "--target", target.name)["runtime"]
    except DeviceError:
        if not memory.exists():
            raise
        facts = read_json(memory)
    else:
        write_json(memory, facts)
    return facts


def _memory(run_dir: Path, device: str) -> Path:
    return run_dir / f".device-{re.sub(r'[^A-Za-z0-9.-]+', '-', device)}.json"


@dataclass(frozen=True)
class Named:
    """The progress of one device among several: its name stands before every line."""

    progress: Progress
    name: str

    def say(self, line: str) -> None:
        self.progress.say(line if line.startswith(f"{self.name}:") else f"{self.name}: {line}")

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        with self.progress.task(f"{self.name}: {label}", total) as task:
            yield task
