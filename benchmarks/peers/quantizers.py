"""One peer's quantizer on one float ONNX file, run by the interpreter of the environment in which that peer is installed.

    PYTHON -I quantizers.py QUANTIZER MODEL.onnx CALIBRATION.npz OUT_DIR

Reads the graph and one array an input, batch first. Writes OUT_DIR/model.onnx (model.xml from OpenVINO) and, last,
OUT_DIR/answer.json: the file, the versions, or what the peer raised. It imports the standard library, numpy and the peer,
and nothing of ours: some peers need other releases of our own dependencies. Nobody's usage reports are sent.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]
Quantizer = Callable[[Path, Arrays, Path], Path]

# NNCF reads NNCF_CI; Olive sends a first message before it reads its own switch, but none where CI is set.
SILENT = {"NNCF_CI": "1", "CI": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
TOLD = ("onnxruntime", "onnxruntime-gpu", "onnx", "olive-ai", "nvidia-modelopt", "nncf", "openvino", "torch", "numpy")


def onnxruntime_defaults(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """`quantize_static` with nothing said but the data: QDQ, signed 8 bits throughout, per tensor, min-max."""
    from onnxruntime.quantization import quantize_static

    quantize_static(model, out_dir / "model.onnx", _reader(arrays))
    return out_dir / "model.onnx"


def onnxruntime_every_op(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """`quantize_static` told every operator type of the graph, and the types that its documentation names for x86."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    op_types = sorted({node.op_type for node in onnx.load(model, load_external_data=False).graph.node})
    quantize_static(
        model,
        out_dir / "model.onnx",
        _reader(arrays),
        op_types_to_quantize=op_types,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return out_dir / "model.onnx"


def olive(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """Olive's workflow of one pass, OnnxStaticQuantization, with the pass's defaults on the CPU provider."""
    from olive.data.registry import Registry  # type: ignore[import-not-found]
    from olive.workflows import run  # type: ignore[import-not-found]

    Registry.register_dataset("rows_of_npz")(_olive_rows)
    np.savez(out_dir / "rows.npz", **arrays)
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    rows = {"type": "rows_of_npz", "params": {"path": str(out_dir / "rows.npz")}}
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(model)},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
            "host": "here",
            "target": "here",
            "data_configs": [{"name": "calibration", "type": "DataContainer", "load_dataset_config": rows}],
            "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": "calibration"}},
            "cache_dir": str(out_dir / "cache"),
            "output_dir": str(out_dir / "output"),
        }
    )
    (out_dir / "rows.npz").unlink()
    # Olive logs what a pass raised and ends as if all were well: the file is the proof.
    return _only(sorted((out_dir / "output").rglob("*.onnx")), "Olive wrote no ONNX file; its log says why")


def modelopt(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """ModelOpt's INT8 with its defaults, but float32 between quantized layers: its float16 is meant for GPUs."""
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]

    quantize(
        str(model),
        calibration_data=dict(arrays),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out_dir / "model.onnx"),
    )
    return out_dir / "model.onnx"


def nncf_onnx(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """NNCF's post-training quantization of the ONNX graph with its defaults."""
    import nncf
    import onnx

    onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(_samples(arrays))), out_dir / "model.onnx")
    return out_dir / "model.onnx"


def nncf_openvino(model: Path, arrays: Arrays, out_dir: Path) -> Path:
    """NNCF's post-training quantization of the graph as OpenVINO reads it, with its defaults."""
    import nncf
    import openvino as ov

    quantized = nncf.quantize(ov.Core().read_model(str(model)), nncf.Dataset(_samples(arrays)))
    ov.save_model(quantized, str(out_dir / "model.xml"), compress_to_fp16=False)
    return out_dir / "model.xml"


QUANTIZERS: dict[str, Quantizer] = {
    function.__name__: function
    for function in (onnxruntime_defaults, onnxruntime_every_op, olive, modelopt, nncf_onnx, nncf_openvino)
}


def main(argv: Sequence[str]) -> int:
    """Quantize and write the answer; returns 0, or 1 where the peer raised."""
    name, model, calibration, out = argv
    out_dir = Path(out)
    os.environ.update(SILENT)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        with np.load(calibration, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        path = QUANTIZERS[name](Path(model), arrays, out_dir)
        answer = {"file": str(path.relative_to(out_dir)), "error": None}
    # A peer may raise anything, and a row with its error is the result then.
    except Exception as error:
        traceback.print_exc()
        answer = {"file": None, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    document = {"quantizer": name, **answer, "versions": versions()}
    (out_dir / "answer.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if answer["error"] is None else 1


def versions() -> dict[str, str]:
    """What is installed here, of the packages that decide a result."""
    found = {}
    for package in TOLD:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _samples(arrays: Arrays) -> list[dict[str, Any]]:
    """One sample a row, with a batch axis of one."""
    num_rows = len(next(iter(arrays.values())))
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(num_rows)]


class _Reader:
    """What ONNX Runtime's calibration asks for: the next sample, None at the end."""

    def __init__(self, samples: Iterator[dict[str, Any]]) -> None:
        self.samples = samples

    def get_next(self) -> dict[str, Any] | None:
        return next(self.samples, None)


def _reader(arrays: Arrays) -> _Reader:
    return _Reader(iter(_samples(arrays)))


def _olive_rows(path: str) -> list[tuple[dict[str, Any], int]]:
    """Olive's data set: (inputs without a batch axis, a label that nobody reads)."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    num_rows = len(next(iter(arrays.values())))
    return [({name: array[row] for name, array in arrays.items()}, 0) for row in range(num_rows)]


def _only(paths: Sequence[Path], otherwise: str) -> Path:
    if not paths:
        raise RuntimeError(otherwise)
    return paths[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
