from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from targets import TARGETS, make_target
from targets.base import Target
from targets.errors import RecipeError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs


@pytest.mark.parametrize("name", sorted(name for name in TARGETS if name.endswith("-cpu")))
def test_every_target_keeps_the_contract_and_its_options(name: str) -> None:
    target = make_target(name, {"num_threads": 3})

    assert isinstance(target, Target)
    assert target.name == name
    assert vars(target)["num_threads"] == 3
    assert target.missing() is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("openvino-cp", {}, "Did you mean 'openvino-cpu'"),
        ("zzz", {}, "Known: openvino-cpu, onnxruntime-cpu"),
        ("openvino-cpu", {"num_thread": 1}, "Did you mean 'num_threads'"),
        ("openvino-cpu", {"name": "x"}, "option 'name'"),
        ("openvino-cpu", {"num_threads": "2"}, "must be int"),
        ("openvino-cpu", {"num_threads": True}, "must be int"),
        ("openvino-cpu", {"num_threads": 0}, "1 or more"),
        ("onnxruntime-cpu", {"allow_spinning": 1}, "must be bool"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_advice(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_target(name, options)


def test_the_registry_imports_no_vendor_runtime() -> None:
    code = (
        "import sys, targets; targets.make_target('openvino-cpu', {}); "
        "print([m for m in ('openvino', 'onnxruntime', 'onnx', 'torch', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


sizes = st.integers(1, 3)


@settings(deadline=None, max_examples=25)
@given(groups=sizes, inputs=sizes, outputs=sizes, kernel=sizes, side=st.integers(3, 6), batch=sizes)
def test_convolution_macs_equal_a_count_by_ones(
    groups: int, inputs: int, outputs: int, kernel: int, side: int, batch: int
) -> None:
    """Without padding, each output of an all-ones convolution is the number of products that it took."""
    weight = torch.ones(groups * outputs, inputs, kernel, kernel)
    y = torch.nn.functional.conv2d(torch.ones(batch, groups * inputs, side, side), weight, groups=groups)

    assert convolution_macs(tuple(y.shape), tuple(weight.shape), weight.shape[0]) == int(y.sum())


@settings(deadline=None, max_examples=25)
@given(inputs=sizes, outputs=sizes, kernel=sizes, side=st.integers(1, 4))
def test_transposed_convolution_macs_equal_a_count_by_ones(inputs: int, outputs: int, kernel: int, side: int) -> None:
    x, weight = torch.ones(1, inputs, side, side), torch.ones(inputs, outputs, kernel, kernel)
    y = torch.nn.functional.conv_transpose2d(x, weight)

    assert transposed_convolution_macs(tuple(x.shape), tuple(weight.shape), inputs) == int(y.sum())


@given(m=sizes, k=sizes, n=sizes)
def test_matmul_macs_equal_a_count_by_ones(m: int, k: int, n: int) -> None:
    y = torch.ones(m, k) @ torch.ones(k, n)

    assert matmul_macs(tuple(y.shape), k) == int(y.sum())
