"""From a compiled directory to a profile with its peaks, and into profiles.json. The device program runs in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.peak
import benchmarks.profile
from benchmarks.dense import Convolution, MatMul
from benchmarks.device.__main__ import main
from benchmarks.device.environment import fingerprint
from benchmarks.devices import COMMAND_TIMEOUT_S, Completed, Local
from benchmarks.profile import add_to_records, arms_of, profile_compiled
from benchmarks.profile_report import Profile
from targets.base import CompiledModel, read_json
from targets.errors import DataError, IntegrityError, MeasurementError, RecipeError

pytestmark = pytest.mark.integration


@dataclass(frozen=True, kw_only=True)
class InProcess(Local):
    """This machine without a process a command."""

    def run(self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Completed:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(argv[3:])
        return Completed(code, out.getvalue(), "")


@pytest.fixture(autouse=True)
def tiny_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peak, "LEVELS", ((Convolution(16, 8), MatMul(64)),))


def profiled(directory: Path, cache_dir: Path, *, said: list[str] | None = None, strict: bool = False) -> Profile:
    lines: list[str] = []
    return profile_compiled(
        InProcess(),
        "",
        directory,
        preset="smoke",
        cache_dir=cache_dir,
        strict=strict,
        say=(lines if said is None else said).append,
    )


@pytest.fixture(scope="module")
def found(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.peak, "LEVELS", ((Convolution(16, 8), MatMul(64)),))
        return profiled(compiled.directory, tmp_path_factory.mktemp("cache"))


def test_a_compiled_model_gets_its_layers_and_the_peak_of_each_precision_that_ran(found: Profile) -> None:
    assert found.macs == {"fp32": 48}
    assert [peak.precision for peak in found.peaks] == ["fp32"]
    assert found.share_of_peak is not None
    assert found.share_of_peak > 0
    assert "share of peak compute:" in found.text()
    assert found.failure is None


def test_the_peak_is_kept_for_the_next_profile(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "peaks").mkdir()
    first = profiled(compiled.directory, tmp_path)
    (path,) = (tmp_path / "peaks").iterdir()
    kept = read_json(path)
    kept["peak"]["psi_cpu"] = 0.0  # whatever else this machine does while tests run
    benchmarks.peak.write_json(path, kept)

    second = profiled(compiled.directory, tmp_path)

    assert (first.peaks[0].cached, second.peaks[0].cached) == (False, True)
    assert second.peaks[0].gops == first.peaks[0].gops


def test_what_is_measured_next_is_said(compiled: CompiledModel, tmp_path: Path) -> None:
    said: list[str] = []

    profiled(compiled.directory, tmp_path, said=said)

    assert said == ["layers of linear", "peak of fp32"]


def test_a_changed_file_is_refused_as_such(compiled: CompiledModel, tmp_path: Path) -> None:
    for name in ("compiled.json", *compiled.files):
        (tmp_path / name).write_bytes((compiled.directory / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"another")

    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        profiled(tmp_path, tmp_path)


def test_an_unknown_preset_is_refused(compiled: CompiledModel) -> None:
    with pytest.raises(RecipeError, match="--preset quick"):
        profile_compiled(InProcess(), "", compiled.directory, preset="quick")


@pytest.mark.parametrize(("psi_cpu", "fails"), [(None, False), (4.0, False), (40.0, True)])
def test_strict_ends_with_7_where_other_work_was_in_the_way(psi_cpu: float | None, fails: bool, found: Profile) -> None:
    judged = benchmarks.profile.strictly(replace(found, psi_cpu=psi_cpu), strict=True)

    assert isinstance(judged.failure, MeasurementError) is fails
    assert judged.to_json()["exit_code"] == (7 if fails else 0)
    assert benchmarks.profile.strictly(replace(found, psi_cpu=psi_cpu), strict=False).failure is None


def stored(arm: str, directory: Path, compiled: CompiledModel, *, digest: str | None = None) -> SimpleNamespace:
    model = SimpleNamespace(sha256=digest or fingerprint(compiled.files))
    runtime = SimpleNamespace(name=compiled.target, flags=dict(compiled.options))
    return SimpleNamespace(arm=arm, directory=directory, record=SimpleNamespace(model=model, runtime=runtime))


def test_a_profile_is_kept_beside_the_record_of_the_same_files_and_leaves_others_alone(
    compiled: CompiledModel, found: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [stored("fp32", tmp_path, compiled), stored("int8", tmp_path, compiled, digest="another")]
    monkeypatch.setattr(benchmarks.profile, "load_records", lambda _: records)
    benchmarks.peak.write_json(tmp_path / "profiles.json", {"int8": {"kept": True}})

    add_to_records(found, arms_of(compiled, tmp_path))

    profiles = read_json(tmp_path / "profiles.json")
    assert profiles["int8"] == {"kept": True}
    assert profiles["fp32"]["share_of_peak"] == found.share_of_peak
    assert profiles["fp32"]["layers"][0].keys() >= {"name", "op", "precision", "macs", "time_us"}


def test_records_of_other_options_are_not_of_the_same_model(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.profile, "load_records", lambda _: [stored("fp32", tmp_path, compiled)])

    with pytest.raises(DataError, match="no record of linear"):
        arms_of(replace(compiled, options={"num_threads": 7}), tmp_path)
