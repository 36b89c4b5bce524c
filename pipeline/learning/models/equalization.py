"""Cross-layer equalization of a BatchNorm-folded module: the mathematics of `pipeline/graphs/equalization.py`.

The pairs are found in a symbolic trace, as folding finds its own; the weights are changed in a copy of the module tree.
Exact in evaluation mode up to float rounding.
"""
# Shapes: O outputs, I inputs of one group, K the kernel and the pixels behind a Flatten.

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.graphs.equalization import balance, ranges, rescaled
from pipeline.learning.models.folding import trace_layers

Array = npt.NDArray[Any]
_Module: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

# By exact type: a subclass may do more with its weight than multiply.
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_POOLING: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_FUNCTIONS: frozenset[Any] = frozenset({torch.relu, torch.relu_, F.relu, F.relu_, F.leaky_relu, F.prelu, torch.prelu})
_METHODS = frozenset({"relu", "relu_"})


def equalize(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of `model` in evaluation mode with all pairs equalized, and how many pairs changed.

    Left alone: a layer whose output something else reads too, that is called several times, or whose weight or bias is
    shared, parametrized or read outside it. Raises ModelError where forward cannot be traced.
    """
    equalized = copy.deepcopy(model).eval()
    layers: dict[str, _Layer] = {}
    pairs = []
    for link in _links(equalized):
        first, second = (layers.setdefault(name, _Layer(equalized.get_submodule(name))) for name in link[:2])
        second.channels = link[2]
        pairs.append((first, second))
    numbers = {id(layer): number for number, layer in enumerate(layers.values())}
    scales = balance(
        [ranges(layer.weight_OIK(), layer.groups) for layer in layers.values()],
        [(numbers[id(first)], numbers[id(second)]) for first, second in pairs],
    )
    for (first, second), scale_C in zip(pairs, scales, strict=True):
        first.outputs_O, second.inputs_C = 1 / scale_C, scale_C
    for layer in layers.values():
        layer.write()
    return equalized, sum(bool(np.any(scale_C != 1)) for scale_C in scales)


@dataclass(eq=False)
class _Layer:
    """A layer; `channels` is what it reads where a Flatten made several inputs of each."""

    module: nn.Module
    channels: int | None = None
    outputs_O: Array | None = None
    inputs_C: Array | None = None

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    def weight_OIK(self) -> Array:  # noqa: N802 (shape suffix)
        weight: Array = cast(_Module, self.module).weight.detach().double().cpu().numpy()
        return weight.reshape(len(weight), self.channels or weight.shape[1], -1)

    def write(self) -> None:
        """Put the scaled weight and bias in the place of the old ones."""
        if all(scale is None or np.all(scale == 1) for scale in (self.outputs_O, self.inputs_C)):
            return
        module = cast(_Module, self.module)
        scaled = rescaled(self.weight_OIK(), self.groups, self.outputs_O, self.inputs_C)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(scaled).reshape(module.weight.shape))
            if module.bias is not None and self.outputs_O is not None:
                module.bias.copy_(module.bias.double() * torch.from_numpy(self.outputs_O).to(module.bias.device))


def _links(model: nn.Module) -> list[tuple[str, str, int | None]]:
    """Names of two layers of which the second alone reads the first; channels of the first if a Flatten stands between."""
    graph = trace_layers(model, failing="its layers cannot be equalized")
    num_calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read_outside = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    num_owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    modules = dict(model.named_modules())
    own = {
        name: module
        for name, module in modules.items()
        if type(module) in _LAYERS
        and num_calls[name] == 1
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and all(num_owners[id(p)] == 1 for p in module.parameters())
        and not any(f"{name}.{part}" in read_outside for part in ("weight", "bias"))
    }
    found = [_link(node, own, modules) for node in graph.nodes if node.op == "call_module" and node.target in own]
    return [link for link in found if link is not None]


def _link(
    first: fx.Node, own: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> tuple[str, str, int | None] | None:
    layer = cast(_Module, own[str(first.target)])
    spatial, flat, node = isinstance(layer, _CONVOLUTIONS), False, first
    while (reader := _only_reader(node)) is not None:
        second = own.get(str(reader.target)) if reader.op == "call_module" else None
        if second is not None:
            num_channels = layer.weight.shape[0]
            fits = _fits(second, num_channels, flat) and (
                spatial and not flat if isinstance(second, _CONVOLUTIONS) else flat == spatial
            )
            return (str(first.target), str(reader.target), num_channels if flat else None) if fits else None
        if spatial and not flat and _flattens(reader, modules):
            flat = True
        elif not _is_homogeneous(reader, modules, pooling=spatial and not flat):
            return None
        node = reader
    return None


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, as its first argument and in no other place."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    places = [*reader.args, *reader.kwargs.values()]
    return reader if reader.args and reader.args[0] is node and sum(place is node for place in places) == 1 else None


def _is_homogeneous(node: fx.Node, modules: Mapping[str, nn.Module], *, pooling: bool) -> bool:
    """f(s x) = s f(x) for s > 0, channel by channel. Pooling is that behind a convolution only: a linear layer's channels
    are the last axis, which pooling would mix."""
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_module" and _acts_homogeneously(modules[str(node.target)], pooling)


def _acts_homogeneously(module: nn.Module, pooling: bool) -> bool:
    if type(module) is nn.Sequential:  # what folding leaves of timm's BatchNormAct2d
        return all(_acts_homogeneously(child, pooling) for child in module)
    return type(module) in _ELEMENTWISE or (
        pooling and type(module) in _POOLING and not getattr(module, "return_indices", False)
    )


def _flattens(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it keeps the samples and makes one axis of all others."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    flatten: tuple[str | Callable[..., Any], ...] = (torch.flatten, "flatten")
    dims = (*node.args[1:], *node.kwargs.values())
    return node.op in ("call_function", "call_method") and node.target in flatten and dims == (1,)


def _fits(second: nn.Module, num_channels: int, flat: bool) -> bool:
    """Whether the layer reads each channel once, or (behind a Flatten) as often as every other channel."""
    weight = cast(_Module, second).weight
    num_inputs = weight.shape[1] * int(getattr(second, "groups", 1))
    return num_inputs == num_channels or (flat and num_inputs % num_channels == 0)
