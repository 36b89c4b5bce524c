"""Whether a bundle's signature is that of the given key and is over exactly these files. Offline.

Reads what OpenSSF model-signing 1.x writes with an EC key: a sigstore bundle (JSON, v0.3) around a DSSE envelope, whose
payload is an in-toto statement with the sha256 of every file. Signed is "DSSEv1 LEN TYPE LEN PAYLOAD", with ECDSA and
SHA-256, -384 or -512 by the curve. Only `cryptography` is needed, and only where a key is given.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from targets.errors import DataError, IntegrityError, TargetError

SIGNATURE = "model.sig"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


def load_public_key(path: Path) -> Any:
    """The EC public key of a PEM file. Raises DataError for any other content, TargetError without `cryptography`."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise TargetError(
            "the signature cannot be checked: cryptography is not installed for this Python. "
            "Run: pip install cryptography; or leave the public key out, which checks the digests alone."
        ) from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"public key {path}: {error.strerror}. Give the PEM file of the signer's public key.") from None
    if b"PRIVATE KEY" in data:
        raise DataError(
            f"public key {path} holds a private key, which should not be here. Keep it secret, and give the public one: "
            "openssl pkey -in KEY -pubout."
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise DataError(f"public key {path} is no public key in PEM form. Give the signer's.") from None
    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise DataError(
            f"public key {path} is no EC key on P-256, P-384 or P-521. Give the key that the bundle was signed with."
        )
    return key


def fingerprint(key: Any) -> str:
    """What names a public key in a signature: sha256 of its PEM form, in hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def check_signature(path: Path, key: Any, digests: Mapping[str, str]) -> None:
    """Raise IntegrityError unless `path` holds a signature by `key` over `digests`: name -> sha256 of all files but the
    signature and the seal. It names the file that is not as signed."""
    try:
        payload, signature = _opened(json.loads(path.read_bytes()), key)
        _check_ecdsa(key, payload, signature)
        signed = _resources(json.loads(payload))
    except _Refused as refusal:
        raise _error(path, str(refusal)) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise _error(path, "is no signature as OpenSSF model-signing writes it") from None
    for name in sorted(signed.keys() | digests.keys()):
        if signed.get(name) != digests.get(name):
            why = (
                "is not signed"
                if name not in signed
                else "is not as it was signed"
                if name in digests
                else "is missing"
            )
            raise _error(path.parent / name, why)


class _Refused(Exception):  # noqa: N818 - a reason on its way to IntegrityError
    """Why a signature is not taken."""


def _opened(bundle: Any, key: Any) -> tuple[bytes, bytes]:
    """(payload, signature) of the envelope. All of the file must be as expected, so that no byte of it is idle."""
    envelope = bundle["dsseEnvelope"]
    (one,) = envelope["signatures"]
    payload, signature = _decoded(envelope["payload"]), _decoded(one["sig"])
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    expected = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": envelope["payload"],
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": one["sig"], "keyid": ""}],
        },
    }
    if bundle != expected:
        _refuse("is no signature as OpenSSF model-signing 1.x writes it with a key")
    if hint != fingerprint(key):
        _refuse(f"was made with another key: its public key has the sha256 {hint}, the given one {fingerprint(key)}")
    return payload, signature


def _decoded(text: str) -> bytes:
    """Base64 in its one form: padding bits that say nothing would let two texts mean the same."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise binascii.Error("not canonical")
    return data


def _check_ecdsa(key: Any, payload: bytes, signature: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    signed = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload
    try:
        key.verify(signature, signed, ec.ECDSA(getattr(hashes, CURVES[key.curve.name])()))
    except InvalidSignature:
        _refuse("does not hold: it was changed, or it was made with another key")


def _resources(statement: Any) -> dict[str, str]:
    """Name -> sha256 of the files that were signed."""
    predicate = statement["predicate"]
    how = predicate["serialization"]
    kinds = (statement["_type"], statement["predicateType"], how["method"], how["hash_type"])
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE, "files", "sha256"):
        _refuse(f"signs something else than the sha256 of files: {', '.join(map(str, kinds))}")
    resources = {str(one["name"]): str(one["digest"]) for one in predicate["resources"]}
    if len(resources) != len(predicate["resources"]) or {one["algorithm"] for one in predicate["resources"]} != {
        "sha256"
    }:
        _refuse("names a file twice, or by another digest than sha256")
    (subject,) = statement["subject"]
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in resources.values())).hexdigest()
    if subject["digest"] != {"sha256": root}:
        _refuse("contradicts itself: its files do not add up to its subject")
    return resources


def _refuse(why: str) -> NoReturn:
    raise _Refused(why)


def _error(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} {why}. Do not use this bundle: ask whoever signed it.")
