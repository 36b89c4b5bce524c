"""The command line: what each error ends with, one document on stdout, and never a traceback."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from targets import errors
from targets.errors import EdgestillError

Cli = Callable[..., Any]
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "scipy", "yaml", "rich", "plotly", "PIL"}
ERRORS = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, EdgestillError)]


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`edgestill run` raises `error` from its depths."""

    def run_recipe(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.run.run_recipe", run_recipe)


# --- how a command ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_error_of_ours_ends_with_its_exit_code_and_its_words(
    edgestill: Cli, monkeypatch: pytest.MonkeyPatch, error: type[EdgestillError]
) -> None:
    fails_with(monkeypatch, error("given: why not. Do this."))

    ended = edgestill("run", "any.yaml")

    assert (ended.code, ended.out, ended.err) == (error.exit_code, "", "edgestill: given: why not. Do this.\n")


def test_the_exit_codes_are_those_of_the_design() -> None:
    codes = {error.__name__: error.exit_code for error in ERRORS}

    assert codes == {
        "EdgestillError": 1,
        **dict.fromkeys(("RecipeError", "DataError", "ModelError"), 2),
        **dict.fromkeys(("TrainingError", "GateError"), 3),
        "BudgetError": 4,
        **dict.fromkeys(("TargetError", "IntegrityError"), 5),
        "DeviceError": 6,
        "MeasurementError": 7,
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/x.npy"), "/d/x.npy: no space is left on the disk."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space is left on the disk."),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied."),
        (ZeroDivisionError("division\nby zero"), "internal error, ZeroDivisionError: division by zero"),
        (AssertionError(), "internal error, AssertionError: "),
        (MemoryError(), "internal error, MemoryError: "),
        (RecursionError("too deep"), "internal error, RecursionError: too deep"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("as_json", [False, True])
def test_what_nobody_expected_is_a_message_too(
    edgestill: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str, as_json: bool
) -> None:
    fails_with(monkeypatch, error)

    ended = edgestill("run", "any.yaml", *["--json"][:as_json])

    assert ended.code == 1
    assert ended.err.startswith(f"edgestill: {words}")
    assert len(ended.err.splitlines()) <= 3
    if as_json:
        document = json.loads(ended.out)
        assert document["exit_code"] == 1
        assert words in document["error"]


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("a\x1b[2Jb\x1e\r\x85", ["a\\x1b[2Jb\\x1e\\r\\x85"]),
        ("1\n2\n3\n4\n5", ["1", "2", "3 4 5"]),
        ("ä → ✓", ["ä → ✓"]),
    ],
)
def test_what_a_person_gave_is_shown_and_neither_obeyed_nor_let_run_over_three_lines(
    edgestill: Cli, monkeypatch: pytest.MonkeyPatch, given: str, lines: list[str]
) -> None:
    fails_with(monkeypatch, EdgestillError(given))

    ended = edgestill("run", "any.yaml", "--json")

    assert ended.err.removeprefix("edgestill: ").splitlines() == lines
    assert json.loads(ended.out)["error"].splitlines() == lines


def test_ctrl_c_ends_with_130_and_says_that_nothing_is_lost(edgestill: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, KeyboardInterrupt())

    ended = edgestill("run", "any.yaml", "--json")

    assert (ended.code, json.loads(ended.out)["exit_code"]) == (130, 130)
    assert "what was finished is kept" in ended.err


def test_a_real_sigint_to_a_waiting_run_ends_with_130(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "r" / "tiny").mkdir(parents=True)
    code = (
        "import fcntl, signal, sys, os\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job begins with it ignored
        f"held = open({str(tmp_path / 'r' / 'tiny' / '.lock')!r}, 'a+'); fcntl.flock(held, fcntl.LOCK_EX)\n"
        "from pipeline.cli import main\n"
        f"sys.argv = ['edgestill', 'run', {str(tiny_recipe())!r}, '--runs', {str(tmp_path / 'r')!r}]\nmain()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "another run is at work" in process.stderr.readline()

    process.send_signal(signal.SIGINT)

    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "interrupted" in rest.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "r.yaml", "--nope"], "No such option: --nope"),
        (["rum", "r.yaml"], "No such command 'rum'"),
        (["bench", "m.onnx", "--threads", "0"], "'--threads'"),
        (["bench", "m.onnx", "--launches", "many"], "'--launches'"),
        (["quantize", "m.onnx"], "Missing option '--calibration'"),
        (["quantize", "m.onnx", "--calibration", "d", "--mean", "grey"], "grey: not numbers separated by commas"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2_in_one_line(
    edgestill: Cli, argv: list[str], words: str
) -> None:
    ended = edgestill(*argv, "--json")

    assert ended.code == 2
    assert json.loads(ended.out)["exit_code"] == 2
    assert words in ended.err
    assert len(ended.err.splitlines()) == 1
    assert "--help" in ended.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--until", "distil"], "--until distil: there is no such stage. Stages: data, teacher, distill"),
        (["--force", "train"], "--force train: there is no such stage."),
        (["--set", "targets.0.name=onnxruntime"], "Did you mean 'onnxruntime-cpu'?"),
        (["--set", "targets.0.name=tpu"], "Known: openvino-cpu, onnxruntime-cpu"),
        (["--set", "targets.0.options={threads: 2}"], "Did you mean 'num_threads'?"),
        (["--set", "targets.0.device=orin"], "device 'orin': there is no devices.yaml"),
        (["--set", "data.source=digit"], "digit"),
        (["--set", "data.sauce=digits"], "did you mean 'source'?"),
        (["--set", "teacher.checkpoint=none.safetensors"], "checkpoint none.safetensors: there is no such file"),
        (["--set", "teacher.model=resnet21"], "resnet21"),
        (["--set", "teacher.args={width: [1]}"], "width"),
        (["--set", "distill.loss='python:os:getcwd'", "--set", "distill.kd_weight=0.5"], "--allow-code"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_with_what_to_do(
    edgestill: Cli, tiny_recipe: Callable[..., Path], tmp_path: Path, argv: list[str], words: str
) -> None:
    ended = edgestill("run", tiny_recipe(), "--runs", tmp_path / "r", "--set", "teacher.train.epochs=1", *argv)

    assert ended.code == 2
    assert words in ended.err
    refusal = ended.err[ended.err.index("edgestill: ") :]
    assert len(refusal.splitlines()) <= 3


def test_targets_and_devices_are_refused_before_anything_is_trained_for_them(
    edgestill: Cli, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    for change in ("targets.0.name=tpu", "targets.0.device=orin"):
        edgestill("run", tiny_recipe(), "--runs", tmp_path / "r", "--set", change)

    assert not (tmp_path / "r").exists()


# --- help, version, recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["--version"], ["recipe", "validate", "-h"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        f"import sys; from pipeline import cli; sys.argv = ['edgestill', *{argv!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print(sorted({HEAVY} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
    assert "edgestill" in done.stdout


def test_without_a_verb_the_help_is_shown_on_stderr(edgestill: Cli) -> None:
    ended = edgestill()

    assert (ended.code, ended.out) == (2, "")
    assert "quantize" in ended.err
    assert edgestill("recipe").err == "edgestill: Missing command. See: edgestill recipe --help.\n"


def test_validate_prints_a_recipe_that_is_valid_itself(
    edgestill: Cli, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    resolved = tmp_path / "resolved.json"
    resolved.write_text(edgestill("recipe", "validate", tiny_recipe(), "--set", "seed=7", "--json").out)

    again = edgestill("recipe", "validate", resolved, "--json")

    assert (again.code, json.loads(again.out)["seed"]) == (0, 7)
    assert json.loads(again.out) == json.loads(resolved.read_text())


def test_the_schema_knows_every_section(edgestill: Cli) -> None:
    assert {"data", "teacher", "distill", "targets"} <= json.loads(edgestill("recipe", "schema").out)[
        "properties"
    ].keys()


def test_init_writes_a_recipe_once(edgestill: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"

    assert edgestill("recipe", "init", path).code == 0
    assert edgestill("recipe", "validate", path).code == 0
    before = path.read_text()
    assert edgestill("recipe", "init", path, "--data", "digits").code == 2
    assert path.read_text() == before


def test_the_report_of_a_finished_run_is_drawn_again_from_its_json(finished: Any, edgestill: Cli) -> None:
    page = finished.dir / "report" / "index.html"
    whole = page.read_text()
    page.write_text("lost")

    ended = edgestill("report", finished.dir)

    assert ended.code == 0
    assert page.read_text() == whole


def test_a_run_that_has_no_report_yet_is_refused(edgestill: Cli, tmp_path: Path) -> None:
    ended = edgestill("report", tmp_path)

    assert ended.code != 0
    assert "summary.json" in ended.err
    assert len(ended.err.splitlines()) <= 3


# --- whatever is given -------------------------------------------------------------------------------------------------

keys = st.sampled_from(
    [
        *(
            "seed",
            "name",
            "data",
            "data.source",
            "data.validation",
            "data.calibration",
            "teacher.train.epochs",
            "targets",
        ),
        *("teacher.model", "teacher.args", "distill.temperature", "distill.curriculum", "quantize.method", "targets.0"),
        *(
            "targets.0.name",
            "targets.0.options",
            "targets.0.device",
            "targets.0.budget.p50_ms",
            "bench.launches",
            "gate",
        ),
        *("schema_version", "data.augment.crop", "x", "targets.-1", "targets.1", "seed.0", "data.source.x", "..", ""),
    ]
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
values = st.one_of(
    texts,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["[]", "{}", "{a: b}", "[1, 2]", "null", "true", ".nan", "-.inf", "1e999", "!!python/name:os.system", "&a [*a]"]
    ),
)


@given(st.lists(st.tuples(keys, values), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_override_is_taken_or_refused_in_three_lines(
    edgestill: Cli, tiny_recipe: Callable[..., Path], tmp_path: Path, changes: list[tuple[str, str]]
) -> None:
    sets = [part for key, value in changes for part in ("--set", f"{key}={value}")]

    ended = edgestill("run", tiny_recipe(), "--runs", tmp_path / "r", "--dry-run", "--offline", "--json", *sets)

    assert ended.code in (0, 2), ended.err
    assert json.loads(ended.out)["exit_code"] == ended.code
    assert "Traceback" not in ended.err
    assert "internal error" not in ended.err
    assert ended.code == 0 or len(ended.err[ended.err.index("edgestill: ") :].splitlines()) <= 3


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    documents | st.dictionaries(st.sampled_from(["name", "data", "teacher", "distill", "targets", "seed"]), documents)
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_yaml_document_is_a_recipe_or_refused_in_three_lines(
    edgestill: Cli, tmp_path: Path, document: object
) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")

    ended = edgestill("recipe", "validate", path)

    assert ended.code == 2, ended.err
    assert "internal error" not in ended.err
    assert 1 <= len(ended.err.splitlines()) <= 3


@given(st.binary(max_size=60))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_recipe_are_refused_in_three_lines(edgestill: Cli, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)

    ended = edgestill("run", path, "--runs", tmp_path / "r")

    assert ended.code == 2, ended.err
    assert "internal error" not in ended.err
    assert 1 <= len(ended.err.splitlines()) <= 3
    assert not (tmp_path / "r").exists()
