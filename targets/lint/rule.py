"""What a rule is, what it finds, and the machine and runtime that a graph is judged for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from targets.lint.graph import Graph, Node, title_of

Severity = Literal["error", "warning", "info"]
Evidence = Literal["tried", "read", "-"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
CPUINFO = Path("/proc/cpuinfo")
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8"})
X86 = frozenset({"x86_64", "amd64", "i386", "i686"})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place in the graph: a stable code, its weight, the node, what is wrong there, and what to do about it."""

    code: str
    severity: Severity
    node: str
    message: str
    advice: str


def has_vnni(cpuinfo: Path = CPUINFO) -> bool | None:
    """Whether this CPU adds u8*s8 products in 32 bits at once; None where the kernel does not say."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")]
    return bool(VNNI_FLAGS.intersection(flags[0])) if flags else None


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where the graph will run. The defaults are this machine, and the oldest TensorRT that is supported (JetPack 6)."""

    machine: str = field(default_factory=platform.machine)
    vnni: bool | None = field(default_factory=has_vnni)
    tensorrt: tuple[int, int] = (10, 3)

    @property
    def x86(self) -> bool:
        return self.machine.lower() in X86

    @property
    def saturates(self) -> bool:
        """True where two u8*s8 products are added in 16 bits."""
        return self.x86 and self.vnni is False


@dataclass(frozen=True)
class Found:
    """What a rule saw at a node. severity and advice stand in for the rule's own where the case differs."""

    node: Node | str
    message: str
    severity: Severity | None = None
    advice: str | None = None


Find = Callable[[Graph, Platform], Iterator[Found]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A stable code with the worst severity that it can have, what is wrong in general, and what to do.

    evidence: `tried` where a test runs a graph with and one without the fault on the runtime, `read` where it is known
    from the runtime's sources or documents only, `-` where there is nothing to prove.
    """

    code: str
    severity: Severity
    find: Find
    title: str
    advice: str
    evidence: Evidence

    def findings(self, graph: Graph, platform: Platform) -> Iterator[Finding]:
        for found in self.find(graph, platform):
            yield Finding(
                code=self.code,
                severity=found.severity or self.severity,
                node=found.node if isinstance(found.node, str) else title_of(found.node),
                message=found.message,
                advice=found.advice or self.advice,
            )
