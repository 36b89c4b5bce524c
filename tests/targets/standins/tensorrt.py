"""A `tensorrt` whose engines are the ONNX file itself, run by ONNX Runtime when the stand-in stream comes to it.

Only names that the real bindings have, which test_tensorrt_contract.py checks. Tests set the module's `settings`.
"""

from __future__ import annotations

import ctypes
import enum
import io
import json
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, shape_inference

__version__ = "10.3.0"
Dims = tuple
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Settings:
    """What a test makes go wrong, and what the module saw."""

    def __init__(self) -> None:
        self.cudart: Any = None
        self.build_fails = ""
        self.refuses_cache = False
        self.executes = True
        self.flags: list[int] = []
        self.config: Any = None


settings = Settings()


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IProgressMonitor:
    pass


NetworkDefinitionCreationFlag = enum.IntEnum(
    "NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
)
BuilderFlag = enum.Enum("BuilderFlag", "FP16 INT8 TF32")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE TACTIC_DRAM")
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE")
LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
LayerType = enum.Enum("LayerType", "CONVOLUTION DECONVOLUTION MATRIX_MULTIPLY EINSUM ELEMENTWISE")
MatrixOperation = enum.Enum("MatrixOperation", "NONE TRANSPOSE VECTOR")
DataType = enum.Enum("DataType", "FLOAT HALF INT8 UINT8 INT32 INT64 BOOL")

ONNX_TYPES = {
    1: DataType.FLOAT,
    2: DataType.UINT8,
    3: DataType.INT8,
    6: DataType.INT32,
    7: DataType.INT64,
    10: DataType.HALF,
}
PRODUCTS = {"Conv": LayerType.CONVOLUTION, "ConvTranspose": LayerType.DECONVOLUTION}
PRODUCTS |= {"Gemm": LayerType.MATRIX_MULTIPLY, "MatMul": LayerType.MATRIX_MULTIPLY, "Einsum": LayerType.EINSUM}


class ITensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self._value = value
        self.name = value.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.dim_value or -1 for dim in self._value.type.tensor_type.shape.dim)

    @shape.setter
    def shape(self, shape: tuple[int, ...]) -> None:
        for dim, size in zip(self._value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size


class ILayer:
    def __init__(self, node: onnx.NodeProto, tensors: dict[str, ITensor], weights: dict[str, tuple[int, ...]]) -> None:
        self._node, self._tensors, self._weight = (
            node,
            tensors,
            weights.get(node.input[1], ()) if node.input[1:] else (),
        )
        self.name = node.name or f"node_of_{node.output[0]}"
        self.metadata = f"[ONNX Layer: {self.name}]"
        self.type = PRODUCTS.get(node.op_type, LayerType.ELEMENTWISE)

    def get_input(self, index: int) -> ITensor:
        return self._tensors[self._node.input[index]]

    def get_output(self, index: int) -> ITensor:
        return self._tensors[self._node.output[index]]


class _Kernel(ILayer):
    @property
    def kernel_size_nd(self) -> tuple[int, ...]:
        return self._weight[2:]

    @property
    def num_groups(self) -> int:
        return next((attribute.i for attribute in self._node.attribute if attribute.name == "group"), 1)

    @property
    def num_output_maps(self) -> int:
        return self.get_output(0).shape[1]


class IConvolutionLayer(_Kernel):
    pass


class IDeconvolutionLayer(_Kernel):
    pass


class IMatrixMultiplyLayer(ILayer):
    op0 = MatrixOperation.NONE


class INetworkDefinition:
    model: onnx.ModelProto
    path: str

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self.model.graph.input[index])

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> ILayer:
        for value in self.model.graph.output:
            value.type.tensor_type.ClearField("shape")
        graph = shape_inference.infer_shapes(self.model, data_prop=True).graph
        tensors = {value.name: ITensor(value) for value in [*graph.input, *graph.value_info, *graph.output]}
        weights = {one.name: tuple(one.dims) for one in graph.initializer}
        weights |= {node.output[0]: weights[node.input[0]] for node in graph.node if node.input[0] in weights}
        return ILayer(graph.node[index], tensors, weights)


class ParserError:
    def __init__(self, index: int, node: onnx.NodeProto, why: str) -> None:
        self._index, self._node, self._why = index, node, why

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def desc(self) -> str:
        return self._why


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        self._network.model, self._network.path = onnx.load(model), model
        for index, node in enumerate(self._network.model.graph.node):
            if node.domain not in ("", "ai.onnx"):
                self._errors.append(ParserError(index, node, "no importer registered for op"))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IHostMemory(bytes):
    pass


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._content + b"timed;")


class IBuilderConfig:
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None

    def __init__(self) -> None:
        self._pools: dict[MemoryPoolType, int] = {}

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        return not (settings.refuses_cache and cache._content)


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        settings.flags.append(flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        settings.config = IBuilderConfig()
        return settings.config

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        config.progress_monitor.phase_start("Building engine", None, 2)
        config.progress_monitor.phase_start("Tactics", "Building engine", 2)
        assert config.progress_monitor.step_complete("Tactics", 0)
        config.progress_monitor.phase_finish("Building engine")
        if settings.build_fails:
            self._logger.log(ILogger.Severity.WARNING, "only a warning")
            self._logger.log(ILogger.Severity.ERROR, settings.build_fails)
            return None
        return IHostMemory(network.model.SerializeToString())


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        return ICudaEngine(serialized_engine) if serialized_engine else None


class ICudaEngine:
    def __init__(self, plan: bytes) -> None:
        self._model = shape_inference.infer_shapes(onnx.load(io.BytesIO(plan)))
        graph = self._model.graph
        self._io = {value.name: value for value in [*graph.input, *graph.output]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        # As TensorRT, which loses nothing where integers are added; an x86 CPU without VNNI does, in ONNX Runtime's INT8 kernels.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])

    def get_tensor_dtype(self, name: str) -> DataType:
        return ONNX_TYPES[self._io[name].type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return ITensor(self._io[name]).shape

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._model)


class EngineInspector:
    """One layer a node, of the types that the graph has: INT8 where both inputs are dequantized."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        nodes = self._model.graph.node
        dequantized = {node.output[0] for node in nodes if node.op_type in ("DequantizeLinear", "Flatten")}
        quantized = any(node.op_type == "DequantizeLinear" for node in nodes)
        layers = [
            {
                "Name": node.name or node.output[0],
                "LayerType": {"Conv": "CaskConvolution", "Gemm": "gemm"}.get(node.op_type, "kgen"),
                "Inputs": [{"Format/Datatype": "Int8" if quantized and node.input[0] in dequantized else "Float"}],
                "TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n" if quantized else "sm80_xmma_f32f32",
                "Metadata": f"[ONNX Layer: {node.name or f'node_of_{node.output[0]}'}]",
            }
            for node in nodes
        ]
        return json.dumps({"Layers": layers})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._kernel = KERNEL(self._compute)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine._io

    def execute_async_v3(self, stream_handle: int) -> bool:
        return settings.executes and settings.cudart.standin_enqueue(self._kernel, None) == 0

    def _compute(self, _: int | None) -> None:
        graph = self._engine._model.graph
        feeds = {value.name: self._at(value.name) for value in graph.input}
        for value, result in zip(graph.output, self._engine._session.run(None, feeds), strict=True):
            self._at(value.name)[...] = result

    def _at(self, name: str) -> Any:
        """The tensor in the stand-in's device memory, which is this process's own."""
        value = self._engine._io[name]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        shape = ITensor(value).shape
        memory = (ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)
