"""A person's own code: a module and a loader from Python, and functions named in a recipe, in a repository of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pipeline.bring_your_own
from pipeline.own_module import quantize_module
from pipeline.verb_reports import QuantizeReport
from targets.errors import DataError, EdgestillError, ModelError, RecipeError

pytestmark = pytest.mark.integration

PARTS = """
import numpy as np
import torch


def data():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    x = np.clip(rng.normal(60 + 120 * y, 20, size=(8, 8, 1, 400)).transpose(3, 0, 1, 2), 0, 255).astype(np.uint8)
    return {"x_train": x[:300], "y_train": y[:300], "x_test": x[300:], "y_test": y[300:]}


def network(channels, image_size, num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 64, num_classes))


def loss():
    return lambda student, teacher, labels: torch.nn.functional.cross_entropy(student, teacher.softmax(1))
"""
RECIPE = """
name: own
data: {source: "python:parts:data"}
teacher: {model: "python:parts:network", train: {epochs: 2, batch_size: 32, lr: 0.05}}
distill: {model: "python:parts:network", loss: "python:parts:loss", train: {epochs: 1, batch_size: 32, lr: 0.05}}
targets: [{name: onnxruntime-cpu}]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project whose packages are called as ours are, and cannot be imported."""
    for name in ("pipeline", "targets", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is the package of the person')\n")
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


def edgestill(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("edgestill")
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.system
def test_own_model_data_and_loss_run_beside_packages_of_our_names(repository: Path) -> None:
    refused = edgestill(repository, "run", "own.yaml", "--until", "distill")
    done = edgestill(repository, "run", "own.yaml", "--until", "distill", "--allow-code")

    assert refused.returncode == 2
    assert "--allow-code" in refused.stderr
    assert done.returncode == 0, done.stderr
    (weights,) = repository.glob("runs/own/distill-*/model.safetensors")
    assert weights.stat().st_size > 0


class TwoInputs(nn.Module):
    """Of (images, extra, labels) it takes the first two, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, extra: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        features = torch.relu(self.norm(self.convolution(image))).mean((2, 3)) * scale
        return {"scores": self.head(features + extra), "features": features}


def loader(*shapes: tuple[int, ...], num: int = 20) -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(*(torch.randn(num, *shape) for shape in shapes)), batch_size=8)


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop behind the graph: what measuring does is tested with ONNX files."""
    monkeypatch.setattr(pipeline.bring_your_own, "_measured", lambda *_: pipeline.bring_your_own.Proof(ships="int8"))


def quantize(model: nn.Module, calibration: Iterable[Any], out_dir: Path, **options: Any) -> QuantizeReport:
    return quantize_module(model, calibration, **({"target": "onnxruntime-cpu", "out_dir": out_dir} | options))


def test_a_module_and_its_loader_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    model = TwoInputs().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    report = quantize(model, loader((3, 8, 8), (8,), ()), tmp_path / "out")

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph's own numbers, on any CPU
    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    image, extra = torch.randn(4, 3, 8, 8), torch.randn(4, 8)
    fed = {"image": image.numpy(), "extra": extra.numpy()}
    answers = dict(zip(("scores", "features"), session.run(None, fed), strict=True))
    assert (report.num_calibration, report.num_held_out) == (16, 4)
    assert [one.name for one in report.differences[:2]] == ["scores", "features"]
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for name, expected in model.eval()(image, extra).items():
            assert np.abs(answers[name] - expected.numpy()).max() < 0.1 * np.ptp(expected.numpy())


def test_batches_that_forward_cannot_take_are_named(tmp_path: Path) -> None:
    model, out_dir = TwoInputs(), tmp_path / "out"

    def refuse(calibration: Iterable[Any], kind: type[EdgestillError], message: str, **options: Any) -> None:
        with pytest.raises(kind, match=message) as refusal:
            quantize(model, calibration, out_dir, **options)
        assert len(str(refusal.value).splitlines()) <= 3

    refuse([], DataError, "no batch")
    refuse([torch.zeros(2, 3, 8, 8)], DataError, "requires image, extra")
    refuse([(torch.zeros(2, 3, 8, 8), "text")], DataError, r"Tensor\[2, 3, 8, 8\], str")
    refuse([(torch.zeros(2, 3, 8, 8), torch.zeros(3, 8))], DataError, "batch 0 holds")
    refuse(loader((4, 8, 8), (8,)), ModelError, "cannot be exported")
    refuse(loader((3, 8, 8), (8,)), RecipeError, "Did you mean", target="onnxruntime")
    assert not out_dir.exists()
