"""INT8 against float on trained students: two data sets, three architectures; PTQ, QAT, QAT + distillation, FP32 control.

    python -m benchmarks.evidence.int8_accuracy --cifar10 npz:FILE --fashion-mnist ROOT --runs DIR --out FILE.json

The recipes are recipes/int8_cifar10.yaml and recipes/int8_fashion_mnist.yaml; each student is trained once and quantized twice.
Both INT8 artifacts are scored once on the 10,000 test images, on the runtime's own kernels, paired with the float student. What
ships nowhere (QAT without distillation, an FP32 fine-tune of the same length) stands beside them on the validation split. A run
that is there already is not made again.
`--students` and `--data` take a part of it; `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.script import parse_out_or_show
from targets.base import read_json, write_json

# Strides for small images: 32 -> 16 -> 8 -> 4 -> 2 with one halving less than the published net.
SMALL_INPUT = "[[1,16,1,1],[6,24,2,1],[6,32,3,2],[6,64,4,2],[6,96,3,1],[6,160,3,1],[6,320,1,1]]"
ADAMW = ("distill.train.optimizer=adamw", "distill.train.weight_decay=0.01")
STUDENTS: dict[str, tuple[str, ...]] = {
    "resnet20": (),
    "mobilenetv3_small": (
        "distill.model=timm:mobilenetv3_small_100",
        "distill.train.lr=0.002",
        "quantize.train.epochs=3",
        *ADAMW,
    ),
    "mobilenet_v2": (
        "distill.model=torchvision:mobilenet_v2",
        f"distill.args={{width_mult: 0.35, inverted_residual_setting: {SMALL_INPUT}}}",
        "distill.train.lr=0.003",
        *ADAMW,
    ),
}
RUNGS: dict[str, tuple[str, ...]] = {
    "PTQ": ("quantize.method=ptq", "targets=[{name: onnxruntime-cpu}]"),
    "QAT + distillation": ("quantize.method=qat",),
}
DATA = ("cifar10", "fashion_mnist")
MAX_LOSS = 0.003  # the goal: INT8 within 0.3 points of float


def main(argv: Sequence[str]) -> None:
    """Run what is missing, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    rows = [row for data in arguments.data for row in _rows_of(data, arguments)]
    document = {"schema_version": 1, "max_loss": MAX_LOSS, "rows": rows}
    write_json(arguments.out, document)
    print(text(document))


def _rows_of(data: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    source = {
        "cifar10": f"data.source={arguments.cifar10}",
        "fashion_mnist": f"data.root={arguments.fashion_mnist}",
    }[data]
    for student in arguments.students:
        given = _floats(arguments.floats, data, student)
        for rung, overrides in RUNGS.items():
            print(f"{data}, {student}, {rung}", file=sys.stderr, flush=True)
            summary = run(data, [source, *STUDENTS[student], *given, *overrides], arguments.runs)
            yield from _rows(data, student, rung, summary)


def _floats(folder: Path | None, data: str, student: str) -> list[str]:
    """Teacher and student that were trained before by the same recipe, taken as they are; none: the recipe trains them."""
    if folder is None:
        return []
    teacher, weights = folder / f"{data}-teacher.safetensors", folder / f"{data}-{student}.safetensors"
    taken = [f"teacher.checkpoint={teacher}", "teacher.train=null", f"distill.checkpoint={weights}"]
    return [*taken, "distill.train=null"]


def run(data: str, options: Sequence[str], runs_dir: Path) -> dict[str, Any]:
    """One run of the pipeline; returns its summary. Finished stages are kept, so teacher and student are trained once."""
    argv = [sys.executable, "-m", "pipeline", "run", f"recipes/int8_{data}.yaml", "--runs", str(runs_dir), "--json"]
    done = subprocess.run([*argv, *(f"--set={option}" for option in options)], stdout=subprocess.PIPE, check=False)
    answer = json.loads(done.stdout)
    if answer.get("report") is None:
        raise SystemExit(f"{data}: {answer['error']}")
    summary: dict[str, Any] = read_json(Path(answer["report"]).parent / "summary.json")
    return summary


def _rows(data: str, student: str, rung: str, summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    (quantized,) = summary["quantized"]
    for target in summary["targets"]:
        hops = {row["hop"]: row for row in summary["ledgers"][target["target"]]}
        int8 = next(row for row in target["rows"] if row["precision"] == "int8")
        yield {
            "data": data,
            "student": student,
            "model": summary["models"][1]["name"],
            "parameters": summary["models"][1]["parameters"],
            "rung": rung,
            "target": target["target"],
            **target["int8_against_float"],
            "int8_share": int8["int8_share"],
            "validation": quantized,
            "hops": {
                name: {key: hops[name][key] for key in ("top1", "agreement_previous", "kl_previous", "max_abs_delta")}
                for name in ("quantized", "onnx", "compiled")
            },
            "versions": summary["versions"],
            "machine": summary["machine"],
        }


def text(document: Mapping[str, Any]) -> str:
    """Markdown: a line an artifact, and whether it keeps within the goal."""
    lines = [
        "| data | student | rung | target | float, % | INT8, % | difference (95 % CI), points | INT8 MACs | within 0.3 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        low, high = (100 * bound for bound in row["ci95"])
        cells = [row["data"], row["student"], row["rung"], row["target"]]
        cells += [f"{100 * row['float_top1']:.2f}", f"{100 * row['int8_top1']:.2f}"]
        cells += [f"{100 * row['difference']:+.2f} ({low:+.2f} to {high:+.2f})", f"{row['int8_share']:.0%}"]
        lines.append(f"| {' | '.join([*cells, 'yes' if row['difference'] >= -document['max_loss'] else 'no'])} |")
    lines += ["", "| data | student | float | PTQ | QAT + distillation | QAT | FP32 fine-tune |", "| --- " * 7 + "|"]
    trained = [row for row in document["rows"] if row["rung"] != "PTQ" and row["target"] == "onnxruntime-cpu"]
    for row in trained:
        rungs = {one["rung"]: one["top1_validation"] for one in row["validation"]["rungs"]}
        controls = {one["name"]: one["top1_validation"] for one in row["validation"]["controls"]}
        values = [row["validation"]["float_top1_validation"], rungs["ptq"], rungs["qat"]]
        values += [controls["QAT without distillation"], controls["FP32 fine-tune of the same length"]]
        lines.append(f"| {' | '.join([row['data'], row['student'], *(f'{100 * value:.2f}' for value in values)])} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar10", default="torchvision:CIFAR10", help="npz:FILE or torchvision:CIFAR10")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("data"), help="where torchvision finds the set")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--floats", type=Path, help="DATA-teacher.safetensors and DATA-STUDENT.safetensors, taken as they are"
    )
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    return parse_out_or_show(parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
