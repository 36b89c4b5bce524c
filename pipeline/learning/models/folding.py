"""BatchNorm folding: each BatchNorm that a convolution or linear layer feeds is absorbed into that layer.

Quantization needs it: a BatchNorm left between a convolution and its quantizer keeps the convolution out of INT8 in
every runtime. The pairs are found in a symbolic trace; the weights are then changed in a copy of the module tree, so
that the result keeps the model's own classes (NNCF follows neither an fx.GraphModule nor an outermost nn.Sequential).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from targets.errors import ModelError

_Layer: TypeAlias = _ConvNd | nn.Linear
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SEE_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # nothing happens here in evaluation
_FUNCTIONAL = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode whose convolution-fed and linear-fed BatchNorms are gone.

    In pre-activation nets those stay that an addition feeds, and those beside which a shortcut reads the convolution
    too: no weights could hold them. timm's BatchNormAct2d leaves its drop and act behind. The result equals the model
    to float rounding. Raises ModelError, naming the layer, where a BatchNorm that should go cannot: one of the two is
    shared, it keeps no running statistics, or the fold does not reproduce the two layers.
    """
    folded = copy.deepcopy(model).eval()
    if any(isinstance(module, _BatchNorm) for module in folded.modules()):
        for pair in _pairs(folded):
            _fold(folded, pair)
    return _Held(folded) if isinstance(folded, (nn.Sequential, fx.GraphModule)) else folded


class _Held(nn.Module):
    """An outermost module with a forward of its own around one that NNCF cannot follow."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class _Tracer(fx.Tracer):
    """Stops at layers with weights, and at modules that hold none (their control flow does not matter here)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, nn.Linear, _BatchNorm)):
            return True
        holds_layers = any(isinstance(child, (_ConvNd, nn.Linear, _BatchNorm)) for child in m.modules())
        return not holds_layers or super().is_leaf_module(m, module_qualified_name)


class _Pair(NamedTuple):
    """A layer and the BatchNorm that it feeds."""

    layer: _Layer
    norm: _BatchNorm
    norm_name: str


def _pairs(model: nn.Module) -> list[_Pair]:
    graph = trace_layers(model, failing="its BatchNorms cannot be folded")
    modules = dict(model.named_modules())
    num_calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        norm = modules[node.target] if node.op == "call_module" else None
        if isinstance(norm, _BatchNorm) and (feeder := _feeder(node, modules)) is not None:
            if num_calls[feeder.target] > 1 or num_calls[node.target] > 1:
                raise _left(node.target, f"it or '{feeder.target}' is called several times", "Give each call its own.")
            pairs.append(_Pair(cast(_Layer, modules[str(feeder.target)]), norm, str(node.target)))
    return pairs


def trace_layers(model: nn.Module, *, failing: str) -> fx.Graph:
    """The calls of layers and of what stands between them. Raises ModelError, which `failing` says the consequence in."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        return _Tracer().trace(model, concrete_args=defaults)
    except Exception as error:  # the model's own forward runs here: it may raise anything
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{type(model).__name__}: {failing}, because forward cannot be traced ({reason}).\n"
            "Take decisions that depend on a tensor's values out of forward."
        ) from error


def _feeder(norm: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The convolution or linear layer whose output `norm`, and nothing else, reads; None where there is none."""
    node = norm.args[0] if norm.args else norm.kwargs["input"]
    while _calls(node, modules, _SEE_THROUGH):
        node = cast(fx.Node, node).args[0]
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _FUNCTIONAL:
        raise _left(norm.target, f"it follows a functional {node.name}", "Use a module of torch.nn for it.")
    return node if _calls(node, modules, (_ConvNd, nn.Linear)) and _reaches_only(node, norm) else None


def _calls(node: object, modules: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and isinstance(modules[str(node.target)], kinds)


def _reaches_only(feeder: fx.Node, norm: fx.Node) -> bool:
    node = feeder
    while node is not norm:
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


def _left(norm_name: object, reason: str, advice: str) -> ModelError:
    return ModelError(f"BatchNorm '{norm_name}' cannot be folded: {reason}. {advice}")


def _fold(model: nn.Module, pair: _Pair) -> None:
    """Change the layer's weights in place, and put what the BatchNorm does besides normalising in its place."""
    layer, norm, _ = pair
    scale_C, shift_C = _affine(pair)
    rest = _rest(pair)
    weight = _scale_outputs(layer, scale_C)
    bias_C = shift_C if layer.bias is None else layer.bias.detach().double() * scale_C + shift_C
    _check_equal(pair, scale_C, shift_C, weight, bias_C)
    dtype, trained = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    layer.bias = nn.Parameter(bias_C.to(dtype), requires_grad=trained)
    for name, module in list(model.named_modules(remove_duplicate=False)):  # one module may stand under several names
        if module is norm:
            model.set_submodule(name, rest)


def _affine(pair: _Pair) -> tuple[Tensor, Tensor]:
    """What the BatchNorm does in evaluation, float64: y = scale * x + shift a channel."""
    norm = pair.norm
    if norm.running_mean is None or norm.running_var is None:
        raise _left(pair.norm_name, "it keeps no running statistics", "Train it with track_running_stats.")
    scale_C = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale_C = scale_C * norm.weight.detach().double()
    shift_C = -norm.running_mean.double() * scale_C
    return scale_C, shift_C if norm.bias is None else shift_C + norm.bias.detach().double()


def _rest(pair: _Pair) -> nn.Module:
    """What stays behind: nothing, or the drop and act of timm's BatchNormAct2d, which is a BatchNorm2d itself."""
    if type(pair.norm) in _PLAIN:
        return nn.Identity()
    if not (hasattr(pair.norm, "drop") and hasattr(pair.norm, "act")):
        raise _left(pair.norm_name, f"{type(pair.norm).__name__} does more than normalise", "Use torch's or timm's.")
    parts = (cast(nn.Module, pair.norm.drop), cast(nn.Module, pair.norm.act))
    acting = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*acting) if acting else nn.Identity()


def _scale_outputs(layer: _Layer, scale_C: Tensor) -> Tensor:
    """The layer's weight, each output channel times its scale. A transposed one has its outputs in axis 1, by group."""
    weight = layer.weight.detach().double()
    if not isinstance(layer, _ConvTransposeNd):
        return weight * scale_C.view(-1, *[1] * (weight.ndim - 1))
    by_group = weight.view(layer.groups, -1, *weight.shape[1:])
    return (by_group * scale_C.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))).view(weight.shape)


def _check_equal(pair: _Pair, scale_C: Tensor, shift_C: Tensor, weight: Tensor, bias_C: Tensor) -> None:
    """Run both forms on one input, float64: a subclass may do more with its weight than multiply (standardise it)."""
    before = copy.deepcopy(pair.layer).double()
    after = copy.deepcopy(before)
    after.weight, after.bias = nn.Parameter(weight), nn.Parameter(bias_C)
    x = _probe(before).to(weight.device)
    with torch.no_grad():
        plain = before(x)
        along_C = (1, -1, *[1] * (plain.ndim - 2))
        expected = plain * scale_C.view(along_C) + shift_C.view(along_C)
        same = torch.allclose(after(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    if not same:
        kind = type(pair.layer).__name__
        raise _left(pair.norm_name, f"the {kind} before it does more than its weight and bias say", "Use torch's own.")


def _probe(layer: _Layer) -> Tensor:
    """A fixed input of two samples, just larger than the kernel; no random number of the caller is spent."""
    shape: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        shape = (2, layer.in_features)
    else:
        spans = zip(layer.dilation, layer.kernel_size, strict=True)
        shape = (2, layer.in_channels, *(dilation * (kernel - 1) + 2 for dilation, kernel in spans))
    return torch.arange(math.prod(shape), dtype=torch.float64).sin().view(shape)
