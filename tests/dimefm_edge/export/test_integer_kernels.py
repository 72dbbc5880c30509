"""What ran in integers, by ONNX Runtime's own profile; and what did not, by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.integer_kernels import count_integer_kernels
from dimefm_edge.export.quant_rules import QUANT_RULES
from tests.dimefm_edge.export.int8_case import family_graph, hand_made, scenes

X86 = ("onnxruntime-x86", "onnxruntime-x86-avx2")


@pytest.mark.parametrize("name", X86)
@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("vit", {"MatMulIntegerToFloat": 8, "QGemm": 1}),
        ("open_clip_resnet", {"MatMulIntegerToFloat": 3, "QGemm": 1, "QLinearConv": 18}),
    ],
)
def test_every_quantised_product_runs_in_integers(family, kinds, name, tmp_path):
    model = quantize_graph(family_graph(family), scenes(4), rules=QUANT_RULES[name])
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert found.fallen_back == ()
    assert found.counts == kinds
    assert found.num_integer == sum(kinds.values())
    products = [n for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    assert found.num_integer + len(found.left_float) == len(products)
    assert set(found.left_float) <= {node.name for node in products}


def test_a_float_graph_has_none(tmp_path):
    onnx.save(family_graph("vit"), str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert (found.counts, found.fallen_back, found.num_integer) == ({}, (), 0)
    assert len(found.left_float) == 14


def test_what_falls_back_is_named(tmp_path):
    """A Gemm whose bias is float has no integer kernel, Q/DQ or not; nor has a lonely Conv."""
    nodes = [
        helper.make_node("Gemm", ["image", "w", "b"], ["x"], "first"),
        helper.make_node("Gemm", ["x", "w", "b"], ["image_embeds"], "second"),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 8)).astype(np.float32), "b": np.ones(8, np.float32)}
    model = hand_made(nodes, weights, shape=["B", 8], out=["B", 8])
    rows = rng.normal(size=(16, 8)).astype(np.float32)
    model = quantize_graph(model, rows, rules=QUANT_RULES["onnxruntime-x86-avx2"])
    second = next(node for node in model.graph.node if node.name == "second")
    second.input[2] = "float_bias"
    model.graph.initializer.append(numpy_helper.from_array(weights["b"], "float_bias"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", rows[:1])
    assert found.counts == {"QGemm": 1}
    assert found.fallen_back == ("second",)
