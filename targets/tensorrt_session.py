"""What runs a TensorRT engine: buffers bound once, one stream, a CUDA graph; and the same with the layers' times.

Python 3.10, stdlib, numpy; `tensorrt` is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from targets.base import Array, Batch, CompiledModel, LayerTime, TensorSpec
from targets.checks import fill
from targets.cuda import Cuda, Handle
from targets.errors import TargetError
from targets.tensorrt_inspector import layer_times, layers_and_products

if TYPE_CHECKING:
    import tensorrt as trt

    from targets.tensorrt_profiler import LayerClock


class TensorRtSession:
    """Buffers bound once: page-locked on the host, one of each tensor on the device; one stream.

    A run is copy in, execute, copy out, and with `cuda_graph` one launch of all three, captured after a first run has let
    TensorRT allocate what it needs. The shapes are fixed, so nothing is captured twice.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: trt.IExecutionContext,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        *,
        cuda_graph: bool,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._cuda, self._context = cuda, context
        self._buffers = {spec.name: cuda.host_array(spec.fixed(1), spec.dtype) for spec in inputs}
        self._results = {spec.name: cuda.host_array(spec.fixed(1), spec.dtype) for spec in outputs}
        self._device: dict[str, Handle] = {
            name: cuda.device_buffer(array.nbytes) for name, array in {**self._buffers, **self._results}.items()
        }
        for name, buffer in self._device.items():
            if not context.set_tensor_address(name, buffer.address):
                raise TargetError(
                    f"TensorRT does not take tensor '{name}': the engine is of another graph. Compile again."
                )
        self._stream = cuda.stream()
        self._graph = self._capture() if cuda_graph else None

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        for name, buffer in self._buffers.items():
            fill(buffer, name, batch)
        self._submit()
        self._cuda.synchronize(self._stream)
        return self._results

    def _submit(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)

    def _enqueue(self) -> None:
        for name, array in self._buffers.items():
            self._cuda.to_device(self._device[name], array, self._stream)
        context: trt.IExecutionContext = self._context
        if not context.execute_async_v3(self._stream.address):
            raise TargetError("TensorRT refuses to execute the engine. Compile the model again on this machine.")
        for name, array in self._results.items():
            self._cuda.to_host(array, self._device[name], self._stream)

    def _capture(self) -> Handle:
        self._enqueue()
        self._cuda.synchronize(self._stream)
        try:
            return self._cuda.capture(self._stream, self._enqueue)
        except TargetError as error:
            raise TargetError(f"The run cannot be captured as a CUDA graph: {error} Set cuda_graph: false.") from None


class TensorRtProfiledSession(TensorRtSession):
    """Layer times are means over the runs since `start`, measured on the device: copies to and from it are not among them."""

    resolution_us = 0.0

    def __init__(self, cuda: Cuda, context: trt.IExecutionContext, compiled: CompiledModel) -> None:
        from targets.tensorrt_profiler import LayerClock

        self.source = f"{compiled.toolchain} IProfiler"
        self._compiled = compiled
        self._clock: LayerClock = LayerClock()
        self._num_runs = 0
        context.profiler = self._clock
        super().__init__(cuda, context, compiled.inputs, compiled.outputs, cuda_graph=False)

    def run(self, batch: Batch) -> Mapping[str, Array]:
        """Run once. The result is a view on the session's own buffers, valid until the next call."""
        self._num_runs += 1
        return super().run(batch)

    def start(self) -> None:
        self._num_runs = 0
        self._clock.total_us.clear()

    def layer_times(self) -> tuple[LayerTime, ...]:
        layers, products = layers_and_products(self._compiled)
        means_us = {name: total_us / self._num_runs for name, total_us in self._clock.total_us.items()}
        return tuple(layer_times(means_us, layers, products, self._compiled.name))
