"""The digest of the data: what changes it, and what it costs on a rerun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.learning.sources import digest
from pipeline.learning.sources.digest import data_digest


def test_the_digest_is_of_names_and_contents_wherever_the_data_lie(tmp_path: Path) -> None:
    digests = []
    for place in ("here", "there"):
        (tmp_path / place / "b").mkdir(parents=True)
        paths = [tmp_path / place / "a.png", tmp_path / place / "b" / "c.png"]
        for path in paths:
            path.write_bytes(b"content of " + path.name.encode())
        digests.append(data_digest(reversed(paths), tmp_path / "cache.json"))
    (tmp_path / "there" / "a.png").write_bytes(b"Content of a.png")

    changed = data_digest(paths, tmp_path / "cache.json")

    assert digests[0] == digests[1]
    assert changed != digests[0]


def test_a_rerun_hashes_no_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache_path = tmp_path / "a.png", tmp_path / "cache" / "hashes.json"
    path.write_bytes(b"content")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    first = data_digest([path], cache_path)
    monkeypatch.setattr(digest, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))

    assert data_digest([path], cache_path) == first


def test_a_damaged_cache_is_no_reason_to_trust_or_to_fail(tmp_path: Path) -> None:
    path, cache_path = tmp_path / "a.png", tmp_path / "hashes.json"
    path.write_bytes(b"content")
    first = data_digest([path], cache_path)
    cache_path.write_text(f'{{"{path}": 3}}')

    assert data_digest([path], cache_path) == first


def test_a_digest_imports_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.recipe import DataConfig\n"
        "from pipeline.learning.sources import data_digest, locate\n"
        "paths = locate(DataConfig(source='digits'), offline=True)\n"
        f"print(len(data_digest(paths, Path({str(tmp_path / 'cache.json')!r}))))\n"
        "print({'torch', 'torchvision', 'sklearn', 'mlxtend', 'PIL'} & set(sys.modules))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["64", "set()"]
