"""Attention is found in every form: graphs that torch exports, and graphs made by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dimefm_edge.export.attention_patterns import (
    AttentionMatch,
    find_attentions,
    find_unmatched_softmaxes,
)
from dimefm_edge.export.fp16 import convert_to_fp16
from dimefm_edge.export.trace import trace
from dimefm_edge.students import build_student, hybrid_spec

SIDE = 32


def traced(module: torch.nn.Module, side: int, *, opset: int, attention: str) -> onnx.ModelProto:
    return trace(
        module, torch.zeros(2, 3, side, side), input_name="image", output_name="image_embeds",
        opset=opset, attention=attention,
    )  # fmt: skip


def our_hybrid() -> nn.Module:
    return build_student(
        hybrid_spec(image_size=2 * SIDE, embed_dim=48, width=16, depth=(1, 1, 1, 1))
    )


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=SIDE, num_classes=0)


def open_clip_vit() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=SIDE, patch_size=8, width=64, layers=2, heads=2, mlp_ratio=2, output_dim=48
    )


def open_clip_pooling() -> nn.Module:
    """How open_clip's ResNets end: one query, all keys."""
    from open_clip.modified_resnet import AttentionPool2d

    return nn.Sequential(nn.Conv2d(3, 64, 16, stride=16), AttentionPool2d(2, 64, 4, 48))


# Model -> (side, attentions, heads, tokens, head_dim).
EXPORTED: dict[Callable[[], nn.Module], tuple[int, int, int, int, int]] = {
    our_hybrid: (2 * SIDE, 1, 4, 16, 32),
    timm_vit: (SIDE, 2, 3, 5, 64),
    open_clip_vit: (SIDE, 2, 2, 17, 32),
    open_clip_pooling: (SIDE, 1, 4, 5, 16),
}


def sizes(match: AttentionMatch) -> tuple[int | None, int | None, int | None]:
    return match.num_heads, match.num_tokens, match.head_dim


@pytest.mark.parametrize("build", EXPORTED, ids=lambda build: build.__name__)
def test_every_attention_of_an_exported_model_is_found(build: Callable[[], nn.Module]) -> None:
    side, count, *expected = EXPORTED[build]
    torch.manual_seed(0)
    model = traced(build().eval(), side, opset=20, attention="decomposed")
    for graph in (model, convert_to_fp16(model)):  # the latter with casts around each softmax
        matches = find_attentions(graph)
        assert [m.form for m in matches] == ["decomposed"] * count
        assert [sizes(m) for m in matches] == [tuple(expected)] * count
        assert not any(m.is_int8 or m.has_qdq_before_bmm1 for m in matches)
        assert find_unmatched_softmaxes(graph) == []
        kinds = {node.name: node.op_type for node in graph.graph.node}
        for match in matches:
            ops = [kinds[name] for name in match.nodes]
            assert ops.count("MatMul") == 2
            assert ops.count("Softmax") == 1
            assert "Mul" not in ops  # the scale is in the projection


def test_opset_23_has_attention_as_one_node() -> None:
    model = traced(our_hybrid().eval(), 2 * SIDE, opset=23, attention="Attention")
    (match,) = find_attentions(model)
    assert (match.form, sizes(match)) == ("onnx", (4, 16, 32))
    assert find_unmatched_softmaxes(model) == []


# ------------------------------------------------------------------------ made by hand


def value(name: str, *shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: str,
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 20,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_empty_tensor_value_info(output)],
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    domain = attributes.pop("domain", "")
    return helper.make_node(
        op, inputs.split(), [output], name=f"{op}_{output}", domain=str(domain), **attributes
    )


def qdq(name: str) -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", f"{name} s z", f"{name}_q"),
        node("DequantizeLinear", f"{name}_q s z", f"{name}_dq"),
    ]


QKV = [value("q", "b", 2, 9, 32), value("kt", "b", 2, 32, 9), value("v", "b", 2, 9, 32)]
SCALES = {"s": np.float32(0.1), "z": np.int8(0), "scale": np.float32(0.2)}


def int8_attention(*, left_out: str = "") -> onnx.ModelProto:
    """Q/DQ on everything that TensorRT's fused int8 attention reads, but what is left out."""
    nodes: list[onnx.NodeProto] = []

    def quantised(name: str) -> str:
        if name == left_out:
            return name
        nodes.extend(qdq(name))
        return f"{name}_dq"

    nodes.append(node("MatMul", f"{quantised('q')} {quantised('kt')}", "scores"))
    nodes.append(node("Mul", "scores scale", "scaled"))
    nodes.append(node("Softmax", "scaled", "p"))
    nodes.append(node("MatMul", f"{quantised('p')} {quantised('v')}", "o"))
    out = quantised("o")
    nodes.append(node("Relu", out, "y"))
    return model_of(nodes, QKV, "y", SCALES)


def test_qdq_of_int8_attention_is_seen() -> None:
    (match,) = find_attentions(int8_attention())
    assert match.is_int8
    assert sizes(match) == (2, 9, 32)


@pytest.mark.parametrize(
    ("left_out", "before", "after", "around"),
    [
        ("q", False, True, True),
        ("kt", False, True, True),
        ("p", True, False, False),
        ("v", True, True, False),
        ("o", True, True, False),
    ],
)
def test_a_missing_qdq_is_seen(left_out: str, before: bool, after: bool, around: bool) -> None:
    (match,) = find_attentions(int8_attention(left_out=left_out))
    assert not match.is_int8
    found = (match.has_qdq_before_bmm1, match.has_qdq_after_softmax, match.has_qdq_around_bmm2)
    assert found == (before, after, around)


@pytest.mark.parametrize("scale", ["before", "Mul", "Div", "mask", "none"])
def test_scale_and_mask_before_or_after_the_product(scale: str) -> None:
    steps = {
        "before": [node("Mul", "q scale", "qs"), node("MatMul", "qs kt", "s1")],
        "Mul": [node("MatMul", "q kt", "s0"), node("Mul", "s0 scale", "s1")],
        "Div": [node("MatMul", "q kt", "s0"), node("Div", "s0 scale", "s1")],
        "mask": [node("MatMul", "q kt", "s0"), node("Mul", "s0 scale", "sm"),
                 node("Add", "sm mask", "s1")],
        "none": [node("MatMul", "q kt", "s1")],
    }[scale]  # fmt: skip
    nodes = [*steps, node("Softmax", "s1", "p"), node("MatMul", "p v", "o")]
    constants = {**SCALES, "mask": np.zeros((9, 9), np.float32)}
    (match,) = find_attentions(model_of(nodes, QKV, "o", constants))
    assert sizes(match) == (2, 9, 32)
    assert match.nodes == tuple(n.name for n in nodes)


def test_three_dimensions_and_a_guard_against_rows_masked_whole() -> None:
    nodes = [
        node("Reshape", "x split", "r"),  # (9, b, 64) -> (9, b * 2, 32)
        node("Transpose", "r", "v", perm=[1, 0, 2]),
        node("Transpose", "r", "kt", perm=[1, 2, 0]),
        node("MatMul", "v kt", "s1"),
        node("Softmax", "s1", "p"),
        node("IsNaN", "p", "n"),
        node("Where", "n zero p", "g"),
        node("MatMul", "g v", "o"),
    ]
    constants = {"split": np.int64([9, -1, 32]), "zero": np.float32(0)}
    (match,) = find_attentions(model_of(nodes, [value("x", 9, "b", 64)], "o", constants))
    assert sizes(match) == (2, 9, 32)


def test_sizes_that_the_graph_does_not_tell_are_none() -> None:
    nodes = [node("MatMul", "q kt", "s1"), node("Softmax", "s1", "p"), node("MatMul", "p v", "o")]
    free = [value(name, "b", "h", "n", "d") for name in ("q", "kt", "v")]
    (match,) = find_attentions(model_of(nodes, free, "o"))
    assert sizes(match) == (None, None, None)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", "q w", "s1"), node("Softmax", "s1", "p")],
        [node("MatMul", "q kt", "s1"), node("Softmax", "s1", "p"), node("Mul", "p p", "o")],
        [node("Softmax", "q", "p"), node("MatMul", "p kt", "o")],
        # A classifier's head and a gate: the product is of weights.
        [node("MatMul", "q w", "s1"), node("Softmax", "s1", "p"), node("MatMul", "p v2", "o")],
    ],
)
def test_a_softmax_of_something_else_is_reported(nodes: list[onnx.NodeProto]) -> None:
    constants = {"w": np.ones((32, 9), np.float32)}
    inputs = [*QKV, value("v2", "b", 2, 9, 32)]
    model = model_of(nodes, inputs, nodes[-1].output[0], constants)
    assert find_attentions(model) == []
    assert find_unmatched_softmaxes(model) == ["Softmax_p"]


def test_attention_of_onnx() -> None:
    nodes = [
        *qdq("q"),
        *qdq("k"),
        node("Attention", "q_dq k_dq v", "o", q_num_heads=4, kv_num_heads=4),
    ]
    inputs = [value(name, "b", 17, 128) for name in ("q", "k", "v")]
    (match,) = find_attentions(model_of(nodes, inputs, "o", SCALES, opset=23))
    assert (match.form, sizes(match)) == ("onnx", (4, 17, 32))
    assert match.has_qdq_before_bmm1
    heads_first = [value(name, "b", 4, 17, 32) for name in ("q", "k", "v")]
    (match,) = find_attentions(
        model_of([node("Attention", "q k v", "o")], heads_first, "o", opset=23)
    )
    assert sizes(match) == (4, 17, 32)


def test_attention_of_onnx_runtime() -> None:
    """Two layers: what onnx cannot infer between them is no obstacle."""
    multi = {"num_heads": 4, "domain": "com.microsoft"}
    nodes = [
        node("MultiHeadAttention", "x x x", "a", **multi),
        node("MatMul", "a w", "b"),
        node("Attention", "b w3 bias", "c", **multi),
        node("FastGelu", "c", "d", domain="com.microsoft"),
        node("MultiHeadAttention", "d d d", "e", **multi),
        node("MultiHeadAttention", "packed", "f", **multi),
    ]
    constants = {
        "w": np.ones((128, 128), np.float32),
        "w3": np.ones((128, 384), np.float32),
        "bias": np.ones(384, np.float32),
    }
    inputs = [value("x", "batch", 17, 128), value("packed", "batch", 50, 4, 3, 64)]
    matches = find_attentions(model_of(nodes, inputs, "f", constants))
    assert [m.form for m in matches] == ["microsoft"] * 4
    assert [sizes(m) for m in matches] == [(4, 17, 32)] * 3 + [(4, 50, 64)]
