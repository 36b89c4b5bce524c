"""Verbs that measure, and verbs on what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.app import (
    AsJson,
    Launches,
    Option,
    OutDir,
    Preset,
    RecipePath,
    TargetName,
    Threads,
    answer,
    app,
    print_document,
    target_options,
)
from pipeline.progress import open_progress

Strict = Annotated[bool, typer.Option("--strict", help="exit 7 where half of the launches or more were disturbed")]


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="an ONNX file, a compiled directory or a bundle", metavar="MODEL")],
    target: TargetName = "onnxruntime-cpu",
    out: OutDir = Path("bench"),
    threads: Threads = 1,
    option: Option = None,
    preset: Preset = "ci",
    launches: Launches = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, load and memory of a model in fresh processes on this machine."""
    from pipeline.bring_your_own import bench_model

    report = bench_model(
        model,
        target=target,
        options=target_options(target, threads, option),
        out_dir=out,
        preset=preset,
        launches=launches,
        strict=strict,
        progress=open_progress(),
    )
    answer(report, as_json)


@app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(
            help="an ONNX file, a compiled directory, a bundle, or a recorded run (DIR or DIR:ARM)", metavar="A"
        ),
    ],
    b: Annotated[Path, typer.Argument(help="what is judged against A", metavar="B")],
    target: TargetName = "onnxruntime-cpu",
    precision: Annotated[str | None, typer.Option(help="for float ONNX files: fp32 (default) or bf16")] = None,
    out: OutDir = Path("compare"),
    threads: Threads = 1,
    option: Option = None,
    preset: Annotated[
        str | None, typer.Option(help="smoke, ci or release; ci by default, smoke with --selftest", metavar="NAME")
    ] = None,
    launches: Annotated[
        int | None,
        typer.Option("--launches", min=1, help="pairs of fresh processes; 10, 20 or 40 by preset, 320 with --selftest"),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="p25, peak RSS, load or size; may be given several times; all by default")
    ] = None,
    max_p99_ms: Annotated[float | None, typer.Option(help="the budget of B's p99: exit 4 beyond it")] = None,
    junit: Annotated[Path | None, typer.Option(help="write the verdicts as JUnit XML to this file")] = None,
    strict: Strict = False,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="A against itself: the false-alarm rate and the power on this machine")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Is B slower, larger or hungrier than A? Pairs of processes that take turns, an exact test; exit 4 when worse."""
    from benchmarks.compare import NAMES
    from pipeline.compare_models import compare_models, selftest_model
    from targets.base import check_folder_of

    common: dict[str, Any] = {
        "target": target,
        "options": target_options(target, threads, option),
        "precision": precision,
        "out_dir": out,
        "preset": preset or ("smoke" if selftest else "ci"),
        "launches": launches,
        "progress": open_progress(),
    }
    if junit is not None:
        check_folder_of(junit, "--junit")
    if selftest:
        if a != b:
            raise typer.BadParameter("--selftest measures one model: give it as A and as B")
        judging = {"--junit": junit, "--metric": metric, "--max-p99-ms": max_p99_ms, "--strict": strict or None}
        if given := [name for name, value in judging.items() if value is not None]:
            raise typer.BadParameter(f"--selftest judges no B: leave out {' and '.join(given)}")
        answer(selftest_model(a, **common), as_json)
        return
    found = compare_models(a, b, metrics=metric or NAMES, max_p99_ms=max_p99_ms, strict=strict, **common)
    if junit is not None:
        junit.write_text(found.junit(), encoding="utf-8")
    answer(found, as_json)


@app.command()
def matrix(
    recipe: RecipePath,
    out: OutDir = Path("matrix"),
    images: Annotated[
        Path | None, typer.Option(help="photographs that calibrate and are held out; in place of the recipe's")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="smoke, ci or release; in place of the recipe's", metavar="NAME")
    ] = None,
    launches: Annotated[
        int | None, typer.Option(min=1, help="fresh processes a cell; in place of the recipe's")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="write all records to this JSON file, to be committed", metavar="FILE")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="measure models with disturbed cells once more")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="download no weights")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Measure many models on many runtimes, precisions and threads by one recipe; started again, it goes on."""
    from pipeline.matrix import export_results, run_matrix
    from targets.base import check_folder_of

    if export is not None:
        check_folder_of(export, "--export")
    found = run_matrix(
        recipe,
        out_dir=out,
        images=images,
        preset=preset,
        launches=launches,
        offline=offline,
        again=again,
        strict=strict,
        progress=open_progress(),
    )
    if export is not None and found.rows:
        export_results(out, export)
    answer(found, as_json)


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="a bundle, a compiled directory or an ONNX file", metavar="BUNDLE")],
    target: TargetName = "onnxruntime-cpu",
    precision: Annotated[str | None, typer.Option(help="for float ONNX files: fp32 (default) or bf16")] = None,
    threads: Threads = 1,
    option: Option = None,
    preset: Preset = "ci",
    top: Annotated[int, typer.Option(min=1, help="rows of the table; the JSON holds all layers")] = 15,
    fresh_peak: Annotated[bool, typer.Option("--fresh-peak", help="measure the machine's peaks anew")] = False,
    out: Annotated[Path | None, typer.Option(help="write the profile to this JSON file", metavar="FILE")] = None,
    records: Annotated[
        Path | None, typer.Option(help="keep it beside the records of the same model in this directory", metavar="DIR")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit 7 where other work waited for a CPU for more than 5 % of the time")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Where the time of a run goes, layer by layer, and how far the whole is from this machine's peak."""
    from pipeline.profile_model import profile_model

    report = profile_model(
        model,
        target=target,
        options=target_options(target, threads, option),
        precision=precision,
        preset=preset,
        fresh_peak=fresh_peak,
        num_top=top,
        out=out,
        records=records,
        strict=strict,
        progress=open_progress(),
    )
    answer(report, as_json)


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="a finished run, e.g. runs/quickstart; or measured directories and files of records", metavar="PATH..."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="for records: where index.html, report.md, report.csv and report.json go")
    ] = Path("report"),
    baseline: Annotated[
        str | None,
        typer.Option(help="for records: the configuration that scores are against, by words that only it has"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="for records: what the page is called")] = None,
    history: Annotated[
        str | None, typer.Option(help="for records: a history to draw beside them", metavar="DATABASE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the report of a finished run again, or compare whatever was measured: devices, runtimes, precisions, threads."""
    summary_path = paths[0] / "report" / "summary.json"
    if len(paths) == 1 and summary_path.is_file():
        from benchmarks.report import render_report
        from targets.base import read_json

        page = render_report(read_json(summary_path), summary_path.parent)
        print_document({"report": str(page)}, as_json, str(page))
        return
    if len(paths) == 1 and paths[0].is_dir() and not any(paths[0].rglob("records.json")):
        from targets.errors import DataError

        raise DataError(
            f"{paths[0]} holds neither a finished run (report/summary.json) nor records (records.json). Run a recipe, or measure "
            "first: edgestill bench MODEL."
        )
    from benchmarks.hardware.verb import hardware_report
    from benchmarks.history import show_history
    from benchmarks.history_series import points_by_series

    past = points_by_series(show_history(db=history).series) if history else None
    answer(hardware_report(paths, out, baseline=baseline, title=title, history=past), as_json)


@app.command()
def devices(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="of devices.yaml, or ssh://user@host; all of devices.yaml by default", metavar="[DEVICE]..."
        ),
    ] = None,
    inventory: Annotated[Path, typer.Option(help="the file that names the boards")] = Path("devices.yaml"),
    as_json: AsJson = False,
) -> None:
    """Look at the boards: reachable, system, runtimes, what is missing and the command that installs it."""
    from benchmarks.doctor import check_devices

    answer(check_devices(names or (), inventory=inventory), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: which targets it can measure, what is missing, what its records will not hold."""
    from benchmarks.doctor import check_this_machine

    answer(check_this_machine(), as_json)
