"""Verbs on a model of a person's own: quantize, compile, lint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import (
    AsJson,
    Launches,
    ModelPath,
    Option,
    OutDir,
    Preset,
    TargetName,
    Threads,
    answer,
    app,
    numbers_of,
    target_options,
)
from pipeline.progress import open_progress

if TYPE_CHECKING:
    from pipeline.onnx_ladder import Demands


Calibration = Annotated[Path, typer.Option(help="a folder of images, or an NPZ file with one array an input")]
NumSamples = Annotated[int, typer.Option("--samples", min=1, help="calibration samples to use")]
Mean = Annotated[str | None, typer.Option(help="pixel mean(s), 0..255, e.g. 127 or 123.7,116.3,103.5")]
Std = Annotated[str | None, typer.Option(help="pixel standard deviation(s), 0..255")]
Resize = Annotated[int | None, typer.Option(min=1, help="shorter side before the centre crop, pixels")]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="the target's own by default; portable: one graph for every runtime; cpu-int8-w7: for x86 CPUs without VNNI"
    ),
]
Method = Annotated[str, typer.Option(help="ladder (the first rung that passes), or one: ptq, equalized, mixed")]
KeepFloat = Annotated[
    list[str] | None, typer.Option(help="a node that stays in float; may be given several times", metavar="NODE")
]
MinInt8Share = Annotated[float, typer.Option(min=0.0, max=1.0, help="share of MACs that must run in INT8")]
MinAgreement = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="one output (N, K): share of held-out samples with float's class")
]
MinCosine = Annotated[float, typer.Option(min=0.0, max=1.0, help="other outputs: mean cosine with float, each of them")]
Metric = Annotated[str | None, typer.Option(help="python:module:factory, in place of both; see docs/bring-your-own.md")]
MinMetric = Annotated[float, typer.Option(help="what your metric must reach")]
AllowCode = Annotated[bool, typer.Option(help="let --metric run code of your own")]
Kit = Annotated[
    bool, typer.Option("--kit", help="the target is not on this machine: write what its first run there needs")
]


@app.command()
def quantize(
    model: ModelPath,
    calibration: Calibration,
    target: TargetName = "onnxruntime-cpu",
    out: OutDir = Path("quantized"),
    num_samples: NumSamples = 128,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    scheme: Scheme = None,
    method: Method = "ladder",
    keep_float: KeepFloat = None,
    min_int8_share: MinInt8Share = 0.95,
    min_agreement: MinAgreement = 0.9,
    min_cosine: MinCosine = 0.95,
    metric: Metric = None,
    min_metric: MinMetric = 0.0,
    allow_code: AllowCode = False,
    kit: Kit = False,
    threads: Threads = 1,
    option: Option = None,
    preset: Preset = "smoke",
    launches: Launches = None,
    as_json: AsJson = False,
) -> None:
    """Quantize any float ONNX model to INT8 for a target and prove it: lint, placement, latency, difference to float."""
    from pipeline.bring_your_own import quantize_model

    report = quantize_model(
        model,
        calibration,
        target=target,
        options=target_options(target, threads, option),
        out_dir=out,
        num_samples=num_samples,
        mean=numbers_of("--mean", mean),
        std=numbers_of("--std", std),
        resize=resize,
        scheme=scheme,
        demands=_demands(
            method, min_int8_share, min_agreement, min_cosine, metric, min_metric, tuple(keep_float or ()), allow_code
        ),
        kit=kit,
        preset=preset,
        launches=launches,
        progress=open_progress(),
    )
    answer(report, as_json)


def _demands(
    method: str,
    min_int8_share: float,
    min_agreement: float,
    min_cosine: float,
    metric: str | None,
    min_metric: float,
    keep_float: tuple[str, ...],
    allow_code: bool,
) -> Demands:
    from pipeline.learning.own_code import called, own_factory
    from pipeline.onnx_ladder import Demands

    return Demands(
        method=method,
        min_int8_share=min_int8_share,
        min_agreement=min_agreement,
        min_cosine=min_cosine,
        metric=called(own_factory(metric, "--metric", allow_code=allow_code), "--metric") if metric else None,
        min_metric=min_metric,
        keep_float=keep_float,
    )


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
        options=target_options(target, threads, option),
        out_dir=out,
        precision=precision,
        min_int8_share=min_int8_share,
        progress=open_progress(),
    )
    answer(report, as_json)


@app.command()
def lint(model: ModelPath, target: TargetName = "onnxruntime-cpu", as_json: AsJson = False) -> None:
    """Look at a Q/DQ graph for what would keep a target from running it in INT8."""
    from pipeline.bring_your_own import lint_model

    report = lint_model(model, target=target)
    answer(report, as_json)
