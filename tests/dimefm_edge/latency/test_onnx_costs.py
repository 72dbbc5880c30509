"""Operators of ONNX graphs: counted by hand; junk is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.latency.onnx_costs import graph_costs, onnx_ops
from dimefm_edge.latency.operators import Operator, attention, product


def save_conv(path: Path, *, batch="N", side="H", groups=1):
    """A 3 x 3 convolution of 8 channels, padded, with a ReLU."""
    weight = numpy_helper.from_array(np.ones((8, 8 // groups, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], group=groups, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, side, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_onnx_kernels_of_a_graph_counted_by_hand(tmp_path):
    path = tmp_path / "conv.onnx"
    save_conv(path)
    (op,) = onnx_ops(path, batch=2, image_size=16)
    size = 2 * 8 * 16 * 16
    padded = size / 8 * 32 * 32 * 9
    assert op == Operator("Conv", "conv", size * 72, padded, 576, size, size, params=576)
    save_conv(path, groups=8, side=16)
    (op,) = onnx_ops(path)
    assert (op.kind, op.macs) == ("depthwise", 8 * 256 * 9)


@pytest.mark.parametrize(
    ("names", "shape"), [(("q", "k", "v"), (1, 10, 32)), (("qkv",), (1, 10, 4, 3, 8))]
)
def test_one_attention_node_counts_as_its_products_and_softmax(names, shape, tmp_path):
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain="com.microsoft", num_heads=4)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10, 32])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values, [output])
    path = tmp_path / "mha.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    (op,) = onnx_ops(path)
    assert op == attention("MultiHeadAttention", (1, 4, 10, 8), 10, 8, read=3 * 320, written=320)
    assert (op.kind, op.macs, op.scores) == ("attention", 2 * 320 * 10, 4 * 10 * 10)


def test_a_product_of_two_activations_fills_tiles(tmp_path):
    path = tmp_path / "product.onnx"
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    save_graph(path, nodes, (3, 17, 40))
    _, op = onnx_ops(path)
    assert op == product("MatMul", 40, read=2 * 3 * 17 * 40, written=(3, 17, 17))


def test_a_swish_of_two_nodes_is_one_activation(tmp_path):
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])
    path = tmp_path / "swish.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), path)
    assert [op.kind for op in onnx_ops(path)] == ["activation"]


def test_a_factor_and_the_class_token_alone_are_free(tmp_path):
    """As in trace.py, where one is taken in by the product before and the other is a view."""
    one, first, three = (
        numpy_helper.from_array(value, name)
        for name, value in (("one", np.float32(0.5)), ("first", np.int64(0)),
                            ("three", np.ones(3, np.float32)))
    )  # fmt: skip
    nodes = [
        helper.make_node("Mul", ["one", "x"], ["half"]),
        helper.make_node("Mul", ["half", "three"], ["scaled"]),
        helper.make_node("Gather", ["scaled", "first"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    path = tmp_path / "token.onnx"
    graph = helper.make_graph(nodes, "g", [x], [y], [one, first, three])
    onnx.save(helper.make_model(graph), path)
    assert [(op.kind, op.written) for op in onnx_ops(path)] == [("elementwise", 15.0)]


def test_products_of_one_input_are_one_kernel(tmp_path):
    weights = [numpy_helper.from_array(np.ones((3, 4), np.float32), name) for name in "qkv"]
    nodes = [helper.make_node("MatMul", ["x", w.name], [f"y{w.name}"]) for w in weights]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 3])
    outputs = [
        helper.make_tensor_value_info(f"y{w.name}", TensorProto.FLOAT, [5, 4]) for w in weights
    ]
    path = tmp_path / "qkv.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], outputs, weights)), path)
    (op,) = onnx_ops(path)
    assert op == Operator("MatMul", "linear", 180, 0, 36, 15, 60, params=36)


def save_graph(path: Path, nodes, shape=(4, 8), *, weights=(), others=()):
    """A graph from x to y; y's shape is left open. Domains beside ONNX's: my, com.microsoft."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid(*known) for known in (("", 18), ("my", 1), ("com.microsoft", 1))]
    graph = helper.make_graph(nodes, "g", [x, *others], [y], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)


def weight(name: str, *shape: int):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def branch(name: str):
    """A product inside an If."""
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("MatMul", ["x", "w"], [name])], name, [], [out])


def test_what_cannot_be_counted_is_named(tmp_path):
    path = tmp_path / "odd.onnx"
    nodes = [
        helper.make_node("BigConv", ["x", "w"], ["a"], domain="my"),
        helper.make_node("QAttention", ["x", "w"], ["b"], domain="com.microsoft"),
        helper.make_node("Det", ["x"], ["c"]),
        helper.make_node("MatMul", ["a", "w"], ["d"]),  # of a shape that nobody knows
        helper.make_node("Reshape", ["d", "sides"], ["e"]),
        helper.make_node("Relu", ["e"], ["y"]),
    ]
    sides = numpy_helper.from_array(np.array([4, 8]), "sides")
    save_graph(path, nodes, (8, 8), weights=[weight("w", 8, 8), sides])
    costs = graph_costs(path)
    assert costs.ops == []
    named = {"my.BigConv": 1, "com.microsoft.QAttention": 1, "Det": 1, "MatMul": 1}
    assert costs.uncounted == named


@pytest.mark.parametrize("by_shape", [False, True], ids=["input", "shape arithmetic"])
def test_a_branch_is_no_free_operator(by_shape, tmp_path):
    """Nor shape arithmetic, even where its condition is: what follows it counts."""
    path = tmp_path / "if.onnx"
    branches = {"then_branch": branch("a"), "else_branch": branch("b")}
    condition = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["c"], to=9),
    ]
    nodes = [
        *(condition if by_shape else ()),
        helper.make_node("If", ["c"], ["i"], **branches),
        helper.make_node("MatMul", ["i", "w"], ["y"]),
    ]  # fmt: skip
    others = () if by_shape else (helper.make_tensor_value_info("c", TensorProto.BOOL, []),)
    save_graph(path, nodes, weights=[weight("w", 8, 8)], others=others)
    costs = graph_costs(path)
    assert [op.macs for op in costs.ops] == [4 * 8 * 8]
    assert costs.uncounted == {"If": 1}


def test_shapes_are_known_past_the_attention_of_onnx_runtime(tmp_path):
    """onnx infers none there, and fp16 graphs of ours hold none: their products were free."""
    path = tmp_path / "half.onnx"
    nodes = [
        helper.make_node(
            "MultiHeadAttention", ["x", "x", "x"], ["a"], domain="com.microsoft", num_heads=2
        ),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    save_graph(path, nodes, (1, 4, 8), weights=[weight("w", 8, 8)])
    costs = graph_costs(path)
    assert [(op.kind, op.macs) for op in costs.ops] == [("attention", 256), ("linear", 256)]
    assert costs.uncounted == {}


def test_what_a_resize_scales_by_is_worked_out(tmp_path):
    """As in graphs of ours that take images of any size: what followed was free."""
    path = tmp_path / "resize.onnx"
    wanted = numpy_helper.from_array(np.array([1, 1, 4, 4], np.float32), "wanted")
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["wanted", "f"], ["scales"]),
        helper.make_node("Resize", ["x", "", "scales"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    save_graph(path, nodes, (1, 1, "H", "W"), weights=[weight("w", 4, 8), wanted])
    costs = graph_costs(path, image_size=16)
    assert [(op.kind, op.written, op.macs) for op in costs.ops] == [
        ("move", 16, 0),
        ("linear", 32, 4 * 4 * 8),
    ]
    assert costs.uncounted == {}


def test_what_no_graph_of_ours_has_to_say_is_not_said(tmp_path):
    """Views, casts, clamps, Q/DQ and shape arithmetic are known to be free."""
    path = tmp_path / "free.onnx"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one"], ["d"]),
        helper.make_node("Clip", ["d"], ["r"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ReduceProd", ["s"], ["n"], keepdims=1),
        helper.make_node("Reshape", ["r", "n"], ["f"]),
        helper.make_node("Cast", ["f"], ["y"], to=TensorProto.FLOAT),
    ]
    save_graph(path, nodes, weights=[weight("one")])
    costs = graph_costs(path)
    assert (costs.ops, costs.uncounted) == ([], {})
