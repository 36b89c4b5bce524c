"""What tells one row of the comparison from another, and how both rows and configurations are called.

A configuration is everything but the model: scores compare configurations over the models that they share. Only what
differs between the rows at hand stands in a name: on one machine nobody wants to read its CPU two hundred times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.device.record import Record

# Fields that mean something only within another one: the version of a runtime, the input of a model, the CPUs of a device.
WITHIN = {"shape": "model", "version": "runtime", "options": "runtime", "num_cpus": "device"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What runs a model; `options` are the runtime's flags beyond the threads, as text, `num_cpus` those it was let to use."""

    runtime: str
    precision: str
    threads: int | None
    device: str
    num_cpus: int | None
    power_mode: str | None
    version: str
    options: str
    batch: int
    taken: str = "alone"  # or in turns: a partner's work leaves the caches colder than a model alone finds them

    def label(self, varying: frozenset[str]) -> str:
        return ", ".join([f"{self.runtime} {self.precision}", *_parts(self, varying)])


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model under a configuration; `shape` is that of its inputs without the batch."""

    model: str
    shape: str
    configuration: Configuration

    def model_label(self, varying: frozenset[str]) -> str:
        return f"{self.model} {self.shape}" if "shape" in varying else self.model

    def label(self, varying: frozenset[str]) -> str:
        configuration = self.configuration
        head = f"{self.model_label(varying)} {configuration.precision} on {configuration.runtime}"
        return ", ".join([head, *_parts(configuration, varying)])

    def fields(self) -> dict[str, Any]:
        """All fields by name, those of the configuration among them."""
        return {"model": self.model, "shape": self.shape, **vars_of(self.configuration)}


def vars_of(configuration: Configuration) -> dict[str, Any]:
    return {name: getattr(configuration, name) for name in configuration.__dataclass_fields__}


def identity_of(record: Record) -> Identity:
    """`student-int8` at int8 and `student` at fp32 are one model: the ending that names the precision is dropped."""
    precision, hard = record.model.precision, record.env.hard
    threads = record.runtime.flags.get("num_threads")
    return Identity(
        model=record.model.name.removesuffix(f"-{precision}"),
        shape=" + ".join(_shape(one) for one in record.model.inputs),
        configuration=Configuration(
            runtime=record.runtime.name,
            precision=precision,
            threads=threads if isinstance(threads, int) else None,
            device=device_of(hard),
            num_cpus=_num_cpus(hard),
            power_mode=power_mode_of(hard),
            version=record.runtime.version,
            options=_options(record.runtime.flags),
            batch=record.scenario.batch,
            taken="in turns" if hard.get("turns") else "alone",
        ),
    )


def device_of(hard: Mapping[str, Any]) -> str:
    """GPU, and module or CPU; the architecture where nothing has a name."""
    names = [hard.get("gpu"), hard.get("soc") or hard.get("cpu") or hard.get("arch")]
    return ", ".join(str(name) for name in names if name) or "unknown device"


def power_mode_of(hard: Mapping[str, Any]) -> str | None:
    """A Jetson's power mode and the clocks' governor; None where neither is readable."""
    governor = hard.get("governor")
    names = [hard.get("power_mode"), f"governor {governor}" if governor else None]
    return ", ".join(str(name) for name in names if name) or None


def varying(identities: Iterable[Identity]) -> frozenset[str]:
    """Names of the fields in which rows differ: `version` only where one runtime has several, `shape` where one model has."""
    rows = [identity.fields() for identity in identities]
    found = set()
    for name in rows[0] if rows else ():
        outer = WITHIN.get(name)
        seen: dict[Any, set[Any]] = {}
        for row in rows:
            seen.setdefault(row[outer] if outer else None, set()).add(row[name])
        if any(len(values) > 1 for values in seen.values()):
            found.add(name)
    return frozenset(found)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _parts(configuration: Configuration, varying: frozenset[str]) -> list[str]:
    """What a name holds beyond model, precision and runtime."""
    threads = configuration.threads
    parts = {
        "threads": counted(threads, "thread") if threads is not None else None,
        "device": configuration.device,
        "num_cpus": counted(configuration.num_cpus, "CPU") if configuration.num_cpus is not None else None,
        "power_mode": configuration.power_mode,
        "version": configuration.version,
        "options": configuration.options or "no options",
        "batch": f"batch {configuration.batch}",
        "taken": configuration.taken,
    }
    return [text for name, text in parts.items() if name in varying and text]


def _shape(tensor: Mapping[str, Any]) -> str:
    """Without the batch: 3×224×224; ? for an axis that the graph leaves free."""
    shape = tensor.get("shape")
    if not isinstance(shape, (list, tuple)):
        return str(tensor.get("name", "input"))
    return "×".join("?" if size is None else str(size) for size in shape[1:]) or "scalar"


def _num_cpus(hard: Mapping[str, Any]) -> int | None:
    allowed = hard.get("cpus_allowed")
    return len(allowed) if isinstance(allowed, list) and allowed else None


def _options(flags: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(flags.items()) if name != "num_threads")
