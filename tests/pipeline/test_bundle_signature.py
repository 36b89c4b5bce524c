"""Signed by OpenSSF model-signing, verified by it and by us: both take and refuse the same."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from model_signing import verifying

from benchmarks.device.signature import SIGNATURE, check_signature, load_public_key
from benchmarks.device.verify import MANIFEST, SEAL, check_files, seal_of, verify_bundle
from benchmarks.pack import pack_device_program
from pipeline.bundles import pack_bundle, sign_bundle
from pipeline.bundles import verify as verify_verb
from pipeline.signing import PASSWORD, sign, signer_of
from pipeline.stages.bundle import write_portable
from targets.base import read_json, sha256_file, write_json
from targets.errors import DataError, IntegrityError, RecipeError, TargetError

COMMITTED = Path(__file__).parents[1] / "fixtures" / "bundle-quickstart"
FILES = sorted(path.relative_to(COMMITTED).as_posix() for path in COMMITTED.rglob("*") if path.is_file())
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def write_key(folder: Path, key: Any, password: bytes | None = None) -> tuple[Path, Path]:
    """(private, public) key files."""
    folder.mkdir(parents=True, exist_ok=True)
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(PEM, PKCS8, locked))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pem", folder / "key.pub"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_key(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def signed(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(COMMITTED, tmp_path_factory.mktemp("signed") / "bundle"))
    sign(bundle, keys[0])
    return bundle


@pytest.fixture
def bundle(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "bundle"))


def they_verify(bundle: Path, public_key: Path) -> None:
    """What OpenSSF model-signing says; raises where it refuses."""
    verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(bundle, bundle / SIGNATURE)


def reseal(bundle: Path) -> None:
    """Make the manifest and the seal agree with the files again, as anybody can who has no key."""
    manifest = read_json(bundle / MANIFEST)
    manifest["files"] = {name: sha256_file(bundle / name) for name in manifest["files"]}
    write_json(bundle / MANIFEST, manifest)
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))


# --- both ways ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_they_sign_they_and_we_verify(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, ec.generate_private_key(curve))
    bundle = Path(shutil.copytree(COMMITTED, tmp_path / "bundle"))

    told = sign(bundle, private)

    they_verify(bundle, public)
    verified = verify_bundle(bundle, public_key=public, replay=False)
    assert verified["signature"] == {"status": "verified", "key_sha256": told}
    assert told == signer_of(private)
    assert verified["files"] == len(FILES) + 1


@pytest.mark.parametrize("name", [name for name in FILES if name != SEAL])
def test_a_changed_file_is_refused_by_both_though_manifest_and_seal_agree(
    name: str, bundle: Path, keys: tuple[Path, Path]
) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    if name != MANIFEST:
        reseal(bundle)
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))

    with pytest.raises(IntegrityError, match="is not as it was signed") as ours:
        verify_bundle(bundle, public_key=keys[1])
    with pytest.raises(ValueError, match="Hash mismatch"):
        they_verify(bundle, keys[1])
    assert Path(str(ours.value).split()[0]).name in (Path(name).name, MANIFEST)


def test_an_added_and_a_removed_file_are_refused_by_both(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "model/extra.bin").write_text("x")
    with pytest.raises(IntegrityError, match=r"extra\.bin is not signed"):
        verify_bundle(bundle, public_key=keys[1])
    with pytest.raises(ValueError, match="Extra files"):
        they_verify(bundle, keys[1])
    (bundle / "model/extra.bin").unlink()
    (bundle / "record.json").unlink()
    with pytest.raises(IntegrityError, match=r"record\.json is missing"):
        verify_bundle(bundle, public_key=keys[1])
    with pytest.raises(ValueError, match="Missing files"):
        they_verify(bundle, keys[1])


def test_another_key_is_refused_by_both(bundle: Path, tmp_path: Path) -> None:
    _, other = write_key(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))

    with pytest.raises(IntegrityError, match=r"model\.sig was made with another key"):
        verify_bundle(bundle, public_key=other)
    with pytest.raises(ValueError, match="Key mismatch"):
        they_verify(bundle, other)


def test_another_key_under_the_right_keys_name_is_refused_by_both(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """The hint in a signature is written by whoever made it: it proves nothing."""
    private, _ = write_key(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    sign(bundle, private)
    document = read_json(bundle / SIGNATURE)
    document["verificationMaterial"]["publicKey"]["hint"] = signer_of(keys[0])
    (bundle / SIGNATURE).write_text(json.dumps(document))
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))

    with pytest.raises(IntegrityError, match=r"model\.sig does not hold"):
        verify_bundle(bundle, public_key=keys[1])
    with pytest.raises(InvalidSignature):
        they_verify(bundle, keys[1])


# --- nothing in the signature is idle ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_the_signature_file_is_refused_though_the_seal_agrees(
    signed: Path, keys: tuple[Path, Path], data: st.DataObject
) -> None:
    whole = (signed / SIGNATURE).read_bytes()
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    digests = _digests(signed)
    key = load_public_key(keys[1])
    try:
        (signed / SIGNATURE).write_bytes(flipped)
        with pytest.raises(IntegrityError, match=SIGNATURE):
            check_signature(signed / SIGNATURE, key, digests)
        with pytest.raises(IntegrityError, match=SIGNATURE):  # without a key the seal finds it
            check_files(signed)
    finally:
        (signed / SIGNATURE).write_bytes(whole)
    check_signature(signed / SIGNATURE, key, digests)


def _digests(bundle: Path) -> dict[str, str]:
    return {name: sha256_file(bundle / name) for name in [*read_json(bundle / MANIFEST)["files"], MANIFEST]}


def _envelope(document: dict[str, Any]) -> dict[str, Any]:
    envelope: dict[str, Any] = document["dsseEnvelope"]
    return envelope


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no envelope": lambda document: document.pop("dsseEnvelope"),
    "no signature": lambda document: _envelope(document).update(signatures=[]),
    "two signatures": lambda document: _envelope(document).update(signatures=_envelope(document)["signatures"] * 2),
    "another payload type": lambda document: _envelope(document).update(payloadType="text/plain"),
    "another media type": lambda document: document.update(mediaType="application/json"),
    "a key of its own": lambda document: document["verificationMaterial"]["publicKey"].update(rawBytes="AA=="),
    "one more field": lambda document: document.update(comment="x"),
    "an empty payload": lambda document: _envelope(document).update(payload=base64.b64encode(b"{}").decode()),
    "a payload that is no text": lambda document: _envelope(document).update(payload=7),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_signature_of_another_form_is_refused(forgery: str, bundle: Path, keys: tuple[Path, Path]) -> None:
    document = read_json(bundle / SIGNATURE)
    FORGERIES[forgery](document)
    (bundle / SIGNATURE).write_text(json.dumps(document))
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))

    with pytest.raises(IntegrityError, match=r"model\.sig"):
        verify_bundle(bundle, public_key=keys[1])


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 20_000])
def test_what_is_no_signature_at_all_is_refused(text: str, bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / SIGNATURE).write_text(text)
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))

    with pytest.raises(IntegrityError, match=r"model\.sig is no signature as OpenSSF model-signing writes it"):
        verify_bundle(bundle, public_key=keys[1])


def test_a_signature_that_leaves_files_out_is_refused(bundle: Path, keys: tuple[Path, Path]) -> None:
    """Its author may tell model-signing to ignore paths; we take no signature that is not over every file."""
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE, SEAL, "model"], ignore_git_paths=False)
    signing.Config().set_hashing_config(config).use_elliptic_key_signer(private_key=keys[0]).sign(
        bundle, bundle / SIGNATURE
    )
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))
    they_verify(bundle, keys[1])

    with pytest.raises(IntegrityError, match=r"model/\S+ is not signed"):
        verify_bundle(bundle, public_key=keys[1])


# --- signed, unsigned, with a key and without ----------------------------------------------------------------------------


def test_an_unsigned_bundle_is_refused_where_a_key_is_given(keys: tuple[Path, Path]) -> None:
    with pytest.raises(IntegrityError, match=r"bundle-quickstart is not signed(?s:.*)Ask for a signed bundle"):
        verify_bundle(COMMITTED, public_key=keys[1])


def test_a_stripped_signature_is_refused_with_and_without_a_key(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / SIGNATURE).unlink()

    with pytest.raises(IntegrityError, match=r"model\.sig is missing"):
        verify_bundle(bundle)
    (bundle / SEAL).write_bytes(seal_of(bundle))  # a clean strip: an unsigned bundle like any other
    with pytest.raises(IntegrityError, match="is not signed"):
        verify_bundle(bundle, public_key=keys[1])


def test_a_signature_that_is_added_to_an_unsigned_bundle_is_refused(signed: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(COMMITTED, tmp_path / "bundle"))
    shutil.copyfile(signed / SIGNATURE, bundle / SIGNATURE)

    with pytest.raises(IntegrityError, match=r"model\.sig was added"):
        verify_bundle(bundle)


def test_what_was_checked_and_what_was_not_is_said_in_words(signed: Path, keys: tuple[Path, Path]) -> None:
    unsigned, unchecked, checked = (
        verify_bundle(COMMITTED, replay=False),
        verify_bundle(signed, replay=False),
        verify_verb(signed, public_key=keys[1]),
    )

    assert "who wrote it: it is not signed" in unsigned["not_checked"]
    assert "whether the model answers as it did" in unsigned["not_checked"]
    assert "who wrote it: it is signed, but no public key was given" in unchecked["not_checked"]
    assert [fact["signature"]["status"] for fact in (unsigned, unchecked, checked.facts)] == [
        *("absent", "not checked", "verified")
    ]
    text = checked.text()
    assert f"checked      signed with the key of sha256 {signer_of(keys[0])}" in text
    assert "checked      the model answers as it did: logits within" in text
    assert checked.failure is None
    assert checked.to_json()["signature"]["status"] == "verified"


def test_without_cryptography_a_key_is_refused_and_digests_are_checked(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)

    with pytest.raises(TargetError, match=r"cryptography is not installed(?s:.*)pip install cryptography"):
        verify_bundle(signed, public_key=keys[1], replay=False)
    assert verify_bundle(signed, replay=False)["signature"]["status"] == "not checked"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no key", "is no public key in PEM form"),
        (ed25519.Ed25519PrivateKey.generate(), "is no EC key on P-256"),
        (ec.generate_private_key(ec.SECP256K1()), "is no EC key on P-256"),
    ],
    ids=["text", "ed25519", "another curve"],
)
def test_a_file_that_is_no_usable_public_key_is_refused(content: Any, says: str, signed: Path, tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        _, path = write_key(tmp_path, content)

    with pytest.raises(DataError, match=says):
        verify_bundle(signed, public_key=path)


def test_an_absent_and_a_private_key_in_place_of_a_public_one_are_refused(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    with pytest.raises(DataError, match="No such file"):
        verify_bundle(signed, public_key=signed / "nowhere.pub")
    with pytest.raises(DataError, match="holds a private key"):
        verify_bundle(signed, public_key=keys[0])


def test_the_packed_program_verifies_the_signature_of_a_folder_and_of_an_archive(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    program = pack_device_program(tmp_path / "program.pyz")
    pack_bundle(signed, tmp_path / "signed.tar")
    command = [sys.executable, "-I", program, "verify", "--public-key", keys[1]]

    good = subprocess.run([*command, tmp_path / "signed.tar"], capture_output=True, text=True)
    bad = subprocess.run([*command, COMMITTED], capture_output=True, text=True)

    assert (good.returncode, json.loads(good.stdout)["signature"]["key_sha256"]) == (0, signer_of(keys[0])), good.stderr
    assert bad.returncode == 5
    assert "is not signed" in json.loads(bad.stdout)["error"]


# --- signing -----------------------------------------------------------------------------------------------------------------


def test_a_bundle_is_signed_when_it_is_written_and_a_portable_one_is_signed_anew(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    unsigned = write_portable(signed, tmp_path / "unsigned")
    again = write_portable(signed, tmp_path / "signed", sign_key=keys[0])

    assert not (unsigned / SIGNATURE).exists()
    they_verify(again, keys[1])
    assert verify_bundle(again, public_key=keys[1], replay=False)["signature"]["status"] == "verified"
    assert {path.name for path in tmp_path.iterdir()} == {"unsigned", "signed"}


def test_signing_changes_nothing_but_the_signature_and_the_seal(bundle: Path, signed: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path / "other", ec.generate_private_key(ec.SECP384R1()))

    report = sign_bundle(bundle, sign_key=private)

    changed = {name for name in [*FILES, SIGNATURE] if (bundle / name).read_bytes() != (signed / name).read_bytes()}
    assert changed == {SIGNATURE, SEAL}
    assert report.signed_by == signer_of(private)
    assert verify_bundle(bundle, public_key=public, replay=False)["files"] == len(FILES) + 1


def test_the_bundle_of_a_run_is_not_signed_in_place(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle.parent / "stage.json").write_text("{}")

    with pytest.raises(RecipeError, match="Sign a copy of it"):
        sign_bundle(bundle, sign_key=keys[0])


def test_a_bundle_that_is_not_as_written_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "MODEL_CARD.md").write_text("Another card.")

    with pytest.raises(IntegrityError, match=r"MODEL_CARD\.md has changed"):
        sign(bundle, keys[0])


def test_without_model_signing_there_is_a_sentence_before_anything_is_trained(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.signing.find_spec", lambda name: None if name == "model_signing" else name)
    with pytest.raises(TargetError, match=r"pip install 'edgestill\[sign\]'"):
        signer_of(keys[0])
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(TargetError, match=r"pip install 'edgestill\[sign\]'"):
        sign(bundle, keys[0])


# --- secrets -----------------------------------------------------------------------------------------------------------------


def test_a_key_with_a_password_is_read_with_it_and_refused_without(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_key(tmp_path / "locked", ec.generate_private_key(ec.SECP256R1()), b"open sesame")

    with pytest.raises(RecipeError, match=f"encrypted, and there is no password in {PASSWORD}"):
        sign(bundle, private)
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(RecipeError, match="is not its password"):
        sign(bundle, private)
    monkeypatch.setenv(PASSWORD, "open sesame")
    sign(bundle, private)

    assert verify_bundle(bundle, public_key=public, replay=False)["signature"]["status"] == "verified"


def test_no_message_and_no_file_has_a_line_of_the_key_or_its_password(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    password = "a password of mine"
    key = ec.generate_private_key(ec.SECP256R1())
    private, _ = write_key(tmp_path / "plain", key)
    locked, _ = write_key(tmp_path / "locked", key, password.encode())
    rsa_key, _ = write_key(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(private.read_text().replace("M", "N", 1))
    secrets = {line for path in (private, locked, rsa_key, damaged) for line in path.read_text().splitlines()[1:-1]}

    told = [sign_bundle(bundle, sign_key=private).text()]
    for path in (damaged, rsa_key, locked, Path(private.read_text()), tmp_path / "nowhere", tmp_path):
        with pytest.raises(RecipeError) as raised:
            sign(bundle, path)
        told.append(str(raised.value))
        assert raised.value.__cause__ is None
    monkeypatch.setenv(PASSWORD, password)
    with pytest.raises(RecipeError) as raised:
        sign(bundle, private)
    told += [str(raised.value), *capfd.readouterr()]
    written = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())

    assert len(secrets) > 4
    assert not [secret for secret in (*secrets, password) for text in told if secret in text]
    assert not [secret for secret in (*secrets, password) if secret.encode() in written]
    assert str(damaged) in told[1], "the path may be told"
