"""What every verb shares: the application, the options that several verbs have, and how an answer is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from targets.errors import EdgestillError

app = typer.Typer(
    name="edgestill",
    help="From a trained teacher to small, fast, provably INT8 models on every target device.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", metavar="RECIPE")]
ModelPath = Annotated[Path, typer.Argument(help="an ONNX file", metavar="MODEL.onnx")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key, e.g. distill.train.epochs=20", metavar="KEY=VALUE")
]
TargetName = Annotated[str, typer.Option("--target", help="openvino-cpu, onnxruntime-cpu, tensorrt or executorch")]
OutDir = Annotated[Path, typer.Option("--out", help="the directory to write")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="threads that the runtime may use")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", help="an option of the target, e.g. cuda_graph=false", metavar="KEY=VALUE"),
]
Launches = Annotated[
    int | None, typer.Option("--launches", min=1, help="fresh processes; the preset's number by default")
]
Preset = Annotated[str, typer.Option("--preset", help="smoke, ci or release: how long is measured")]


def target_options(target: str, threads: int, given: list[str] | None) -> dict[str, Any]:
    """The target's options: its threads, where it has such a thing, and what was given as KEY=VALUE (YAML values)."""
    import yaml

    from targets import TARGETS

    fields = getattr(TARGETS.get(target), "__dataclass_fields__", {})
    options: dict[str, Any] = {"num_threads": threads} if "num_threads" in fields else {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--option {text}: not of the form KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


def numbers_of(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text}: not numbers separated by commas") from None


class Answer(Protocol):
    """What a verb returns: for machines, for people, and the error that the command ends with all the same."""

    @property
    def failure(self) -> EdgestillError | None: ...

    def to_json(self) -> dict[str, Any]: ...

    def text(self) -> str: ...


def answer(answer: Answer, as_json: bool) -> None:
    """Print the answer. Its document holds the failure already, so that stdout has one document and no second."""
    print_document(answer.to_json(), as_json, answer.text())
    if answer.failure is not None:
        print(f"edgestill: {shown(str(answer.failure))}", file=sys.stderr)
        raise typer.Exit(answer.failure.exit_code)


def print_document(document: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(document, indent=1, allow_nan=False, default=str) if as_json else text)


def shown(message: str) -> str:
    """At most three lines. What a person gave may hold line breaks and control characters: shown, not obeyed."""
    lines = message.split("\n")
    lines = [*lines[:2], " ".join(lines[2:])] if len(lines) > 3 else lines
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
