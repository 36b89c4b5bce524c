"""Verbs on a recipe: run it, check it, describe it, begin one; draw its report again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, Overrides, RecipePath, answer, app, print_document
from pipeline.progress import open_progress

recipe_app = typer.Typer(help="Check, describe or begin a recipe.", rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Annotated[
        str | None, typer.Option(help="stop after this stage: data, teacher, soft_labels, distill, quantize, export")
    ] = None,
    force: Annotated[str | None, typer.Option(help="build this stage again though nothing changed")] = None,
    runs_dir: Annotated[Path, typer.Option("--runs", help="where finished stages are kept")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option(help="say what would be built, build nothing")] = False,
    offline: Annotated[bool, typer.Option(help="download nothing")] = False,
    allow_code: Annotated[bool, typer.Option(help="let the recipe run python: code of its own")] = False,
    include_samples: Annotated[bool, typer.Option(help="put real samples into the bundle's golden input")] = False,
    sign_key: Annotated[
        Path | None,
        typer.Option(help="sign the bundles with this EC key, a PEM file", metavar="FILE", envvar="EDGESTILL_SIGN_KEY"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline: teacher, distillation, quantization, compilation, measurement, report, bundles."""
    from pipeline.run import run_recipe

    result = run_recipe(
        recipe,
        overrides=overrides or [],
        runs_dir=runs_dir,
        until=until,
        force=force,
        dry_run=dry_run,
        offline=offline,
        allow_code=allow_code,
        include_samples=include_samples,
        sign_key=sign_key,
        progress=open_progress(),
    )
    answer(result, as_json)


@recipe_app.command("validate")
def recipe_validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and print it with every default filled in."""
    import yaml

    from pipeline.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or []).model_dump(mode="json")
    print_document(resolved, as_json, yaml.safe_dump(resolved, sort_keys=False) + f"{recipe}: valid")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes."""
    from pipeline.recipe import recipe_schema as schema

    typer.echo(json.dumps(schema(), indent=2))


@recipe_app.command("init")
def recipe_init(
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("recipe.yaml"),
    data: Annotated[str, typer.Option(help="the data source")] = "mnist_5k",
) -> None:
    """Write a small recipe to begin with; an existing file is left alone."""
    from pipeline.recipe import write_first_recipe

    write_first_recipe(path, data)
    typer.echo(
        f"{path}: written. Check it with `edgestill recipe validate {path}`, run it with `edgestill run {path}`."
    )
