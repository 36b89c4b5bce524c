"""Whatever is done to a bundle on its way, folder or archive, it is refused by the file's name before a runtime sees it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.device import verify
from benchmarks.device.archive import extract_archive
from benchmarks.device.verify import MANIFEST, SEAL, seal_of, verify_bundle
from pipeline.bundles import pack_bundle
from targets.base import read_json, sha256_file, write_json
from targets.errors import EdgestillError, IntegrityError, TargetError

COMMITTED = Path(__file__).parents[1] / "fixtures" / "bundle-quickstart"
FILES = sorted(path.relative_to(COMMITTED).as_posix() for path in COMMITTED.rglob("*") if path.is_file())
Tamper = Callable[[Path, Path], None]


@pytest.fixture(autouse=True)
def nothing_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a runtime was asked")

    monkeypatch.setattr(verify, "make_target", refuse)
    monkeypatch.setattr(verify, "check_machine", refuse)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(COMMITTED, tmp_path / "bundle"))


def _truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def _extend(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _remove(path: Path, _: Path) -> None:
    path.unlink()


def _rename(path: Path, _: Path) -> None:
    path.rename(path.with_name(f"{path.name}.bak"))


def _case(path: Path, _: Path) -> None:
    path.rename(path.with_name(path.name.swapcase()))


def _link_outside(path: Path, aside: Path) -> None:
    path.rename(aside)
    path.symlink_to(aside)


def _link_inside(path: Path, _: Path) -> None:
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")


def _dangling(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to(aside / "nowhere")


def _folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def _folder_with_the_file_in_it(path: Path, aside: Path) -> None:
    path.rename(aside)
    path.mkdir()
    aside.rename(path / path.name)


TAMPERS = (
    *(_truncate, _empty, _extend, _remove, _rename, _case, _link_outside, _link_inside, _dangling),
    *(_folder, _folder_with_the_file_in_it),
)


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda tamper: tamper.__name__[1:])
@pytest.mark.parametrize("name", FILES)
def test_any_file_that_is_not_as_written_is_named(name: str, tamper: Tamper, bundle: Path, tmp_path: Path) -> None:
    tamper(bundle / name, tmp_path / "aside")

    with pytest.raises(IntegrityError) as raised:
        verify_bundle(bundle)

    named = Path(str(raised.value).split()[0])
    kept = {"kept", f"{Path(name).name}.bak", Path(name).name.swapcase()}
    sealed = {MANIFEST} if name == SEAL else set()
    assert named.name in {Path(name).name} | kept | sealed, raised.value
    assert len(str(raised.value).splitlines()) <= 3


def test_two_files_that_change_places_are_named(bundle: Path) -> None:
    (bundle / "golden/input.npy").rename(bundle / "aside")
    (bundle / "golden/output.npy").rename(bundle / "golden/input.npy")
    (bundle / "aside").rename(bundle / "golden/output.npy")

    with pytest.raises(IntegrityError, match=r"golden/input\.npy has changed"):
        verify_bundle(bundle)


# --- a manifest that agrees with itself: its seal proves no author, so what it names is not trusted --------------------------


def _reseal(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest and the seal, as anybody may who has no key."""
    manifest = read_json(bundle / MANIFEST)
    manifest["files"] = {name: sha256_file(bundle / name) for name in manifest["files"] if (bundle / name).is_file()}
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    (bundle / SEAL).write_bytes(seal_of(bundle))


OUTSIDE = (
    "../outside",
    "/etc/hostname",
    "model/../../outside",
    "./model/model.onnx",
    "model//model.onnx",
    "..",
    "a\\b",
    "a\nb",
    "",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_path_outside_is_refused(name: str, bundle: Path) -> None:
    (bundle.parent / "outside").write_text("a file of the person's")
    digest = sha256_file(bundle.parent / "outside")

    _reseal(bundle, lambda manifest: manifest["files"].update({name: digest}))

    with pytest.raises(IntegrityError, match=r"manifest\.json is none of ours: manifest\.files: the name"):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "golden/../../outside.npy", "model/model.onnx"])
def test_a_golden_array_outside_its_folder_is_refused(name: str, bundle: Path) -> None:
    _reseal(
        bundle, lambda manifest: manifest["golden"]["inputs"].update(dict.fromkeys(manifest["golden"]["inputs"], name))
    )

    with pytest.raises(IntegrityError, match=r"manifest\.golden\.inputs"):
        verify_bundle(bundle)


def test_a_golden_array_that_is_not_listed_is_refused(bundle: Path) -> None:
    _reseal(
        bundle,
        lambda manifest: manifest["golden"]["outputs"].update(
            dict.fromkeys(manifest["golden"]["outputs"], "golden/x.npy")
        ),
    )

    with pytest.raises(IntegrityError, match=r"does not list golden/x\.npy"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    "files",
    [{"../../outside": "0" * 64}, {"/etc/hostname": "0" * 64}, {}, None, ["model.onnx"]],
    ids=["parent", "absolute", "none", "null", "list"],
)
def test_a_description_that_names_other_files_than_those_beside_it_is_refused(files: Any, bundle: Path) -> None:
    path = bundle / "model/compiled.json"
    write_json(path, {**read_json(path), "files": files})
    _reseal(bundle, lambda _: None)

    with pytest.raises(IntegrityError, match=r"compiled\.json does not describe the files beside it"):
        verify_bundle(bundle)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', '{"schema_version": NaN}', "[" * 20_000, "\ud800"])
def test_a_manifest_that_is_no_json_object_is_refused(text: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    (bundle / SEAL).write_bytes(seal_of(bundle))

    with pytest.raises((IntegrityError, TargetError), match=r"manifest\.json"):
        verify_bundle(bundle)


def test_a_tolerance_that_lets_everything_pass_is_refused(bundle: Path) -> None:
    _reseal(bundle, lambda manifest: manifest["golden"].update(tolerance={"logits": float("inf")}))

    with pytest.raises(IntegrityError, match="Infinity is no number"):
        verify_bundle(bundle)


@pytest.mark.parametrize("field", ["inputs", "toolchain", "options", "name"])
def test_a_description_with_a_key_less_is_refused(field: str, bundle: Path) -> None:
    path = bundle / "model/compiled.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != field})
    _reseal(bundle, lambda _: None)

    with pytest.raises(IntegrityError, match=r"compiled\.json describes no compiled model"):
        verify_bundle(bundle)


# --- archives ----------------------------------------------------------------------------------------------------------------


def _members(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _link(name: str, kind: bytes, target: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


GOOD = (tarfile.TarInfo("bundle/good"), b"good")
BAD_MEMBERS = {
    "parent": (tarfile.TarInfo("bundle/../../outside"), b"x"),
    "absolute": (tarfile.TarInfo("/tmp/outside"), b"x"),
    "beside": (tarfile.TarInfo("outside"), b"x"),
    "dot": (tarfile.TarInfo("bundle/./good2"), b"x"),
    "twice": (tarfile.TarInfo("bundle/good"), b"other"),
    "symlink outside": _link("bundle/link", tarfile.SYMTYPE, "../../outside"),
    "symlink inside": _link("bundle/link", tarfile.SYMTYPE, "good"),
    "hard link": _link("bundle/link", tarfile.LNKTYPE, "bundle/good"),
    "device": _link("bundle/device", tarfile.CHRTYPE, ""),
    "pipe": _link("bundle/pipe", tarfile.FIFOTYPE, ""),
    "folder": _link("bundle/folder", tarfile.DIRTYPE, ""),
    "below a file": (tarfile.TarInfo("bundle/good/deeper"), b"x"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_an_archive_with_a_member_that_is_no_plain_file_inside_is_not_extracted(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    path = tmp_path / "in" / "bundle.tar"
    path.write_bytes(_members(GOOD, BAD_MEMBERS[kind]))

    with pytest.raises(IntegrityError, match=r"bundle\.tar"):
        extract_archive(path, tmp_path / "in" / "deep" / "out")
    with pytest.raises(IntegrityError, match=r"bundle\.tar"):
        verify_bundle(path)

    written = {found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("*") if found.is_file()}
    assert written <= {"in/bundle.tar", *({"in/deep/out/bundle/good"} if kind == "below a file" else set())}
    assert not Path("/tmp/outside").exists()


@pytest.mark.parametrize("has_filter", [True, False], ids=["this Python", "Debian 12's"])
def test_an_archive_brings_neither_modes_nor_owners(
    has_filter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    member = tarfile.TarInfo("bundle/deep/program")
    member.mode, member.uid = 0o6777, 12345
    (tmp_path / "bundle.tar").write_bytes(_members((member, b"x"), GOOD))

    out = extract_archive(tmp_path / "bundle.tar", tmp_path / "out")

    program = out / "deep" / "program"
    assert program.read_bytes() == b"x"
    assert (out / "good").read_bytes() == b"good"
    assert program.stat().st_mode & 0o7111 == 0
    assert program.stat().st_uid == os.getuid()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "bundle.tar"
    pack_bundle(COMMITTED, path)
    return path


@pytest.mark.parametrize("size", [0, 1, 511, 512, 700, -1, -10_240, -20_000])
def test_a_truncated_archive_is_refused_or_whole_all_the_same(size: int, archive: Path, tmp_path: Path) -> None:
    """The last ten thousand bytes of an archive are zeros that say nothing; any other cut is found."""
    data = archive.read_bytes()
    cut = tmp_path / "bundle.tar"
    cut.write_bytes(data[:size] if size >= 0 else data[: len(data) + size])
    if not any(data[len(cut.read_bytes()) :]):
        verify.check_files(extract_archive(cut, tmp_path / "out"))
        return

    with pytest.raises(IntegrityError):
        verify_bundle(cut)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_in_an_archive_changes_no_file_unnoticed(archive: Path, data: st.DataObject) -> None:
    whole = bytearray(archive.read_bytes())
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    whole[position] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "bundle.tar").write_bytes(whole)
        try:
            extracted = extract_archive(scratch / "bundle.tar", scratch / "out")
            verify.check_files(extracted)
        except EdgestillError:
            return
        assert _content(extracted) == _content(COMMITTED)


def _content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
