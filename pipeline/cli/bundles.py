"""Verbs on a bundle: verify it, sign it, put it into one file, write it for any machine; the schema of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, answer, app

bundle_app = typer.Typer(
    help="Sign or pack a bundle, write it for any machine, print its schema.", rich_markup_mode=None
)
app.add_typer(bundle_app, name="bundle")

BundlePath = Annotated[Path, typer.Argument(help="a bundle, its folder or its .tar", metavar="BUNDLE")]
BundleFolder = Annotated[Path, typer.Argument(help="the folder of a bundle", metavar="BUNDLE")]


@app.command()
def verify(
    bundle: BundlePath,
    public_key: Annotated[
        Path | None, typer.Option(help="a PEM file: the bundle must be signed with this key", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a bundle, its signature where a key is given, this machine, and its golden output."""
    from pipeline.bundles import verify as verify_bundle

    answer(verify_bundle(bundle, public_key=public_key), as_json)


@bundle_app.command("sign")
def bundle_sign(
    bundle: BundleFolder,
    sign_key: Annotated[
        Path, typer.Option(help="a private EC key, a PEM file", metavar="FILE", envvar="EDGESTILL_SIGN_KEY")
    ],
    as_json: AsJson = False,
) -> None:
    """Sign a bundle in place with OpenSSF model-signing, offline."""
    from pipeline.bundles import sign_bundle

    answer(sign_bundle(bundle, sign_key=sign_key), as_json)


@bundle_app.command("pack")
def bundle_pack(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Argument(help="the .tar to write", metavar="FILE.tar")],
    as_json: AsJson = False,
) -> None:
    """Put a bundle into one file, always the same bytes for the same bundle."""
    from pipeline.bundles import pack_bundle

    answer(pack_bundle(bundle, out), as_json)


@bundle_app.command("portable")
def bundle_portable(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Argument(help="the directory to write", metavar="OUT")],
    as_json: AsJson = False,
) -> None:
    """Write a bundle again for any machine that has its runtime; its golden output then decides."""
    from pipeline.bundles import portable_bundle

    answer(portable_bundle(bundle, out), as_json)


@bundle_app.command("schema")
def bundle_schema() -> None:
    """Print the JSON Schema of a bundle's manifest."""
    from pipeline.bundles import bundle_schema as schema

    typer.echo(json.dumps(schema(), indent=2))
