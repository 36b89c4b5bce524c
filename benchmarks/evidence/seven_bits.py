"""What an x86 CPU without VNNI makes of INT8: weights of 8 bits against 7, the graph as ONNX defines it against what the CPU answers.

    python -m benchmarks.evidence.seven_bits --images DIR --floats build/float --out docs/results/seven_bits.json

DIR as in `benchmarks.evidence.efficientnet_lite0`; the float nets are those of `benchmarks.evidence.models`. Each is quantized by
`edgestill quantize --method ptq` from the same photographs, with every gate wide open: what is wrong is to be shown and not refused.
No clock is read. On a CPU that does not overflow both schemes answer what the graph says. `--show FILE` prints a stored result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.environment import environment
from benchmarks.evidence.models import MODELS, FloatModel, described
from benchmarks.evidence.script import parse_out_or_show, quantize_ungated
from targets.base import read_json, write_json

TARGETS = ("onnxruntime-cpu", "openvino-cpu")
SCHEMES = ("cpu-int8", "cpu-int8-w7")
HOPS = {
    "graph_to_float": ("INT8 graph", "float graph"),
    "cpu_to_graph": ("INT8, compiled", "INT8 graph"),
    "cpu_to_float": ("INT8, compiled", "float graph"),
}


def main(argv: Sequence[str]) -> None:
    """Quantize each net for each target in both schemes, write one JSON file, print the table."""
    arguments = _arguments(argv)
    if arguments.show:
        print(text(read_json(arguments.show)))
        return
    hard = environment().hard
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in (described(name, arguments.floats) for name in MODELS):
            for target in TARGETS:
                for scheme in SCHEMES:
                    print(f"{model.name} for {target}, {scheme}", file=sys.stderr, flush=True)
                    given = (model.path, model.preprocessing, target, arguments.images, Path(folder) / "out")
                    rows.append(_row(model, target, scheme, quantize_ungated(*given, "--scheme", scheme)))
    document = {
        "schema_version": 1,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": hard["cpu"],
        "isa": hard["isa"],
        "rows": rows,
    }
    write_json(arguments.out, document)
    print(text(document))


def _row(model: FloatModel, target: str, scheme: str, report: Mapping[str, Any]) -> dict[str, Any]:
    found = {(row["hop"], row["against"]): row for row in report["differences"]}
    kept = ("num_samples", "agreement", "cosine_mean", "max_abs_delta")
    return {
        "model": model.name,
        "weights": model.weights,
        "target": target,
        "scheme": scheme,
        "int8_share": report["placement"]["int8_share"],
        "overflow_findings": sum(finding["code"] in ("O25", "V17") for finding in report["findings"]),
        **{name: {key: found[hop][key] for key in kept} for name, hop in HOPS.items()},
    }


def text(document: Mapping[str, Any]) -> str:
    """Markdown: a line a net, target and scheme; agreement only where the weights were trained."""
    lines = [
        "| net | target | scheme | layers the linter warns of | graph to float | CPU to graph | CPU to float | top-1 as in float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        last = row["cpu_to_float"]
        agreement = f"{last['agreement']:.1%} of {last['num_samples']}" if row["weights"] == "published" else "-"
        cells = [row["model"], row["target"], f"`{row['scheme']}`", str(row["overflow_findings"])]
        cells += [f"{row[name]['cosine_mean']:.4f}" for name in HOPS]
        lines.append(f"| {' | '.join([*cells, agreement])} |")
    lines += ["", f"Mean cosines of the outputs. {document['cpu']} ({document['isa']}), {document['utc'][:10]}."]
    return "\n".join(lines)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument(
        "--floats", type=Path, default=Path("build/float"), help="what benchmarks.evidence.models wrote"
    )
    arguments = parse_out_or_show(parser, argv)
    if not arguments.show and not arguments.images:
        parser.error("--images is needed")
    return arguments


if __name__ == "__main__":
    main(sys.argv[1:])
