"""Which layer of a TensorRT engine runs in which precision: the engine inspector's words joined to the parsed network's sizes.

The inspector (ProfilingVerbosity.DETAILED) names types and kernels, but not every size: what Myelin compiled ("gemm",
"correlation", "fusion") lists no weights, and a fused pooling hides a convolution's output. So multiply-accumulates are
counted on the network as it was parsed, and each such product must be found again in the engine, by the ONNX node that both
name; one that is not found is an error, never a zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from targets.base import CompiledModel, LayerPlacement, LayerTime, read_json
from targets.errors import TargetError
from targets.macs import convolution_macs, matmul_macs, transposed_convolution_macs

if TYPE_CHECKING:
    import tensorrt as trt

Layer = Mapping[str, Any]
LAYERS_FILE, PRODUCTS_FILE = "layers.json", "products.json"

# The inspector writes "Int8", "Half", "Row major linear FP32", "Thirty-two wide channel vectorized row major Int8 format".
TYPES = {
    "int8": "int8",
    "uint8": "uint8",
    "half": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "float": "fp32",
    "fp32": "fp32",
    "fp8": "fp8",
    "fp4": "fp4",
    "int4": "int4",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
UNKNOWN = "unknown"
# Layers that move or convert, whatever ONNX node they name; everything else may compute.
MOVES = frozenset({"Reformat", "NoOp", "Constant", "Shuffle", "Slice", "Concat", "Identity", "wait", "signal"})
PRODUCT_TYPE = re.compile(r"conv|correlation|gemm|matrix_?multiply|matmul|fusion|dla|foreignnode|myelin", re.IGNORECASE)
PRODUCT_KERNEL = re.compile(r"gemm|gemv|fprop|conv|correlat|[ih]mma|dgrad|_mha", re.IGNORECASE)
# ..._i8i8_i8i32_f32_..., ..._i8f32_i8i32_..., ampere_first_layer_filter3x3_imma_fwd, volta_int8x4_icudnn_int8x4_...
INT8_KERNEL = re.compile(r"i8(i8|f16|f32|bf16)_i8|imma|int8", re.IGNORECASE)
UNCOUNTED = ("EINSUM", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3", "RECURRENCE", "ATTENTION_INPUT", "MOE")


@dataclass(frozen=True)
class Product:
    """A layer of the parsed network with multiply-accumulates a sample; None where its kind cannot be counted here."""

    name: str
    metadata: str  # "[ONNX Layer: /conv1/Conv]", which the engine's layers repeat
    macs: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def products_of(trt: Any, network: trt.INetworkDefinition) -> Iterator[Product]:
    """All convolutions and matrix products of a network whose shapes are fixed."""
    uncounted = [getattr(trt.LayerType, name) for name in UNCOUNTED if hasattr(trt.LayerType, name)]
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        kind = layer.type
        if kind == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer  # the binding hands out the base class
            yield Product(layer.name, layer.metadata, _convolution(layer))
        elif kind == trt.LayerType.DECONVOLUTION:
            layer.__class__ = trt.IDeconvolutionLayer
            yield Product(layer.name, layer.metadata, _deconvolution(layer))
        elif kind == trt.LayerType.MATRIX_MULTIPLY:
            layer.__class__ = trt.IMatrixMultiplyLayer
            yield Product(layer.name, layer.metadata, _matrix_product(trt, layer))
        elif kind in uncounted:
            yield Product(layer.name, layer.metadata, None)


def _convolution(layer: trt.IConvolutionLayer) -> int | None:
    x, output = tuple(layer.get_input(0).shape), tuple(layer.get_output(0).shape)
    weight = (layer.num_output_maps, x[1] // layer.num_groups, *layer.kernel_size_nd)
    return _static(convolution_macs(output, weight, layer.num_output_maps), x, output)


def _deconvolution(layer: trt.IDeconvolutionLayer) -> int | None:
    x = tuple(layer.get_input(0).shape)
    weight = (x[1], layer.num_output_maps // layer.num_groups, *layer.kernel_size_nd)
    return _static(transposed_convolution_macs(x, weight, x[1]), x)


def _matrix_product(trt: Any, layer: trt.IMatrixMultiplyLayer) -> int | None:
    x, output = tuple(layer.get_input(0).shape), tuple(layer.get_output(0).shape)
    inner = x[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else x[-1]
    return _static(matmul_macs(output, inner), x, output)


def _static(macs: int, *shapes: tuple[int, ...]) -> int | None:
    return None if any(size < 0 for shape in shapes for size in shape) else macs


def layers_and_products(compiled: CompiledModel) -> tuple[list[Layer], list[Product]]:
    """What was written of the engine when it was built."""
    text = (compiled.directory / LAYERS_FILE).read_text(encoding="utf-8")
    products = [Product(**values) for values in read_json(compiled.directory / PRODUCTS_FILE)]
    return parse_layers(text, compiled.name), products


def parse_layers(text: str, name: str) -> list[Layer]:
    """The layers of the inspector's JSON. Old versions write the separator of node names as a bare control character."""
    layers: list[Any] = json.loads(text, strict=False)["Layers"]
    if not all(isinstance(layer, dict) for layer in layers):
        raise TargetError(f"{name}: the engine tells the names of its layers only. Build it again, verbosity DETAILED.")
    return layers


def placements(layers: Sequence[Layer], products: Sequence[Product], name: str) -> Iterator[LayerPlacement]:
    """Each product with the layer that runs it; raises TargetError for one that cannot be placed or counted."""
    for product in products:
        if product.macs is None:
            raise TargetError(
                f"{name}: the multiply-accumulates of layer '{product.name}' cannot be counted, so no share of INT8 "
                "can be told. Replace that operator by convolutions and matrix products, or leave the gate away."
            )
        running = _running(layers, product, name)
        found = [precision_of(layer) for layer in running]
        # Several kernels for one product: INT8 is said only where all of them are.
        precision = next((one for one in found if one != "int8"), "int8")
        yield LayerPlacement(
            name=product.name, op=str(running[0].get("LayerType", "")), precision=precision, macs=product.macs
        )


def layer_times(
    means_us: Mapping[str, float], layers: Sequence[Layer], products: Sequence[Product], name: str
) -> Iterator[LayerTime]:
    """Each layer that the profiler timed, by its name, with the products that run in it.

    A layer may run several products; a product that several layers run is counted with the first of them. Raises TargetError
    as `placements` does.
    """
    known = {str(layer.get("Name", "")): layer for layer in layers}
    macs: dict[str, int] = {}
    for product, placed in zip(products, placements(layers, products, name), strict=True):
        first = str(_running(layers, product, name)[0].get("Name", ""))
        macs[first] = macs.get(first, 0) + placed.macs
    for layer_name, time_us in means_us.items():
        layer = known.get(layer_name, {})
        yield LayerTime(
            name=layer_name,
            op=str(layer.get("LayerType", UNKNOWN)),
            precision=precision_of(layer) if layer_name in macs else _type_of((layer.get("Inputs") or [{}])[0]),
            macs=macs.get(layer_name, 0),
            time_us=time_us,
            kernel=str(layer.get("TacticName", "")),
        )


def _running(layers: Sequence[Layer], product: Product, name: str) -> list[Layer]:
    """The layers that name the product's node and compute; a lone one is taken whatever it calls itself."""
    named = [layer for layer in layers if layer.get("LayerType") not in MOVES and _names(layer, product)]
    computing = [layer for layer in named if _multiplies(layer)]
    if computing or len(named) == 1:
        return computing or named
    told = ", ".join(f"'{layer['Name']}'" for layer in named) or "no layer"
    raise TargetError(
        f"{name}: '{product.name}' of the network is named by {told} of the engine, so where it runs cannot be told. "
        "Send layers.json with a report of this; nothing is assumed."
    )


def _names(layer: Layer, product: Product) -> bool:
    """By the ONNX node where both sides tell one, else by name: 'W + /conv/Conv + /relu/Relu', 'a || b', 'PWN(a)'."""
    ours, theirs = _nodes(product.metadata), _nodes(str(layer.get("Metadata", "")))
    if ours and theirs:
        return bool(ours & theirs)
    return product.name in re.split(r" \+ | \|\| |[()]|, ", str(layer.get("Name", "")))


def _nodes(metadata: str) -> set[str]:
    return set(re.findall(r"\[ONNX Layer: ([^\x1e\x1f]+?)\](?=$|[\x1e\x1f\[])", metadata))


def _multiplies(layer: Layer) -> bool:
    kernel = str(layer.get("TacticName", ""))
    return bool(PRODUCT_TYPE.search(str(layer.get("LayerType", ""))) or PRODUCT_KERNEL.search(kernel))


def precision_of(layer: Layer) -> str:
    """INT8 iff activation and weights both are; what is fed INT8 but does not tell its weights is unknown.

    Weights stand in the layer's own words, or in the kernel's name where Myelin made it.
    """
    x = _type_of((layer.get("Inputs") or [{}])[0])
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and "Type" in weights:
        weight = data_type(str(weights["Type"]))
    else:
        weight = "int8" if INT8_KERNEL.search(str(layer.get("TacticName", ""))) else UNKNOWN
    if x == "int8":
        return weight
    return x if weight in ("int8", UNKNOWN) else weight


def _type_of(tensor: Layer) -> str:
    """Versions differ: "Format/Datatype" (8.x to 10.x) or "Datatype" beside "Format"."""
    return data_type(str(tensor.get("Datatype", tensor.get("Format/Datatype", ""))))


def data_type(text: str) -> str:
    words = re.findall(r"[a-z]+[0-9]*", text.lower())
    return next((TYPES[word] for word in words if word in TYPES), UNKNOWN)
