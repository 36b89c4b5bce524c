"""The time of each layer of an engine, as TensorRT calls it back. Imported by the method that profiles: as in
`tensorrt_listeners`, a class that derives from TensorRT's own needs TensorRT."""

from __future__ import annotations

import tensorrt as trt


class LayerClock(trt.IProfiler):  # type: ignore[misc]
    """Adds up what each layer took, in the order in which the layers are first reported."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.total_us: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.total_us[layer_name] = self.total_us.get(layer_name, 0.0) + ms * 1e3
