"""The packed program as a device runs it: a process of its own, JSON out, no traceback."""

import ast
import errno
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.device import __main__ as program_main
from benchmarks.device import measure, sampler
from benchmarks.device.__main__ import main
from benchmarks.device.record import HARNESS_VERSION
from benchmarks.device.sampler import CPU, Probe
from benchmarks.devices import Local, run_program
from benchmarks.pack import MAIN, pack_device_program
from targets import make_target
from targets.base import CompiledModel, Exported
from targets.errors import DeviceError, MeasurementError, TargetError

pytestmark = pytest.mark.integration

DEVICE = Local()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_device_program(tmp_path_factory.mktemp("program") / "edgestill-device.pyz")


def _answer(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    exit_code = main(argv)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return exit_code, json.loads(captured.out)


def test_the_same_sources_give_the_same_bytes(program: Path, tmp_path: Path) -> None:
    assert pack_device_program(tmp_path / "again.pyz").read_bytes() == program.read_bytes()


def test_holds_only_what_a_device_needs_in_syntax_that_python_310_reads(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        names = archive.namelist()
        trees = {name: ast.parse(archive.read(name), feature_version=(3, 10)) for name in names}

    assert {"__main__.py", "targets/base.py", "benchmarks/device/measure.py"} <= set(names)
    assert not [
        name for name in names if name.startswith(("pipeline", "targets/lint")) or name == "benchmarks/bench.py"
    ]
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names}
    for name, tree in trees.items():
        ours = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert {module for module in ours if module.split(".")[0] in ("targets", "benchmarks")} <= modules, name


def test_imports_nothing_beyond_numpy_before_a_runtime_is_asked_for(program: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import benchmarks.device.__main__, benchmarks.device.measure, benchmarks.device.verify;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script, program], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "scipy", "pydantic", "onnx", "onnxruntime", "openvino", "pipeline", "PIL"}


def test_an_old_python_or_one_without_numpy_gets_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(f"import sys\nsys.version_info = (3, 8)\n{MAIN}")
    old = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True)
    script.with_name("bare.py").write_text(MAIN)
    bare = subprocess.run([sys.executable, "-I", "-S", script.with_name("bare.py")], capture_output=True, text=True)

    assert (old.returncode, bare.returncode) == (5, 5)
    assert "needs 3.10 or newer" in json.loads(old.stdout)["error"]
    assert "pip install numpy" in json.loads(bare.stdout)["error"]


def test_compiles_places_and_evaluates_in_processes_of_its_own(
    program: Path, exported: Exported, evaluation_dir: Path, tmp_path: Path
) -> None:
    built, out = tmp_path / "built", tmp_path / "answers"
    options = ["--target", "onnxruntime-cpu", "--options", '{"num_threads": 1}']
    argv = ["compile", "--exported", str(exported.directory), *options, "--precision", "fp32", "--out", str(built)]
    compiled = run_program(DEVICE, str(program), argv)
    answer = run_program(
        DEVICE,
        str(program),
        ["evaluate", "--compiled", str(built), "--evaluation", str(evaluation_dir), "--out", str(out)],
    )
    placement = run_program(DEVICE, str(program), ["placement", "--compiled", str(built)])

    assert compiled["files"] == CompiledModel.load(built).files
    assert answer == {"outputs": {"logits": "logits.npy"}, "num_samples": 7, "batch": 1}
    assert np.load(out / "logits.npy").shape == (7, 3)
    assert [layer["macs"] for layer in placement["layers"]] == [16 * 3]


@pytest.mark.parametrize("batch", [1, 4, 7, 20])
def test_every_sample_is_answered_once_whatever_the_batch(
    batch: int, compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--compiled", str(compiled.directory), "--evaluation", str(evaluation_dir), "--out", str(tmp_path)]

    exit_code, answer = _answer(["evaluate", *paths, "--batch", str(batch)], capsys)

    x_NP = np.load(evaluation_dir / "x-000.npy").reshape(7, -1).astype(np.float32)
    weights_PK = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    assert (exit_code, answer["batch"]) == (0, batch)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), x_NP @ weights_PK, rtol=1e-4, atol=1e-3)


def test_raw_bytes_give_the_answers_of_their_pixels(
    compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--compiled", str(compiled.directory), "--evaluation", str(evaluation_dir)]
    for source in ("shards", "encoded"):
        _answer(["evaluate", *paths, "--source", source, "--out", str(tmp_path / source)], capsys)

    from_pixels, from_bytes = (np.load(tmp_path / source / "logits.npy") for source in ("shards", "encoded"))
    np.testing.assert_array_equal(from_bytes, from_pixels[:2])


def test_an_unknown_target_and_a_wrong_command_line_are_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["probe", "--target", "openvin0-cpu"],
        ["probe"],
        ["fly"],
        ["probe", "--target", "x", "--options", "[]"],
    ):
        exit_code, answer = _answer(argv, capsys)

        assert exit_code == answer["exit_code"] == 2


def test_a_model_that_is_not_there_is_named_with_exit_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, answer = _answer(["placement", "--compiled", str(tmp_path)], capsys)

    assert exit_code == 5
    assert "compiled.json" in answer["error"]


def test_a_fault_of_our_own_is_one_line_with_exit_1(
    compiled: CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "measure",
        "--compiled",
        str(compiled.directory),
        "--out",
        str(tmp_path / "absent" / "samples.npy"),
        "--short",
    ]

    exit_code, answer = _answer(argv, capsys)

    assert exit_code == 1
    assert answer["error"].startswith("FileNotFoundError")


def test_a_full_disk_there_is_named_with_exit_6(
    compiled: CompiledModel, evaluation_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logits.npy").symlink_to("/dev/full")  # refuses every write with ENOSPC
    paths = ["--compiled", str(compiled.directory), "--evaluation", str(evaluation_dir), "--out", str(tmp_path)]

    exit_code, answer = _answer(["evaluate", *paths], capsys)

    assert exit_code == answer["exit_code"] == DeviceError.exit_code
    assert answer["error"].startswith("no space is left on the device's disk")
    assert answer["error"].endswith("Make room there, then run the same again.")


@pytest.mark.parametrize(
    "error",
    [
        OSError("300000 requested and 76768 written"),  # numpy: no number
        OSError(errno.EDQUOT, "Disk quota exceeded", "/there/x.npy"),
        RuntimeError("model.cc:12 write failed: No space left on device"),  # a runtime, from C++
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_told_from_a_fault_whoever_finds_it_full(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(arguments: object) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(program_main, "_environment", full)

    exit_code, answer = _answer(["environment"], capsys)

    assert exit_code == DeviceError.exit_code
    assert "no space is left" in answer["error"]
    assert str(error) in answer["error"]


def test_a_launch_that_is_slowed_on_purpose_waits_in_every_call_and_says_so(
    compiled: CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["measure", "--compiled", str(compiled.directory), "--out", str(tmp_path / "s.npy"), "--short"]

    exit_code, answer = _answer([*argv, "--inject-us", "2000"], capsys)

    assert exit_code == 0
    assert np.load(tmp_path / "s.npy").min() >= 2_000_000
    assert "injected: a busy wait of 2000 us in every timed call, on purpose. Never ship on this" in answer["flags"]
    assert set(answer["overhead"]) == {"null_us", "null_wall_us", "closure_us", "spin_100_us", "spin_1000_us"}
    assert answer["overhead"]["null_us"] == answer["overhead_us"]


@pytest.mark.parametrize("dies", [True, False])
def test_a_launch_is_whole_whatever_becomes_of_its_sampler(
    dies: bool,
    compiled: CompiledModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "khz").write_text("2000000")
    monkeypatch.setattr(measure, "probes", lambda root: [Probe(CPU, tmp_path / "khz", 1e-3)])
    if dies:
        monkeypatch.setattr(
            sampler, "_command", lambda probes: [sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"]
        )
    argv = ["measure", "--compiled", str(compiled.directory), "--out", str(tmp_path / "s.npy")]

    exit_code, answer = _answer(argv, capsys)

    assert (exit_code, answer["n"]) == (0, len(np.load(tmp_path / "s.npy")))
    if dies:
        assert any(flag.startswith("sampler: ended by itself with 3") for flag in answer["flags"])
        assert (answer["telemetry"]["clk_min_mhz"], answer["telemetry"]["num_sampled"]) == (None, None)
    else:
        told = [flag for flag in answer["flags"] if flag.startswith("sampler: ")]
        assert answer["telemetry"]["clk_min_mhz"] == 2000.0 or told


@pytest.mark.parametrize("wait", ["-1", "2e6", "nan", "soon"])
def test_a_wait_that_cannot_be_is_refused(
    wait: str, compiled: CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["measure", "--compiled", str(compiled.directory), "--out", str(tmp_path / "s.npy"), f"--inject-us={wait}"]

    assert _answer(argv, capsys)[0] == 2


@pytest.mark.parametrize("arena", [True, False])
def test_memory_is_read_with_the_arena_as_asked(
    arena: bool, compiled: CompiledModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--options", json.dumps({"arena": arena})]

    exit_code, answer = _answer(["memory", "--compiled", str(compiled.directory), *options], capsys)

    assert (exit_code, answer["memory"]["arena"]) == (0, arena)
    assert answer["memory"]["vmhwm_mib"] > 0
    assert answer["memory"]["gpu_mib"] is None
    assert any(flag.startswith("gpu_mib: ") for flag in answer["flags"])


@pytest.mark.parametrize("arena", [True, False])
def test_the_arena_of_onnx_runtime_is_as_asked(arena: bool, compiled: CompiledModel) -> None:
    session = make_target("onnxruntime-cpu", {"arena": arena}).load(compiled)

    assert session._session.get_session_options().enable_cpu_mem_arena is arena


def test_what_a_runtime_prints_does_not_disturb_the_answer(program: Path, tmp_path: Path) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import benchmarks.device.__main__ as program\n"
        "parse = program._parser\n"
        "def noisy():\n"
        "    os.write(1, b'a runtime says hello')\n"
        "    return parse()\n"
        "program._parser = noisy\n"
        "sys.exit(program.run())\n"
    )
    done = subprocess.run([sys.executable, "-I", script, program, "environment"], capture_output=True, text=True)

    assert json.loads(done.stdout)["hard"]["harness"] == HARNESS_VERSION
    assert "hello" in done.stderr


def test_the_devices_words_reach_the_host_in_the_matching_error(
    program: Path, compiled: CompiledModel, tmp_path: Path
) -> None:
    measured = [
        "measure",
        "--compiled",
        str(compiled.directory),
        "--out",
        str(tmp_path / "x.npy"),
        "--boundary",
        "host_e2e",
    ]

    with pytest.raises(TargetError, match=r"local: .*compiled\.json"):
        _raise_as_host(program, ["placement", "--compiled", str(tmp_path)])
    with pytest.raises(MeasurementError, match="no evaluation set"):
        _raise_as_host(program, measured)
    with pytest.raises(DeviceError, match="target 'nothing' is not known"):
        _raise_as_host(program, ["probe", "--target", "nothing"])


def _raise_as_host(program: Path, argv: Sequence[str]) -> None:
    run_program(DEVICE, str(program), argv)


def test_a_process_that_dies_or_hangs_or_is_not_there_is_a_device_error(tmp_path: Path) -> None:
    dying, hanging = tmp_path / "dying.py", tmp_path / "hanging.py"
    dying.write_text("import os; os.kill(os.getpid(), 9)")
    hanging.write_text("import threading; threading.Event().wait()")

    with pytest.raises(DeviceError, match="killed by signal 9"):
        run_program(DEVICE, str(dying), ["measure"])
    with pytest.raises(DeviceError, match=r"did not end within 0\.5 s"):
        run_program(DEVICE, str(hanging), ["measure"], timeout_s=0.5)
    with pytest.raises(DeviceError, match="cannot be started"):
        run_program(Local(python=str(tmp_path / "no-python")), str(dying), ["measure"])
