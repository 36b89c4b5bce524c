"""The boards that a person has: devices.yaml, and what a recipe's `device:` means.

orin:
  address: ssh://ann@orin.local    # user, port, key and jump hosts may stand in ~/.ssh/config
  target: tensorrt                 # what `edgestill devices` looks for there
  power_mode: MAXN                 # a measurement in another mode is refused
  python: /opt/edge/bin/python3    # the interpreter that has numpy and the runtime
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.devices import Device, Local
from benchmarks.ssh import Ssh
from benchmarks.ssh_login import Address
from targets import TARGETS
from targets.errors import RecipeError

INVENTORY = Path("devices.yaml")  # in the folder where the command runs
LOCAL, KIT = "local", "kit"  # this machine, and a board that is not connected


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One board of the inventory."""

    name: str
    address: Address
    target: str | None = None
    power_mode: str | None = None
    python: str = "python3"

    def open(self, say: Callable[[str], None] | None = None) -> Ssh:
        return Ssh(name=self.name, address=self.address, python=self.python, power_mode=self.power_mode, say=say)


def open_device(name: str, *, inventory: Path = INVENTORY, say: Callable[[str], None] | None = None) -> Device:
    """This machine, a name of the inventory, or ssh://user@host[:port]; nothing is connected yet. Raises RecipeError."""
    if name == LOCAL:
        return Local(say=say)
    if name.startswith("ssh:"):
        return Entry(name=name, address=Address.parse(name)).open(say)
    entries = load_inventory(inventory) if inventory.exists() else {}
    if name not in entries:
        raise RecipeError(_unknown_device(name, entries, inventory))
    return entries[name].open(say)


def load_inventory(path: Path = INVENTORY) -> dict[str, Entry]:
    """Every board of the file, by its name. Raises RecipeError that names the entry at fault, and what may be meant."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"{path} cannot be read: {why}. Write the boards' names and addresses there.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}. Mend that line.") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no boards. Write NAME: {{address: ssh://user@host}} for each.")
    return {str(name): _entry(str(name), values, path) for name, values in raw.items()}


def _entry(name: str, values: Any, path: Path) -> Entry:
    known = [field.name for field in fields(Entry) if field.name != "name"]
    if name in (LOCAL, KIT) or name.startswith("ssh:"):
        raise RecipeError(
            f"{path}: '{name}' means something else as the device of a recipe. Give the board another name."
        )
    if not isinstance(values, Mapping) or "address" not in values:
        raise RecipeError(f"{path}: '{name}' has no address. Write {name}: {{address: ssh://user@host}}.")
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{path}: unknown key '{name}.{key}'; {_meant(str(key), known)}")
        if not isinstance(value, str) or not value:
            raise RecipeError(f"{path}: {name}.{key}={value!r} is not a word. Put it in quotes.")
    target, python = values.get("target"), values.get("python", "python3")
    if target is not None and target not in TARGETS:
        raise RecipeError(f"{path}: {name}.target='{target}' does not exist; {_meant(target, list(TARGETS))}")
    if python.startswith("~"):
        raise RecipeError(f"{path}: {name}.python='{python}': no shell reads it there. Write the whole path: /home/...")
    address = Address.parse(values["address"])
    return Entry(name=name, address=address, target=target, power_mode=values.get("power_mode"), python=python)


def _unknown_device(name: str, entries: Mapping[str, Entry], inventory: Path) -> str:
    ways = f"{LOCAL}, {KIT} (a board that is not connected), ssh://user@host"
    if not entries:
        return f"device '{name}': there is no {inventory} that could name it. Known without one: {ways}."
    return f"device '{name}' does not stand in {inventory}; {_meant(name, list(entries))} Known without it: {ways}."


def _meant(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}."
