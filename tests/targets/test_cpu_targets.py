from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from targets import TARGETS, make_target
from targets.base import CompiledModel, Exported
from targets.errors import IntegrityError, TargetError

CONV_MACS = 8 * 8 * 8 * 3 * 3 * 3
HEAD_MACS = 8 * 5
MakeExported = Callable[..., Exported]
each_target = pytest.mark.parametrize("name", sorted(name for name in TARGETS if name.endswith("-cpu")))


@each_target
@pytest.mark.parametrize("batch", [1, 4])
def test_a_float_model_gives_the_numbers_of_plain_numpy(
    name: str, batch: int, make_exported: MakeExported, pixels: Any, expected_logits: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    compiled = target.compile(make_exported(), tmp_path / "c", "fp32")

    logits = target.load(compiled, batch=batch).run({"image": pixels[:batch]})["logits"]

    np.testing.assert_allclose(logits, expected_logits[:batch], atol=1e-4)


@each_target
def test_a_quantized_model_stays_within_its_quantization_steps(
    name: str,
    make_exported: MakeExported,
    pixels: Any,
    expected_logits: Any,
    exact_int8: Callable[[Path, str], bool],
    tmp_path: Path,
) -> None:
    target, exported = make_target(name, {}), make_exported(quantized=True)
    compiled = target.compile(exported, tmp_path / "c", "int8")

    logits = target.load(compiled, batch=4).run({"image": pixels})["logits"]

    # Two roundings of half a step each (0.02 / 2) reach the head, whose rows sum to at most 8 * 1.27.
    if exact_int8(exported.model_path, target.dialect):
        np.testing.assert_allclose(logits, expected_logits, atol=2 * 0.01 * 8 * 1.27 + 0.01)
    assert not np.array_equal(logits, expected_logits.astype(np.float32))


@each_target
def test_the_result_is_a_view_that_the_next_run_overwrites(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {})
    session = target.load(target.compile(make_exported(), tmp_path / "c", "fp32"))

    first = session.run({"image": pixels[:1]})["logits"]
    kept = first.copy()
    second = session.run({"image": pixels[1:2]})["logits"]

    assert np.shares_memory(first, second)
    assert not np.array_equal(kept, second)


@each_target
def test_placement_counts_every_product_and_says_how_it_ran(
    name: str, make_exported: MakeExported, tmp_path: Path
) -> None:
    target = make_target(name, {})
    placement = target.placement(target.compile(make_exported(quantized=True), tmp_path / "c", "int8"))

    by_macs = {layer.macs: layer.precision for layer in placement.layers}

    assert by_macs.keys() == {CONV_MACS, HEAD_MACS}
    assert by_macs[CONV_MACS] == "int8"
    assert placement.int8_share >= CONV_MACS / (CONV_MACS + HEAD_MACS)


@each_target
def test_a_float_model_has_no_int8_share(name: str, make_exported: MakeExported, tmp_path: Path) -> None:
    target = make_target(name, {})
    placement = target.placement(target.compile(make_exported(), tmp_path / "c", "fp32"))

    assert placement.int8_share == 0.0
    assert {layer.precision for layer in placement.layers} == {"fp32"}


def test_bf16_runs_the_products_in_bf16_where_the_cpu_offers_it(make_exported: MakeExported, tmp_path: Path) -> None:
    target = make_target("openvino-cpu", {})
    if "bf16" in target.float_precisions():
        placement = target.placement(target.compile(make_exported(), tmp_path / "c", "bf16"))
        assert "bf16" in {layer.precision for layer in placement.layers}
    else:
        with pytest.raises(TargetError, match="precision 'bf16'"):
            target.compile(make_exported(), tmp_path / "c", "bf16")


@each_target
def test_a_compiled_model_survives_the_way_over_json(
    name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path
) -> None:
    target = make_target(name, {"num_threads": 2})
    compiled = target.compile(make_exported(quantized=True), tmp_path / "c", "int8")
    again = CompiledModel.load(tmp_path / "c")

    assert again == compiled
    assert again.options["num_threads"] == 2
    here, there = (target.load(c).run({"image": pixels[:1]})["logits"].copy() for c in (compiled, again))
    np.testing.assert_array_equal(here, there)


@each_target
def test_a_flipped_byte_in_the_compiled_model_is_noticed(
    name: str, make_exported: MakeExported, tmp_path: Path
) -> None:
    compiled = make_target(name, {}).compile(make_exported(), tmp_path / "c", "fp32")
    path = tmp_path / "c" / next(iter(compiled.files))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(IntegrityError, match=path.name):
        CompiledModel.load(tmp_path / "c")


@each_target
@pytest.mark.parametrize(("quantized", "precision"), [(False, "int8"), (True, "fp32"), (False, "fp8")])
def test_a_precision_that_the_graph_does_not_have_is_refused(
    name: str, quantized: bool, precision: str, make_exported: MakeExported, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=f"precision '{precision}'"):
        make_target(name, {}).compile(make_exported(quantized=quantized), tmp_path / "c", precision)


@each_target
def test_a_fixed_batch_is_kept(name: str, make_exported: MakeExported, pixels: Any, tmp_path: Path) -> None:
    target = make_target(name, {})
    compiled = target.compile(make_exported(batch=2), tmp_path / "c", "fp32")

    assert target.load(compiled, batch=2).run({"image": pixels[:2]})["logits"].shape == (2, 5)
    with pytest.raises(TargetError, match="fixed shape"):
        target.load(compiled, batch=1)


@each_target
@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"image": np.zeros((2, 3, 8, 8), np.uint8)},
        {"image": np.zeros((1, 3, 8, 8), np.float32)},
        {"image": np.zeros((3, 8, 8), np.uint8)},
    ],
)
def test_an_input_that_does_not_fit_is_never_cast_or_broadcast(
    name: str, batch: dict[str, Any], make_exported: MakeExported, tmp_path: Path
) -> None:
    target = make_target(name, {})
    session = target.load(target.compile(make_exported(), tmp_path / "c", "fp32"))

    with pytest.raises(TargetError, match="input 'image' got"):
        session.run(batch)


@each_target
def test_an_operator_that_the_runtime_lacks_is_refused_in_three_lines(
    name: str, make_exported: MakeExported, tmp_path: Path
) -> None:
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["image"], ["logits"], domain="nobody")],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)]
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)

    with pytest.raises(TargetError) as refusal:
        make_target(name, {}).compile(make_exported(proto=proto), tmp_path / "c", "fp32")

    assert len(str(refusal.value).splitlines()) <= 3
    assert not (tmp_path / "c" / "compiled.json").exists()
