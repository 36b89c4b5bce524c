"""Nets by name as float graphs. The nets are timm's smallest that have what is tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from pipeline.calibration import Calibration
from pipeline.matrix.nets import inputs_of, write_float
from pipeline.matrix.recipe import InputConfig, ModelEntry
from pipeline.matrix.samples import samples_of
from pipeline.progress import Quiet
from targets.base import Exported
from targets.errors import DataError, ModelError

PIXELS = InputConfig(size=32, resize=None)


def samples_for(entry: ModelEntry) -> Calibration:
    return samples_of(None, inputs_of(entry, PIXELS), PIXELS, 4, Quiet())


def write(entry: ModelEntry, out_dir: Path) -> Exported:
    write_float(entry, PIXELS, samples_for(entry), out_dir, seed=0, offline=True, half=False)
    return Exported.load(out_dir)


def weights_of(exported: Exported) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(exported.model_path).graph.initializer}


def test_random_weights_are_seeded_and_leave_no_branch_at_zero(tmp_path: Path) -> None:
    entry = ModelEntry(name="tiny", model="timm:test_resnet")  # its last norms begin at zero
    first, again = (write(entry, tmp_path / name) for name in ("first", "again"))

    weights = weights_of(first)
    assert all(value.any() for value in weights.values() if value.ndim == 4)
    assert all(np.array_equal(value, weights_of(again)[name]) for name, value in weights.items())
    assert first.name == "tiny"


def test_norms_have_seen_the_samples(tmp_path: Path) -> None:
    exported = write(ModelEntry(name="tiny", model="timm:test_resnet"), tmp_path)
    session = ort.InferenceSession(str(exported.model_path), providers=["CPUExecutionProvider"])
    (sample, *_) = samples_for(ModelEntry(name="tiny", model="timm:test_resnet")).samples

    (logits_NK,) = session.run(None, dict(sample))

    assert logits_NK.shape == (1, 1000)
    assert 0 < np.abs(logits_NK).max() < 100


def test_branches_that_train_side_by_side_are_folded(tmp_path: Path) -> None:
    exported = write(ModelEntry(name="folded", model="timm:mobileone_s0"), tmp_path)

    ops = [node.op_type for node in onnx.load(exported.model_path).graph.node]
    assert "BatchNormalization" not in ops
    assert "Add" not in ops  # each block was the sum of up to six branches


def test_a_net_that_no_library_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="timm has no 'test_resnat'; did you mean 'test_resnet'"):
        write(ModelEntry(name="typo", model="timm:test_resnat"), tmp_path)


def test_weights_from_a_file_that_is_not_there_are_named(tmp_path: Path) -> None:
    entry = ModelEntry(name="lost", model="timm:test_resnet", weights=str(tmp_path / "lost.safetensors"))

    with pytest.raises(ModelError, match=r"lost\.safetensors: there is no such file"):
        write(entry, tmp_path)


def test_synthetic_samples_are_seeded_and_hold_none_out() -> None:
    entry = ModelEntry(name="tiny", model="timm:test_resnet")
    one, two = samples_for(entry), samples_for(entry)

    assert (len(one.samples), one.held_out) == (4, ())
    assert one.samples[0]["image"].shape == (1, 3, 32, 32)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(one.samples, two.samples, strict=True))
    assert not np.array_equal(one.samples[0]["image"], one.samples[1]["image"])


def test_calibration_that_is_not_there_is_named(tmp_path: Path) -> None:
    entry = ModelEntry(name="tiny", model="timm:test_resnet")

    with pytest.raises(DataError, match="there is no such folder or file"):
        samples_of(tmp_path / "nowhere", inputs_of(entry, PIXELS), PIXELS, 4, Quiet())
