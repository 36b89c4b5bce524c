"""What the sources must not do, read from the sources: run code out of a file, or build a command for a shell out of names.

That a recipe, a checkpoint and an array that try to run code are refused is tested where these are read: test_recipe.py,
test_models_weights.py, test_bad_input.py; what a bundle and its archive must stand in test_bundle_tampering.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "targets", "benchmarks")
SOURCES = [*sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "edgestill.py"]

CODE_RUNNERS = {"eval", "exec", "compile", "__import__"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
SHELLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
}
PROCESSES = {
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
}
YAML_LOADERS = {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
}
UNFILTERED = {"shutil.unpack_archive"}


def faults(source: str) -> Iterator[str]:
    """Every line that does what this project does not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {why}" for why in _calls(node))


def _calls(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in CODE_RUNNERS or name in SHELLS or name in YAML_LOADERS or name in UNFILTERED:
        yield f"calls {name}"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if method == "load_state_dict_from_url" and keywords.get("weights_only") != "True":
        yield "load_state_dict_from_url without weights_only=True"
    if keywords.get("allow_pickle", "False") != "False":
        yield "reads or writes pickles in arrays"
    if keywords.get("shell", "False") != "False":
        yield "starts a shell"
    if name in PROCESSES and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
        yield "a command in one text"
    if method in ("extractall", "extract") and keywords.get("filter") != "'data'":
        yield "extracts an archive without the data filter"


def test_no_source_runs_code_from_files_or_builds_shell_commands() -> None:
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text(encoding="utf-8"))) for path in SOURCES}

    assert len(found) > 150
    assert {path: lines for path, lines in found.items() if lines} == {}


BAD = (
    "import pickle",
    "from joblib import load",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.hub.load_state_dict_from_url(url)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.FullLoader)",
    "np.load(path, allow_pickle=True)",
    "eval(text)",
    "os.system(f'rm {name}')",
    "subprocess.run(command, shell=True)",
    "subprocess.run(f'ls {name}')",
    "subprocess.run('ls ' + name)",
    "archive.extractall(out)",
    "archive.extract(member, filter='tar')",
    "shutil.unpack_archive(path)",
)
GOOD = (
    "torch.load(path, map_location='cpu', weights_only=True)",
    "yaml.safe_load(text)",
    "np.load(path, allow_pickle=False)",
    "np.load(path)",
    "model.eval()",
    "re.compile(pattern)",
    "subprocess.run(['ls', name], check=False)",
    "subprocess.run(argv)",
    "archive.extractall(out, members, filter='data')",
)


@pytest.mark.parametrize("source", BAD)
def test_the_check_finds_what_it_is_for(source: str) -> None:
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize("source", GOOD)
def test_the_check_lets_pass_what_is_safe(source: str) -> None:
    assert list(faults(source)) == []


def test_archives_are_extracted_in_one_place() -> None:
    """Whoever needs another: tests/pipeline/test_bundle_tampering.py is what it has to stand."""
    words = (".extractall(", ".extract(", ".extractfile(", "unpack_archive(")
    places = [path for path in SOURCES if any(word in path.read_text(encoding="utf-8") for word in words)]

    assert [path.relative_to(ROOT).as_posix() for path in places] == ["benchmarks/device/archive.py"]


def test_the_report_holds_no_image_of_the_data() -> None:
    """So there is nothing for a flag to leave out: neither templates nor the page's own scripts embed or draw pixels."""
    templates = sorted((ROOT / "benchmarks" / "templates").iterdir())
    texts = {path.name: path.read_text(encoding="utf-8") for path in templates}

    assert "report.html.j2" in texts
    found = [
        (name, word)
        for name, text in texts.items()
        for word in ("<img", "<image", "<canvas", "<picture", "putImageData", "url(", "data:image", "layout_image")
        if word in text
    ]
    assert found == []
