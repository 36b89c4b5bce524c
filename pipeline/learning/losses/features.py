"""A feature loss: a layer inside the student is led to a layer inside the teacher, read off by forward hooks."""
# Shapes: N batch, C channels, H height, W width, L tokens, D their width.

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own custom)

from pipeline.learning.distributed import gathered
from pipeline.learning.models.inference import evaluating
from targets.errors import RecipeError

MAX_NAMES = 200


class FeatureLoss(nn.Module):
    """Romero et al., 2015 (FitNets' hint): mean over all entries of (projector(student's) - teacher's)^2, (N,).

    Features are (N, C, H, W), tokens (N, L, D) or (N, D). The larger map is average-pooled to the smaller; tokens against
    anything else than as many tokens, and maps against vectors, are averaged to vectors. The projector is what is left to do:
    a 1x1 convolution for maps, a linear map for the rest, the identity where the widths agree. It learns with the student and is
    thrown away. A layer that is called more than once in a forward pass is read at its last call.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, student_layer: str, teacher_layer: str, example_NCHW: Tensor
    ) -> None:
        super().__init__()
        self._student = _Tap(student, student_layer, "student_layer")
        self._teacher = _Tap(teacher, teacher_layer, "teacher_layer")
        seen, wanted = self._student.probe(student, example_NCHW), self._teacher.probe(teacher, example_NCHW)
        seen, wanted = _alike(seen, wanted)
        self.projector = _projector(seen, wanted)

    def listen(self) -> None:
        """Take what comes out of both layers in the forward passes that follow; before this, and after `forward`, nothing is held."""
        self._student.is_listening = self._teacher.is_listening = True

    def forward(self) -> Tensor:
        """(N,), of the forward passes of student and teacher since `listen`. No gradient reaches the teacher."""
        student, teacher = _alike(self._student.take(), self._teacher.take().detach())
        student, teacher = gathered(_full_precision(student)), gathered(_full_precision(teacher))
        difference: Tensor = self.projector(student) - teacher
        return difference.square().flatten(1).mean(1)

    def remove(self) -> None:
        """Take the hooks out of student and teacher."""
        self._student.handle.remove()
        self._teacher.handle.remove()


class _Tap:
    """A forward hook on one layer that keeps a copy of what came out last: a ReLU in place would write over the original."""

    def __init__(self, model: nn.Module, layer: str, key: str) -> None:
        layers = {name: module for name, module in model.named_modules() if name}
        if layer not in layers:
            raise RecipeError(_no_such_layer(layer, key, list(layers)))
        self.layer, self.key = layer, key
        self.is_listening = False
        self.output: Tensor | None = None
        self.handle = layers[layer].register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.is_listening and isinstance(output, Tensor):
            self.output = output.clone()

    def __deepcopy__(self, memo: object) -> _Tap:
        """A copy of the model (its moving average, a trial run) reports to the same place."""
        return self

    def take(self) -> Tensor:
        """What came out, once; raises RecipeError where nothing that can be compared did."""
        output, self.output, self.is_listening = self.output, None, False
        if output is None or output.ndim not in (2, 3, 4):
            given = "no tensor" if output is None else f"a tensor of shape {tuple(output.shape)}"
            raise RecipeError(
                f"distill.losses: {self.key}={self.layer} gives {given} in a forward pass. Name a layer that gives maps "
                "(N, C, H, W), tokens (N, L, D) or vectors (N, D)."
            )
        return output

    def probe(self, model: nn.Module, example_NCHW: Tensor) -> Tensor:
        """The layer's output for an example, to know its shape."""
        self.is_listening = True
        with evaluating(model), torch.no_grad():
            model(example_NCHW)
        return self.take()


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same number of axes and the same extent in all but channels."""
    if student.ndim == teacher.ndim == 4:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        return _pooled(student, size), _pooled(teacher, size)
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return student, teacher
    return _vector(student), _vector(teacher)


def _pooled(maps_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return maps_NCHW if maps_NCHW.shape[2:] == size else F.adaptive_avg_pool2d(maps_NCHW, size)


def _full_precision(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def _vector(features: Tensor) -> Tensor:
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


def _projector(student: Tensor, teacher: Tensor) -> nn.Module:
    axis = 1 if student.ndim == 4 else -1
    widths = student.shape[axis], teacher.shape[axis]
    if widths[0] == widths[1]:
        return nn.Identity()
    return nn.Conv2d(*widths, 1) if student.ndim == 4 else nn.Linear(*widths)


def _no_such_layer(layer: str, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(layer, names, n=1, cutoff=0.5)
    advice = f"; did you mean '{near[0]}'?" if near else "."
    more = f" and {len(names) - MAX_NAMES} more below them" if len(names) > MAX_NAMES else ""
    outermost = sorted(names, key=lambda name: name.count("."))[:MAX_NAMES]
    listed = [name for name in names if name in set(outermost)]
    return f"distill.losses: {key}={layer}: the model has no such layer{advice}\nIts layers: {', '.join(listed)}{more}."
