"""The time of a run on the device: CUDA events around what the stream does, copies in and out and all kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from targets.base import Array, Batch, TensorSpec
from targets.cuda import Cuda
from targets.tensorrt_session import TensorRtSession

if TYPE_CHECKING:
    import tensorrt as trt


class TensorRtClockedSession(TensorRtSession):
    """An event on the stream before the work of a run and one after it."""

    clock, slowed = "CUDA events", False

    def __init__(
        self,
        cuda: Cuda,
        context: trt.IExecutionContext,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        cuda_graph: bool,
    ) -> None:
        super().__init__(cuda, context, inputs, outputs, cuda_graph=cuda_graph)
        self._begin, self._end = cuda.event(), cuda.event()
        self._run_times_us: list[float] = []

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        results = super().run(batch)
        self._run_times_us.append(self._cuda.elapsed_us(self._begin, self._end))
        return results

    def run_times_us(self) -> list[float]:
        return self._run_times_us

    def _submit(self) -> None:
        self._cuda.record(self._begin, self._stream)
        super()._submit()
        self._cuda.record(self._end, self._stream)
