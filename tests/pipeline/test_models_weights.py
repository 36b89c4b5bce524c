"""Weights on disk: what is written comes back, and what is not whole or not the model's is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from pipeline.learning.models import load_weights, save_weights
from targets.errors import ModelError


class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, loaded = Net().to(memory_format=torch.channels_last), Net()

    save_weights(saved, tmp_path / "model.safetensors")
    load_weights(loaded, tmp_path / "model.safetensors")

    assert states_equal(saved, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_same_weights_make_the_same_bytes(tmp_path: Path) -> None:
    net = Net()
    save_weights(net, tmp_path / "a.safetensors")
    save_weights(net, tmp_path / "b.safetensors")

    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    saved, loaded = Tied(), Tied()
    save_weights(saved, tmp_path / "tied.safetensors")
    load_weights(loaded, tmp_path / "tied.safetensors")

    assert states_equal(saved, loaded)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(Net(), path)
    old = path.read_bytes()

    def full_disk(tensors, partial, metadata) -> None:
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.learning.models.weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights(Net(), path)

    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_flipped_bit_or_a_cut_is_refused_or_harmless(tmp_path: Path, suffix: str, data) -> None:
    saved, loaded = Net(), Net()
    path = tmp_path / f"net{suffix}"
    save_weights(saved, path) if suffix == ".safetensors" else torch.save(saved.state_dict(), path)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)

    try:
        load_weights(loaded, path)
    except ModelError as refusal:
        assert str(refusal).count("\n") < 3
    else:  # a bit of padding or of an unused field of the archive
        assert states_equal(saved, loaded)


def test_every_flipped_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(nn.Linear(2, 2), path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    for position in range(header, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ModelError, match="digest differs"):
            load_weights(nn.Linear(2, 2), path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
def test_training_scripts_wrappers_are_opened_and_told(tmp_path: Path, wrapper: str, caplog) -> None:
    saved, loaded = Net(), Net()
    weights = {f"module.{name}": value for name, value in saved.state_dict().items()}
    torch.save({"epoch": 240, wrapper: weights}, tmp_path / "crd.pth")

    with caplog.at_level("INFO"):
        load_weights(loaded, tmp_path / "crd.pth")

    assert states_equal(saved, loaded)
    assert f"'{wrapper}'" in caplog.text
    assert "'module.'" in caplog.text


def test_a_foreign_safetensors_file_without_our_digest_loads(tmp_path: Path) -> None:
    saved, loaded = Net(), Net()
    save_file(saved.state_dict(), tmp_path / "foreign.safetensors")

    load_weights(loaded, tmp_path / "foreign.safetensors")

    assert states_equal(saved, loaded)


def test_half_precision_weights_fill_a_float32_model(tmp_path: Path) -> None:
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in Net().state_dict().items()},
        tmp_path / "half.pt",
    )
    loaded = Net()

    load_weights(loaded, tmp_path / "half.pt")

    assert loaded.fc.weight.dtype == torch.float32


def test_all_that_does_not_fit_is_listed_first_few_and_count(tmp_path: Path) -> None:
    weights = Net(num_classes=5).state_dict()
    for name in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        weights[name.replace("norm", "bn")] = weights.pop(name)
    torch.save(weights, tmp_path / "other.pt")
    loaded = Net()
    before = {name: value.clone() for name, value in loaded.state_dict().items()}

    with pytest.raises(ModelError) as refusal:
        load_weights(loaded, tmp_path / "other.pt")

    message = str(refusal.value)
    assert "missing norm.weight, norm.bias, norm.running_mean and 1 more" in message
    assert "unknown bn.weight, bn.bias, bn.running_mean and 1 more" in message
    assert "fc.weight ([5, 4], the model has [3, 4])" in message
    assert message.count("\n") < 3
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    net = Net()
    net.fc.bias.data[1] = value
    save_weights(net, tmp_path / "nan.safetensors")

    with pytest.raises(ModelError, match=r"fc\.bias"):
        load_weights(Net(), tmp_path / "nan.safetensors")


def test_integers_do_not_pass_for_weights(tmp_path: Path) -> None:
    weights = {**Net().state_dict(), "fc.bias": torch.zeros(3, dtype=torch.int64)}
    torch.save(weights, tmp_path / "int.pt")

    with pytest.raises(ModelError, match=r"torch\.int64"):
        load_weights(Net(), tmp_path / "int.pt")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))

    with pytest.raises(ModelError, match="cannot be read"):
        load_weights(Net(), tmp_path / "evil.pt")

    assert not (tmp_path / "touched").exists()


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ModelError, match=name):
        load_weights(Net(), tmp_path / name)


def test_a_tensor_alone_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")

    with pytest.raises(ModelError, match="holds a Tensor"):
        load_weights(Net(), tmp_path / "tensor.pt")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.pt"):
        load_weights(Net(), tmp_path / "absent.pt")
