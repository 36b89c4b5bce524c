"""What stands between a machine and its first measurement: `edgestill devices` for boards, `edgestill doctor` for this machine.

Asks and reads, changes nothing. Every fault comes with the command that mends it; where Debian keeps its Python to itself
(PEP 668), with that of an environment of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.device.environment import environment
from benchmarks.device.survey import survey
from benchmarks.devices import Completed
from benchmarks.inventory import INVENTORY, Entry, load_inventory
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address
from benchmarks.terminal import aligned
from targets import TARGETS, make_target
from targets.errors import DeviceError, EdgestillError, RecipeError, TargetError

SURVEY = Path(__file__).parent / "device" / "survey.py"
SURVEY_TIMEOUT_S = 60.0
LEAST_FREE_MIB = 500
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Fault:
    """What stands in the way, and the command that mends it."""

    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class BoardState:
    """One board as it was found; `found` is its survey, None where it could not be asked. `error` says why."""

    name: str
    address: str
    target: str | None
    found: Mapping[str, Any] | None = None
    power_mode: str | None = None
    faults: tuple[Fault, ...] = ()
    error: str | None = None

    def row(self) -> dict[str, str]:
        found = self.found or {}
        runtimes = [
            f"{module} {version}"
            for module, version in found.get("packages", {}).items()
            if version is not None and module in map(_module, TARGETS)
        ]
        return {
            "device": self.name,
            "state": "not reached" if self.error else "not ready" if self.faults else "ready",
            "board": " ".join(str(one) for one in (found.get("board") or found.get("arch"), self.power_mode) if one),
            "system": " ".join(str(one) for one in (found.get("os"), found.get("l4t")) if one),
            "python": found.get("python", ""),
            "runtimes": ", ".join(runtimes),
        }


@dataclass(frozen=True, kw_only=True)
class DevicesReport:
    """What `edgestill devices` answers."""

    boards: tuple[BoardState, ...]

    @property
    def failure(self) -> EdgestillError | None:
        """The first board that was not reached, else the first that is not ready."""
        for board in self.boards:
            if board.error is not None:
                return DeviceError(board.error)
        for board in self.boards:
            if board.faults:
                return TargetError(f"{board.name}: {board.faults[0].what}. Run there: {board.faults[0].mend}")
        return None

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "verb": "devices", **asdict(self), **_ending(self.failure)}

    def text(self) -> str:
        lines = aligned([board.row() for board in self.boards])
        for board in self.boards:
            lines += [f"{board.name}: {fault.what}\n  {fault.mend}" for fault in board.faults]
            lines += [board.error] if board.error else []
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What `edgestill doctor` answers: this machine, its targets (None: installed, else the command), and what it cannot tell."""

    found: Mapping[str, Any]
    targets: Mapping[str, str | None]
    extras: tuple[Fault, ...]
    unreadable: tuple[str, ...]
    cpu: str | None
    isa: str | None  # what it multiplies with, in words

    @property
    def failure(self) -> EdgestillError | None:
        if any(command is None for command in self.targets.values()):
            return None
        return TargetError(
            f"no runtime is installed here, so nothing can be compiled or measured. Run: {next(iter(self.targets.values()))}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "verb": "doctor", **asdict(self), **_ending(self.failure)}

    def text(self) -> str:
        found = self.found
        lines = [
            f"machine   {found['board'] or found['arch']}, {found['cpus']} CPUs, {found['ram_mib']} MiB, {found['os']}",
            f"cpu       {self.cpu or 'its name is not readable'}: {self.isa or 'its instructions are not readable'}",
            f"python    {found['python']} ({found['executable']})",
            f"disk      {found['free_mib']} MiB free",
            "targets",
        ]
        for target, command in self.targets.items():
            version = found["packages"].get(_module(target))
            lines.append(
                f"  {target:<16} {version or 'ready'}"
                if command is None
                else f"  {target:<16} not installed: {command}"
            )
        lines += [f"{fault.what}\n  {fault.mend}" for fault in self.extras]
        lines += (
            ["not readable here, so null in records", *(f"  {flag}" for flag in self.unreadable)]
            if self.unreadable
            else []
        )
        return "\n".join(lines)


def check_devices(
    names: Sequence[str] = (), *, inventory: Path = INVENTORY, opened: Callable[[Entry], Ssh] = Entry.open
) -> DevicesReport:
    """Look at boards, all at once: those named (of the inventory, or ssh://user@host), else all of the inventory.

    Raises RecipeError for a name that stands nowhere.
    """
    entries = load_inventory(inventory) if inventory.exists() or not names else {}
    wanted = [_entry(name, entries, inventory) for name in names] or list(entries.values())
    with ThreadPoolExecutor(max_workers=max(len(wanted), 1)) as pool:
        return DevicesReport(boards=tuple(pool.map(lambda entry: _look(entry, opened(entry)), wanted)))


def check_this_machine() -> DoctorReport:
    """Which targets can be compiled for and measured here, and what a record from here will not hold."""
    extras = []
    if find_spec("fabric") is None:
        extras.append(Fault("boards over SSH need fabric", _install(survey(), "pip install 'edgestill[devices]'")))
    missing = {name: make_target(name, {}).missing() for name in TARGETS}
    here = environment()
    return DoctorReport(
        found=survey(),
        targets={name: None if command is None else _install(survey(), command) for name, command in missing.items()},
        extras=tuple(extras),
        unreadable=here.flags,
        cpu=here.hard["cpu"],
        isa=here.hard["isa"],
    )


def _entry(name: str, entries: Mapping[str, Entry], inventory: Path) -> Entry:
    if name.startswith("ssh:"):
        return Entry(name=name, address=Address.parse(name))
    if name not in entries:
        raise RecipeError(f"device '{name}' does not stand in {inventory}. Known: {', '.join(entries) or 'none'}.")
    return entries[name]


def _look(entry: Entry, ssh: Ssh) -> BoardState:
    state = BoardState(name=entry.name, address=str(entry.address), target=entry.target)
    with ssh:
        try:
            found = _survey_of(ssh)
            faults = [*_faults_of(found), *_runtime_faults(ssh, found, entry)]
            mode = ssh.ask("environment")["hard"].get("power_mode") if found["packages"]["numpy"] else None
        except EdgestillError as error:
            return replace(state, error=str(error))
    if entry.power_mode is not None and mode != entry.power_mode:
        what = f"its power mode is {mode or 'not readable'}, and {entry.power_mode} is expected"
        faults.append(Fault(what, "sudo nvpmodel -m ID (the IDs stand in /etc/nvpmodel.conf); or mend devices.yaml"))
    return replace(state, found=found, power_mode=mode, faults=tuple(faults))


def _survey_of(ssh: Ssh) -> dict[str, Any]:
    done: Completed = ssh.peek([ssh.python, "-I", ssh.put(SURVEY)], timeout_s=SURVEY_TIMEOUT_S)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        raise DeviceError(
            f"{ssh.name}: {ssh.python} does not tell what is installed there ({said[-1] if said else done.returncode}). "
            "Try it there by hand, or name another in devices.yaml."
        ) from None
    return found


def _faults_of(found: Mapping[str, Any]) -> list[Fault]:
    faults = []
    if found["packages"]["numpy"] is None:
        faults.append(Fault(f"numpy is not installed for {found['executable']}", _install(found, "pip install numpy")))
    if found["free_mib"] < LEAST_FREE_MIB:
        faults.append(Fault(f"only {found['free_mib']} MiB are free in the home directory", "df -h ~; du -sh ~/*"))
    return faults


def _runtime_faults(ssh: Ssh, found: Mapping[str, Any], entry: Entry) -> list[Fault]:
    """What the target that is wanted there lacks, by the target itself; without one, that there is no runtime at all."""
    if entry.target is None:
        if any(found["packages"].get(_module(target)) for target in TARGETS):
            return []
        return [Fault("no runtime is installed", _install(found, "pip install onnxruntime"))]
    if found["packages"]["numpy"] is None:
        return []  # the device program, which asks the target, needs it first
    missing = ssh.ask("probe", "--target", entry.target)["missing"]
    return [] if missing is None else [Fault(f"{entry.target} is not installed", _install(found, missing))]


def _module(target: str) -> str:
    package: str = TARGETS[target].package
    return package


def _install(found: Mapping[str, Any], command: str) -> str:
    """A pip command for the very interpreter that was asked; another command as it is."""
    if not command.startswith("pip install "):
        return command
    packages = command.removeprefix("pip install ")
    python = found["executable"] or sys.executable
    if not found["externally_managed"]:
        return f"{python} -m pip install {packages}"
    return (
        f"{python} -m venv --system-site-packages ~/edgestill && ~/edgestill/bin/pip install {packages} "
        "(then name that python, with its whole path, in devices.yaml)"
    )


def _ending(failure: EdgestillError | None) -> dict[str, Any]:
    return {
        "error": None if failure is None else str(failure),
        "exit_code": 0 if failure is None else failure.exit_code,
    }
