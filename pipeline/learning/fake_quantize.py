"""Quantizers in a torch model or an ONNX graph: ranges from calibration samples; save, reload, strip for export.

NNCF does the work; what pipeline/schemes.py wants otherwise is changed on its result, before anything is trained: signed
activations (NNCF refuses to be told), weights of 7 bits, and one quantizer less at a residual addition. Writes and reads
model.safetensors and fake_quantize.json. NNCF's telemetry is off, its progress bars and its notes are silent: the caller reports.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import onnx
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.graphs.branches import Branch, depths, main_branch
from pipeline.graphs.schemes import apply_scheme
from pipeline.schemes import Scheme, scheme_of
from targets.base import read_json, write_json
from targets.errors import IntegrityError, ModelError, first_line

PRODUCTS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
HANDS_ON = frozenset(
    {"max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "dropout"}
)
HOOKS = "__nncf_hooks."  # before a hook's name, where the names of NNCF's graph have one
TINY = 1e-3  # below this range a tensor is looked at: NNCF gives one of zeros about 1e-4
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


def insert_fake_quantizers(
    model: nn.Module,
    calibration_batches: Iterable[Tensor],
    example: Tensor,
    scheme: str = "cpu-int8",
) -> nn.Module:
    """A copy of `model` with the scheme's quantizers, ranges from the calibration batches; ready to be trained on.

    `model` is BatchNorm-folded and takes what the batches hold, (N, C, H, W) normalised floats; `example` is one such
    batch. Raises ModelError if there is nothing to calibrate with, or NNCF cannot follow the model.
    """
    wanted = scheme_of(scheme)
    batches = calibration_batches if isinstance(calibration_batches, Sized) else list(calibration_batches)
    if len(batches) == 0:
        raise ModelError("calibration got no batch: ranges cannot be set. Give at least one batch of training samples.")
    _pin_if_open()
    quantized: nn.Module = _quantize(model.eval(), batches, wanted)
    with _quiet(), torch.no_grad():
        _check_ranges(quantized, batches)
        if wanted.signed:
            _make_signed(quantized)
        if wanted.weight_bits == 7:
            _halve_weights(quantized)
        if not wanted.both_branches:
            _free_main_branches(quantized, example)
        quantized(example)
    return quantized


def quantize_graph(
    proto: onnx.ModelProto,
    samples: Sequence[Mapping[str, Any]],
    scheme: str = "cpu-int8",
    *,
    ignored: Sequence[str] = (),
) -> onnx.ModelProto:
    """The same on a float ONNX graph: Q/DQ pairs with ranges from the samples; `ignored` are node names. Raises ModelError."""
    wanted = scheme_of(scheme)
    quantized: onnx.ModelProto = _quantize(proto, samples, wanted, ignored)
    return apply_scheme(quantized, wanted)


def _quantize(model: Any, batches: Any, scheme: Scheme, ignored: Sequence[str] = ()) -> Any:
    """Without NNCF's bias correction: its fast one moved logits of small padded images more than quantization did (mean KL
    to float 0.0042 with it, 0.0002 without, a ResNet-20 on Fashion-MNIST), its accurate one fails on residual graphs. The
    rung after this one has a correction of our own."""
    nncf = _nncf()
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    activations = QuantizationParameters(mode=QuantizationScheme.SYMMETRIC, per_channel=False)
    # With 8 bits NNCF still gives the layers that read the input 7, where overflow is likeliest. A torch model gets its 7 bits from
    # _halve_weights: NNCF would double the range, which training could fill again.
    in_graph = nncf.OverflowFix.ENABLE if isinstance(model, onnx.ModelProto) else nncf.OverflowFix.DISABLE
    overflow_fix = in_graph if scheme.weight_bits == 7 else nncf.OverflowFix.FIRST_LAYER
    try:
        with _quiet(), torch.no_grad():
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(batches),
                ignored_scope=nncf.IgnoredScope(names=list(ignored)) if ignored else None,
                advanced_parameters=AdvancedQuantizationParameters(
                    overflow_fix=overflow_fix, activations_quantization_params=activations, disable_bias_correction=True
                ),
            )
    except (nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be quantized: {first_line(error)}. "
            "Use operators that the quantizer knows, and fold BatchNorm first."
        ) from None


def _check_ranges(quantized: nn.Module, batches: Iterable[Tensor]) -> None:
    """Raise ModelError for a quantizer whose tensor is no number, or zero on all batches: NNCF gives it a range all the same."""
    from nncf.torch.quantization.layers import SymmetricQuantizer

    largest: dict[str, float] = {}
    hooks = []
    for name, module in quantized.named_modules():
        if isinstance(module, SymmetricQuantizer) and (
            bool(module.scale.isnan().any()) or float(module.scale.max()) < TINY
        ):
            hooks.append(module.register_forward_pre_hook(partial(_note_largest, largest, name)))
    if not hooks:
        return
    for batch in batches:
        quantized(batch)
    for hook in hooks:
        hook.remove()
    for name, value in largest.items():
        if value == 0.0 or not math.isfinite(value):
            told = "is zero on every calibration sample" if value == 0.0 else "holds NaN or infinity"
            where = name.removeprefix(HOOKS).partition(".")[2].rpartition("__")[0]
            raise ModelError(
                f"the tensor that is quantized at '{where}' {told}, so it has no range. "
                "Look at that layer's weights, and give calibration samples that reach it."
            )


def _note_largest(largest: dict[str, float], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    value = float(inputs[0].abs().max())
    largest[name] = value if math.isnan(value) else max(largest.get(name, 0.0), value)


def _make_signed(quantized: nn.Module) -> None:
    """Signed levels around the range that calibration found: the step of what is never negative doubles."""
    from nncf.torch.quantization.layers import SymmetricQuantizer

    for module in quantized.modules():
        if isinstance(module, SymmetricQuantizer):
            module.signed = True


def _halve_weights(quantized: nn.Module) -> None:
    """Weights keep their range and have half the levels, -63..63: what is trained, saved and exported stays within.

    Those of depthwise convolutions keep all levels, as they do in NNCF: no kernel adds two of their products in 16 bits.
    """
    from nncf.torch.function_hook.hook_storage import decode_hook_name
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import SymmetricQuantizer

    layers = dict(quantized.named_modules())
    for name, module in get_hook_storage(quantized).named_hooks():
        if not isinstance(module, SymmetricQuantizer) or not module._qspec.per_channel:
            continue  # only weights have a scale a channel
        _, operation, _ = decode_hook_name(name)  # block.0.conv/conv2d/0
        layer = layers.get(operation.partition("/")[0])
        if not _is_depthwise(layer):
            module._half_range = module._qspec.half_range = True
            module.set_levels()


def _is_depthwise(layer: nn.Module | None) -> bool:
    convolution = layer if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
    return convolution is not None and 1 < convolution.groups == convolution.in_channels == convolution.out_channels


def _free_main_branches(quantized: nn.Module, example: Tensor) -> None:
    """Take the quantizer off the main branch of each residual addition, so that Conv + Add can be one kernel."""
    from nncf.torch.function_hook.hook_storage import RemovableHookHandle
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
    from nncf.torch.function_hook.wrapper import get_hook_storage

    graph, storage = build_nncf_graph(quantized, example), get_hook_storage(quantized)
    nodes = graph.topological_sort()
    depth = depths({node.node_name: [one.node_name for one in graph.get_previous_nodes(node)] for node in nodes})
    for addition in nodes:
        if addition.node_type in ADDITIONS and (main := main_branch(_branches(graph, addition), depth)) is not None:
            kind, _, hook = main.quantizer.partition(".")
            RemovableHookHandle(getattr(storage, kind), *hook.rsplit(".", 1)).remove()


def _branches(graph: Any, addition: Any) -> list[Branch]:
    """The quantized inputs of an addition; a quantizer goes by the name of its hook, which its scale carries."""
    return [branch for node in graph.get_previous_nodes(addition) if (branch := _branch(graph, node)) is not None]


def _branch(graph: Any, node: Any) -> Branch | None:
    """None for an input that nothing quantizes; a pool or a reshape hands on what was quantized before it."""
    before = graph.get_previous_nodes(node)
    if node.node_type in HANDS_ON and len(before) == 1:
        behind = _branch(graph, before[0])
        return behind and Branch(quantizer=behind.quantizer, source=node.node_name, fusible=False)
    scales = [one.node_name for one in before if one.node_name.startswith(HOOKS)]
    sources = [one for one in before if not one.node_name.startswith(HOOKS)]
    if node.node_type != "symmetric_quantize" or not scales or len(sources) != 1:
        return None
    alone = len(graph.get_next_nodes(node)) == 1 and len(graph.get_next_nodes(sources[0])) == 1
    hook = scales[0].removeprefix(HOOKS).rpartition(".")[0]
    return Branch(quantizer=hook, source=sources[0].node_name, fusible=alone and sources[0].node_type in PRODUCTS)


def strip_fake_quantizers(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with torch's own FakeQuantize in place of NNCF's hooks: what the ONNX exporter turns into Q/DQ pairs."""
    nncf = _nncf()
    with _quiet(), torch.no_grad():
        stripped: nn.Module = nncf.strip(model, do_copy=True, example_input=example)
    return stripped.eval()


def save_quantized(model: nn.Module, directory: Path, *, example: Tensor, scheme: str = "cpu-int8") -> None:
    """Write the weights with the quantizers' scales, where the quantizers stand, and the shape they were made for."""
    _nncf()
    from nncf.torch import get_config

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / WEIGHTS_FILE)
    description = {"scheme": scheme, "example_shape": list(example.shape), "nncf": get_config(model)}
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
            f"{directory} does not hold the quantizers and weights of {type(folded).__name__}: {first_line(error)}. "
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
