"""What the ExecuTorch target says of itself, how it reads a trace, and what it refuses: nothing here is compiled or run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from targets import executorch as module
from targets import make_target
from targets.base import CompiledModel, Exported, TensorSpec
from targets.errors import TargetError
from targets.executorch import ExecuTorch, check_answers
from targets.executorch_inspector import Instruction, Product, placements, read_program


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ({"executorch"}, "pip install 'executorch>=1.5.1,<1.6'"),
        ({"executorch", "torch"}, "pip install 'executorch>=1.5.1,<1.6' torch"),
        (set(), None),
    ],
)
def test_missing_names_the_pip_command(absent: set[str], command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in absent else object())

    assert ExecuTorch().missing() == command


def test_on_a_board_without_torch_or_onnx_the_compile_sends_to_the_host(
    make_exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnx" else object())

    with pytest.raises(TargetError, match="made on the host, with torch, onnx and onnxruntime, and onnx is not"):
        ExecuTorch().compile(make_exported(), tmp_path / "c", "fp32")


def test_float16_is_offered_where_the_cpu_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, offered in (
        ("processor : 0\nflags\t\t: fpu avx2 f16c fma\n", ("fp32", "fp16")),
        ("flags : fpu sse4_2\n", ("fp32",)),
        ("Features\t: fp asimd asimdhp\n", ("fp32", "fp16")),
        ("Features : fp asimd\n", ("fp32",)),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
        assert ExecuTorch().float_precisions() == offered
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "absent")
    assert ExecuTorch().float_precisions() == ("fp32",)


def test_the_target_is_registered_with_its_option() -> None:
    target = make_target("executorch", {"num_threads": 3})

    assert (target.name, target.scheme, target.dialect) == ("executorch", "cpu-int8", "executorch")
    assert vars(target)["num_threads"] == 3


def test_the_module_imports_neither_torch_nor_executorch() -> None:
    code = "import sys, targets.executorch; print([m for m in ('torch', 'onnx', 'executorch') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def event(text: str, index: int = 0) -> dict[str, Any]:
    return {"delegate_debug_id_str": text, "instruction_id": index, "chain_index": 0, "start_time": 0, "end_time": 5000}


def test_a_one_by_one_convolution_may_run_as_a_matrix_product() -> None:
    program = [Instruction("", (Product(("Convolution", "Fully Connected"), 7),))]

    (layer,) = placements(program, [event("Fully Connected (NC, QS8, QC8W) GEMM #1")], "small")

    assert (layer.op, layer.precision, layer.macs) == ("Fully Connected", "int8", 7)


@pytest.mark.parametrize(
    ("ran", "words"),
    [
        ([], "a Convolution of the file did not run"),
        (["Convolution (NHWC, F32) IGEMM #1", "Convolution (NHWC, F32) IGEMM #2"], "which the file does not hold"),
        (["Deconvolution (NHWC, F32) #1"], "which the file does not hold"),
    ],
)
def test_a_product_that_only_the_file_or_only_the_run_knows_is_no_zero(ran: list[str], words: str) -> None:
    program = [Instruction("", (Product(("Convolution",), 7),))]

    with pytest.raises(TargetError, match=words):
        list(placements(program, [event(text) for text in ran], "small"))


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Convolution (NHWC, QC8) IGEMM #1", "int8"),
        ("Fully Connected (NC, QD8, F32, QC8W) GEMM #3", "int8"),
        ("Convolution (NHWC, F16) DWConv #1", "fp16"),
        ("Fully Connected (NC, F32, QC4W) GEMM #1", "fp32"),
        ("Convolution (NHWC, Z99) #1", "unknown"),
    ],
)
def test_the_precision_is_that_of_the_type_which_comes_in(text: str, precision: str) -> None:
    program = [Instruction("", (Product(("Convolution", "Fully Connected"), 1),))]

    assert [layer.precision for layer in placements(program, [event(text)], "small")] == [precision]


def test_bytes_that_are_no_program_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(TargetError, match="no ExecuTorch program"):
        read_program(b"PK\x03\x04 something else")


def answering(*values: float) -> dict[str, Any]:
    return {"logits": np.array([values], np.float32)}


@pytest.mark.parametrize(
    ("precision", "delta", "passes"),
    [
        ("int8", 0.1, True),
        ("int8", 1.0, False),
        ("fp32", 1e-4, True),
        ("fp32", 0.1, False),
        ("fp16", float("nan"), False),
    ],
)
def test_a_program_that_answers_otherwise_than_its_graph_is_refused(precision: str, delta: float, passes: bool) -> None:
    compiled = CompiledModel(
        name="small",
        target="executorch",
        options={},
        precision=precision,
        files={},
        inputs=(),
        outputs=(TensorSpec(name="logits", shape=(1, 3), dtype="float32"),),
        toolchain="",
        built_for={},
    )
    expected = [np.array([[1.0, 2.0, 3.0]], np.float32)]

    if passes:
        check_answers(compiled, answering(1 + delta, 2, 3), expected)
        return
    with pytest.raises(TargetError, match="answers otherwise than the graph: output 'logits'"):
        check_answers(compiled, answering(1 + delta, 2, 3), expected)
