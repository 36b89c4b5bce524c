"""What today's nets are made of, one block a test: INT8 where the runtime has it, told where not, and the ledger holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.differences import differences
from pipeline.graphs.proof import node_by_node
from pipeline.stages.quantize_onnx import quantize_onnx
from targets import make_target
from targets.base import Exported, Placement, read_json

pytestmark = pytest.mark.integration

CHANNELS = 16


class Block(nn.Module):
    """stem -> what is tested -> pooled class scores."""

    def __init__(self, body: Callable[[], nn.Module], width: int = CHANNELS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.body = body()
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


class Concatenated(nn.Module):
    """Two branches of unlike ranges side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        nn.init.normal_(self.b.weight, std=2.0)
        self.after = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.after(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)))
        return y


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.down, self.up = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        gates = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * gates


def depthwise() -> nn.Module:
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU6()]
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU6())


def hard_swish() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Hardswish(), nn.Conv2d(CHANNELS, CHANNELS, 1))


BODIES: dict[str, Callable[[], nn.Module]] = {
    "depthwise": depthwise,
    "residual": Residual,
    "concat": Concatenated,
    "squeeze-excite": SqueezeExcite,
    "hard-swish": hard_swish,
}
# Share of MACs that ONNX Runtime 1.32 runs in INT8: it has no integer hard-swish, so the convolution before it stays float
# in its middle, and no quantized Mul of unlike shapes that would take the gates.
ONNX_RUNTIME_SHARE = {"depthwise": 0.95, "residual": 0.95, "concat": 0.95, "squeeze-excite": 0.9, "hard-swish": 0.1}


@pytest.fixture(scope="module", params=sorted(BODIES))
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param) / "float.onnx"
    model = Block(BODIES[request.param]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the tracing exporter
        torch.onnx.export(
            model,
            (torch.zeros(1, 3, 12, 12),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
        )
    return request.param, path


def samples(num: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(num)]


def placed(name: str, path: Path, out_dir: Path) -> tuple[Exported, Placement, dict[str, list[Any]]]:
    target = make_target(name, {})
    exported = quantize_onnx(path, samples(16, 0), scheme=target.scheme, dialect=target.dialect, out_dir=out_dir / "q")
    compiled = target.compile(exported, out_dir / "c", "int8")
    session = target.load(compiled)
    answers = [np.array(session.run(sample)["y"]) for sample in samples(8, 1)]
    return exported, target.placement(compiled), {"y": answers}


@pytest.mark.parametrize("name", ["openvino-cpu", "onnxruntime-cpu"])
def test_each_block_runs_where_it_is_said_to_and_answers_as_float(
    name: str, block: tuple[str, Path], exact_int8: Callable[[Path, str], bool], tmp_path: Path
) -> None:
    kind, path = block
    exported, placement, answers = placed(name, path, tmp_path)
    expected = node_by_node(path, samples(8, 1))
    graph = node_by_node(exported.model_path, samples(8, 1))

    share = ONNX_RUNTIME_SHARE[kind] if name == "onnxruntime-cpu" else 0.95
    in_float = [layer.name for layer in placement.layers if layer.precision != "int8"]
    assert placement.int8_share >= share, in_float
    assert bool(in_float) == (placement.int8_share < 1.0)
    for hop, before, after in (("graph", expected, graph), ("kernels", graph, answers), ("in all", expected, answers)):
        (row,) = differences(hop, "before", before, after)
        assert row.cosine_min > 0.99 or (
            hop != "graph" and not exact_int8(exported.model_path, make_target(name, {}).dialect)
        )
    proofs = read_json(exported.directory / "rewrites.json")
    assert all(proof["max_abs_delta"] == 0.0 for proof in proofs if proof["exact"])
