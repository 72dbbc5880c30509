"""What ran in integers, by ONNX Runtime's own profile; and what did not, by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.integer_kernels import (
    IntegerKernels,
    count_integer_kernels,
    quantized_products,
)
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.runtime.onnxruntime import load_session
from tests.dimefm_edge.export.int8_case import cosines, family_graph, hand_made, run, scenes

X86 = ("onnxruntime-x86", "onnxruntime-x86-avx2")


def products(model: onnx.ModelProto) -> list[str]:
    return [n.name for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]


@pytest.mark.parametrize("name", X86)
def test_every_quantised_product_of_a_vit_runs_in_integers(name, tmp_path):
    model = quantize_graph(family_graph("vit"), scenes(4), rules=QUANT_RULES[name])
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert found.fallen_back == ()
    assert found.counts == {"MatMulIntegerToFloat": 12, "QGemm": 1}
    assert found.num_integer == 13
    assert len(found.left_float) == 5  # the stem, and both products of two attentions
    assert set(found.left_float) < set(products(model))


@pytest.mark.parametrize("name", X86)
def test_convolutions_with_and_without_what_follows(name, tmp_path):
    """A Relu, a residual Add, a GELU: the convolution before them is an integer kernel.

    Weights of their own: ONNX Runtime 1.32 cannot load s8 weights that two nodes share where
    session.x64quantprecision is set.
    """
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], "stem", pads=[1] * 4),
        helper.make_node("Conv", ["a", "w1", "b1"], ["b"], "before_relu", pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "w2", "b1"], ["d"], "before_add", pads=[1] * 4),
        helper.make_node("Add", ["a", "d"], ["e"]),
        helper.make_node("Conv", ["e", "w3"], ["f"], "before_gelu", pads=[1] * 4),
        helper.make_node("Gelu", ["f"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["image_embeds"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), **dict.fromkeys(("w1", "w2", "w3"), (8, 8, 3, 3)), "b1": (8,)}
    weights = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    model = hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 8])
    model = quantize_graph(model, scenes(4), rules=QUANT_RULES[name])
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert found == IntegerKernels({"QLinearConv": 3}, (), ("stem",))


def test_what_the_rules_leave_in_float_is_not_quantised_by_the_runtime(tmp_path):
    """ONNX Runtime by itself rounds such weights, with one scale for all of them."""
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], "stem"),
        helper.make_node("Conv", ["a", "w1", "b"], ["c"], "first"),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "w2", "b"], ["e"], "depthwise", group=8),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("Conv", ["f", "w3"], ["g"], "last"),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["image_embeds"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 1, 1), "w1": (8, 8, 1, 1), "w2": (8, 1, 1, 1), "w3": (8, 8, 1, 1),
              "b": (8,)}  # fmt: skip
    weights = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    weights["w2"] = np.abs(weights["w2"])
    weights["w2"][0] *= 300  # one scale for all would round the others to nothing
    weights["w3"][:, 0] /= 300
    plain = hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 8])
    model = quantize_graph(plain, scenes(4), rules=QUANT_RULES["onnxruntime-x86"])
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert found == IntegerKernels({"QLinearConv": 2}, (), ("stem", "depthwise"))
    session = load_session(tmp_path / "model.onnx", 1, precision="int8")
    ran = session.run(None, {"image": scenes(4)})[0]
    assert cosines(ran, run(model, scenes(4), is_simulated=True)).min() > 0.999


def test_a_float_graph_has_none(tmp_path):
    onnx.save(family_graph("vit"), str(tmp_path / "model.onnx"))
    found = count_integer_kernels(tmp_path / "model.onnx", scenes(1))
    assert (found.counts, found.fallen_back, found.num_integer) == ({}, (), 0)
    assert len(found.left_float) == 18


def test_what_falls_back_is_named(tmp_path):
    """A Gemm whose bias is float has no integer kernel, Q/DQ or not."""
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
    assert str(found) == (
        "products in integers: 1 (1 QGemm); left in float: 0; fell back to float: 1 (second)"
    )


def test_what_is_left_in_float_is_told_by_kind():
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], "stem"),
        helper.make_node("Conv", ["a", "w1"], ["b"], "depthwise", group=8),
        helper.make_node("Sqrt", ["w2"], ["computed"]),
        helper.make_node("Conv", ["b", "computed"], ["c"], "standardised"),
        helper.make_node("MatMul", ["c", "c"], ["d"], "pair"),
        helper.make_node("Conv", ["d", "w2"], ["e"], "wide"),
        helper.make_node("GlobalAveragePool", ["e"], ["g"]),
        helper.make_node("Flatten", ["g"], ["image_embeds"]),
    ]
    weights = {
        name: np.ones(shape, np.float32)
        for name, shape in {"w0": (8, 3, 1, 1), "w1": (8, 1, 1, 1), "w2": (8, 8, 1, 1)}.items()
    }
    model = hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 8])
    found = quantized_products(model)
    assert (found.quantized, found.left_float["wide"]) == ((), "of other kinds")
    assert str(found) == (
        "0 of 5 products quantised; left in float: 1 on the image, 1 depthwise, 1 of computed "
        "weights, 1 of two activations, 1 of other kinds (wide)"
    )
    rules = QUANT_RULES["onnxruntime-x86"]
    found = quantized_products(quantize_graph(model, scenes(2), rules=rules))
    assert found.quantized == ("wide",)
