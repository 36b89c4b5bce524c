"""The command line: verbs only. Each picks its arguments, calls one public function and prints what came back.

Heavy imports happen inside the verbs, so that `edgestill --help` answers at once. Errors of ours become one message on
stderr and the exit code of targets/errors.py; with `--json` one JSON document goes to stdout, also for an error.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer
from typer.exceptions import TyperException

from pipeline.progress import open_progress

if TYPE_CHECKING:
    from targets.errors import EdgestillError

USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, what a shell expects

app = typer.Typer(
    name="edgestill",
    help="From a trained teacher to small, fast, provably INT8 models on every target device.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="Check, describe or begin a recipe.", rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", metavar="RECIPE")]
ModelPath = Annotated[Path, typer.Argument(help="an ONNX file", metavar="MODEL.onnx")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key, e.g. distill.train.epochs=20", metavar="KEY=VALUE")
]
TargetName = Annotated[str, typer.Option("--target", help="openvino-cpu, onnxruntime-cpu or tensorrt")]
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


def main() -> None:
    """Run a verb and end with the exit code of what happened; never a traceback."""
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


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Annotated[
        str | None, typer.Option(help="stop after this stage: data, teacher, distill, quantize, export")
    ] = None,
    force: Annotated[str | None, typer.Option(help="build this stage again though nothing changed")] = None,
    runs_dir: Annotated[Path, typer.Option("--runs", help="where finished stages are kept")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option(help="say what would be built, build nothing")] = False,
    offline: Annotated[bool, typer.Option(help="download nothing")] = False,
    allow_code: Annotated[bool, typer.Option(help="let the recipe run python: code of its own")] = False,
    include_samples: Annotated[bool, typer.Option(help="put real samples into the bundle's golden input")] = False,
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
        progress=open_progress(),
    )
    _answer(result, as_json)


@recipe_app.command("validate")
def recipe_validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and print it with every default filled in."""
    import yaml

    from pipeline.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or []).model_dump(mode="json")
    _print(resolved, as_json, yaml.safe_dump(resolved, sort_keys=False) + f"{recipe}: valid")


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


@app.command()
def quantize(
    model: ModelPath,
    calibration: Annotated[Path, typer.Option(help="a folder of images, or an NPZ file with one array an input")],
    target: TargetName = "onnxruntime-cpu",
    out: OutDir = Path("quantized"),
    num_samples: Annotated[int, typer.Option("--samples", min=1, help="calibration samples to use")] = 128,
    mean: Annotated[str | None, typer.Option(help="pixel mean(s), 0..255, e.g. 127 or 123.7,116.3,103.5")] = None,
    std: Annotated[str | None, typer.Option(help="pixel standard deviation(s), 0..255")] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="shorter side before the centre crop, pixels")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="the target's own by default; portable: one graph for every runtime")
    ] = None,
    method: Annotated[
        str, typer.Option(help="ladder (the first rung that passes), or one: ptq, equalized, mixed")
    ] = "ladder",
    keep_float: Annotated[
        list[str] | None, typer.Option(help="a node that stays in float; may be given several times", metavar="NODE")
    ] = None,
    min_int8_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of MACs that must run in INT8")] = 0.95,
    min_agreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="one output (N, K): share of held-out samples with float's class")
    ] = 0.9,
    min_cosine: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="other outputs: mean cosine with float, each of them")
    ] = 0.95,
    metric: Annotated[
        str | None, typer.Option(help="python:module:factory, in place of both; see docs/bring-your-own.md")
    ] = None,
    min_metric: Annotated[float, typer.Option(help="what your metric must reach")] = 0.0,
    allow_code: Annotated[bool, typer.Option(help="let --metric run code of your own")] = False,
    kit: Annotated[
        bool, typer.Option("--kit", help="the target is not on this machine: write what its first run there needs")
    ] = False,
    threads: Threads = 1,
    option: Option = None,
    preset: Preset = "smoke",
    launches: Launches = None,
    as_json: AsJson = False,
) -> None:
    """Quantize any float ONNX model to INT8 for a target and prove it: lint, placement, latency, difference to float."""
    from pipeline.bring_your_own import quantize_model
    from pipeline.learning.own_code import own_factory
    from pipeline.onnx_ladder import Demands

    report = quantize_model(
        model,
        calibration,
        target=target,
        options=_options(target, threads, option),
        out_dir=out,
        num_samples=num_samples,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        resize=resize,
        scheme=scheme,
        demands=Demands(
            method=method,
            min_int8_share=min_int8_share,
            min_agreement=min_agreement,
            min_cosine=min_cosine,
            metric=own_factory(metric, "--metric", allow_code=allow_code)() if metric else None,
            min_metric=min_metric,
            keep_float=tuple(keep_float or ()),
        ),
        kit=kit,
        preset=preset,
        launches=launches,
        progress=open_progress(),
    )
    _answer(report, as_json)


@app.command(name="compile")
def compile_(
    model: ModelPath,
    target: TargetName = "onnxruntime-cpu",
    out: OutDir = Path("compiled"),
    precision: Annotated[str | None, typer.Option(help="int8, fp32 or bf16; by default what the graph holds")] = None,
    threads: Threads = 1,
    option: Option = None,
    min_int8_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="for INT8: share of MACs that must run in it")
    ] = 0.95,
    as_json: AsJson = False,
) -> None:
    """Compile any ONNX model for a target and say where each of its layers runs."""
    from pipeline.bring_your_own import compile_model

    report = compile_model(
        model,
        target=target,
        options=_options(target, threads, option),
        out_dir=out,
        precision=precision,
        min_int8_share=min_int8_share,
        progress=open_progress(),
    )
    _answer(report, as_json)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="an ONNX file, a compiled directory or a bundle", metavar="MODEL")],
    target: TargetName = "onnxruntime-cpu",
    out: OutDir = Path("bench"),
    threads: Threads = 1,
    option: Option = None,
    preset: Preset = "ci",
    launches: Launches = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, load and memory of a model in fresh processes on this machine."""
    from pipeline.bring_your_own import bench_model

    report = bench_model(
        model,
        target=target,
        options=_options(target, threads, option),
        out_dir=out,
        preset=preset,
        launches=launches,
        progress=open_progress(),
    )
    _answer(report, as_json)


@app.command()
def lint(model: ModelPath, target: TargetName = "onnxruntime-cpu", as_json: AsJson = False) -> None:
    """Look at a Q/DQ graph for what would keep a target from running it in INT8."""
    from pipeline.bring_your_own import lint_model

    report = lint_model(model, target=target)
    _answer(report, as_json)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="a bundle directory", metavar="BUNDLE")], as_json: AsJson = False
) -> None:
    """Check every file of a bundle against its digests, then replay its golden input."""
    from benchmarks.device.verify import verify_bundle

    facts = verify_bundle(bundle)
    _print(facts, as_json, f"{bundle}: every file is as it was written, and the golden output is reproduced")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a finished run, e.g. runs/quickstart", metavar="RUN")],
) -> None:
    """Draw the report of a finished run again, from its JSON alone."""
    from benchmarks.report import render_report
    from targets.base import read_json

    typer.echo(render_report(read_json(run_dir / "report" / "summary.json"), run_dir / "report"))


def _options(target: str, threads: int, given: list[str] | None) -> dict[str, Any]:
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


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
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


def _answer(answer: Answer, as_json: bool) -> None:
    """Print the answer. Its document holds the failure already, so that stdout has one document and no second."""
    _print(answer.to_json(), as_json, answer.text())
    if answer.failure is not None:
        print(f"edgestill: {_shown(str(answer.failure))}", file=sys.stderr)
        raise typer.Exit(answer.failure.exit_code)


def _print(document: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(document, indent=1, allow_nan=False, default=str) if as_json else text)


def _fail(message: str, exit_code: int) -> NoReturn:
    message = _shown(message)
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": exit_code}, indent=1))
    print(f"edgestill: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _shown(message: str) -> str:
    """At most three lines. What a person gave may hold line breaks and control characters: shown, not obeyed."""
    lines = message.split("\n")
    lines = [*lines[:2], " ".join(lines[2:])] if len(lines) > 3 else lines
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


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
