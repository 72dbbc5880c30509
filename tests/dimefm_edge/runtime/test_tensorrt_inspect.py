"""The engine inspector's JSON, in the shapes that TensorRT's pages and issues show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dimefm_edge.errors import DimeFMError
from dimefm_edge.runtime.tensorrt_inspect import (
    AttentionFusion,
    EngineLayer,
    attention_fusion,
    describe_layers,
    kernels_by_kind,
    parse_layer_log,
    parse_layers,
)

ATTENTIONS = [["mul_0", "bmm1_0", "softmax_0", "bmm2_0"], ["bmm1_1", "softmax_1", "bmm2_1"]]


def layer(name: str, kind: str, tactic: str, *nodes: str, key: str = "Format/Datatype") -> Any:
    return {
        "Name": name,
        "LayerType": kind,
        "Outputs": [{"Name": "o", "Dimensions": [1, 4], key: "Half"}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def text(*layers: Any, **more: Any) -> str:
    return json.dumps({"Layers": layers, **more})


MHA = layer("_gemm_mha_v2_myl0_1", "kgen", "_gemm_mha_v2_0x3f", "bmm1_0", "softmax_0", "bmm2_0")
LOOSE = [
    layer("bmm1_1_myl0_2", "gemm", "sm80_xmma_gemm", "bmm1_1"),
    layer("__myl_MaxSubExp_myl0_3", "kgen", "__myl_MaxSub_0xaa", "softmax_1"),
    layer("bmm2_1_myl0_4", "gemm", "sm80_xmma_gemm", "bmm2_1"),
]


def test_layers_of_both_schemas() -> None:
    old = parse_layers(text(MHA, Bindings=["image"]))
    new = parse_layers(
        text(layer("a", "gemm", "t", "n", key="Datatype"), **{"I/O Tensors": [{"Name": "image"}]})
    )
    assert (old[0].kind, old[0].precision, old[0].onnx_nodes) == (
        "kgen", "Half", ("bmm1_0", "softmax_0", "bmm2_0"),
    )  # fmt: skip
    assert new[0].precision == "Half"
    assert describe_layers(new)[0]["onnx_nodes"] == ["n"]
    (named,) = parse_layers(text("only a name"))
    assert (named.name, named.kind, named.onnx_nodes) == ("only a name", "", ())


def test_fused_attention_is_told_from_loose() -> None:
    fusion = attention_fusion(parse_layers(text(MHA, *LOOSE)), ATTENTIONS)
    assert fusion == AttentionFusion(2, 1, ("bmm1_1",))
    assert fusion.describe() == "attention: 1 of 2 fused; not fused: bmm1_1"


def test_a_layer_named_attention_is_not_thereby_fused() -> None:
    names = ["bmm1_0", "softmax_0", "scaled_dot_product_attention"]
    loose = parse_layers(text(*(layer(f"node_{n}", "gemm", "sm80_xmma_gemm", n) for n in names)))
    assert attention_fusion(loose, [names]).fused == 0


def test_without_metadata_kernels_are_counted() -> None:
    layers = parse_layers(text("_gemm_mha_v2_myl0_1", "conv", "_gemm_mha_v2_myl0_7"))
    assert attention_fusion(layers, ATTENTIONS) == AttentionFusion(2, 2, ())
    fusion = attention_fusion(layers, None)
    assert fusion.describe() == "attention: 2 of ? fused"


def test_one_opaque_layer_tells_nothing() -> None:
    opaque = {"Name": "{ForeignNode[conv...div]}", "LayerType": "Myelin"}
    fusion = attention_fusion(parse_layers(text(opaque)), ATTENTIONS)
    assert fusion.fused is None
    assert fusion.describe() == "attention: the engine does not tell how its 2 are computed"


@pytest.mark.parametrize("bad", ["", "[]", "{}", '{"Layers": [{}]}', '{"Layers": [3]}'])
def test_another_answer_is_an_error(bad: str) -> None:
    with pytest.raises(DimeFMError, match="engine inspector answers in a form that is not known"):
        parse_layers(bad)


def test_our_own_kernel_is_a_plugin_layer_not_a_layer_of_that_name() -> None:
    name = "blocks.0/fused_attention_qkv_12"
    assert EngineLayer(name, "PluginV3", "", "", ()).is_fused_attention
    assert not EngineLayer(f"{name}/MatMul", "gemm", "sm80_xmma", "", ()).is_fused_attention


def test_the_layers_of_a_builders_log() -> None:
    side = "{ Name: q, Dimensions: [-1,197,64], StrideOrder: [1,2,0], Datatype: Half, Format: (x) }"
    log = f"""Engine Layer Information:
Layers:
Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Outputs: []
Name: _gemm_mha_v2_myl0_9, LayerType: kgen, Inputs: [ {side}, {side}], Constants: [], \
Outputs: [ {side.replace("Half", "Int8")}], TacticName: _gemm_mha_v2_0xec, StreamId: 0, \
Metadata: [ONNX Layer: bmm1_0][ONNX Layer: softmax_0][ONNX Layer: bmm2_0]
Name: bmm1_1+x_myl0_2, LayerType: gemm, Inputs: [], Outputs: [ {side}], TacticName: t

Bindings:
image
"""
    layers = parse_layer_log(log)
    assert [(layer.name, layer.kind, layer.kernel, layer.precision) for layer in layers] == [
        ("__mye1_0_myl0_0", "shape_call", "", ""),
        ("_gemm_mha_v2_myl0_9", "kgen", "_gemm_mha_v2_0xec", "Int8"),
        ("bmm1_1+x_myl0_2", "gemm", "t", "Half"),
    ]
    assert kernels_by_kind(layers) == {"kgen": 1, "gemm": 1}
    assert attention_fusion(layers, ATTENTIONS) == AttentionFusion(2, 1, ("bmm1_1",))
    assert parse_layer_log("") == []
