"""Layers go back to float: which, by whom they are chosen, and what is then left of their quantizers."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pipeline.graphs.dialects import apply_dialect
from pipeline.graphs.mixed_precision import Layer, choose, in_float, quantized_layers, sensitivities
from pipeline.learning.fake_quantize import (
    insert_fake_quantizers,
    load_quantized,
    pin_kernels,
    quantize_graph,
    save_quantized,
    strip_fake_quantizers,
)
from pipeline.learning.mixed_precision import find_layers
from pipeline.learning.mixed_precision import in_float as torch_in_float
from pipeline.learning.mixed_precision import sensitivities as torch_sensitivities
from pipeline.learning.models import Normalized
from pipeline.stages.export import export_quantized
from targets.errors import ModelError

pytestmark = pytest.mark.integration

node = helper.make_node


# --- the choice --------------------------------------------------------------------------------------------------------


class Gate:
    """Passes where the gains of what is in float reach `needed`; remembers what it was asked."""

    def __init__(self, layers: list[Layer], needed: float) -> None:
        self.gains = {layer.name: layer.gain for layer in layers}
        self.needed = needed
        self.asked: list[frozenset[str]] = []

    def __call__(self, names: frozenset[str]) -> bool:
        self.asked.append(names)
        return sum(self.gains[name] for name in names) >= self.needed


def layers_of(sizes: list[tuple[int, float]]) -> list[Layer]:
    return [Layer(name=f"layer{i}", macs=macs, gain=gain) for i, (macs, gain) in enumerate(sizes)]


SIZES = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), min_size=2, max_size=12)


@settings(max_examples=200)
@given(sizes=SIZES, share=st.floats(0.01, 1))
def test_what_is_chosen_passes_and_no_layer_of_it_can_be_spared(sizes: list[tuple[int, float]], share: float) -> None:
    layers = layers_of(sizes)
    gate = Gate(layers, share * sum(layer.gain for layer in layers))

    chosen = choose(layers, gate)

    ordered = sorted(layers, key=lambda layer: (-layer.gain / layer.macs, layer.name))
    prefixes = [frozenset(layer.name for layer in ordered[:n]) for n in range(1, len(layers))]
    if chosen is None:
        assert not gate(prefixes[-1])
        return
    assert gate(frozenset(chosen))
    assert all(not gate(frozenset(chosen) - {name}) for name in chosen if len(chosen) > 1)
    macs = {layer.name: layer.macs for layer in layers}
    shortest = next(prefix for prefix in prefixes if gate(prefix))
    assert sum(macs[name] for name in chosen) <= sum(macs[name] for name in shortest)


def test_the_gate_is_asked_about_a_logarithm_of_the_layers_and_about_each_chosen_one() -> None:
    layers = layers_of([(1, float(gain)) for gain in range(64, 0, -1)])
    gate = Gate(layers, 64 + 63 + 62)

    assert choose(layers, gate) == ("layer0", "layer1", "layer2")
    assert len(gate.asked) <= 1 + 6 + 3


def test_gain_is_weighed_against_the_work_that_it_costs() -> None:
    dear, cheap, useless = layers_of([(1000, 0.5), (10, 0.4), (1, -0.1)])

    assert choose([dear, cheap, useless], lambda names: bool(names & {"layer0", "layer1"})) == ("layer1",)


def test_one_layer_has_to_stay_in_int8() -> None:
    layers = layers_of([(1, 1.0), (1, 1.0)])

    assert choose(layers, lambda names: len(names) == 2) is None
    assert choose(layers[:1], lambda names: True) is None
    assert choose([], lambda names: True) is None


# --- ONNX --------------------------------------------------------------------------------------------------------------


def float_proto(outputs: tuple[str, ...] = ("logits",)) -> onnx.ModelProto:
    """stem -> Relu -> (one -> Relu -> two) + identity -> Relu -> MaxPool -> Flatten -> head, and a bare ConvTranspose."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (4, 3, 3, 3), "one": (4, 4, 3, 3), "two": (4, 4, 1, 1), "head": (5, 64), "up": (4, 2, 2, 2)}
    constants = {f"{name}_w": rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    constants |= {f"{name}_b": rng.normal(size=5 if name == "head" else 4) for name in ("stem", "one", "two", "head")}
    nodes = [
        node("Conv", ["x", "stem_w", "stem_b"], ["s"], name="stem", pads=[1] * 4),
        node("Relu", ["s"], ["a"], name="relu0"),
        node("Conv", ["a", "one_w", "one_b"], ["b"], name="one", pads=[1] * 4),
        node("Relu", ["b"], ["c"], name="relu1"),
        node("Conv", ["c", "two_w", "two_b"], ["d"], name="two"),
        node("Add", ["d", "a"], ["e"], name="add"),
        node("Relu", ["e"], ["f"], name="relu2"),
        node("MaxPool", ["f"], ["g"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["g"], ["h"], name="flatten"),
        node("Gemm", ["h", "head_w", "head_b"], ["logits"], name="head", transB=1),
        node("ConvTranspose", ["f", "up_w"], ["map"], name="up", strides=[2, 2]),
    ]
    shape: dict[str, list[Any]] = {"logits": ["N", 5], "map": ["N", 2, 16, 16]}
    graph = helper.make_graph(
        nodes if "map" in outputs else nodes[:-1],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape[name]) for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


SAMPLES = [{"x": x} for x in np.random.default_rng(1).normal(size=(8, 1, 3, 8, 8)).astype(np.float32)]
ALL = ("stem", "one", "two", "head")


@pytest.fixture(scope="module")
def float_model() -> ir.Model:
    return ir.from_proto(float_proto())


@pytest.fixture(scope="module")
def quantized() -> ir.Model:
    return ir.from_proto(quantize_graph(float_proto(), SAMPLES))


def run(model: ir.Model, optimized: bool = False) -> list[Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(None, sample)[0] for sample in SAMPLES]


def quantized_tensors(model: ir.Model) -> set[str]:
    return {str(n.inputs[0].name) for n in model.graph if n.op_type == "QuantizeLinear"}


def reads(model: ir.Model, name: str) -> str:
    """What kind of node gives the layer its input: "" for the graph's own input."""
    layer = next(n for n in model.graph if n.name == name)
    producer = layer.inputs[0].producer()
    return "" if producer is None else str(producer.op_type)


def test_the_quantized_layers_are_found_in_order(quantized: ir.Model) -> None:
    assert [n.name for n in quantized_layers(quantized)] == list(ALL)


def test_all_layers_in_float_leave_nothing_quantized_but_the_addition(
    float_model: ir.Model, quantized: ir.Model
) -> None:
    mixed = in_float(quantized, float_model, ALL)

    assert quantized_layers(mixed) == []
    assert quantized_tensors(mixed) == {"a", "d"}  # both inputs of the addition


def test_a_layer_in_float_reads_and_writes_float_and_others_keep_their_quantizers(
    float_model: ir.Model, quantized: ir.Model
) -> None:
    mixed = in_float(quantized, float_model, ["one"])

    assert [n.name for n in quantized_layers(mixed)] == ["stem", "two", "head"]
    assert quantized_tensors(mixed) == quantized_tensors(quantized)  # the addition reads a, two reads c
    assert reads(mixed, "one") == "Relu"
    assert reads(quantized, "one") == "DequantizeLinear"


def test_a_quantizer_goes_when_only_layers_in_float_read_it(float_model: ir.Model, quantized: ir.Model) -> None:
    both = in_float(quantized, float_model, ["one", "two"])
    last = in_float(quantized, float_model, ["head"])

    assert quantized_tensors(quantized) - quantized_tensors(both) == {"c"}
    assert quantized_tensors(quantized) - quantized_tensors(last) == {"f"}  # behind a MaxPool and a Flatten


def test_a_layer_in_float_has_its_original_weight_and_bias(float_model: ir.Model, quantized: ir.Model) -> None:
    mixed = in_float(quantized, float_model, ["stem", "head"])

    for name in ("stem", "head"):
        layer = next(n for n in mixed.graph if n.name == name)
        original = next(n for n in float_model.graph if n.name == name)
        for position in (1, 2):
            np.testing.assert_array_equal(
                layer.inputs[position].const_value.numpy(), original.inputs[position].const_value.numpy()
            )


def test_the_first_layer_in_float_answers_as_the_float_graph_up_to_there(
    float_model: ir.Model, quantized: ir.Model
) -> None:
    def with_stem(model: ir.Model) -> ir.Model:
        return ir.from_proto(onnx.utils.Extractor(ir.to_proto(model)).extract_model(["x"], ["s"]))

    expected = run(with_stem(float_model))

    got = run(with_stem(in_float(quantized, float_model, ["stem"])))

    np.testing.assert_array_equal(got, expected)


def test_the_graph_that_is_given_is_left_as_it_was(float_model: ir.Model, quantized: ir.Model) -> None:
    before = ir.to_proto(quantized).SerializeToString(deterministic=True)

    in_float(quantized, float_model, ALL)

    assert ir.to_proto(quantized).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("names", [["stem"], ["one", "head"], ["two"]])
def test_a_dialect_keeps_what_a_mixed_graph_computes(
    float_model: ir.Model, quantized: ir.Model, names: list[str], dialect: str
) -> None:
    mixed = in_float(quantized, float_model, names)
    expected = run(mixed)

    apply_dialect(mixed, dialect)

    np.testing.assert_allclose(run(mixed), expected, atol=0.03)  # integer biases round


@pytest.mark.parametrize("name", ["relu0", "absent"])
def test_a_name_that_is_no_quantized_layer_is_refused(float_model: ir.Model, quantized: ir.Model, name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is no layer of the quantized graph.*stem, one, two, head"):
        in_float(quantized, float_model, [name])


def with_bad_layer(names: Collection[str]) -> ir.Model:
    """The quantized graph with the weights of some layers far off."""
    proto = quantize_graph(float_proto(), SAMPLES)
    model = ir.from_proto(proto)
    for layer in quantized_layers(model):
        if layer.name in names:
            integers = layer.inputs[1].producer().inputs[0]
            integers.const_value = ir.tensor(integers.const_value.numpy() // 64 * 64, name=integers.name)
    return model


@pytest.mark.parametrize("bad", ALL)
def test_the_layer_that_costs_most_gains_most(float_model: ir.Model, bad: str) -> None:
    layers = sensitivities(float_model, with_bad_layer([bad]), SAMPLES)

    assert max(layers, key=lambda layer: layer.gain).name == bad
    assert [layer.name for layer in layers] == list(ALL)


def test_macs_are_those_of_one_sample(float_model: ir.Model, quantized: ir.Model) -> None:
    layers = sensitivities(float_model, quantized, SAMPLES[:1])

    assert {layer.name: layer.macs for layer in layers} == {
        "stem": 64 * 4 * 27,
        "one": 64 * 4 * 36,
        "two": 64 * 4 * 4,
        "head": 5 * 64,
    }


def test_the_gain_is_the_fall_of_the_divergence_from_the_float_answers(
    float_model: ir.Model, quantized: ir.Model
) -> None:
    def divergence(model: ir.Model) -> float:
        log_p, log_q = (torch.tensor(np.concatenate(run(m))).double().log_softmax(1) for m in (float_model, model))
        return float(torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))

    stem = sensitivities(float_model, quantized, SAMPLES)[0]

    freed = divergence(in_float(quantized, float_model, ["stem"]))
    assert stem.gain == pytest.approx(divergence(quantized) - freed, rel=1e-9)


def test_several_outputs_are_compared_by_relative_squared_error() -> None:
    proto = float_proto(("logits", "map"))
    model, quantized = ir.from_proto(proto), ir.from_proto(quantize_graph(proto, SAMPLES))

    layers = sensitivities(model, quantized, SAMPLES)

    assert [layer.name for layer in layers] == [*ALL, "up"]
    assert layers[-1].macs == 64 * 4 * 2 * 4
    assert layers[0].gain > 0


def test_without_samples_nothing_is_measured(float_model: ir.Model, quantized: ir.Model) -> None:
    with pytest.raises(ModelError, match="no samples"):
        sensitivities(float_model, quantized, [])


# --- torch -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The same net as the graph above, without the transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.two, self.head = nn.Conv2d(4, 4, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.one(x))) + x)
        logits_NK: Tensor = self.head(torch.max_pool2d(x, 2).flatten(1))
        return logits_NK


EXAMPLE = torch.zeros(1, 3, 8, 8)
NAMES = {name: f"{name}/{'linear' if name == 'head' else 'conv2d'}/0" for name in ALL}


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def fake(net: nn.Module, batches: list[Tensor]) -> nn.Module:
    pin_kernels("torch")
    return insert_fake_quantizers(net, batches, EXAMPLE)


def hooks_of(model: nn.Module) -> set[str]:
    names = (re.fullmatch(r"__nncf_hooks\.((?:pre|post)_hooks\..+)\.0", name) for name, _ in model.named_modules())
    return {match[1] for match in names if match}


def freed(fake: nn.Module, *names: str, original: nn.Module | None = None) -> nn.Module:
    found = find_layers(fake, EXAMPLE)
    return torch_in_float(fake, found, [NAMES[name] for name in names], original)


def test_layers_of_a_module_are_found_in_order_with_their_macs(fake: nn.Module) -> None:
    found = find_layers(fake, EXAMPLE)

    assert dict(found.macs) == {
        NAMES["stem"]: 64 * 4 * 27,
        NAMES["one"]: 64 * 4 * 36,
        NAMES["two"]: 64 * 4 * 4,
        NAMES["head"]: 5 * 64,
    }
    assert list(found.macs) == [NAMES[name] for name in ALL]


@pytest.mark.parametrize(
    ("names", "gone"),
    [
        (["stem"], {"pre_hooks.stem/conv2d/0__1", "post_hooks.x__0"}),
        (["one"], {"pre_hooks.one/conv2d/0__1"}),  # the addition reads its input too, two reads its output
        (["one", "two"], {"pre_hooks.one/conv2d/0__1", "pre_hooks.two/conv2d/0__1", "post_hooks./relu/1__0"}),
        (["head"], {"pre_hooks.head/linear/0__1", "post_hooks./relu/2__0"}),  # behind a pooling and a flatten
    ],
)
def test_a_layer_loses_its_weight_quantizer_and_those_that_only_it_reads(
    fake: nn.Module, names: list[str], gone: set[str]
) -> None:
    assert hooks_of(fake) - hooks_of(freed(fake, *names)) == gone


def test_with_all_layers_in_float_the_first_one_answers_as_the_float_net(net: nn.Module, fake: nn.Module) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    mixed = freed(fake, *ALL, original=net)
    handle = mixed.get_submodule("stem").register_forward_hook(lambda layer, inputs, output: seen.append(output))

    with torch.no_grad():
        mixed(x)
        expected = net.get_submodule("stem")(x)

    handle.remove()
    assert torch.equal(seen[0], expected)
    assert hooks_of(mixed) == {"post_hooks./relu/0__0", "post_hooks.two/conv2d/0__0"}  # both inputs of the addition


def test_the_original_weights_come_back_only_where_they_are_given(net: nn.Module, fake: nn.Module) -> None:
    trained = copy.deepcopy(fake)
    with torch.no_grad():
        for part in ("one.weight", "one.bias", "two.weight"):
            trained.get_parameter(part).add_(0.01)

    restored, kept = freed(trained, "one", original=net), freed(trained, "one")

    for part in ("one.weight", "one.bias"):
        assert torch.equal(restored.get_parameter(part), net.get_parameter(part))
        assert torch.equal(kept.get_parameter(part), trained.get_parameter(part))
    assert torch.equal(restored.get_parameter("two.weight"), trained.get_parameter("two.weight"))


def test_the_model_that_is_given_keeps_its_quantizers(fake: nn.Module, batches: list[Tensor]) -> None:
    before = hooks_of(fake)
    with torch.no_grad():
        expected = fake(batches[0])
        freed(fake, *ALL)

        assert torch.equal(fake(batches[0]), expected)
    assert hooks_of(fake) == before


def test_saved_and_reloaded_a_mixed_model_answers_bit_for_bit(
    fake: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    mixed = freed(fake, "one", "two")
    save_quantized(mixed, tmp_path, example=EXAMPLE)

    again = load_quantized(Net(), tmp_path)

    with torch.no_grad():
        assert torch.equal(again(batches[0]), mixed.eval()(batches[0]))
    assert hooks_of(again) == hooks_of(mixed)


def test_a_mixed_model_trains_on(fake: nn.Module, batches: list[Tensor]) -> None:
    mixed = freed(fake, "one").train()

    mixed(batches[0]).square().sum().backward()

    assert all(p.grad is not None for name, p in mixed.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
def test_what_is_in_float_has_no_quantizer_in_the_exported_graph(
    fake: nn.Module, batches: list[Tensor], tmp_path: Path, dialect: str
) -> None:
    mixed = freed(fake, "one", "two")
    stripped = Normalized(strip_fake_quantizers(mixed, EXAMPLE), (0.5,) * 3, (0.25,) * 3)
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    export_quantized(
        stripped,
        name="mixed",
        scheme="cpu-int8",
        dialect=dialect,
        example_shape=(3, 8, 8),
        preprocessing=None,  # type: ignore[arg-type]
        out_dir=tmp_path,
        pixels_NCHW=image.numpy(),
    )

    graph = ir.load(tmp_path / "model.onnx")
    sizes = {
        producer.inputs[0].shape.numpy()
        for n in graph.graph
        if n.op_type in ("Conv", "Gemm")
        and (producer := n.inputs[1].producer()) is not None
        and producer.op_type == "DequantizeLinear"
    }
    assert sizes == {(4, 3, 3, 3), (5, 64)}
    in_float = [n for n in graph.graph if n.op_type == "Conv" and n.inputs[1].producer() is None]
    assert [tuple(n.inputs[1].shape.numpy()) for n in in_float] == [(4, 4, 3, 3), (4, 4, 1, 1)]
    assert in_float[1].inputs[0].producer().op_type == "Relu"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = stripped(image)
    np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, atol=0.02)


@pytest.mark.parametrize("bad", ALL)
def test_the_layer_of_a_module_that_costs_most_gains_most(
    net: nn.Module, fake: nn.Module, batches: list[Tensor], bad: str
) -> None:
    broken = copy.deepcopy(fake)
    with torch.no_grad():
        weight = broken.get_parameter(f"{bad}.weight")
        weight.copy_(torch.sign(weight) * weight.abs().mean())

    gains = torch_sensitivities(broken, find_layers(broken, EXAMPLE), net, batches, net)

    assert max(gains, key=lambda layer: layer.gain).name == NAMES[bad]
    assert [layer.name for layer in gains] == [NAMES[name] for name in ALL]


class Shared(nn.Module):
    """Two branches that are concatenated, so that their quantizers share one scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.cat([self.left(x), torch.relu(self.right(x))], 1))
        return y.mean((2, 3))


def test_quantizers_that_share_a_scale_stay_or_go_together(batches: list[Tensor]) -> None:
    quantized = insert_fake_quantizers(Shared(), batches, EXAMPLE)
    found = find_layers(quantized, EXAMPLE)

    mixed = torch_in_float(quantized, found, ["left/conv2d/0"])

    assert hooks_of(quantized) - hooks_of(mixed) == {"pre_hooks.left/conv2d/0__1"}
    with torch.no_grad():
        assert torch.isfinite(mixed(batches[0])).all()
