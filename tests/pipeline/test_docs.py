"""The code blocks of the documents, run in one empty folder."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.cli import main
from targets.lint import Platform

pytestmark = pytest.mark.system  # from a model to bundles, several times

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.(?:py|yaml))\n")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A person's folder with a model and images; what a block imports from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.onnx.export(
        net.eval(),
        (torch.zeros(1, 3, 16, 16),),
        str(tmp_path / "model.onnx"),
        dynamo=False,
        input_names=["image"],
        dynamic_axes={"image": {0: "N"}},
    )
    (tmp_path / "images").mkdir()
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (20, 20, 24, 3), dtype=np.uint8)
    for i, image_HWC in enumerate(pixels_NHWC):
        Image.fromarray(image_HWC).save(tmp_path / "images" / f"{i}.png")
    yield tmp_path
    for name in ("own_parts", "own_metric"):
        sys.modules.pop(name, None)


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours, in this process: an `edgestill` that is started anew imports for seconds."""
    program, *arguments = shlex.split(line)
    assert program == "edgestill"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), line


@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning")
def test_every_block_of_bring_your_own_does_what_it_says(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall((DOCS / "bring-your-own.md").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for language, text in blocks:
        if (named := FILE_NAME.match(text)) is not None:
            (workplace / named.group(1)).write_text(text, encoding="utf-8")
        elif language == "bash":
            for line in text.splitlines():
                run_command(line, monkeypatch)
        else:
            exec(compile(text, f"docs/bring-your-own.md ({language})", "exec"), names)  # noqa: S102
            if "quantize_module" in text:
                placed: Any = names["report"]
                in_int8 = placed.placement is not None and placed.placement.int8_share == 1.0
                assert in_int8 or Platform().saturates  # where INT8 sums overflow, a gate may refuse it

    assert len(blocks) == 12
    assert {"quantized", "by_metric", "for_jetson", "compiled", "bench", "from_python", "runs"} <= {
        path.name for path in workplace.iterdir()
    }
    assert list((workplace / "runs" / "own2").glob("distill-*/stage.json"))


def test_the_example_of_a_comparison_from_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    (example,) = [code for language, code in BLOCK.findall(text) if language == "python"]
    for name in ("old", "new"):
        run_command(f"edgestill compile model.onnx --out {name}", monkeypatch)
    names: dict[str, Any] = {}

    quick = example.replace('preset="ci"', 'preset="smoke", pairs=1')
    assert quick != example
    exec(compile(quick, "docs/compare.md", "exec"), names)  # noqa: S102

    assert names["found"].verdict == "cannot tell"  # one pair proves nothing
    assert (workplace / "session" / "samples").is_dir()
