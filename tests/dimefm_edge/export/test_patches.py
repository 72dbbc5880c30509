"""Patch embeddings as products: what is one, what is none, and that the answers stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.export.patches import patches_as_products
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import build_student, vit_spec
from tests.dimefm_edge.export.int8_case import hand_made

WIDTH, CHANNELS = 5, 3


def embedding(
    *, patch: int = 4, sides: tuple[int, int] = (8, 12), perm: Sequence[int] = (0, 2, 1),
    target: Sequence[int] | None = None, kernel: tuple[int, int] | None = None,
    has_bias: bool = True, has_other_reader: bool = False, groups: int = 1, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A patch embedding of (B, 3, 8, 12), or something near to one."""
    rng = np.random.default_rng(0)
    rows, columns = (side // patch for side in sides)
    weights = {
        "w": rng.normal(size=(WIDTH, CHANNELS // groups, *(kernel or (patch, patch)))),
        "b": rng.normal(size=WIDTH),
    }
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    weights["shape"] = np.array(target or [-1, WIDTH, rows * columns], np.int64)
    inputs = ["image", "w", "b"] if has_bias else ["image", "w"]
    attributes = {"strides": [patch, patch], "group": groups, **attributes}
    last = "tokens" if has_other_reader else "image_embeds"
    nodes = [
        helper.make_node("Conv", inputs, ["map"], name="conv", **attributes),
        helper.make_node("Reshape", ["map", "shape"], ["flat"], name="flatten"),
        helper.make_node("Transpose", ["flat"], [last], name="swap", perm=list(perm)),
    ]
    if has_other_reader:
        nodes += [
            helper.make_node("ReduceSum", ["map"], ["sum"], name="sum", keepdims=0),
            helper.make_node("Add", ["tokens", "sum"], ["image_embeds"], name="add"),
        ]
    if not has_bias:
        del weights["b"]
    flat = list(target or [-1, WIDTH, rows * columns])
    out = ["B", *(flat[axis] for axis in perm[1:])]
    return hand_made(nodes, weights, shape=["B", CHANNELS, *sides], out=out)


def answers(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"image": image})
    return found


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("attributes", [{}, {"pads": [0] * 4, "dilations": [1, 1]}])
def test_a_patch_embedding_becomes_a_product(has_bias: bool, attributes: dict[str, Any]) -> None:
    model = embedding(has_bias=has_bias, **attributes)
    image = np.random.default_rng(1).normal(size=(3, CHANNELS, 8, 12)).astype(np.float32)
    wanted = answers(model, image)
    assert patches_as_products(model) == 1
    ops = [node.op_type for node in model.graph.node]
    assert ops == ["Reshape", "Transpose", "Reshape", "MatMul", *(["Add"] if has_bias else [])]
    onnx.checker.check_model(model, full_check=True)
    assert "w" not in [tensor.name for tensor in model.graph.initializer]
    for batch in (1, 3):
        np.testing.assert_allclose(answers(model, image[:batch]), wanted[:batch], atol=1e-5)
    assert patches_as_products(model) == 0  # there is none left


@pytest.mark.parametrize(
    "near",
    [
        {"strides": [2, 2]},  # windows overlap
        {"pads": [1, 1, 1, 1]},
        {"dilations": [2, 2]},
        {"perm": (0, 1, 2)},  # not made into tokens
        {"sides": (8, 13)},  # the last column would be cut
        {"patch": 1},  # a 1 x 1 convolution
        {"kernel": (4, 2)},
        {"target": [-1, 6, 5]},  # mixes channels and places
        {"has_other_reader": True},
        {"groups": 3, "has_bias": False},
    ],
    ids=lambda near: next(iter(near)),
)
def test_what_only_looks_like_one_stays(near: dict[str, Any]) -> None:
    model = embedding(**near)
    before = model.SerializeToString(deterministic=True)
    assert patches_as_products(model) == 0
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("spec", "convs"),
    [
        (GraphSpec(runtime="onnxruntime", attention="MultiHeadAttention"), 0),
        (GraphSpec(runtime="onnxruntime", attention="decomposed", batch_size=2), 0),
        (GraphSpec(), 1),  # TensorRT
        (GraphSpec(runtime="onnxruntime", attention="decomposed", precision="fp16"), 1),
        (GraphSpec(runtime="onnxruntime", attention="decomposed", providers=("qnn", "cpu")), 1),
    ],
)
def test_only_graphs_for_a_cpu_in_fp32_have_it(spec: GraphSpec, convs: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    student = build_student(
        vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=1, num_heads=1)
    ).eval()
    images = preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(32))
    graph = export_onnx(
        student, tmp_path / "m.onnx", image_size=32, spec=spec, parity_images=images, metadata={}
    )
    assert graph.op_counts.get("Conv", 0) == convs
    assert graph.parity.min_cosine > 0.9999
