"""Mixed precision of a fake-quantized module: which quantizers belong to a layer, what each layer costs, and taking them off.

A quantizer that is taken off is gone from NNCF's own description of the model, so that saving, loading and export treat
the rest as any other model. Nothing is calibrated or trained anew: what training made of weights and ranges stays.
Layers go by the names of NNCF's graph. Which layers are chosen is `pipeline/graphs/mixed_precision.py`'s matter.
"""
# Shapes: N samples, K classes.

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.graphs.mixed_precision import Layer
from pipeline.learning.models.inference import evaluating
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

HOOKS = "__nncf_hooks."  # before a hook's name, where the names of NNCF's graph have one
CONSTANT = "nncf_model_const"
# What hands a tensor on without a quantizer of its own: whoever reads the result reads the quantized input.
TRANSPARENT = frozenset(
    {
        *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "dropout", "pad", "contiguous"),
        *(
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "flatten",
            "reshape",
            "view",
            "squeeze",
            "unsqueeze",
            "transpose",
            "permute",
        ),
    }
)


@dataclass(frozen=True)
class QuantizedLayers:
    """What belongs to each quantized layer, and who reads each quantized activation (layers and other operations)."""

    weight_hooks: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]]
    macs: Mapping[str, int]
    readers: Mapping[str, frozenset[str]]


def find_layers(quantized: nn.Module, example: Tensor) -> QuantizedLayers:
    """Read NNCF's graph of the model on `example`, one sample; layers come in its order."""
    graph = _graph_of(quantized, example)
    weight_hooks, parameters, macs = {}, {}, {}
    readers: dict[str, set[str]] = defaultdict(set)
    for quantizer in graph.topological_sort():
        hook, source = _hook_and_source(graph, quantizer)
        if hook is None:
            continue
        if source.node_type != CONSTANT:
            readers[hook] |= _readers(graph, quantizer)
            continue
        for layer in graph.get_next_nodes(quantizer):
            constants = [one for one in graph.get_previous_nodes(layer) if one.node_type == CONSTANT]
            weight_hooks[layer.node_name] = hook
            parameters[layer.node_name] = tuple(one.layer_attributes.name for one in (source, *constants))
            macs[layer.node_name] = _macs(graph, layer, source.layer_attributes.shape)
    return QuantizedLayers(weight_hooks, parameters, macs, {hook: frozenset(names) for hook, names in readers.items()})


def in_float(
    quantized: nn.Module, layers: QuantizedLayers, names: Collection[str], original: nn.Module | None = None
) -> nn.Module:
    """A copy in which the named layers have no weight quantizer, and what only they read is not quantized either.

    `original` is the float module that was quantized: the layers get its weight and bias again, for a bias that was
    corrected for a quantized weight is wrong for the float one. None after training, which moved all of them.
    """
    from nncf.torch.function_hook.wrapper import get_hook_storage

    mixed = copy.deepcopy(quantized)
    storage = get_hook_storage(mixed)
    gone = {layers.weight_hooks[name] for name in names}
    gone |= {hook for hook, readers in layers.readers.items() if readers and readers <= set(names)}
    modules = dict(storage.named_hooks())
    for hook, module in list(storage.named_hooks(remove_duplicate=False)):
        if any(module is modules[one] for one in gone):  # one quantizer may serve several tensors that share a scale
            storage.delete_hook(hook)
    if original is not None:
        with torch.no_grad():
            for parameter in (one for name in names for one in layers.parameters[name]):
                mixed.get_parameter(parameter).copy_(original.get_parameter(parameter))
    return mixed


def sensitivities(
    quantized: nn.Module,
    layers: QuantizedLayers,
    float_model: nn.Module,
    batches: Sequence[Tensor],
    original: nn.Module | None = None,
) -> list[Layer]:
    """Each layer with its gain: the fall of the mean KL divergence (nats) from the float model's softmaxed logits, over
    `batches`, when it alone is float again; `original` as for `in_float`."""
    expected_NK = _logits(float_model, batches)
    divergence = _divergence(expected_NK, _logits(quantized, batches))
    found = []
    for name, macs in layers.macs.items():
        freed_NK = _logits(in_float(quantized, layers, [name], original), batches)
        found.append(Layer(name=name, macs=macs, gain=divergence - _divergence(expected_NK, freed_NK)))
    return found


def _graph_of(quantized: nn.Module, example: Tensor) -> Any:
    """NNCF's graph: operations in the order of their calls, constants and quantizers among them."""
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    device = next(parameter.device for parameter in quantized.parameters())
    with evaluating(quantized), torch.no_grad():
        return build_nncf_graph(quantized, example.to(device))


def _hook_and_source(graph: Any, node: Any) -> tuple[str | None, Any]:
    """A quantizer's hook, which its scale carries in its name, and what it quantizes; None for any other operation."""
    before = graph.get_previous_nodes(node)
    scales = [one for one in before if one.node_type == CONSTANT and one.layer_attributes.name.startswith(HOOKS)]
    sources = [one for one in before if one not in scales]
    if not scales or len(sources) != 1:
        return None, None
    return scales[0].layer_attributes.name.removeprefix(HOOKS).rpartition(".")[0], sources[0]


def _readers(graph: Any, node: Any) -> set[str]:
    found: set[str] = set()
    for reader in graph.get_next_nodes(node):
        found |= _readers(graph, reader) if reader.node_type in TRANSPARENT else {reader.node_name}
    return found


def _macs(graph: Any, layer: Any, weight: Sequence[int]) -> int:
    (y,) = {tuple(edge.tensor_shape) for edge in graph.get_output_edges(layer)}
    if layer.node_type.startswith("conv_transpose"):
        x = next(edge.tensor_shape for edge in graph.get_input_edges(layer) if edge.input_port_id == 0)
        return transposed_convolution_macs(x, weight, x[1])
    if layer.node_type.startswith("conv"):
        return convolution_macs(y, weight, y[1])
    return matmul_macs(y, math.prod(weight) // y[-1])


def _logits(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with evaluating(model), torch.no_grad():
        return torch.cat([model(x).double() for x in batches])


def _divergence(expected_NK: Tensor, got_NK: Tensor) -> float:
    log_p, log_q = expected_NK.log_softmax(1), got_NK.log_softmax(1)
    return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
