"""TensorRT 10.3 (JetPack 6) to 11: an engine built on the machine that runs it, from a graph that says its types itself.

Reads the exported ONNX, its float16 form for fp16 and int8. Writes model.engine, timing.cache, layers.json (the engine
inspector's own words), products.json (the network's multiply-accumulates) and compiled.json. Python 3.10, stdlib, numpy,
`tensorrt` imported by the method that uses it, libcudart through ctypes.

Quantization is explicit (Q/DQ) and the network strongly typed: the one path that 10.x and 11.x share. What differs between
versions is asked of the installed package by name: the number of an enum means something else in 11 than in 10.
FP32 products run in TF32 where the GPU has it, TensorRT's default.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from targets.base import (
    CompiledModel,
    Exported,
    Placement,
    TensorSpec,
    sha256_file,
    write_json,
)
from targets.checks import check_batch, check_precision, smallest_batch
from targets.cuda import Cuda, has_cuda, open_cuda
from targets.errors import RecipeError, TargetError
from targets.tensorrt_inspector import (
    LAYERS_FILE,
    PRODUCTS_FILE,
    Product,
    layers_and_products,
    placements,
    products_of,
)
from targets.tensorrt_key import built_for, check_machine, machine
from targets.tensorrt_session import TensorRtProfiledSession, TensorRtSession

if TYPE_CHECKING:
    import tensorrt as trt

    from targets.tensorrt_clock import TensorRtClockedSession
    from targets.tensorrt_listeners import Log

ENGINE_FILE, CACHE_FILE = "model.engine", "timing.cache"
OLDEST = (10, 3)
MIB = 2**20
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True, kw_only=True)
class TensorRt:
    """A GPU through TensorRT. `allow_spinning`: a run polls for its end (quicker, hotter; a Jetson would sleep otherwise).
    `timing_cache`: a file to begin with and to write back, so that a second build is quick."""

    name: ClassVar[str] = "tensorrt"
    package: ClassVar[str] = "tensorrt"
    on_cpu: ClassVar[bool] = False
    scheme: ClassVar[str] = "tensorrt-int8"
    dialect: ClassVar[str] = "tensorrt"

    workspace_mib: int = 1024
    optimization_level: int = 3  # 0 quick to build, 5 thorough
    cuda_graph: bool = True
    allow_spinning: bool = True
    timing_cache: str = ""

    def __post_init__(self) -> None:
        if self.workspace_mib < 1:
            raise RecipeError(
                f"option workspace_mib={self.workspace_mib} of target 'tensorrt' must be 1 or more. Raise it."
            )
        if not 0 <= self.optimization_level <= 5:
            raise RecipeError(
                f"option optimization_level={self.optimization_level} of target 'tensorrt' must be 0 to 5. Take 3."
            )

    def missing(self) -> str | None:
        jetson = platform.machine() == "aarch64"
        if not find_spec("tensorrt"):
            return (
                "sudo apt-get install python3-libnvinfer (comes with JetPack)"
                if jetson
                else "pip install tensorrt-cu13"
            )
        if not has_cuda():
            return "sudo apt-get install nvidia-jetpack" if jetson else "pip install nvidia-cuda-runtime"
        return None

    def float_precisions(self) -> tuple[str, ...]:
        return ("fp32", "fp16")

    def compile(self, exported: Exported, out_dir: Path, precision: str) -> CompiledModel:
        """Build the engine on this GPU. Raises TargetError with the parser's or the builder's own words."""
        check_precision(exported, precision, self.float_precisions())
        trt, cuda = _tensorrt(), open_cuda()
        from targets.tensorrt_listeners import Log

        log = Log()
        if self.timing_cache:
            Path(self.timing_cache).parent.mkdir(parents=True, exist_ok=True)
        graph = _graph_for(exported, precision)
        flags = f"workspace_mib={self.workspace_mib} optimization_level={self.optimization_level}"
        decided_by = built_for(trt, cuda, graph, flags, "fp32" if graph == exported.model_path else "fp16")
        out_dir.mkdir(parents=True, exist_ok=True)
        plan, products, cache = self._build(trt, log, graph, exported, Path(self.timing_cache or out_dir / CACHE_FILE))
        (out_dir / ENGINE_FILE).write_bytes(plan)
        (out_dir / CACHE_FILE).write_bytes(cache)
        write_json(out_dir / PRODUCTS_FILE, [product.to_json() for product in products])
        if self.timing_cache:
            Path(self.timing_cache).write_bytes(cache)
        engine = _deserialize(trt, log, out_dir / ENGINE_FILE, exported.name)
        (out_dir / LAYERS_FILE).write_text(_inspect(trt, engine), encoding="utf-8")
        compiled = CompiledModel(
            name=exported.name,
            target=self.name,
            options=asdict(self),
            precision=precision,
            files={name: sha256_file(out_dir / name) for name in (ENGINE_FILE, CACHE_FILE, LAYERS_FILE, PRODUCTS_FILE)},
            inputs=_specs(engine, exported.inputs),
            outputs=_specs(engine, exported.outputs),
            toolchain=f"tensorrt {trt.__version__}",
            built_for=decided_by,
            preprocessing=exported.preprocessing,
            directory=out_dir,
        )
        compiled.save()
        return compiled

    def load(self, compiled: CompiledModel, *, batch: int = 1) -> TensorRtSession:
        """A session for the batch that the engine was built for. Raises TargetError for an engine of another machine."""
        cuda, context = self._open(compiled, batch)
        return TensorRtSession(cuda, context, compiled.inputs, compiled.outputs, cuda_graph=self.cuda_graph)

    def load_clocked(self, compiled: CompiledModel, *, batch: int = 1) -> TensorRtClockedSession:
        """A session with CUDA events around what its stream does: copies in and out and all kernels."""
        from targets.tensorrt_clock import TensorRtClockedSession

        cuda, context = self._open(compiled, batch)
        return TensorRtClockedSession(cuda, context, compiled.inputs, compiled.outputs, cuda_graph=self.cuda_graph)

    def load_profiled(self, compiled: CompiledModel, *, batch: int = 1) -> TensorRtProfiledSession:
        """A session whose engine tells what each of its layers took. Without a CUDA graph, which would hide the layers."""
        cuda, context = self._open(compiled, batch)
        return TensorRtProfiledSession(cuda, context, compiled)

    def placement(self, compiled: CompiledModel) -> Placement:
        """From what the inspector said of the engine when it was built; needs neither TensorRT nor a GPU."""
        layers = placements(*layers_and_products(compiled), compiled.name)
        return Placement(layers=tuple(layers), source=f"{compiled.toolchain} engine inspector")

    def _open(self, compiled: CompiledModel, batch: int) -> tuple[Cuda, trt.IExecutionContext]:
        check_batch(compiled.inputs, batch)
        trt, cuda = _tensorrt(), open_cuda()
        if self.allow_spinning:
            cuda.spin()
        check_machine(compiled, machine(trt, cuda))
        from targets.tensorrt_listeners import Log

        log = Log()
        engine = _deserialize(trt, log, compiled.directory / ENGINE_FILE, compiled.name)
        return cuda, _context(engine, log, compiled.name)

    def _build(
        self, trt: Any, log: Log, graph: Path, exported: Exported, cache_path: Path
    ) -> tuple[bytes, list[Product], bytes]:
        """(plan, products, timing cache); the cache begins with what `cache_path` holds."""
        from targets.tensorrt_listeners import Progress

        builder = trt.Builder(log)
        network = builder.create_network(_strongly_typed(trt))
        _parse(trt, log, network, graph, exported)
        products = list(products_of(trt, network))
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_mib * MIB)
        config.builder_optimization_level = self.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = Progress()
        cache = _timing_cache(config, cache_path)
        plan: trt.IHostMemory | None = builder.build_serialized_network(network, config)
        if plan is None:
            raise TargetError(
                f"{exported.name}: TensorRT {trt.__version__} cannot build {graph.name}: {log.why()}. "
                "Raise workspace_mib, run edgestill lint on the graph, or take another target."
            )
        return bytes(plan), products, bytes(cache.serialize())


def _tensorrt() -> Any:
    """The installed package, 10.3 or newer; raises TargetError."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise TargetError(
            f"TensorRT cannot be imported: {error}. Run: {TensorRt().missing() or 'its installation anew'}."
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise TargetError(
            f"TensorRT {trt.__version__} is installed, 10.3 or newer is needed: earlier versions read Q/DQ otherwise. "
            "On a Jetson move to JetPack 6.1 or newer; elsewhere: pip install tensorrt-cu13."
        )
    return trt


def _strongly_typed(trt: Any) -> int:
    """The flags of a network whose tensors have the types that the graph gives them: asked for where networks of another
    kind still exist, which is where the builder still has precision flags."""
    if not hasattr(trt.BuilderFlag, "FP16"):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _graph_for(exported: Exported, precision: str) -> Path:
    """The ONNX file that is written in the asked types. INT8 without a float16 form keeps the rest in FP32, and says so."""
    if precision == "fp32":
        return exported.model_path
    if exported.half_model_path is not None:
        return exported.half_model_path
    why = exported.half_note or "none was exported"
    if precision == "fp16":
        raise TargetError(
            f"{exported.name}: fp16 needs a graph written in float16, and there is none: {why}. Export it, or take fp32."
        )
    print(f"tensorrt: no float16 graph ({why}): what is not INT8 runs in FP32", file=sys.stderr, flush=True)
    return exported.model_path


def _parse(trt: Any, log: Log, network: trt.INetworkDefinition, graph: Path, exported: Exported) -> None:
    """Read the graph into the network and fix its shapes; raises TargetError with every error and its node.

    The shapes are set on the network, not by an optimization profile: then they are constants for the build, and the
    inspector tells types, which it keeps to itself for dynamic shapes.
    """
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = []
        for index in range(parser.num_errors):
            error: trt.ParserError = parser.get_error(index)
            said.append(f"node {error.node()} '{error.node_name()}' ({error.node_operator()}): {error.desc()}")
        raise TargetError(
            f"{exported.name}: TensorRT {trt.__version__} cannot read {graph.name}: {'; '.join(said) or log.why()}. "
            "Replace these operators, or take another target."
        )
    specs = {spec.name: spec for spec in exported.inputs}
    batch = smallest_batch(exported.inputs)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if None in specs[tensor.name].shape:
            tensor.shape = trt.Dims(specs[tensor.name].fixed(batch))


def _timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Attached to the build: what the file holds, or an empty one where there is none or it was made elsewhere."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        print(f"tensorrt: {path} is of another GPU or version; timing anew", file=sys.stderr, flush=True)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _deserialize(trt: Any, log: Log, path: Path, name: str) -> trt.ICudaEngine:
    runtime = trt.Runtime(log)
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise TargetError(
            f"{name}: TensorRT {trt.__version__} cannot load {path.name}: {log.why()}. Compile the model on this machine."
        )
    return engine


def _context(engine: trt.ICudaEngine, log: Log, name: str) -> trt.IExecutionContext:
    context: trt.IExecutionContext | None = engine.create_execution_context()
    if context is None:
        raise TargetError(
            f"{name}: TensorRT cannot create an execution context: {log.why()}. "
            "Close what else uses the GPU's memory, or take a smaller model."
        )
    return context


def _inspect(trt: Any, engine: trt.ICudaEngine) -> str:
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def _specs(engine: trt.ICudaEngine, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The specs with the engine's fixed shapes; raises TargetError where its types are not those that were exported."""
    fixed = []
    for spec in specs:
        kind: str = engine.get_tensor_dtype(spec.name).name
        shape = tuple(int(size) for size in engine.get_tensor_shape(spec.name))
        if DTYPES.get(kind) != spec.dtype or min(shape, default=1) < 0:
            raise TargetError(
                f"tensor '{spec.name}' of the engine is {kind}{list(shape)}, exported was {spec.dtype}{list(spec.shape)}. "
                "Export a graph whose inputs and outputs keep their type and whose only free axis is the batch."
            )
        fixed.append(replace(spec, shape=shape))
    return tuple(fixed)
