"""Placement from the engine inspector's words. The layers below have the form of published ones, shortened:

- "CaskConvolution", "CaskConvActPool", "Reformat" with "Format/Datatype" and "Metadata": github.com/NVIDIA/TensorRT/issues/4020
  (ResNet-18, TensorRT 10, trtexec --exportLayerInfo --profilingVerbosity=detailed)
- two convolutions in one kernel, "a || b": issues/3737 of the same repository
- "CaskGemmConvolution" in FP32: issues/3583
- Myelin's "gemm", "fusion", "kgen": issues/4397
- "Datatype" beside "Format" in place of "Format/Datatype": newer 10.x
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from targets.errors import TargetError
from targets.tensorrt_inspector import Product, data_type, parse_layers, placements, precision_of

VECTOR_INT8 = "Thirty-two wide channel vectorized row major Int8 format"
INT8_TACTIC = (
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tensor16x8x32_t1r3s3"
)
SEPARATOR = "\x1e"


def nodes(*names: str) -> str:
    return SEPARATOR.join(f"[ONNX Layer: {name}]" for name in names)


def tensor(kind: str) -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 64, 56, 56], "Format/Datatype": kind}


def cask(name: str, x: str, weights: str, *onnx: str, layer_type: str = "CaskConvolution") -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": layer_type,
        "Inputs": [tensor(x)],
        "Outputs": [tensor(x)],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "OutMaps": 64,
        "Groups": 1,
        "Weights": {"Type": weights, "Count": 36864},
        "TacticName": INT8_TACTIC if weights == "Int8" else "sm80_xmma_fprop_f16f16_f16f16_f16",
        "Metadata": nodes(*onnx),
    }


def myelin(name: str, kind: str, x: str, tactic: str, *onnx: str) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "a", "Dimensions": [1, 512], "Format/Datatype": x}],
        "Outputs": [{"Name": "b", "Dimensions": [1, 1000], "Format/Datatype": "Half"}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": nodes(*onnx),
    }


REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
    "LayerType": "Reformat",
    "Inputs": [tensor("Row major linear FP32")],
    "Outputs": [tensor("Row major Int8 format")],
    "Origin": "REFORMAT",
    "Metadata": "",
}


def product(name: str, macs: int | None = 100, metadata: str | None = None) -> Product:
    return Product(name, nodes(name) if metadata is None else metadata, macs)


def placed(layers: list[dict[str, Any]], *products: Product) -> dict[str, str]:
    return {layer.name: layer.precision for layer in placements(layers, products, "m")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VECTOR_INT8, "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Row major Int8 format", "int8"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Channel major FP32 format where channel % 4 == 0", "fp32"),
        ("Int8", "int8"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("UInt8", "uint8"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_types_are_read_out_of_every_way_to_write_them(text: str, expected: str) -> None:
    assert data_type(text) == expected


def test_a_layer_is_int8_only_where_activation_and_weights_both_are() -> None:
    assert precision_of(cask("c", VECTOR_INT8, "Int8")) == "int8"
    assert precision_of(cask("c", VECTOR_INT8, "Half")) == "fp16"
    assert precision_of(cask("c", "Half", "Int8")) == "fp16"
    assert precision_of(cask("c", "Channel major FP32 format where channel % 4 == 0", "Float")) == "fp32"


def test_the_kernels_name_tells_the_weights_that_myelin_keeps_to_itself() -> None:
    assert precision_of(myelin("g", "gemm", "Int8", "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x128x64")) == "int8"
    assert precision_of(myelin("g", "gemm", "Int8", "ampere_first_layer_filter3x3_imma_fwd")) == "int8"
    assert precision_of(myelin("g", "gemm", "Half", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64")) == "fp16"
    assert precision_of(myelin("g", "kgen", "Int8", "__myl_CastMulConv_0xf2543c36")) == "unknown"


def test_the_newer_key_for_types_is_read_too() -> None:
    layer = cask("c", "", "Int8")
    layer["Inputs"] = [{"Name": "x", "Format": "Channel major where channel % 32 == 0", "Datatype": "Int8"}]

    assert precision_of(layer) == "int8"


def test_products_are_found_by_their_onnx_node_in_fused_layers() -> None:
    layers = [
        REFORMAT,
        cask("conv1 + relu1 + pool1", VECTOR_INT8, "Int8", "conv1", "relu1", "pool1", layer_type="CaskConvActPool"),
        cask("conv2 + add", "Half", "Half", "conv2", "add", layer_type="CaskGemmConvolution"),
        myelin("/fc/Gemm_myl9_4", "gemm", "Half", "sm50_xmma_cublas_gemvx_f16f16_f32_f32_tn_n", "/fc/Gemm"),
        myelin("__myl_Add_myl9_5", "kgen", "Half", "__myl_Add_0x1", "/fc/Gemm"),
    ]

    assert placed(layers, product("conv1"), product("conv2"), product("/fc/Gemm")) == {
        "conv1": "int8",
        "conv2": "fp16",
        "/fc/Gemm": "fp16",
    }


def test_two_convolutions_in_one_kernel_are_both_found() -> None:
    layers = [cask("cv2 + act || cv3 + act", VECTOR_INT8, "Int8", "cv2", "a2", "cv3", "a3")]

    assert placed(layers, product("cv2"), product("cv3")) == {"cv2": "int8", "cv3": "int8"}


def test_without_metadata_the_layers_name_is_read() -> None:
    layers = [cask("W + W_QuantizeLinear + conv", VECTOR_INT8, "Int8"), cask("conv10", "Half", "Half")]
    for layer in layers:
        del layer["Metadata"]

    assert placed(layers, product("conv", metadata="")) == {"conv": "int8"}


def test_a_name_that_only_begins_alike_is_another_layer() -> None:
    with pytest.raises(TargetError, match="'conv1' of the network is named by no layer"):
        placed([cask("conv10", VECTOR_INT8, "Int8", "conv10")], product("conv1"))


def test_one_product_in_several_kernels_is_int8_only_where_all_are() -> None:
    layers = [
        cask("conv part 1", VECTOR_INT8, "Int8", "conv"),
        cask("conv part 2", "Half", "Half", "conv"),
    ]

    assert placed(layers, product("conv")) == {"conv": "fp16"}


def test_a_lone_layer_of_an_unheard_kind_is_taken() -> None:
    assert placed([myelin("x", "newkind", "Half", "t", "conv")], product("conv")) == {"conv": "fp16"}


def test_a_product_that_cannot_be_told_apart_is_an_error_with_both_names() -> None:
    layers = [myelin("__myl_A", "kgen", "Half", "t", "conv"), myelin("__myl_B", "kgen", "Int8", "t", "conv")]

    with pytest.raises(TargetError, match="'__myl_A', '__myl_B' of the engine"):
        placed(layers, product("conv"))


def test_a_reformat_never_counts_as_the_layer_that_computes() -> None:
    with pytest.raises(TargetError, match="named by no layer"):
        placed([{**REFORMAT, "Metadata": nodes("conv")}], product("conv"))


def test_what_cannot_be_counted_is_never_counted_as_nothing() -> None:
    with pytest.raises(TargetError, match="layer 'einsum' cannot be counted"):
        placed([cask("c", "Half", "Half", "einsum")], product("einsum", macs=None))


def test_an_engine_without_details_is_refused() -> None:
    with pytest.raises(TargetError, match="names of its layers only"):
        parse_layers(json.dumps({"Layers": ["conv1 + relu1"], "Bindings": ["x"]}), "m")


def test_a_bare_control_character_between_node_names_is_read() -> None:
    text = json.dumps({"Layers": [cask("c", "Half", "Half", "a", "b")]}).replace("\\u001e", SEPARATOR)

    assert placed(list(map(dict, parse_layers(text, "m"))), product("b")) == {"b": "fp16"}


def test_node_names_with_brackets_are_kept_whole() -> None:
    layers = [cask("c", VECTOR_INT8, "Int8", "block[0]/conv", "block[1]/conv")]

    assert placed(layers, product("block[0]/conv")) == {"block[0]/conv": "int8"}
    with pytest.raises(TargetError, match="named by no layer"):
        placed(layers, product("block[0"))
