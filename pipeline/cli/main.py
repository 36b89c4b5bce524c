"""The way in and the last wall: an error of ours becomes one message on stderr and the exit code of targets/errors.py.

With `--json` one JSON document goes to stdout, also for an error; never a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

# The verbs register themselves when they are imported, in the order of the help.
# isort: off
from pipeline.cli import recipes, ablation, models, bundles, measuring, history  # noqa: F401

# isort: on
from pipeline.cli.app import app, shown
from pipeline.launch import num_processes, process_index

USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell expects


def main() -> None:
    """Run a verb and end with the exit code of what happened; never a traceback. Of several processes the first speaks."""
    if process_index() == 0:
        _main()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        _main()


def _main() -> NoReturn:
    try:
        exit_code = app(standalone_mode=False)
    except Exception as error:  # the last wall before the person
        _fail(*_explain(error))
    if exit_code == INTERRUPTED:
        _fail("interrupted: what was finished is kept, the same command goes on from there", INTERRUPTED)
    sys.exit(exit_code)


def _explain(error: Exception) -> tuple[str, int]:
    """Message and exit code. `targets` brings numpy along, which an answer to --help does without: imported here."""
    if isinstance(error, TyperException):
        return _about_usage(error), USAGE
    from targets.errors import EdgestillError

    if isinstance(error, EdgestillError):
        return str(error), error.exit_code
    return _about_os_error(error) if isinstance(error, OSError) else _about_internal_error(error), 1


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    if show_version:
        from importlib.metadata import version

        typer.echo(f"edgestill {version('edgestill')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(USAGE)
    if num_processes() > 1 and context.invoked_subcommand != "run":
        raise typer.BadParameter(
            f"{num_processes()} processes were started, and only `run` knows what to do with them: start one"
        )


def _fail(message: str, exit_code: int) -> NoReturn:
    message = shown(message)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": exit_code}, indent=1))
    print(f"edgestill: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _about_usage(error: TyperException) -> str:
    """A command line that cannot be read; the error knows the verb that it was for."""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context is not None else "edgestill"
    return f"{error.format_message().rstrip('.')}. See: {verb} --help."


def _about_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space is left on the disk. Free some and run again: finished stages are kept."
    return f"{where}{error.strerror or type(error).__name__}. Mend that and run again: finished stages are kept."


def _about_internal_error(error: Exception) -> str:
    if os.environ.get("EDGESTILL_DEBUG"):
        traceback.print_exc()
    text = " ".join(str(error).split())[:300]
    return f"internal error, {type(error).__name__}: {text}\nThis is a fault of ours. EDGESTILL_DEBUG=1 shows where; please report it."
