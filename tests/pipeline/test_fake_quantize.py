from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.learning import fake_quantize
from pipeline.learning.fake_quantize import (
    insert_fake_quantizers,
    kernels_in_use,
    load_quantized,
    pin_kernels,
    save_quantized,
    strip_fake_quantizers,
)
from targets.errors import IntegrityError, ModelError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = torch.relu(self.first(x_NCHW))
        x = torch.relu(self.second(x) + x)
        logits_NK: Tensor = self.head(x.mean((2, 3)))
        return logits_NK


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.fixture(scope="module")
def quantized(batches: list[Tensor]) -> nn.Module:
    pin_kernels("torch")
    return insert_fake_quantizers(Net(), batches, batches[0][:1])


def test_the_float_model_is_left_as_it_was(batches: list[Tensor]) -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    insert_fake_quantizers(model, batches, batches[0][:1])

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantizers_move_the_outputs_a_little(quantized: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        delta = (quantized(batches[0]) - Net().eval()(batches[0])).abs().max().item()

    assert 0.0 < delta < 0.05


def test_activations_are_per_tensor_and_weights_per_channel(quantized: nn.Module) -> None:
    scales = {name: tensor.numel() for name, tensor in quantized.state_dict().items() if name.endswith(".scale")}

    of_weights = {name: size for name, size in scales.items() if "__1.0." in name and "pre_hooks" in name}
    assert sorted(of_weights.values()) == [4, 8, 8]
    assert {size for name, size in scales.items() if name not in of_weights} == {1}


def test_a_quantized_model_trains_its_weights_and_its_ranges(batches: list[Tensor]) -> None:
    model = insert_fake_quantizers(Net(), batches, batches[0][:1]).train()
    model(batches[0]).square().sum().backward()

    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for name, g in gradients.items() if name.endswith("weight"))
    assert any(g is not None and g.abs().sum() > 0 for name, g in gradients.items() if "scale" in name)


def test_saved_and_reloaded_it_answers_bit_for_bit(quantized: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    save_quantized(quantized, tmp_path, example=batches[0][:1])
    again = load_quantized(Net(), tmp_path)

    with torch.no_grad():
        assert torch.equal(again(batches[1]), quantized.eval()(batches[1]))


@pytest.mark.parametrize("damage", ["truncated weights", "no weights", "other architecture", "no config"])
def test_a_damaged_or_foreign_directory_is_refused(
    damage: str, quantized: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    save_quantized(quantized, tmp_path, example=batches[0][:1])
    weights, config = tmp_path / fake_quantize.WEIGHTS_FILE, tmp_path / fake_quantize.CONFIG_FILE
    net = Net()
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "other architecture":
        net.head = nn.Linear(8, 5)
    else:
        config.write_text(json.dumps({}))

    with pytest.raises(IntegrityError):
        load_quantized(net, tmp_path)


def test_stripping_keeps_the_answers_to_float_rounding(quantized: nn.Module, batches: list[Tensor]) -> None:
    stripped = strip_fake_quantizers(quantized, batches[0][:1])

    with torch.no_grad():
        torch.testing.assert_close(stripped(batches[1]), quantized.eval()(batches[1]), atol=1e-5, rtol=0)
    assert not any("nncf" in type(m).__module__ and "Quantizer" in type(m).__name__ for m in stripped.modules())


def test_no_calibration_batch_is_refused() -> None:
    with pytest.raises(ModelError, match="no batch"):
        insert_fake_quantizers(Net(), [], torch.zeros(1, 3, 8, 8))


def test_a_generator_of_batches_is_enough(batches: list[Tensor], quantized: nn.Module) -> None:
    from_generator = insert_fake_quantizers(Net(), (batch for batch in batches), batches[0][:1])

    with torch.no_grad():
        assert torch.equal(from_generator.eval()(batches[0]), quantized.eval()(batches[0]))


def test_calibration_prints_nothing(batches: list[Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    insert_fake_quantizers(Net(), batches, batches[0][:1])

    assert capfd.readouterr().out == ""


def test_torch_kernels_are_pinned_and_reported() -> None:
    assert pin_kernels("torch") == "torch" == kernels_in_use()


def test_an_extension_that_does_not_compile_is_reported_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.load", _no_compiler)

    try:
        assert pin_kernels("extension") == "torch" == kernels_in_use()
    finally:
        pin_kernels("torch")


def _no_compiler(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler here")


@pytest.mark.system
def test_nncf_sends_no_telemetry() -> None:
    code = (
        "from pipeline.learning.fake_quantize import kernels_in_use; kernels_in_use(); "
        "from nncf.telemetry.decorator import telemetry; print(type(telemetry).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "MagicMock"  # NNCF's own stub


class Dead(nn.Module):
    """A ReLU that nothing passes, or a weight that is no number."""

    def __init__(self, *, bias: float, weight: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        nn.init.constant_(self.first.bias, bias)
        self.first.weight.data[0, 0, 0, 0] = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(x)))
        return y


@pytest.mark.parametrize(
    ("bias", "weight", "message"),
    [
        (-1e3, 0.1, "'/relu/0' is zero on every calibration sample"),
        (0.0, float("nan"), "'first/conv2d/0' holds NaN or infinity"),
    ],
)
def test_a_tensor_without_a_range_is_named(
    bias: float, weight: float, message: str, batches: list[torch.Tensor]
) -> None:
    with pytest.raises(ModelError, match=message):
        insert_fake_quantizers(Dead(bias=bias, weight=weight), batches, batches[0][:1])


def test_a_dead_channel_is_no_dead_layer(batches: list[torch.Tensor]) -> None:
    net = Dead(bias=0.0, weight=0.1)
    net.first.weight.data[1] = 0

    quantized = insert_fake_quantizers(net, batches, batches[0][:1])

    assert torch.isfinite(quantized(batches[0])).all()
