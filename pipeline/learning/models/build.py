"""From a recipe's `model:` to a network for the data's channels, image size and classes, with its weights loaded."""
# Shapes: N batch, C channels, H height, W width, K classes.

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from pipeline.learning.models.cifar import RESNETS, WIDE_RESNETS, build_cifar_model, is_cifar_model
from pipeline.learning.models.inference import evaluating
from pipeline.learning.models.weights import check_fit, load_weights
from pipeline.learning.own_code import own_factory
from pipeline.recipe import ModelConfig
from targets.errors import ModelError

_SOURCES = ("torchvision", "timm", "python")


def build_model(
    config: ModelConfig,
    *,
    channels: int,
    image_size: tuple[int, int],
    num_classes: int,
    allow_code: bool = False,
    offline: bool = False,
) -> nn.Module:
    """The network of `config`: takes normalised float (N, C, H, W), gives logits (N, K). The caller sets the seed.

    `resnet20`, `wrn_16_2` and their kin are built for small images. `torchvision:NAME` and `timm:NAME` keep their
    published strides (usually 32): images under 64 pixels shrink to one position, and some nets refuse them.
    `python:package.module:factory` is called as factory(channels=, image_size=, num_classes=, **args).
    A checkpoint, where given, takes the place of published weights. Raises ModelError, or RecipeError for own code.
    """
    source, separator, name = config.model.partition(":")
    wanted = _Wanted(config, channels, image_size, num_classes, allow_code, offline)
    if not separator:
        model = _cifar(wanted)
    elif source == "torchvision":
        model = _torchvision(wanted, name)
    elif source == "timm":
        model = _timm(wanted, name)
    elif source == "python":
        model = _from_python(wanted)
    else:
        raise ModelError(f"model={config.model}: unknown source '{source}'; {_advice(source, _SOURCES)}")
    _check_forward(model, config.model, (1, channels, *image_size), num_classes)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint)
    return model


@dataclass(frozen=True)
class _Wanted:
    """What the recipe, the data and the command line ask for."""

    config: ModelConfig
    channels: int
    image_size: tuple[int, int]
    num_classes: int
    allow_code: bool
    offline: bool

    @property
    def label(self) -> str:
        return self.config.model

    @property
    def published_weights(self) -> bool:
        return self.config.pretrained and self.config.checkpoint is None


def _cifar(wanted: _Wanted) -> nn.Module:
    name = wanted.label
    if not is_cifar_model(name):
        known = [*RESNETS, *WIDE_RESNETS, *(f"torchvision:{other}" for other in _torchvision_names())]
        raise ModelError(f"model={name}: unknown; {_advice(name, known)}")
    if wanted.published_weights:
        raise _nothing_published(name)
    return build_cifar_model(name, wanted.config.args, channels=wanted.channels, num_classes=wanted.num_classes)


def _nothing_published(label: str) -> ModelError:
    return ModelError(f"model={label}: no weights are published with it, so pretrained cannot be. Name a checkpoint.")


def _torchvision_names() -> list[str]:
    from torchvision import models as zoo

    names: list[str] = zoo.list_models(module=zoo)
    return names


def _torchvision(wanted: _Wanted, name: str) -> nn.Module:
    from torchvision import models as zoo

    _check_known(wanted.label, name, _torchvision_names(), "torchvision")
    args = dict(wanted.config.args)
    if name.startswith("vit_"):  # the only nets there whose weights depend on the image's size
        args.setdefault("image_size", wanted.image_size[0])
    builder = zoo.get_model_builder(name)
    model = _called(builder, wanted.label, weights=None, num_classes=wanted.num_classes, **args)
    if getattr(model, "aux_logits", False):
        raise ModelError(f"model={wanted.label} has auxiliary outputs in training. Set args: {{aux_logits: false}}.")
    _replace_first_convolution(model, wanted.channels, wanted.label)
    if wanted.published_weights:
        published = zoo.get_model_weights(name).DEFAULT
        if wanted.offline:
            _check_cached(wanted.label, _torch_hub_path(published.url))
        donor = _called(builder, wanted.label, weights=published, progress=False, **args)
        _transfer(donor, model, len(published.meta["categories"]), wanted)
    return model


def _replace_first_convolution(model: nn.Module, channels: int, label: str) -> None:
    """torchvision has no argument for the number of channels."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3:
        raise ModelError(
            f"model={label}: its first convolution does not take 3 channels, so it cannot be adapted to {channels}."
        )
    if channels == 3:
        return
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")


def _transfer(donor: nn.Module, model: nn.Module, num_donor_classes: int, wanted: _Wanted) -> None:
    """Copy published weights. The head stays as it is where the classes differ; filters are adapted to the channels."""
    from timm.models import adapt_input_conv

    first = next(name for name, module in donor.named_modules() if isinstance(module, nn.Conv2d))
    weights: dict[str, Tensor] = donor.state_dict()
    weights[f"{first}.weight"] = adapt_input_conv(wanted.channels, weights[f"{first}.weight"])
    own = model.state_dict()
    for name, value in weights.items():
        if name in own and value.shape != own[name].shape and value.shape[:1] == (num_donor_classes,):
            weights[name] = own[name]
    check_fit(weights, own, f"{wanted.label}, as published,")
    model.load_state_dict(weights)


def _timm(wanted: _Wanted, name: str) -> nn.Module:
    import timm

    architecture, _, tag = name.partition(".")
    _check_known(wanted.label, architecture, timm.list_models(), "timm")
    if tag:
        _check_known(wanted.label, name, timm.list_pretrained(f"{architecture}.*"), "timm")
    published = timm.get_pretrained_cfg(name)
    args: dict[str, Any] = dict(wanted.config.args)
    if published is not None and published.fixed_input_size:
        args.setdefault("img_size", wanted.image_size)
    if wanted.published_weights and wanted.offline:
        args["pretrained_cfg_overlay"] = {"file": str(_cached_timm_weights(wanted.label, published))}
    return _called(
        timm.create_model,
        wanted.label,
        model_name=name,
        pretrained=wanted.published_weights,
        in_chans=wanted.channels,
        num_classes=wanted.num_classes,
        **args,
    )


def _cached_timm_weights(label: str, published: Any) -> Path:
    """The file that an earlier run downloaded; raises ModelError where there is none."""
    from huggingface_hub import constants, try_to_load_from_cache

    if published is None or not (published.hf_hub_id or published.url):
        raise _nothing_published(label)
    if not published.hf_hub_id:
        return _check_cached(label, _torch_hub_path(published.url))
    named = published.hf_hub_filename
    filenames = [named] if named else ["model.safetensors", "pytorch_model.bin"]
    for filename in filenames:
        found = try_to_load_from_cache(published.hf_hub_id, filename)
        if isinstance(found, str):
            return Path(found)
    folder = "models--" + published.hf_hub_id.replace("/", "--")
    return _check_cached(label, Path(constants.HF_HUB_CACHE) / folder / filenames[0])


def _check_cached(label: str, path: Path) -> Path:
    if not path.is_file():
        raise ModelError(
            f"model={label}: its published weights are not at {path}, and --offline forbids to download them.\n"
            "Run once without --offline, or name a checkpoint."
        )
    return path


def _torch_hub_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _from_python(wanted: _Wanted) -> nn.Module:
    if wanted.published_weights:
        raise ModelError(
            f"model={wanted.label}: pretrained is for libraries. Load weights in the factory, or name a checkpoint."
        )
    factory = own_factory(wanted.label, "model", allow_code=wanted.allow_code)
    return _called(
        factory,
        wanted.label,
        channels=wanted.channels,
        image_size=wanted.image_size,
        num_classes=wanted.num_classes,
        **wanted.config.args,
    )


def _called(builder: Callable[..., Any], label: str, /, **arguments: Any) -> nn.Module:
    try:
        model = builder(**arguments)
    except Exception as error:  # foreign code with a person's args: anything may come
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model={label} cannot be built: {type(error).__name__}: {reason}.\n"
            f"It was called with {', '.join(arguments)}. Mend `args`, or choose another model."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model={label} gave a {type(model).__name__}. Return a torch.nn.Module.")
    return model


def _check_forward(model: nn.Module, label: str, shape: tuple[int, ...], num_classes: int) -> None:
    """One image through the net in evaluation mode, so that a misfit shows now and not in the first epoch."""
    image = "x".join(str(size) for size in shape[1:])
    try:
        with evaluating(model), torch.no_grad():
            output = model(torch.zeros(shape))
    except Exception as error:  # the model's own forward runs here
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"model={label} does not take {image} images: {reason}.\nChoose another image size or model."
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        given = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"model={label} gives {given} for one image; {num_classes} logits are needed. Mend its head or `args`."
        )


def _check_known(label: str, name: str, known: Iterable[str], library: str) -> None:
    if name not in (names := list(known)):
        raise ModelError(f"model={label}: {library} has no '{name}'; {_advice(name, names)}")


def _advice(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    by_ending = [other for other in names if other.partition(":")[2] == name]
    if by_ending or near:
        return f"did you mean '{(by_ending or near)[0]}'?"
    return f"known are {', '.join(names[:5])}{', ...' if len(names) > 5 else '.'}"
