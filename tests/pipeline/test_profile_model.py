"""`edgestill profile` from what a person points at; the arithmetic is in tests/benchmarks/test_profile_report.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import benchmarks.peak
from benchmarks.dense import Convolution, MatMul
from pipeline.profile_model import profile_model
from targets import make_target
from targets.base import Exported, TensorSpec
from targets.errors import DataError, IntegrityError, ModelError, RecipeError

pytestmark = pytest.mark.integration


class Run(Protocol):
    """A finished run of the tiny recipe."""

    def stage(self, label: str) -> Path: ...


@pytest.fixture(autouse=True)
def small_peaks_in_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peak, "LEVELS", ((Convolution(16, 8), MatMul(64)),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def onnx_file(path: Path, *, multiplies: bool = True) -> Path:
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"]) if multiplies else helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weights] if multiplies else [])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def compiled_from(model: Path, out_dir: Path) -> Path:
    specs = [TensorSpec(name=name, shape=(1, 8), dtype="float32") for name in ("x", "y")]
    exported = Exported(
        name="net", onnx_path=model.name, inputs=(specs[0],), outputs=(specs[1],), directory=model.parent
    )
    make_target("onnxruntime-cpu", {"num_threads": 1}).compile(exported, out_dir, "fp32")
    return out_dir


def test_what_is_compiled_is_profiled_as_it_is_and_the_profile_written(tmp_path: Path) -> None:
    compiled = compiled_from(onnx_file(tmp_path / "net.onnx"), tmp_path / "compiled")

    found = profile_model(compiled, target="openvino-cpu", preset="smoke", out=tmp_path / "new" / "profile.json")

    assert (found.target, found.options["num_threads"], found.precision) == (
        "onnxruntime-cpu",
        1,
        "fp32",
    )
    assert found.macs == {"fp32": 64}
    assert found.share_of_peak is not None
    document = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert document == json.loads(json.dumps(found.to_json()))


def test_a_bundle_is_profiled_in_the_precision_that_it_ships(built: Run) -> None:
    (bundle,) = built.stage("bundle-onnxruntime-cpu").glob("bundle")

    found = profile_model(bundle, preset="smoke")

    assert found.precision == json.loads((bundle / "manifest.json").read_text())["precision"]
    assert set(found.macs) == {peak.precision for peak in found.peaks}
    assert found.share_of_peak is not None


def test_a_bundle_whose_file_was_changed_is_refused_before_anything_runs(built: Run, tmp_path: Path) -> None:
    (bundle,) = built.stage("bundle-onnxruntime-cpu").glob("bundle")
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "model" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    with pytest.raises(IntegrityError, match=r"model\.onnx has changed"):
        profile_model(tmp_path / "bundle")


def test_an_onnx_file_without_products_has_no_share_and_needs_no_peak(tmp_path: Path) -> None:
    found = profile_model(onnx_file(tmp_path / "net.onnx", multiplies=False), preset="smoke", num_top=3)

    assert found.share_of_peak is None
    assert "no layer of the model multiplies" in found.why_no_share
    assert found.peaks == ()
    assert found.num_top == 3
    assert "Relu" in found.text()


def test_records_that_are_not_there_are_refused_before_anything_runs(tmp_path: Path) -> None:
    compiled = compiled_from(onnx_file(tmp_path / "net.onnx"), tmp_path / "compiled")

    with pytest.raises(DataError, match=r"no records\.json"):
        profile_model(compiled, records=tmp_path)


def test_a_directory_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        profile_model(onnx_file(tmp_path / "net.onnx"), out=tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a compiled directory nor a bundle"):
        profile_model(tmp_path)
