"""What a CPU can multiply with, read from /proc/cpuinfo."""

from __future__ import annotations

import pytest

from benchmarks.device.isa import instruction_set

ZEN4 = "processor\t: 0\nflags\t\t: sse4_2 avx avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t: none\n"
SAPPHIRE_RAPIDS = "flags\t\t: avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8\n"
HASWELL = "flags\t\t: sse4_2 avx avx2\n"
ALDER_LAKE = "flags\t\t: avx2 avx_vnni\n"
ORIN = "processor\t: 0\nFeatures\t: fp asimd aes asimdhp asimddp\nCPU part\t: 0xd42\n"
PI_4 = "Features\t: fp asimd crc32\n"


@pytest.mark.parametrize(
    ("cpuinfo", "int8", "bf16", "vector"),
    [
        (ZEN4, "AVX-512 VNNI", "AVX-512 BF16", "AVX-512"),
        (SAPPHIRE_RAPIDS, "AMX", "AMX", "AVX-512"),
        (HASWELL, "", "", "AVX2"),
        (ALDER_LAKE, "AVX-VNNI", "", "AVX2"),
        (ORIN, "dot product", "", "NEON"),
        (PI_4, "", "", "NEON"),
    ],
)
def test_the_best_instructions_are_named(cpuinfo: str, int8: str, bf16: str, vector: str) -> None:
    found = instruction_set(cpuinfo)

    assert (found.int8, found.bf16) == (int8, bf16)
    assert found.words.startswith(vector)


def test_a_cpu_without_vnni_is_told_what_that_means_for_int8() -> None:
    assert "saturates" in instruction_set(HASWELL).words
    assert "saturates" not in instruction_set(ZEN4).words


@pytest.mark.parametrize("cpuinfo", ["", "vendor_id : x\n"])
def test_an_unreadable_instruction_set_is_null_and_not_none_of_them(cpuinfo: str) -> None:
    found = instruction_set(cpuinfo)

    assert (found.int8, found.bf16) == (None, None)
    assert "not readable" in found.words
