"""The report of a run: one page that works offline, the same in Markdown, and the summary beside them.

Reads the summary of a run (JSON, schema 1). Writes index.html, report.md and summary.json. Names, labels and paths in a
summary are not trusted: HTML is escaped by jinja2, Markdown by `escape_markdown`, labels of figures before plotly reads
them, and the page's own policy lets no script run but the two that stand in it, and nothing be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report_figures import ecdf_figure, pareto_figure, training_figure
from benchmarks.report_page import environment, escape_markdown, page_scripts, write_text
from benchmarks.report_tables import (
    CONTROLS,
    EPOCHS,
    GATES,
    HEADLINE,
    LAYERS,
    LEDGER,
    MEASURED,
    MODELS,
    ROUNDS,
    RUNGS,
    Row,
    Table,
    make_table,
    name_of,
    number,
    percent,
    points,
)
from targets.base import write_json
from targets.errors import IntegrityError

SCHEMA_VERSION = 1


def render_report(summary: Mapping[str, Any], out_dir: Path) -> Path:
    """Write index.html, report.md and summary.json into `out_dir`; returns the path of the page.

    Any part of the summary may be absent or null. Raises IntegrityError for a summary of another schema.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    report = _report(summary)
    markdown = environment(escape_markdown).get_template("report.md.j2")
    write_text(out_dir / "report.md", markdown.render(report))
    write_json(out_dir / "summary.json", summary)
    page_path = out_dir / "index.html"
    write_text(page_path, environment().get_template("report.html.j2").render(report | page_scripts("report.js")))
    return page_path


def headline_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What ships on each target, as texts by column, ready to be printed."""
    table = _headline_table(_headlines(summary))
    return table.records() if table else []


def verdict(summary: Mapping[str, Any]) -> str:
    """The run in one sentence: what ships where, and what that wins and costs against the float teacher."""
    headlines = _headlines(summary)
    if not headlines:
        return "Nothing was deployed in this run."
    quantized = [headline for headline in headlines if headline.get("shipped") == "int8"]
    sentence = f"INT8 ships on {len(quantized)} of {len(headlines)} target{'s' if len(headlines) > 1 else ''}"
    gains = [
        text
        for text in (
            _range(quantized, "speedup", number, "× as fast as the float teacher"),
            _range(quantized, "shrink", number, "× smaller"),
            _range(quantized, "delta_top1_teacher", points, " points of top-1"),
        )
        if text
    ]
    return f"{sentence}: {', '.join(gains)}." if gains else f"{sentence}."


def _report(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that both templates show, tables and figures made."""
    if summary.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError(
            f"The summary has schema_version={summary.get('schema_version')!r}; this edgestill reads {SCHEMA_VERSION}. "
            "Run the recipe again with this version, or read it with the version that wrote it."
        )
    headlines = _headlines(summary)
    trainings = [_training(index, stage) for index, stage in enumerate(_list(summary, "training"))]
    targets = [_target(index, target) for index, target in enumerate(_list(summary, "targets"))]
    pareto = {"pareto": pareto_figure(_list(summary, "targets"))}
    figures = [pareto, *(part["figures"] for part in (*targets, *trainings))]
    return {
        "name": name_of(summary.get("name")),
        "marked": summary.get("marked"),
        "verdict": verdict(summary),
        "remarks": [f"{h['target']}: {_sentence(h)}" for h in headlines if _is_remarkable(h)],
        "doubtful": [headline["target"] for headline in headlines if headline["is_doubtful"]],
        "facts": _facts(summary),
        "headline": _headline_table(headlines),
        "models": make_table("Models before quantization", MODELS, _list(summary, "models")),
        "ledgers": [_ledger(summary, name, rows or []) for name, rows in (summary.get("ledgers") or {}).items()],
        "targets": targets,
        "ladders": [_ladder(one) for one in _list(summary, "quantized")],
        "training": trainings,
        "rounds": make_table("Progressive rounds", ROUNDS, _list(summary, "rounds")),
        "provenance": _provenance(summary),
        "recipe": json.dumps(summary.get("recipe"), indent=2, ensure_ascii=False) if summary.get("recipe") else None,
        "figures": {name: figure for group in figures for name, figure in group.items() if figure},
    }


def _list(mapping: Mapping[str, Any], key: str) -> list[Any]:
    return list(mapping.get(key) or ())


def _headlines(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a target: what ships, and the fastest float teacher of the same runtime beside it."""
    return [_headline(target) for target in _list(summary, "targets")]


def _headline(target: Mapping[str, Any]) -> dict[str, Any]:
    rows = _list(target, "rows")
    shipped: Row = next((row for row in rows if _is_shipped(row, target)), {})
    teachers = [row for row in rows if row.get("role") == "teacher" and row.get("p50_ms")]
    baseline: Row = min(teachers, key=lambda row: float(row["p50_ms"]), default={})
    gates = _list(target, "gates")
    names = {
        outcome: [name_of(gate.get("name")) for gate in gates if gate.get("passed") is outcome]
        for outcome in (True, False, None)
    }
    return {
        **shipped,
        "target": name_of(target.get("target")),
        "shipped": target.get("shipped"),
        "why": target.get("why"),
        "baseline": baseline.get("precision"),
        "speedup": _ratio(baseline.get("p50_ms"), shipped.get("p50_ms")),
        "shrink": _ratio(baseline.get("size_mib"), shipped.get("size_mib")),
        "gates_passed": f"{len(names[True])} of {len(gates)}" if gates else None,
        "missed": names[False],
        "undecided": names[None],
        "is_doubtful": shipped.get("valid") is False or baseline.get("valid") is False,
    }


def _is_remarkable(headline: Row) -> bool:
    """Whether the headline table leaves something to be said: a float that ships, a gate that was not passed."""
    return bool(headline["shipped"] != "int8" or headline["missed"] or headline["undecided"])


def _is_shipped(row: Row, target: Mapping[str, Any]) -> bool:
    return row.get("role") == "student" and row.get("precision") == target.get("shipped") is not None


def _ratio(larger: float | None, smaller: float | None) -> float | None:
    return larger / smaller if larger and smaller else None


def _headline_table(headlines: Sequence[Row]) -> Table | None:
    return make_table(
        "What ships on each target, against the float teacher at its fastest precision on the same runtime",
        HEADLINE,
        headlines,
        badges=lambda row: ("not valid",) if row["is_doubtful"] else (),
        is_digest=True,
    )


def _range(headlines: Sequence[Row], key: str, show: Any, unit: str) -> str | None:
    values = [headline[key] for headline in headlines if headline.get(key) is not None]
    if not values:
        return None
    low, high = show(min(values)), show(max(values))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _sentence(headline: Row) -> str:
    """One target in one sentence, of what is known only."""
    shipped = str(headline["shipped"] or "nothing").upper()
    parts = [
        f"{number(headline['p50_ms'])} ms an image (p50)" if headline.get("p50_ms") else None,
        f"{number(headline['speedup'])}× as fast as the {headline['baseline'] or 'float'} teacher"
        if headline["speedup"]
        else None,
        f"{percent(headline['top1'])} % top-1" if headline.get("top1") is not None else None,
    ]
    known = ", ".join(part for part in parts if part)
    sentence = f"{shipped} ships" + (f" at {known}." if known else ".")
    for word in ("missed", "undecided"):
        if headline[word]:
            sentence += f" Gates {word}: {', '.join(headline[word])}."
    return sentence + (f" {headline['why']}" if headline["why"] else "")


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of small print under the title."""
    data, machine = summary.get("data") or {}, summary.get("machine") or {}
    seconds = summary.get("seconds")
    splits = [
        f"{number(data[f'num_{part}'])} {part}"
        for part in ("train", "validation", "calibration", "test")
        if data.get(f"num_{part}") is not None
    ]
    lines = {
        "Data": [data.get("source"), ", ".join(splits)],
        "Machine": [
            machine.get("cpu"),
            f"{machine['cores']} cores" if machine.get("cores") else None,
            machine.get("os"),
        ],
        "Run": [summary.get("utc"), None if seconds is None else f"{number(seconds)} s"],
    }
    return [(term, " · ".join(str(word) for word in words if word)) for term, words in lines.items() if any(words)]


def _provenance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    groups = {"edgestill": summary.get("edgestill")}
    for key in ("machine", "versions", "data"):
        groups |= summary.get(key) or {}
    return [(term.replace("_", " "), str(value)) for term, value in groups.items() if value is not None]


def _ledger(summary: Mapping[str, Any], target: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One target's ledger; `lost` says which hop lost the accuracy, if any did."""
    culprits = summary.get("lost_most") or {}
    culprit = culprits.get(target)
    lost = f"most accuracy was lost at the hop “{culprit}”." if culprit else "no hop lost accuracy beyond the noise."
    table = make_table(
        f"From the teacher to {target}: every hop on the same held-out samples",
        LEDGER,
        [_hop(row) for row in rows],
        badges=lambda row: ("lost most",) if culprit and row.get("hop") == culprit else (),
        plot="top1",
    )
    flipped = [(name_of(row.get("hop")), [number(i) for i in row["flipped"]]) for row in rows if row.get("flipped")]
    return {"target": target, "table": table, "lost": lost if target in culprits else None, "flipped": flipped}


def _hop(row: Row) -> Row:
    """A ledger row with its paired difference, and what it says where the teacher errs, beside the other values."""
    difference, flipped = row.get("difference") or {}, row.get("flipped")
    errs = row.get("where_teacher_errs") or {}
    num_wrong = errs.get("num_wrong")
    return {
        **row,
        "difference_top1": difference.get("top1"),
        "difference_ci95": difference.get("ci95"),
        "mcnemar_p": difference.get("mcnemar_p"),
        "num_flipped": row.get("num_flipped", None if flipped is None else len(flipped)),
        "teacher_errs": num_wrong,
        "right_where_teacher_errs": errs["num_right"] / num_wrong if num_wrong else None,
        "same_where_teacher_errs": errs["num_same"] / num_wrong if num_wrong else None,
    }


def _target(index: int, target: Mapping[str, Any]) -> dict[str, Any]:
    outcome = {True: "passed", False: "missed", None: None}
    gates = [{**gate, "result": outcome[gate.get("passed")]} for gate in _list(target, "gates")]
    return {
        "id": f"target-{index}",
        "name": name_of(target.get("target")),
        "sentence": _sentence(_headline(target)),
        "in_all": _in_all(target.get("int8_against_float")),
        "bundle": target.get("bundle"),
        "gates": make_table("Gates, in the order they were asked", GATES, gates),
        "rows": make_table(
            "Measured on the device, a row a model and precision",
            MEASURED,
            _list(target, "rows"),
            badges=lambda row: ("ships",) * _is_shipped(row, target) + ("not valid",) * (row.get("valid") is False),
        ),
        "placement": _placement(target.get("placement") or {}),
        "figures": {f"ecdf-{index}": ecdf_figure(target)},
    }


def _in_all(paired: Mapping[str, Any] | None) -> str | None:
    """INT8 on the device against the float student, on the same test samples: what all hops together cost."""
    if paired is None:
        return None
    low, high = paired["ci95"]
    return (
        f"INT8 here against the float student, on the same {paired['n']:,} test samples: {points(paired['difference'])} points "
        f"(95 % interval {points(low)} to {points(high)}, McNemar p {paired['mcnemar_p']:.2g}); they agree on "
        f"{percent(paired['agreement'])} %."
    )


def _ladder(quantized: Mapping[str, Any]) -> dict[str, Any]:
    """The rungs of one scheme in the order that they were tried."""
    outcome = {True: "passed", False: "missed", None: None}
    rungs = [
        {
            **rung,
            "result": outcome[rung.get("passed")],
            "float_layers": ", ".join(rung.get("layers_in_float") or ()) or None,
        }
        for rung in _list(quantized, "rungs")
    ]
    shipped, float_top1 = quantized.get("shipped_rung"), quantized.get("float_top1_validation")
    told = f"; float has {percent(float_top1)} %" if float_top1 is not None else ""
    title = f"The ladder of scheme {quantized.get('scheme')}: {shipped} goes on{told}"
    return {"table": make_table(title, RUNGS, rungs)}


def _placement(placement: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shares of the multiply-accumulates by the precision that the runtime executed, the largest first."""
    layers = _list(placement, "layers")
    if not layers:
        return None
    macs: dict[str, int] = {}
    for layer in layers:
        precision = layer.get("precision") or "other"
        macs[precision] = macs.get(precision, 0) + (layer.get("macs") or 0)
    total = sum(macs.values())
    shares = sorted(((p, count / total) for p, count in macs.items()), key=lambda item: -item[1]) if total else []
    return {
        "source": placement.get("source"),
        "shares": [(precision, percent(share)) for precision, share in shares],
        "layers": make_table("Layers with arithmetic, as executed", LAYERS, layers),
    }


def _training(index: int, stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": name_of(stage.get("stage")),
        "best_epoch": stage.get("best_epoch"),
        "notes": _list(stage, "notes"),
        "controls": make_table("Controls of the same length", CONTROLS, _list(stage, "controls")),
        "epochs": make_table("Epochs", EPOCHS, _list(stage, "epochs")),
        "figures": {f"training-{index}": training_figure(stage)},
    }
