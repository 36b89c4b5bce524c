"""Tables in documents, put there by the commands that print them: `python -m benchmarks.documents`.

A place for a table is `<!-- results: python -m MODULE ARGUMENTS -->` with `<!-- end -->` below it. MODULE is one of ours and
prints Markdown from a JSON file of the repository, so that no number stands in a document that no file holds.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- results: python -m ((?:benchmarks|pipeline)\.\S+ .*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """The documents that may hold tables: the README and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The document with every table as its command prints it now."""
    return PLACE.sub(lambda found: f"{found[1]}{printed(found[2])}\n{found[4]}", text)


def printed(command: str) -> str:
    """What `python -m COMMAND` prints, run in this process at the repository's root."""
    module, *arguments = shlex.split(command)
    argv, out = sys.argv, io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.chdir(ROOT),
            contextlib.suppress(SystemExit),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module is imported already: it only prints
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = argv
    return out.getvalue().strip()


def main() -> None:
    """Fill every place, and say which documents changed."""
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
