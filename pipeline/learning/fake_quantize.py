"""Quantizers in a torch model or an ONNX graph: ranges from calibration samples; save, reload, strip for export.

NNCF does the work. The scheme "cpu-int8": activations per-tensor and symmetric, unsigned where they are never negative;
weights int8, symmetric, per output channel. Writes and reads model.safetensors and fake_quantize.json. NNCF's telemetry
is off, its progress bars and its notes are silent: the caller reports.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import onnx
import safetensors.torch
import torch
from torch import Tensor, nn

from targets.base import read_json, write_json
from targets.errors import IntegrityError, ModelError

SCHEME = "cpu-int8"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "fake_quantize.json"
Kernels = Literal["torch", "extension"]


def pin_kernels(kernels: Kernels) -> Kernels:
    """Choose the fake-quantize kernels of this process and return which will really run.

    "torch" is NNCF's reference in plain torch operators, called directly: NNCF would hand it to torch.compile, which
    recompiles for each shape (60 s for ResNet-18). "extension" is its C++ (and CUDA) code, compiled at first use. They
    differ in the last bits, so one training keeps to one of them. Where the compilation fails, "torch" runs and the
    answer says so.
    """
    namespaces = _kernel_namespaces()
    loaded = [_torch_kernels()] * len(namespaces) if kernels == "torch" else _compiled_kernels(namespaces)
    for namespace, functions in zip(namespaces, loaded, strict=True):
        namespace._loaded_namespace = functions
    return kernels_in_use() or kernels


def kernels_in_use() -> Kernels | None:
    """Which kernels every quantized model of this process runs; None before they are pinned."""
    functions = _kernel_namespaces()[-1]._loaded_namespace
    if functions is None:
        return None
    return "extension" if isinstance(functions, ModuleType) else "torch"


def insert_fake_quantizers(model: nn.Module, calibration_batches: Iterable[Tensor], example: Tensor) -> nn.Module:
    """A copy of `model` with quantizers whose ranges come from the calibration batches; ready to be trained on.

    `model` is BatchNorm-folded and takes what the batches hold, (N, C, H, W) normalised floats; `example` is one such
    batch. Raises ModelError if there is nothing to calibrate with, or NNCF cannot follow the model.
    """
    batches = calibration_batches if isinstance(calibration_batches, Sized) else list(calibration_batches)
    if len(batches) == 0:
        raise ModelError("calibration got no batch: ranges cannot be set. Give at least one batch of training samples.")
    _pin_if_open()
    quantized: nn.Module = _quantize(model.eval(), batches)
    with _quiet(), torch.no_grad():
        quantized(example)
    return quantized


def quantize_graph(proto: onnx.ModelProto, samples: Sequence[Mapping[str, Any]]) -> onnx.ModelProto:
    """The same scheme on a float ONNX graph: Q/DQ pairs with ranges from the samples. Raises ModelError."""
    quantized: onnx.ModelProto = _quantize(proto, samples)
    return quantized


def _quantize(model: Any, batches: Any) -> Any:
    nncf = _nncf()
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    activations = QuantizationParameters(mode=QuantizationScheme.SYMMETRIC, per_channel=False)
    try:
        with _quiet(), torch.no_grad():
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(batches),
                advanced_parameters=AdvancedQuantizationParameters(activations_quantization_params=activations),
            )
    except (nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be quantized: {_first_line(error)}. "
            "Use operators that the quantizer knows, and fold BatchNorm first."
        ) from None


def strip_fake_quantizers(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with torch's own FakeQuantize in place of NNCF's hooks: what the ONNX exporter turns into Q/DQ pairs."""
    nncf = _nncf()
    with _quiet(), torch.no_grad():
        stripped: nn.Module = nncf.strip(model, do_copy=True, example_input=example)
    return stripped.eval()


def save_quantized(model: nn.Module, directory: Path, *, example: Tensor) -> None:
    """Write the weights with the quantizers' scales, where the quantizers stand, and the shape they were made for."""
    _nncf()
    from nncf.torch import get_config

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / WEIGHTS_FILE)
    description = {"scheme": SCHEME, "example_shape": list(example.shape), "nncf": get_config(model)}
    write_json(directory / CONFIG_FILE, description)


def load_quantized(folded: nn.Module, directory: Path) -> nn.Module:
    """Put saved quantizers and weights on the same BatchNorm-folded architecture, strictly; in evaluation mode."""
    nncf = _nncf()
    from nncf.torch import load_from_config

    _pin_if_open()
    description = read_json(directory / CONFIG_FILE)
    try:
        quantized: nn.Module = load_from_config(folded, description["nncf"])
        quantized.load_state_dict(safetensors.torch.load_file(directory / WEIGHTS_FILE), strict=True)
    except (KeyError, OSError, RuntimeError, nncf.InternalError, safetensors.SafetensorError) as error:
        raise IntegrityError(
            f"{directory} does not hold the quantizers and weights of {type(folded).__name__}: {_first_line(error)}. "
            "Run the quantize stage again."
        ) from None
    return quantized.eval()


def _nncf() -> ModuleType:
    """NNCF reads this variable once, at its first import, and then sends nothing."""
    os.environ.setdefault("NNCF_CI", "1")
    # Two notes at import that nobody can act on: a CUDA folder without a GPU, and an enum that torchao registers.
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import nncf

    module: ModuleType = nncf
    return module


def _pin_if_open() -> None:
    """NNCF would compile its extension at the first use, unasked."""
    if kernels_in_use() is None:
        pin_kernels("torch")


def _kernel_namespaces() -> list[Any]:
    """Where NNCF looks its kernels up: on the CPU and, last, on the GPU if there is one."""
    _nncf()
    from nncf.torch.quantization import extensions

    with_gpu = [extensions.QuantizedFunctionsCUDA] if torch.cuda.is_available() else []
    return [extensions.QuantizedFunctionsCPU, *with_gpu]


def _torch_kernels() -> SimpleNamespace:
    from nncf.torch.quantization.reference import torch_executor

    return SimpleNamespace(Quantize_forward=torch_executor.forward, Quantize_backward=torch_executor.backward)


def _compiled_kernels(namespaces: Sequence[Any]) -> list[Any]:
    """All extensions compiled, or torch's kernels for all; without NNCF's time limit, which a busy machine exceeds."""
    if shutil.which("ninja") is None:
        import ninja

        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        with _quiet():
            loaded = [namespace._loader.load() for namespace in namespaces]
    except _nncf().InstallationError:
        loaded = []
    whole = bool(loaded) and all(isinstance(functions, ModuleType) for functions in loaded)
    return loaded if whole else [_torch_kernels()] * len(namespaces)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress bars and notes, and without the deprecations of the libraries below it."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
