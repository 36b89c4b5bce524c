"""docker/ as it is written: who runs, what is pinned, what ships, what can enter a context. Nothing is built."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from benchmarks.evidence.images import IMAGES, main
from benchmarks.pack import pack_device_program
from targets.base import read_json

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
LOCKS = sorted((ROOT / "docker").glob("*.lock"))
PIN = re.compile(
    r"^([A-Za-z0-9_.-]+)==([^\s;]+)(?: ; [^\\]+?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)

each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(INSTRUCTION, the rest) of a Dockerfile, lines put together, comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), " ".join(rest.split())


def what_ships(path: Path) -> list[tuple[str, str]]:
    """The instructions of the last stage."""
    found = list(instructions(path))
    last = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


def values(path: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == word]


def pins(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Package -> version and hashes; where it stands twice, for two Pythons, the one for Python 3.11."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for name, version, hashes in PIN.findall(path.read_text(encoding="utf-8")):
        found.setdefault(name, (version, frozenset(re.findall(r"[0-9a-f]{64}", hashes))))
    return found


def test_there_are_the_three_images() -> None:
    assert [path.stem for path in DOCKERFILES] == ["device", "jetson", "train"]
    assert {image.dockerfile for image in IMAGES.values()} == set(DOCKERFILES)


@each_dockerfile
def test_what_ships_runs_as_a_user_by_number_that_is_not_root(path: Path) -> None:
    users = [rest for word, rest in what_ships(path) if word == "USER"]

    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d*:\d+", users[0])  # by number: a cluster's runAsNonRoot can check it


@each_dockerfile
def test_what_ships_is_copied_and_nothing_is_run_for_it(path: Path) -> None:
    words = [word for word, _ in what_ships(path)]

    assert not {"RUN", "ADD", "VOLUME", "EXPOSE"} & set(words)
    assert [rest for word, rest in what_ships(path) if word == "FROM"] == ["${BASE}"]
    assert words.count("ENTRYPOINT") == words.count("STOPSIGNAL") == 1


@each_dockerfile
def test_a_base_is_pinned_by_digest_or_has_to_be_named(path: Path) -> None:
    bases = dict(rest.partition("=")[::2] for rest in values(path, "ARG") if "BASE" in rest)

    assert bases["BASE"] or path.stem == "jetson"  # of another JetPack its engines would be refused
    for value in filter(None, bases.values()):
        assert value == "${BASE}" or re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", value)
    assert all(
        re.fullmatch(r"(--platform=\$\{BUILDPLATFORM\} )?\$\{\w+\}( AS \w+)?", rest) for rest in values(path, "FROM")
    )


@each_dockerfile
def test_nothing_is_fetched_but_by_hash_through_a_persons_own_settings(path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    assert not values(path, "ADD")
    assert not re.search(r"https?://|\b[\w-]+\.(?:com|dev|io|net|org)\b", written)
    assert not re.search(r"\b(?:curl|wget|git clone|apt-get|latest)\b", written)
    for rest in values(path, "RUN"):
        if re.search(r"pip install", rest) and "--offline" not in rest:
            assert "--require-hashes" in rest
            assert "--mount=type=secret,id=ca" in rest


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_holds_hashes_and_the_versions_that_are_tested(path: Path) -> None:
    tested, here = pins(ROOT / "requirements.lock"), pins(path)

    packages = re.findall(r"^([A-Za-z0-9_.-]+)==", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert here
    assert set(packages) == set(here)
    assert {name: pin for name, pin in here.items() if name in tested} == {
        name: tested[name] for name in here if name in tested
    }
    assert here.keys() - tested.keys() <= {"uv"}


def test_one_command_makes_every_lock_anew() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = makefile.partition("\nlock:")[2].partition("\n\n")[0].splitlines()[1:]

    made = {command.rpartition(" -o ")[2]: command.split()[1] for command in commands}
    assert made.pop("requirements.lock") == "pyproject.toml"
    assert made == {f"docker/{path.name}": f"docker/{path.stem}.in" for path in LOCKS}
    assert all("-c requirements.lock" in command for command in commands[1:])


def test_uv_is_the_one_that_makes_the_environment() -> None:
    (version,) = re.findall(r"'uv==([\d.]+)'", (ROOT / "Makefile").read_text(encoding="utf-8"))

    assert pins(ROOT / "docker" / "build.lock")["uv"][0] == version


@each_dockerfile
def test_labels_name_the_version_and_the_licence(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (labels,) = [rest for word, rest in what_ships(path) if word == "LABEL"]

    assert f'image.version="{project["version"]}"' in labels
    assert f'image.licenses="{project["license"]}"' in labels


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches it, or a folder above it, decides."""
    out = False
    above = [name, *(str(parent) for parent in Path(name).parents if parent != Path())]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            tried = [Path(path).name for path in above] if "**/" in line else above
            out = not line.startswith("!") if any(fnmatch(path, pattern) for path in tried) else out
    return out


@pytest.mark.parametrize(
    "name",
    [".git/config", ".venv/bin/python", "build/arm/root/etc/passwd", "data/t10k", "runs/quickstart/teacher", "key.pem", ".env",
     "devices.yaml", "targets/__pycache__/base.cpython-311.pyc", "tests/arm/conftest.py", "docs/images.md"],
)  # fmt: skip
def test_no_run_environment_data_or_key_enters_a_context(name: str) -> None:
    assert ignored(name)


@each_dockerfile
def test_what_is_copied_enters_it(path: Path) -> None:
    sources = [
        name
        for rest in values(path, "COPY")
        if "--from" not in rest
        for name in rest.split()[:-1]
        if not name.startswith("--")
    ]

    assert sources
    for name in sources:
        assert (ROOT / name).exists()
        assert not ignored(name)


def test_the_program_is_packed_without_numpy_as_it_is_everywhere_else(tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-m", "benchmarks.pack", str(tmp_path / "image.pyz")]  # -S: no site-packages

    subprocess.run(bare, check=True, cwd=ROOT)

    assert (tmp_path / "image.pyz").read_bytes() == pack_device_program(tmp_path / "here.pyz").read_bytes()


def test_a_machine_that_cannot_build_them_is_told_which_packages_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    exit_code = main(["device", "--out", str(tmp_path / "images.json")])

    assert exit_code == 5
    assert "apt-get install buildah debootstrap" in capsys.readouterr().err
    assert not (tmp_path / "images.json").exists()


def test_every_image_that_was_tried_ran_as_its_user_and_without_build_tools() -> None:
    document = read_json(ROOT / "docs" / "results" / "images.json")
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")

    assert document["images"].keys() == IMAGES.keys()
    for name, found in document["images"].items():
        (user,) = values(IMAGES[name].dockerfile, "USER")
        assert found["user"] == user == f"{found['uid']}:{found['gid']}"
        assert found["may_write"] == ["/home/edgestill"]
        assert [run["argv"] for run in found["runs"]] == [check.shown for check in IMAGES[name].checks]
        assert [run["exit_code"] for run in found["runs"]] == [check.exit_code for check in IMAGES[name].checks]
        assert f"| {name} |" in page
    assert [document["images"][name]["tools"] for name in ("device", "device-arm64", "jetson")] == [[], [], []]
