"""Stage 6, bundle: everything that a device and its keeper need, in one directory that proves itself.

Reads a compiled model, its record and its accuracy. Writes model/, golden/, record.json, edgestill-device.pyz,
MODEL_CARD.md, manifest.json (sha256 of every other file), with a key model.sig, and manifest.sha256 over these two. The same
inputs give the same bytes, but for the signature: ECDSA draws a number for each.
"""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.evaluate import batch_of
from benchmarks.device.json_schema import first_fault
from benchmarks.device.manifest import SCHEMA, SCHEMA_VERSION
from benchmarks.device.measure import synthetic_batch
from benchmarks.device.preprocess import load_evaluation
from benchmarks.device.signature import SIGNATURE
from benchmarks.device.verify import MANIFEST, SEAL, check_files, seal_of
from benchmarks.devices import Device, Local
from benchmarks.pack import PROGRAM, pack_device_program
from pipeline.artifacts import CompiledArms, Measured, PreparedData, Verdict
from pipeline.how import How
from pipeline.signing import sign
from pipeline.workbench import Workbench
from targets import make_target
from targets.base import Array, Batch, CompiledModel, sha256_file, write_json
from targets.errors import DataError, RecipeError, TargetError

# What another machine's kernels may change of an output, as a share of the golden output's range. INT8: a few quantization
# steps of 1/255 add up over the layers; BF16 keeps 8 bits of mantissa.
TOLERANCES = {"int8": 0.05, "bf16": 0.02, "fp16": 0.005, "fp32": 1e-4}
GOLDEN_SEED = 0
LOCAL = Local()
# The folders of an absolute path, also in "images:/home/ann/cats", not those of a URL.
FOLDERS = re.compile(r"(?<![\w./])/(?:[^/\n:]+/)+")
OF_THE_BUILD = frozenset({"timing_cache"})  # options that are paths of the machine that compiled; a session needs none
PORTABLE = ("onnxruntime-cpu", "openvino-cpu", "executorch")  # whose compiled form is a graph, not code for a processor
# What a reader wants first; other facts follow by name.
FIRST = ("metric", "value", "ci95", "n", "on", "at", "preset", "p50_us", "p50_ci95_us", "fps")


def bundle_shipped(
    verdict: Verdict,
    arms: CompiledArms,
    measured: Measured,
    prepared: PreparedData,
    provenance: Mapping[str, Any],
    out_dir: Path,
    how: How,
    *,
    device: Device = LOCAL,
    sign_key: Path | None = None,
) -> None:
    """Bundle what the verdict ships; with `how.include_samples` the golden input is real, else synthetic and seeded.

    `device`: where the model was measured and answers the golden input, for an engine runs only where it was built.
    """
    info = verdict.info
    compiled = CompiledModel.load(arms.dir / info["shipped_dir"])
    golden = None
    if how.include_samples:
        size = batch_of(compiled.inputs, 1)
        samples = load_evaluation(prepared.evaluation_dir).batches(size, compiled.inputs[0])
        golden = {compiled.inputs[0].name: next(samples)}
    write_bundle(
        out_dir / "bundle",
        compiled=compiled,
        record=measured.records[info["shipped_arm"]],
        accuracy=info["accuracy"],
        provenance=provenance,
        labels=prepared.info["classes"],
        device_program=pack_device_program(out_dir / PROGRAM),
        float_reason=info["float_reason"],
        golden_input=golden,
        include_samples=how.include_samples,
        answer=None
        if isinstance(device, Local)
        else functools.partial(_answer_of, device, compiled, out_dir / PROGRAM),
        sign_key=sign_key,
    )


def _answer_of(device: Device, compiled: CompiledModel, program: Path, batch: Batch) -> Batch:
    bench = Workbench(
        target=compiled.target,
        options=compiled.options,
        device=device,
        program=device.put(program),
        float_precisions=(),
    )
    return {name: arrays[0] for name, arrays in bench.answers(compiled.directory, [batch]).items()}


def write_bundle(
    out_dir: Path,
    *,
    compiled: CompiledModel,
    record: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    provenance: Mapping[str, Any],
    labels: Sequence[str],
    device_program: Path,
    float_reason: str | None = None,
    golden_input: Batch | None = None,
    include_samples: bool = False,
    answer: Callable[[Batch], Batch] | None = None,
    sign_key: Path | None = None,
) -> Path:
    """Write the bundle into `out_dir`, whole or not at all; returns it. `sign_key`: a private EC key to sign it with.

    `record` is a record of schema 1, `accuracy` has the metric with n and interval, `float_reason` says why a float model
    ships in place of INT8. The golden input is synthetic and seeded; a `golden_input` of real samples (one array an input,
    batch first) is packed only with `include_samples`, and the manifest says so. The golden output is what `answer` gives,
    or, without one, what the model answers on this machine. Raises TargetError where it answers with NaN or infinity.
    """
    if include_samples != (golden_input is not None):
        raise DataError(
            "bundle: real samples leave this machine only when both are given, the samples and include_samples. "
            "Give both, or neither for a synthetic golden input."
        )
    partial = _fresh_directory(out_dir)
    kept = {name: value for name, value in compiled.options.items() if name not in OF_THE_BUILD}
    compiled = _copied(replace(compiled, options=kept), partial / "model")
    golden = _write_golden(partial / "golden", compiled, golden_input, answer)
    write_json(partial / "record.json", _canonical(record))
    shutil.copyfile(device_program, partial / PROGRAM)
    return _finish(
        partial, _manifest(compiled, record, accuracy, provenance, labels, float_reason, golden), out_dir, sign_key
    )


def write_portable(bundle: Path, out_dir: Path, *, sign_key: Path | None = None) -> Path:
    """Write a bundle again for any machine and any version of its runtime; returns `out_dir`.

    Only where the model is what was exported and not what a machine made of it (ONNX, OpenVINO's IR). Its golden output,
    whose tolerance is for other machines' kernels, then decides alone. A signature does not carry over. Raises TargetError
    for an engine, IntegrityError for a bundle whose files are not as written.
    """
    if out_dir.resolve().is_relative_to(bundle.resolve()):
        raise RecipeError(f"{out_dir} is the bundle, or lies in it. Name a directory beside it.")
    manifest = check_files(bundle)
    compiled = CompiledModel.load(bundle / "model")
    if compiled.target not in PORTABLE:
        raise TargetError(
            f"{bundle}: a model that was compiled for {compiled.target} runs only where it was built. "
            f"Take a bundle for {' or '.join(PORTABLE)}."
        )
    partial = _fresh_directory(out_dir)
    shutil.copytree(bundle, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SEAL, SIGNATURE))
    replace(compiled, built_for={}, directory=partial / "model").save()
    return _finish(partial, {**manifest, "built_for": {}}, out_dir, sign_key)


def model_card(manifest: Mapping[str, Any]) -> str:
    """The model card, as Markdown: what it is, what was measured and where, how to use it."""
    return "\n".join(
        (
            f"# {manifest['name']} for {manifest['target']}",
            "",
            f"A {manifest['precision']} model for {manifest['built_for'].get('arch', 'any machine')}, {manifest['toolchain']}.",
            *([f"Float ships in place of INT8: {manifest['float_reason']}"] if manifest["float_reason"] else []),
            "",
            *_section("Input and output", _tensor_lines(manifest)),
            *_section("Accuracy", _fact_lines(manifest["accuracy"])),
            *_section("Measured", _fact_lines(manifest["measured"])),
            *_section("Origin", _fact_lines(manifest["provenance"])),
            *_section("Check and use it", _use_lines(manifest)),
            *(_section("In an app", _app_lines(manifest)) if manifest["target"] == "executorch" else ()),
        )
    )


def _fresh_directory(out_dir: Path) -> Path:
    """An empty directory of the same name in a hidden folder beside it; refuses to replace what is no bundle. Many a folder has a
    manifest.json: a bundle has its seal beside it."""
    is_bundle = (out_dir / MANIFEST).is_file() and (out_dir / SEAL).is_file()
    if out_dir.exists() and not is_bundle and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir} holds files that are no bundle. Name another directory, or empty it.")
    hidden = out_dir.with_name(f".{out_dir.name}.partial")
    if hidden.exists():
        shutil.rmtree(hidden)
    (hidden / out_dir.name).mkdir(parents=True)
    return hidden / out_dir.name


def _finish(partial: Path, manifest: Mapping[str, Any], out_dir: Path, sign_key: Path | None) -> Path:
    """Write what is over all other files, and move the directory to its place."""
    told = _canonical({key: value for key, value in manifest.items() if key != "files"})
    (partial / "MODEL_CARD.md").write_text(model_card(told), encoding="utf-8")
    whole = _canonical({**told, "files": _digests(partial)})
    if (fault := first_fault(SCHEMA, whole, "manifest")) is not None:
        raise DataError(f"bundle: {fault}. What is bundled must fit docs/schemas: correct what was handed over.")
    write_json(partial / MANIFEST, whole)
    (partial / SEAL).write_bytes(seal_of(partial))
    if sign_key is not None:
        sign(partial, sign_key)
    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial.rename(out_dir)
    partial.parent.rmdir()
    return out_dir


def _canonical(value: Any) -> Any:
    """The one form of a JSON value: keys sorted, sequences as lists."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return value


def _without_paths(value: Any) -> Any:
    """A JSON value with every absolute path in its texts cut to the last name: where it lay says nothing to a device."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def _copied(compiled: CompiledModel, model_dir: Path) -> CompiledModel:
    for name in compiled.files:
        (model_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(compiled.directory / name, model_dir / name)
    copied = replace(compiled, directory=model_dir)
    copied.save()
    return copied


def _write_golden(
    golden_dir: Path, compiled: CompiledModel, samples: Batch | None, answer: Callable[[Batch], Batch] | None
) -> dict[str, Any]:
    """Run the model once and save what went in and came out; returns the manifest's section."""
    batch = batch_of(compiled.inputs, 1 if samples is None else len(next(iter(samples.values()))))
    inputs = synthetic_batch(compiled.inputs, batch, GOLDEN_SEED) if samples is None else samples
    if answer is None:
        answer = make_target(compiled.target, compiled.options).load(compiled, batch=batch).run
    outputs = answer(inputs)
    golden_dir.mkdir()
    for name, output in outputs.items():
        if not np.isfinite(output).all():
            raise TargetError(
                f"{compiled.name}: output '{name}' is not finite on the golden input. Do not ship this model."
            )
    return {
        "source": f"synthetic, seed {GOLDEN_SEED}" if samples is None else "real samples",
        "contains_samples": samples is not None,
        "batch": batch,
        "inputs": _save(golden_dir, "input", inputs),
        "outputs": _save(golden_dir, "output", outputs),
        "tolerance": {name: _tolerance(output, compiled.precision) for name, output in outputs.items()},
    }


def _save(golden_dir: Path, stem: str, arrays: Batch) -> dict[str, str]:
    names = {name: f"{stem}.npy" if len(arrays) == 1 else f"{stem}-{i}.npy" for i, name in enumerate(arrays)}
    for name, file in names.items():
        np.save(golden_dir / file, arrays[name], allow_pickle=False)
    return {name: f"{golden_dir.name}/{file}" for name, file in names.items()}


def _tolerance(output: Array, precision: str) -> float:
    """Largest |delta| that is let pass; whole numbers (class ids) must agree."""
    if output.dtype.kind != "f":
        return 0.0
    spread = float(np.max(output) - np.min(output)) or float(np.max(np.abs(output))) or 1.0
    return TOLERANCES[precision] * spread


def _manifest(
    compiled: CompiledModel,
    record: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    provenance: Mapping[str, Any],
    labels: Sequence[str],
    float_reason: str | None,
    golden: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": compiled.name,
        "target": compiled.target,
        "options": dict(compiled.options),
        "precision": compiled.precision,
        "float_reason": float_reason,
        "toolchain": compiled.toolchain,
        "built_for": dict(compiled.built_for),
        "inputs": [asdict(spec) for spec in compiled.inputs],
        "outputs": [asdict(spec) for spec in compiled.outputs],
        "preprocessing": asdict(compiled.preprocessing) if compiled.preprocessing else None,
        "labels": list(labels),
        "accuracy": dict(accuracy),
        "measured": _measured(record, compiled),
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__, "runtime": compiled.toolchain},
        "provenance": _without_paths(provenance),
        "golden": dict(golden),
    }


def _measured(record: Mapping[str, Any], compiled: CompiledModel) -> dict[str, Any]:
    """What a keeper asks first; record.json has the rest."""
    summary, hard = record["summary"], record["env"]["hard"]
    return {
        "on": f"{hard['cpu'] or 'a CPU without a name'}, {hard['arch']}, Linux {hard['kernel']}",
        "at": record["utc"],
        "preset": record["scenario"]["preset"],
        "p50_us": summary["p50_us"],
        "p50_ci95_us": summary["ci95"],
        "fps": summary["fps"],
        "load_ms": summary["load_ms"],
        "peak_rss_mib": record["memory"]["vmhwm_mib"],
        "size_mib": compiled.size_bytes / 2**20,
        "trustworthy": record["validity"]["ok"],
    }


def _digests(directory: Path) -> dict[str, str]:
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: sha256_file(paths[name]) for name in paths if name not in (MANIFEST, SEAL, SIGNATURE)}


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _fact_lines(facts: Mapping[str, Any]) -> list[str]:
    keys = [*(key for key in FIRST if key in facts), *sorted(facts.keys() - set(FIRST))]
    return [f"- {key}: {_shown(facts[key])}" for key in keys] or ["- nothing is known"]


def _shown(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items() if item is not None) or "none"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return str(value)


def _tensor_lines(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind in ("inputs", "outputs"):
        for spec in manifest[kind]:
            shape = " x ".join("N" if size is None else str(size) for size in spec["shape"])
            lines.append(f"- {kind[:-1]} `{spec['name']}`: {spec['dtype']}, {shape} {spec['layout']}".rstrip())
    labels = manifest["labels"]
    if labels:
        lines.append(f"- {len(labels)} classes: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
    return [*lines, f"- preprocessing: {_shown(manifest['preprocessing'] or {})}"]


def _use_lines(manifest: Mapping[str, Any]) -> list[str]:
    return [
        f"`python3 {PROGRAM} verify .` holds every byte against the manifest, this machine against what the model was",
        f"compiled for, and the model's answer against golden/ ({manifest['golden']['source']}). Of a signed bundle,",
        "`--public-key FILE` checks who wrote it; get the key from the signer, never from where the bundle came from.",
    ]


def _app_lines(manifest: Mapping[str, Any]) -> list[str]:
    """How an Android or iOS app loads an ExecuTorch program, by ExecuTorch's documents."""
    spec, (_, version) = manifest["inputs"][0], manifest["toolchain"].split()
    shape = ", ".join(str(size) for size in spec["shape"])
    android, swift = {"uint8": ("fromBlobUnsigned", "UInt8")}.get(spec["dtype"], ("fromBlob", "Float"))
    return [
        f"`model/model.pte` is all that the app needs. It wants ExecuTorch {version} with the XNNPACK backend, {spec['dtype']} values",
        f"in the order {spec['layout'] or 'of the shape'}; golden/ is a test for it. This code has not been compiled here.",
        "",
        "Android, Gradle dependency `org.pytorch:executorch-android` of that version:",
        "",
        "```kotlin",
        "val module = Module.load(path)",
        f"val input = Tensor.{android}(values, longArrayOf({shape}))",
        "val output = module.forward(EValue.from(input))[0].toTensor().dataAsFloatArray",
        "```",
        "",
        f"iOS, Swift package `https://github.com/pytorch/executorch`, branch `swiftpm-{version}`; link `executorch`, `backend_xnnpack`",
        "and `kernels_optimized` with `-all_load`:",
        "",
        "```swift",
        'let module = Module(filePath: Bundle.main.path(forResource: "model", ofType: "pte")!)',
        'try module.load("forward")',
        f"let input = Tensor<{swift}>(data: data, shape: [{shape}])",
        "let output = try Tensor<Float>(module.forward(input)).scalars()",
        "```",
    ]
