"""Signs a bundle with a private EC key by OpenSSF model-signing, offline; benchmarks/device/signature.py verifies.

Reads a key file in PEM form (and, where that is encrypted, its password from EDGESTILL_SIGN_PASSWORD). Writes model.sig and the
seal over it. What a key file holds stands in no message, no log and no file that is written. Needs the extra `sign`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.device.signature import CURVES, SIGNATURE, check_signature, fingerprint
from benchmarks.device.verify import MANIFEST, SEAL, check_files, seal_of
from targets.base import sha256_file
from targets.errors import RecipeError, TargetError

PASSWORD = "EDGESTILL_SIGN_PASSWORD"
NEEDED = ("model_signing", "OpenSSL")  # model-signing 1.1.1 imports pyOpenSSL and does not say so
MAKE_ONE = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"


def sign(bundle: Path, key_path: Path) -> str:
    """Sign the bundle in place, in place of any signature that it has; returns the public key's fingerprint.

    Raises RecipeError for what is no usable key, TargetError without model-signing, IntegrityError for a bundle whose files
    are not as written.
    """
    private_key = _private_key(key_path)
    signing, hashing = _model_signing()
    check_files(bundle)
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE, SEAL], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(config)
    signer.use_elliptic_key_signer(private_key=key_path, password=_password()).sign(bundle, bundle / SIGNATURE)
    (bundle / SEAL).write_bytes(seal_of(bundle, signed=True))
    signed = {*check_files(bundle)["files"], MANIFEST}
    public_key = private_key.public_key()
    check_signature(bundle / SIGNATURE, public_key, {name: sha256_file(bundle / name) for name in signed})
    return fingerprint(public_key)


def signer_of(key_path: Path) -> str:
    """The fingerprint of the public half of a private key: what may be told of it, and enters a stage's key. Raises as `sign`
    does, so that a run may ask before it trains."""
    if not all(find_spec(module) for module in NEEDED):
        raise _not_installed()
    return fingerprint(_private_key(key_path).public_key())


def _private_key(path: Path) -> Any:
    if "PRIVATE KEY" in str(path):
        raise RecipeError(
            "the sign key is given by the path of its file; what was given is a key itself (not shown here). "
            "Write it to a file that only you can read, and give its path."
        )
    try:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise _not_installed() from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"sign key {path}: {error.strerror}. Give the path of a private key; to make one: {MAKE_ONE}."
        ) from None
    try:
        key = load_pem_private_key(data, _password())
    except TypeError:
        kind = (
            "encrypted, and there is no password" if _password() is None else "not encrypted, and there is a password"
        )
        raise RecipeError(f"sign key {path} is {kind} in {PASSWORD}. Set or unset that variable.") from None
    except Exception:  # ValueError, UnsupportedAlgorithm; nothing of the file's content is passed on
        raise RecipeError(
            f"sign key {path} cannot be read: it is no private key in PEM form, or {PASSWORD} is not its password. "
            f"To make one: {MAKE_ONE}."
        ) from None
    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise RecipeError(f"sign key {path} is no EC key on P-256, P-384 or P-521. To make one: {MAKE_ONE}.")
    return key


def _password() -> bytes | None:
    text = os.environ.get(PASSWORD)
    return text.encode() if text else None


def _model_signing() -> tuple[Any, Any]:
    """Its modules signing and hashing."""
    try:
        from model_signing import hashing, signing
    except ImportError:
        raise _not_installed() from None
    return signing, hashing


def _not_installed() -> TargetError:
    return TargetError(
        "signing needs OpenSSF model-signing and pyOpenSSL, which are not both installed. "
        "Run: pip install 'edgestill[sign]'; or leave the sign key out."
    )
