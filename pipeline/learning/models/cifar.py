"""The CIFAR family of the distillation literature: ResNets (He et al., 2016) and Wide ResNets (Zagoruyko, 2016).

Depths, widths, projection shortcuts, initialisation and the names of all tensors are those of the CRD benchmark (Tian
et al., 2020), so that its published checkpoints load as they are. The head pools globally: any image size goes.
"""
# Shapes: N batch, C channels, H height, W width, K classes.

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from targets.errors import ModelError

_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

# name -> depth, and the widths of the stem and the three stages
RESNETS: Mapping[str, tuple[int, tuple[int, ...]]] = {
    **{f"resnet{depth}": (depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, _WIDE) for depth in (8, 32)},
}
WIDE_RESNETS = ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2")  # the usual ones; any wrn_DEPTH_FACTOR is built
_WRN_NAME = re.compile(r"wrn_(\d{1,4})_(\d{1,3})")


def is_cifar_model(name: str) -> bool:
    return name in RESNETS or _WRN_NAME.fullmatch(name) is not None


def build_cifar_model(name: str, args: Mapping[str, Any], *, channels: int, num_classes: int) -> nn.Module:
    """The network called `name`, which `is_cifar_model` knows.

    args: `widths`, the channels of the stem and of the three stages instead of the published ones ([8, 8, 16, 32]
    makes a student of half the width). Raises ModelError for another argument, other widths, or a depth that the
    family does not have.
    """
    if unknown := sorted(set(args) - {"widths"}):
        raise ModelError(
            f"{name}: unknown args {', '.join(unknown)}. The only one is widths, as in {{widths: [8, 8, 16, 32]}}."
        )
    if name in RESNETS:
        depth, widths = RESNETS[name]
        return ResNet(depth, _widths(name, args, widths), channels=channels, num_classes=num_classes)
    depth, factor = _depth_and_factor(name)
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    return WideResNet(depth, _widths(name, args, widths), channels=channels, num_classes=num_classes)


def _depth_and_factor(name: str) -> tuple[int, int]:
    match = _WRN_NAME.fullmatch(name)
    depth, factor = (int(part) for part in match.groups()) if match else (0, 0)
    if depth < 10 or (depth - 4) % 6 or factor < 1:
        raise ModelError(
            f"{name}: a wide ResNet wrn_DEPTH_FACTOR has depth 6n+4 and a factor from 1. Example: wrn_16_2."
        )
    return depth, factor


def _widths(name: str, args: Mapping[str, Any], published: Sequence[int]) -> Sequence[int]:
    widths = args.get("widths", published)
    if (
        not isinstance(widths, Sequence)
        or len(widths) != len(published)
        or not all(type(width) is int and width > 0 for width in widths)
    ):
        raise ModelError(
            f"{name}: widths={widths!r} are not {len(published)} positive integers (stem and three stages). "
            f"Published: widths: {list(published)}."
        )
    return widths


class ResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: a stem of stride 1, then three stages of n blocks."""

    def __init__(self, depth: int, widths: Sequence[int], *, channels: int, num_classes: int) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(channels, widths[0], 1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, widths[0], widths[1], num_blocks, stride=1)
        self.layer2 = _stage(BasicBlock, widths[1], widths[2], num_blocks, stride=2)
        self.layer3 = _stage(BasicBlock, widths[2], widths[3], num_blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.layer3(self.layer2(self.layer1(x_NCHW)))
        logits_NK: Tensor = self.fc(self.avgpool(x_NCHW).flatten(1))
        return logits_NK


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        shortcut_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        x_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.bn2(self.conv2(x_NCHW))
        out_NCHW: Tensor = self.relu(x_NCHW + shortcut_NCHW)
        return out_NCHW


class WideResNet(nn.Module):
    """Wide ResNet of depth 6n+4: pre-activation blocks, so a BatchNorm stands before its convolution."""

    def __init__(self, depth: int, widths: Sequence[int], *, channels: int, num_classes: int) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        self.conv1 = _conv3x3(channels, widths[0], 1)
        self.block1 = _named_layer(_stage(PreActivationBlock, widths[0], widths[1], num_blocks, stride=1))
        self.block2 = _named_layer(_stage(PreActivationBlock, widths[1], widths[2], num_blocks, stride=2))
        self.block3 = _named_layer(_stage(PreActivationBlock, widths[2], widths[3], num_blocks, stride=2))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.block3(self.block2(self.block1(self.conv1(x_NCHW))))
        x_NCHW = self.avgpool(self.relu(self.bn1(x_NCHW)))
        logits_NK: Tensor = self.fc(x_NCHW.flatten(1))
        return logits_NK


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; where the width changes, the shortcut starts after the first ReLU."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width, 1)
        self.convShortcut: nn.Module | None = None
        if stride != 1 or in_width != width:
            self.convShortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        active_NCHW = self.relu1(self.bn1(x_NCHW))
        shortcut_NCHW = x_NCHW if self.convShortcut is None else self.convShortcut(active_NCHW)
        residual_NCHW: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active_NCHW))))
        return residual_NCHW + shortcut_NCHW


def _stage(block: type[nn.Module], in_width: int, width: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    later = [block(width, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(block(in_width, width, stride), *later)


def _named_layer(stage: nn.Sequential) -> nn.Sequential:
    """The published checkpoints call a stage's blocks `block1.layer.0`, not `block1.0`."""
    return nn.Sequential(OrderedDict(layer=stage))


def _conv3x3(in_width: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)


def _initialise(model: nn.Module) -> None:
    """He et al. (2015), fan-out, for every convolution; BatchNorm and the head start as torch has them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
