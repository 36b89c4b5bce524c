"""What every page of ours is made of: templates that escape, one policy, scripts that are inlined, text that is written.

A page is one file that works offline. Names, labels and paths in it are not trusted: HTML is escaped by jinja2, Markdown by
`escape_markdown`, and the page's own policy lets no script run but those that stand in it, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def escape_markdown(value: object) -> Markup:
    """Text that Markdown shows as it is, on one line, in or out of a table; markup that is safe already passes."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return Markup(re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text))


@cache
def environment(finalize: Callable[[object], object] | None = None) -> Environment:
    """The templates; `finalize` is what every value passes through. One for all pages: templates are compiled once."""
    return Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )


def page_scripts(*names: str) -> dict[str, str]:
    """plotly, our own script, and the policy that lets just these run and nothing be fetched.

    Our own is figures.js, which draws in the page's colours, followed by the templates `names`.
    """
    from plotly.offline import get_plotlyjs  # 5 MB of text: read only when a page is written

    own = [(files("benchmarks") / "templates" / name).read_text("utf-8") for name in ("figures.js", *names)]
    scripts = {"plotly_js": get_plotlyjs(), "own_js": "\n".join(own)}
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    return {name: Markup(text) for name, text in scripts.items()} | {"policy": policy}


def write_text(path: Path, text: str) -> None:
    """A name that is no valid text (a path of foreign bytes) is written with escapes rather than not at all."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
