"""What a CPU can multiply with, in words: whether INT8 can be faster than float at all is decided here.

Reads the text of /proc/cpuinfo. Flags as the kernel writes them: `flags` on x86, `Features` on ARM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The first that a CPU has is what a runtime takes; AMX is a unit of its own beside the vectors.
X86_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2"}
X86_INT8 = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI"}
X86_BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
ARM_VECTORS = {"sve2": "SVE2", "sve": "SVE", "asimd": "NEON", "neon": "NEON"}
ARM_INT8 = {"i8mm": "I8MM", "asimddp": "dot product"}
ARM_BF16 = {"bf16": "BF16"}


@dataclass(frozen=True)
class InstructionSet:
    """`int8` and `bf16` name the instructions that multiply them, "" for none, None where the kernel tells no flags."""

    words: str
    int8: str | None
    bf16: str | None


def instruction_set(cpuinfo: str) -> InstructionSet:
    """The instruction set of the first CPU that `cpuinfo` describes."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields = {name.strip().lower(): value.split() for name, _, value in reversed(list(lines))}
    if "flags" in fields:
        return _described(frozenset(fields["flags"]), X86_VECTORS, X86_INT8, X86_BF16, without=_WITHOUT_VNNI)
    if "features" in fields:
        return _described(frozenset(fields["features"]), ARM_VECTORS, ARM_INT8, ARM_BF16, without=_WITHOUT_DOT)
    return InstructionSet("the instruction set is not readable", None, None)


# vpmaddubsw adds two products of u8 and s8 into 16 bits.
_WITHOUT_VNNI = "no VNNI: INT8 products are added in 16 bits, which saturates with 8-bit weights and gains little speed"
_WITHOUT_DOT = "no dot product: INT8 products are widened first, which gains little speed"


def _described(
    flags: frozenset[str],
    vectors: Mapping[str, str],
    int8: Mapping[str, str],
    bf16: Mapping[str, str],
    *,
    without: str,
) -> InstructionSet:
    vector, by_int8, by_bf16 = (_first(names, flags) for names in (vectors, int8, bf16))
    words = [
        vector or "no vector instructions",
        f"INT8 by {by_int8}" if by_int8 else without,
        f"BF16 by {by_bf16}" if by_bf16 else "no BF16",
    ]
    return InstructionSet("; ".join(words), by_int8, by_bf16)


def _first(names: Mapping[str, str], flags: frozenset[str]) -> str:
    return next((name for flag, name in names.items() if flag in flags), "")
