"""Verbs on a finished bundle: verify it, sign it, make it portable, put it into one file; and the schema of its manifest.

Each reads a bundle and checks its files first. Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.archive import write_archive
from benchmarks.device.manifest import SCHEMA
from benchmarks.device.signature import SIGNATURE
from benchmarks.device.verify import MANIFEST, SEAL, check_files, verify_bundle
from pipeline.signing import sign
from pipeline.stages.bundle import write_portable
from targets.base import sha256_file
from targets.errors import EdgestillError, RecipeError


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """A bundle that was found to be in order, with what was looked at and what was not."""

    bundle: Path
    facts: Mapping[str, Any]
    failure: EdgestillError | None = None  # a bundle that is not in order is an error that verify raises

    def to_json(self) -> dict[str, Any]:
        return {"bundle": str(self.bundle), **self.facts}

    def text(self) -> str:
        lines = [f"{self.bundle}: verified"]
        lines += [f"  checked      {what}" for what in self.facts["checked"]]
        lines += [f"  not checked  {what}" for what in self.facts["not_checked"]]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class BundleReport:
    """Where what was written lies, what names it, and whose signature it has."""

    path: Path
    sha256: str  # of manifest.json, or of the archive
    signed_by: str | None = None  # sha256 of the public key
    failure: EdgestillError | None = None

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "sha256": self.sha256, "signed_by": self.signed_by}

    def text(self) -> str:
        signed = f", signed with the key of sha256 {self.signed_by}" if self.signed_by else ""
        return f"{self.path}: written, sha256 {self.sha256}{signed}"


def verify(bundle: Path, *, public_key: Path | None = None) -> VerifyReport:
    """Verify a bundle (a folder or its .tar) on this machine; benchmarks/device/verify.py says what that is."""
    return VerifyReport(bundle=bundle, facts=verify_bundle(bundle, public_key=public_key))


def sign_bundle(bundle: Path, *, sign_key: Path) -> BundleReport:
    """Sign a bundle in place, in place of any signature that it has. A stage of a run is not signed in place: RecipeError."""
    folder = bundle.resolve()
    if (folder.parent / "stage.json").exists():
        raise RecipeError(
            f"{bundle} belongs to a run, which would build it again. "
            "Sign a copy of it, or give the key to the run: edgestill run RECIPE --sign-key FILE."
        )
    signed_by = sign(bundle, sign_key)
    return BundleReport(path=bundle, sha256=sha256_file(bundle / MANIFEST), signed_by=signed_by)


def portable_bundle(bundle: Path, out_dir: Path) -> BundleReport:
    """Write a bundle again for any machine that has its runtime; TargetError for an engine."""
    path = write_portable(bundle, out_dir)
    return BundleReport(path=path, sha256=sha256_file(path / MANIFEST))


def pack_bundle(bundle: Path, out_path: Path) -> BundleReport:
    """Put a bundle into one .tar, which `verify` takes as it takes the folder. The same bundle gives the same bytes."""
    if out_path.is_dir() or out_path.resolve().is_relative_to(bundle.resolve()):
        raise RecipeError(
            f"{out_path} is a directory, or lies in the bundle. Name a file beside it, such as model.tar."
        )
    names = {*check_files(bundle)["files"], MANIFEST, SEAL}
    if (bundle / SIGNATURE).is_file():
        names.add(SIGNATURE)
    write_archive(bundle, names, out_path)
    return BundleReport(path=out_path, sha256=sha256_file(out_path))


def bundle_schema() -> dict[str, Any]:
    """The JSON Schema of manifest.json, as docs/schemas/bundle-manifest-1.json publishes it."""
    return copy.deepcopy(SCHEMA)
