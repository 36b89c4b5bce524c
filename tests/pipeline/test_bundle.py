import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper

from benchmarks.device import verify
from benchmarks.device.json_schema import first_fault
from benchmarks.device.verify import MANIFEST, SEAL, seal_of, verify_bundle
from benchmarks.pack import pack_device_program
from pipeline.bundles import pack_bundle, portable_bundle
from pipeline.stages.bundle import model_card, write_bundle
from targets import make_target
from targets.base import CompiledModel, Exported, Preprocessing, TensorSpec, read_json, write_json
from targets.errors import DataError, EdgestillError, IntegrityError, RecipeError, TargetError

pytestmark = pytest.mark.integration

RECORD = {
    "utc": "2026-01-01T00:00:00+00:00",
    "scenario": {"preset": "smoke"},
    "summary": {"p50_us": 12.5, "ci95": None, "fps": 8e4, "load_ms": 30.0},
    "memory": {"vmhwm_mib": 64.0},
    "env": {"hard": {"cpu": "Fixture 1", "arch": "x86_64", "kernel": "6.1"}},
    "validity": {"ok": True},
}
ACCURACY = {"metric": "top1", "value": 0.93, "n": 1000, "ci95": [0.912, 0.944]}
Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def _compile(directory: Path, bias: float = 0.0) -> CompiledModel:
    """Two inputs and two outputs: scores = left * right + bias, winner = argmax of them."""
    left, right = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5]) for name in ("left", "right"))
    outputs = [
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5]),
        helper.make_tensor_value_info("winner", TensorProto.INT64, [1, 1]),
    ]
    nodes = [
        helper.make_node("Mul", ["left", "right"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["winner"], axis=1),
    ]
    constant = numpy_helper.from_array(np.full((1, 5), bias, dtype=np.float32), "bias")
    graph = helper.make_graph(nodes, "two", [left, right], outputs, [constant])
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), directory / "model.onnx"
    )
    exported = Exported(
        name="two",
        onnx_path="model.onnx",
        inputs=tuple(TensorSpec(name=name, shape=(1, 5), dtype="float32") for name in ("left", "right")),
        outputs=(
            TensorSpec(name="scores", shape=(1, 5), dtype="float32"),
            TensorSpec(name="winner", shape=(1, 1), dtype="int64"),
        ),
        directory=directory,
    )
    return make_target("onnxruntime-cpu", {}).compile(exported, directory / "compiled", "fp32")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return _compile(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def write(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Write:
    program = pack_device_program(tmp_path_factory.mktemp("program") / "edgestill-device.pyz")

    def _write(out_dir: Path, **changed: Any) -> Path:
        given: dict[str, Any] = {
            "compiled": compiled,
            "record": RECORD,
            "accuracy": ACCURACY,
            "provenance": {"recipe": "fixture", "git": None},
            "labels": ["ant", "bee"],
            "device_program": program,
        }
        return write_bundle(out_dir, **(given | changed))

    return _write


@pytest.fixture(scope="module")
def pristine(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "two")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def _content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def _reseal(bundle: Path, **changed: Any) -> None:
    """Write a manifest that agrees with the files again, as only its author could."""
    manifest = read_json(bundle / MANIFEST)
    files = {name: verify.sha256_file(bundle / name) for name in manifest["files"]}
    write_json(bundle / MANIFEST, {**manifest, "files": files, **changed})
    (bundle / SEAL).write_bytes(seal_of(bundle))


def test_a_bundle_holds_everything_and_verifies(pristine: Path) -> None:
    verified = verify_bundle(pristine)

    assert set(_content(pristine)) == {
        "MODEL_CARD.md",
        "edgestill-device.pyz",
        "golden/input-0.npy",
        "golden/input-1.npy",
        "golden/output-0.npy",
        "golden/output-1.npy",
        "manifest.json",
        "manifest.sha256",
        "model/compiled.json",
        "model/model.onnx",
        "record.json",
    }
    assert (verified["name"], verified["files"]) == ("two", 11)
    assert verified["max_abs_delta"] == {"scores": 0.0, "winner": 0.0}


def test_the_manifest_says_what_ships_how_good_it_is_and_where_it_is_from(pristine: Path) -> None:
    manifest = read_json(pristine / MANIFEST)

    assert (manifest["schema_version"], manifest["precision"], manifest["float_reason"]) == (1, "fp32", None)
    assert (manifest["labels"], manifest["accuracy"]) == (["ant", "bee"], ACCURACY)
    assert manifest["provenance"] == {"recipe": "fixture", "git": None}
    assert manifest["golden"]["source"] == "synthetic, seed 0"
    assert not manifest["golden"]["contains_samples"]
    assert manifest["golden"]["tolerance"]["winner"] == 0.0


def test_every_manifest_is_valid_by_the_published_schema(pristine: Path, write: Write, tmp_path: Path) -> None:
    samples = {name: np.full((1, 5), 2.0, dtype=np.float32) for name in ("left", "right")}
    pre = Preprocessing(mode="RGB", resize=256, crop=(224, 224), mean=(1.0, 2.0, 3.0), std=(1, 1, 1))
    rich = write(tmp_path / "rich", golden_input=samples, include_samples=True, float_reason="INT8 is slower")
    bare = write(tmp_path / "bare", accuracy={}, labels=[], provenance={})
    published = json.loads((ROOT / "docs/schemas/bundle-manifest-1.json").read_text())

    for bundle in (pristine, rich, bare, portable_bundle(pristine, tmp_path / "portable").path):
        Draft202012Validator(published).validate(read_json(bundle / MANIFEST))
    assert first_fault(published["properties"]["preprocessing"], json.loads(json.dumps(asdict(pre))), "pre") is None


@pytest.mark.parametrize("accuracy", [{"value": "good"}, {"n": -1}, {"metric": None}])
def test_what_the_schema_does_not_know_is_not_bundled(accuracy: dict[str, Any], write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bundle: manifest\.accuracy\."):
        write(tmp_path / "bundle", accuracy=accuracy)
    assert not (tmp_path / "bundle").exists()


def test_the_golden_output_is_what_the_model_computes(pristine: Path) -> None:
    left, right, scores, winner = (
        np.load(pristine / "golden" / name) for name in ("input-0.npy", "input-1.npy", "output-0.npy", "output-1.npy")
    )

    np.testing.assert_array_equal(scores, left * right)
    assert winner.item() == np.argmax(left * right)


def test_the_same_inputs_give_the_same_bytes(write: Write, pristine: Path, tmp_path: Path) -> None:
    assert _content(write(tmp_path / "again")) == _content(pristine)


def _turned(value: Any) -> Any:
    """The same JSON value with the keys of each object the other way round."""
    if isinstance(value, dict):
        return {key: _turned(value[key]) for key in reversed(value)}
    return [_turned(item) for item in value] if isinstance(value, list) else value


def test_the_order_of_keys_on_the_way_in_changes_no_byte(write: Write, pristine: Path, tmp_path: Path) -> None:
    provenance = {"git": None, "recipe": "fixture"}

    again = write(tmp_path / "two", record=_turned(RECORD), accuracy=_turned(ACCURACY), provenance=provenance)

    assert _content(again) == _content(pristine)


def test_an_archive_of_the_same_files_has_the_same_bytes_whoever_copied_them_and_when(
    pristine: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pristine, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o777)

    first, second = pack_bundle(pristine, tmp_path / "first.tar"), pack_bundle(other, tmp_path / "second.tar")

    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()
    assert first.sha256 == second.sha256
    with tarfile.open(tmp_path / "first.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == sorted(f"bundle/{name}" for name in _content(pristine))
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


def test_an_archive_verifies_as_the_folder_does(pristine: Path, tmp_path: Path) -> None:
    pack_bundle(pristine, tmp_path / "two.tar")

    assert verify_bundle(tmp_path / "two.tar") == verify_bundle(pristine)


def test_an_archive_is_not_written_into_the_bundle_or_over_a_folder(bundle: Path, tmp_path: Path) -> None:
    for path in (bundle / "two.tar", tmp_path):
        with pytest.raises(RecipeError, match="Name a file beside it"):
            pack_bundle(bundle, path)
    verify_bundle(bundle, replay=False)


def test_no_path_of_this_machine_stands_in_a_bundle(write: Write, tmp_path: Path) -> None:
    provenance = {
        "recipe": {"checkpoint": "/home/ann/secret project/net.pth", "data": {"source": "images:/home/ann/cats"}},
        "from": "https://example.org/a/b, and a/relative/path",
        "paths": ["/srv/x"],
    }

    bundle = write(tmp_path / "two", provenance=provenance)

    assert read_json(bundle / MANIFEST)["provenance"] == {
        "recipe": {"checkpoint": "net.pth", "data": {"source": "images:cats"}},
        "from": "https://example.org/a/b, and a/relative/path",
        "paths": ["x"],
    }
    told = b"".join(_content(bundle)[name] for name in ("manifest.json", "record.json", "MODEL_CARD.md"))
    assert b"/home" not in told
    assert str(tmp_path).encode() not in told


def test_an_option_that_is_a_file_of_the_build_is_left_out(
    compiled: CompiledModel, write: Write, tmp_path: Path
) -> None:
    built = replace(compiled, options={**compiled.options, "timing_cache": "/home/ann/timing.cache"})

    bundle = write(tmp_path / "two", compiled=built)

    assert read_json(bundle / MANIFEST)["options"] == dict(compiled.options)
    assert CompiledModel.load(bundle / "model").options == compiled.options


def test_the_reason_for_shipping_float_stands_in_manifest_and_card(write: Write, tmp_path: Path) -> None:
    bundle = write(tmp_path / "float", float_reason="INT8 is 4 % slower than FP32 here")

    assert read_json(bundle / MANIFEST)["float_reason"] == "INT8 is 4 % slower than FP32 here"
    assert "INT8 is 4 % slower than FP32 here" in (bundle / "MODEL_CARD.md").read_text()


def test_the_card_of_a_program_for_phones_says_how_an_app_loads_it(pristine: Path) -> None:
    manifest = read_json(pristine / MANIFEST)
    pixels = TensorSpec(name="image", shape=(1, 3, 32, 32), dtype="uint8", layout="NCHW")
    mobile = {**manifest, "target": "executorch", "toolchain": "executorch 1.5.1", "inputs": [asdict(pixels)]}

    android, ios = model_card(mobile).partition("## In an app")[2].split("iOS, ")

    assert "org.pytorch:executorch-android" in android
    assert "Tensor.fromBlobUnsigned(values, longArrayOf(1, 3, 32, 32))" in android
    assert "branch `swiftpm-1.5.1`" in ios
    assert "Tensor<UInt8>(data: data, shape: [1, 3, 32, 32])" in ios
    assert "In an app" not in model_card(manifest)


def test_real_samples_are_packed_only_when_asked_for(write: Write, tmp_path: Path) -> None:
    samples = {name: np.full((1, 5), 2.0, dtype=np.float32) for name in ("left", "right")}

    with pytest.raises(DataError, match="include_samples"):
        write(tmp_path / "silent", golden_input=samples)
    with pytest.raises(DataError, match="include_samples"):
        write(tmp_path / "empty", include_samples=True)
    asked = write(tmp_path / "asked", golden_input=samples, include_samples=True)

    assert read_json(asked / MANIFEST)["golden"]["contains_samples"]
    assert np.load(asked / "golden/output-0.npy").tolist() == [[4.0] * 5]
    assert not (tmp_path / "silent").exists()


def test_a_model_that_answers_nan_is_not_bundled(write: Write, tmp_path: Path) -> None:
    broken = _compile(tmp_path / "nan", bias=float("nan"))

    with pytest.raises(TargetError, match="'scores' is not finite"):
        write(tmp_path / "bundle", compiled=broken)
    assert not (tmp_path / "bundle").exists()


def test_an_older_bundle_is_replaced_and_other_files_are_not(write: Write, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("three years")

    write(bundle, labels=["one", "two"])
    with pytest.raises(DataError, match="no bundle"):
        write(tmp_path / "home")

    assert read_json(bundle / MANIFEST)["labels"] == ["one", "two"]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "three years"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_any_file_is_found_and_named(pristine: Path, data: st.DataObject) -> None:
    path = pristine / data.draw(st.sampled_from(sorted(_content(pristine))))
    whole = path.read_bytes()
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        # The seal is named by what it seals.
        with pytest.raises(IntegrityError, match="manifest" if path.name == SEAL else path.name):
            verify_bundle(pristine, replay=False)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "model/model.onnx", "golden/output-1.npy"])
def test_a_missing_a_truncated_and_a_renamed_file_are_found(name: str, bundle: Path) -> None:
    path, aside = bundle / name, bundle.parent / "aside"
    path.rename(aside)
    with pytest.raises(IntegrityError, match=f"{path.name} is missing"):
        verify_bundle(bundle)
    shutil.copyfile(aside, path.with_name("other.bin"))
    with pytest.raises(IntegrityError, match=r"(other\.bin was added|is missing)"):
        verify_bundle(bundle)
    path.with_name("other.bin").unlink()
    path.write_bytes(aside.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="manifest" if name == SEAL else path.name):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["extra.txt", "model/extra.bin", ".hidden", "golden/deep/extra.npy"])
def test_an_added_file_is_found(name: str, bundle: Path) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")

    with pytest.raises(IntegrityError, match="was added"):
        verify_bundle(bundle)


def test_an_empty_folder_and_a_pipe_are_found(bundle: Path) -> None:
    (bundle / "plugins").mkdir()
    with pytest.raises(IntegrityError, match="plugins is an empty folder"):
        verify_bundle(bundle)
    (bundle / "plugins").rmdir()
    os.mkfifo(bundle / "pipe")
    with pytest.raises(IntegrityError, match="pipe is no regular file"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["model/model.onnx", "manifest.json", "golden"])
def test_a_symlink_is_refused_even_to_the_right_bytes(name: str, bundle: Path) -> None:
    aside = bundle.parent / "aside"
    (bundle / name).rename(aside)
    (bundle / name).symlink_to(aside)

    with pytest.raises(IntegrityError, match=f"{Path(name).name} is a symlink"):
        verify_bundle(bundle)


def test_no_bundle_at_all_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(IntegrityError):
            verify_bundle(path)


@pytest.fixture
def nothing_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(verify, "make_target", refuse)


def _rewrite_compiled(bundle: Path, **changed: Any) -> None:
    path = bundle / "model/compiled.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    _reseal(bundle, **{key: value for key, value in changed.items() if key != "files"})


@pytest.mark.usefixtures("nothing_may_run")
def test_another_architecture_is_refused_before_anything_runs(bundle: Path) -> None:
    _rewrite_compiled(bundle, built_for={"arch": "riscv128"})

    with pytest.raises(TargetError, match="compiled for riscv128, this machine is"):
        verify_bundle(bundle)


@pytest.mark.usefixtures("nothing_may_run")
@pytest.mark.parametrize("toolchain", ["onnxruntime 0.0.1", "absent-runtime 1.2"])
def test_another_or_no_runtime_is_refused_before_anything_runs(toolchain: str, bundle: Path) -> None:
    _rewrite_compiled(bundle, toolchain=toolchain)

    with pytest.raises(TargetError, match=f"proved with {toolchain}, here is"):
        verify_bundle(bundle)


@pytest.mark.usefixtures("nothing_may_run")
@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("1.32.0", "1.32.0", True),
        ("2026.4.1-22982-abc", "2026.4.1", True),
        ("1.32.0", "1.32.0+local", True),
        ("1.32.0", "1.32.1", False),
        ("1.32.0", "1.33.0", False),
        ("10.3.0", "10.13.0", False),
    ],
)
def test_a_runtime_must_be_of_the_release_that_was_proved(
    built: str, here: str, runs: bool, compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "installed_version", lambda _: here)
    asked = replace(compiled, toolchain=f"onnxruntime {built}")

    if runs:
        verify.check_machine(asked)
        return
    with pytest.raises(
        TargetError, match=rf"here is {re.escape(here)}\. Install that \(pip install onnxruntime=={built}\)"
    ):
        verify.check_machine(asked)


ORIN = {"arch": platform.machine(), "runtime": "10.3.0", "sm": "8.7", "gpu": "Orin"}


@pytest.mark.usefixtures("nothing_may_run")
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"sm": "10.1", "gpu": "Thor"},
            r"built for SM 8\.7, here is SM 10\.1\. (?s:.*)compile the exported model on this machine",
        ),
        ({"gpu": "Orin Nano"}, "built for the GPU Orin, here is the GPU Orin Nano"),
        ({"runtime": "10.4.0"}, r"proved with tensorrt 10\.3\.0, here is 10\.4\.0\. Install that \(take the JetPack"),
    ],
)
def test_an_engine_of_another_gpu_or_tensorrt_is_refused_before_anything_runs(
    changed: dict[str, str], says: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**ORIN, **changed}
    monkeypatch.setattr(verify, "gpu_facts", lambda: here)
    monkeypatch.setattr(verify, "installed_version", lambda _: here["runtime"])
    _rewrite_compiled(bundle, target="tensorrt", toolchain="tensorrt 10.3.0", built_for=ORIN)

    with pytest.raises(TargetError, match=says):
        verify_bundle(bundle)


def test_an_engine_is_let_through_on_the_gpu_that_it_was_built_on(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "gpu_facts", lambda: ORIN)
    monkeypatch.setattr(verify, "installed_version", lambda _: "10.3.0")

    verify.check_machine(replace(compiled, target="tensorrt", toolchain="tensorrt 10.3.0", built_for=ORIN))


@pytest.mark.usefixtures("nothing_may_run")
def test_without_cuda_an_engine_is_refused_with_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.cuda.candidates", lambda: iter(()))
    monkeypatch.setattr(verify, "installed_version", lambda _: "10.3.0")
    _rewrite_compiled(bundle, target="tensorrt", toolchain="tensorrt 10.3.0", built_for=ORIN)

    with pytest.raises(TargetError, match="libcudart, the CUDA runtime, is not found here"):
        verify_bundle(bundle)


def test_a_portable_bundle_is_for_any_machine_and_its_golden_output_decides(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = portable_bundle(bundle, tmp_path / "portable")
    monkeypatch.setattr(platform, "machine", lambda: "riscv128")
    monkeypatch.setattr(verify, "installed_version", lambda _: "99.0")

    verified = verify_bundle(report.path)

    assert verified["max_abs_delta"] == {"scores": 0.0, "winner": 0.0}
    assert "machine and version: it is for any that runs onnxruntime-cpu" in " ".join(verified["not_checked"])
    before, after = _content(bundle), _content(report.path)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {"MODEL_CARD.md", "manifest.json", "manifest.sha256", "model/compiled.json"}
    assert "for any machine" in after["MODEL_CARD.md"].decode()


def test_a_portable_bundle_needs_its_runtime_all_the_same(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    portable_bundle(bundle, tmp_path / "portable")
    monkeypatch.setattr(verify, "installed_version", lambda _: None)

    with pytest.raises(TargetError, match=r"here is none\. Install that \(pip install onnxruntime\)"):
        verify_bundle(tmp_path / "portable")


@pytest.mark.parametrize("where", ["an extension", "the bundle", "in it"])
def test_a_portable_bundle_takes_no_place_but_that_of_a_bundle(bundle: Path, tmp_path: Path, where: str) -> None:
    extension = tmp_path / "extension"
    extension.mkdir()
    for name in ("manifest.json", "work.js"):
        (extension / name).write_text("{}")
    out = {"an extension": extension, "the bundle": bundle, "in it": bundle / "deep" / "er"}[where]
    before = _content(bundle)

    with pytest.raises((DataError, RecipeError), match="no bundle" if where == "an extension" else "lies in it"):
        portable_bundle(bundle, out)

    assert _content(bundle) == before
    assert sorted(path.name for path in extension.iterdir()) == ["manifest.json", "work.js"]


def test_a_portable_bundle_replaces_a_bundle(bundle: Path, tmp_path: Path) -> None:
    first = portable_bundle(bundle, tmp_path / "portable")

    assert portable_bundle(bundle, tmp_path / "portable") == first


def test_an_engine_has_no_portable_form(bundle: Path, tmp_path: Path) -> None:
    _rewrite_compiled(bundle, target="tensorrt")

    with pytest.raises(TargetError, match="compiled for tensorrt runs only where it was built"):
        portable_bundle(bundle, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()


@pytest.mark.usefixtures("nothing_may_run")
def test_a_bundle_of_a_later_schema_is_refused_before_anything_runs(bundle: Path) -> None:
    _reseal(bundle, schema_version=2)

    with pytest.raises(TargetError, match="schema_version=2"):
        verify_bundle(bundle)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_another_answer_than_the_golden_one_is_refused(wrong: float, bundle: Path) -> None:
    path = bundle / "golden/output-0.npy"
    np.save(path, np.load(path) + np.float32(wrong))
    _reseal(bundle)

    with pytest.raises(IntegrityError, match="output 'scores' differs"):
        verify_bundle(bundle)


def test_the_bundle_verifies_itself_with_its_own_program_and_stays_as_it_was(bundle: Path, pristine: Path) -> None:
    command = [sys.executable, "-I", "edgestill-device.pyz", "verify", "."]
    good = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    untouched = _content(bundle) == _content(pristine)
    (bundle / "MODEL_CARD.md").write_text("Another card.")
    bad = subprocess.run(command, cwd=bundle, capture_output=True, text=True)

    assert (good.returncode, json.loads(good.stdout)["max_abs_delta"]["scores"]) == (0, 0.0)
    assert untouched
    assert (bad.returncode, json.loads(bad.stdout)["exit_code"]) == (5, 5)
    assert "MODEL_CARD.md has changed" in json.loads(bad.stdout)["error"]


def test_messages_have_three_lines_at_most(bundle: Path) -> None:
    (bundle / "extra").write_text("")

    with pytest.raises(EdgestillError) as raised:
        verify_bundle(bundle)
    assert len(str(raised.value).splitlines()) <= 3
