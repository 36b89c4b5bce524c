"""`edgestill history`: measurements over time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import AsJson, answer, app

history_app = typer.Typer(
    help="Measurements over time: keep them, show them, has anything become slower?", rich_markup_mode=None
)
app.add_typer(history_app, name="history")

Db = Annotated[str, typer.Option("--db", help="a path, or a database URL such as postgresql://USER@HOST/NAME")]
Spool = Annotated[
    Path | None,
    typer.Option("--spool", help="where records wait that the database does not take; beside it by default"),
]
DEFAULT_DB = "edgestill-history.db"


@history_app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="measured directories, or files of records", metavar="PATH...")],
    db: Db = DEFAULT_DB,
    spool: Spool = None,
    as_json: AsJson = False,
) -> None:
    """Keep the records at these paths; what is there already stays once."""
    from benchmarks.history import add_to_history

    answer(add_to_history(paths, db=db, spool_dir=spool), as_json)


@history_app.command()
def show(
    series: Annotated[str | None, typer.Argument(help="one series, as a plot; all by default")] = None,
    page: Annotated[Path | None, typer.Option(help="write one offline page with every run", metavar="FILE")] = None,
    db: Db = DEFAULT_DB,
    spool: Spool = None,
    as_json: AsJson = False,
) -> None:
    """All series in a line each, or one as a plot."""
    from benchmarks.history import show_history

    answer(show_history(series, db=db, page=page, spool_dir=spool), as_json)


@history_app.command()
def check(
    series: Annotated[list[str] | None, typer.Argument(help="these series; all by default")] = None,
    db: Db = DEFAULT_DB,
    spool: Spool = None,
    as_json: AsJson = False,
) -> None:
    """Has a series become slower? Exit 4 when one has."""
    from benchmarks.history import check_history

    answer(check_history(series or (), db=db, spool_dir=spool), as_json)


@history_app.command()
def accept(
    note: Annotated[str, typer.Option(help="why the new level is right")],
    series: Annotated[str | None, typer.Argument(help="the series; the one with an open change by default")] = None,
    run: Annotated[
        str | None, typer.Option(help="the run from which the new level holds; the first that is beyond")
    ] = None,
    who: Annotated[str | None, typer.Option(help="who accepts it; you by default")] = None,
    db: Db = DEFAULT_DB,
    spool: Spool = None,
    as_json: AsJson = False,
) -> None:
    """Take a new level for good."""
    from benchmarks.history import accept_change

    answer(accept_change(series, note=note, run=run, who=who, db=db, spool_dir=spool), as_json)
