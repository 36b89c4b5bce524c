"""`edgestill ablate`: does the recipe help?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, Overrides, RecipePath, answer, app
from pipeline.progress import open_progress


@app.command()
def ablate(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: Annotated[
        str | None,
        typer.Option(help="some of the arms, separated by commas; plain KD is always there", metavar="NAMES"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="how many are judged; in place of the recipe's")] = None,
    processes: Annotated[int, typer.Option(min=1, help="trainings at once, each with its share of the cores")] = 1,
    runs_dir: Annotated[Path, typer.Option("--runs", help="where finished stages are kept")] = Path("runs"),
    export: Annotated[
        Path | None, typer.Option(help="write all figures to this JSON file, to be committed", metavar="FILE")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="say what would be trained, train nothing")] = False,
    offline: Annotated[bool, typer.Option(help="download nothing")] = False,
    allow_code: Annotated[bool, typer.Option(help="let the recipe run python: code of its own")] = False,
    as_json: AsJson = False,
) -> None:
    """Does a recipe help? Its controls at equal budget over seeds, each against tuned plain KD; started again, it goes on."""
    from pipeline.ablation.run import ablate_recipe

    report = ablate_recipe(
        recipe,
        overrides=overrides or [],
        arms=[name.strip() for name in arms.split(",")] if arms else [],
        seeds=seeds,
        processes=processes,
        runs_dir=runs_dir,
        dry_run=dry_run,
        offline=offline,
        allow_code=allow_code,
        export=export,
        progress=open_progress(),
    )
    answer(report, as_json)
