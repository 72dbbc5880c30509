"""Operators of ONNX graphs: counted by hand; junk is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.errors import InputError
from dimefm_edge.latency.onnx_costs import onnx_ops
from dimefm_edge.latency.operators import Operator


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


def test_one_attention_node_counts_as_its_products_and_softmax(tmp_path):
    names = ("q", "k", "v")
    node = helper.make_node("MultiHeadAttention", names, ["y"], domain="com.microsoft", num_heads=4)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 10, 32]) for n in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10, 32])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values, [output])
    path = tmp_path / "mha.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    (op,) = onnx_ops(path)
    assert (op.kind, op.macs, op.scores) == ("attention", 2 * 320 * 10, 4 * 10 * 10)


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


def test_bad_onnx_files_are_refused(tmp_path):
    path = tmp_path / "conv.onnx"
    save_conv(path)
    with pytest.raises(InputError, match=r"dimension 2 of input x has no fixed size") as caught:
        onnx_ops(path)
    assert caught.value.hint == "--image-size PIXELS"
    with pytest.raises(InputError, match="no ONNX file at"):
        onnx_ops(tmp_path / "missing.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="is not an ONNX file: it has no nodes"):
        onnx_ops(tmp_path / "empty.onnx")


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_never_taken_for_onnx(junk, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "junk.onnx"
    path.write_bytes(junk)
    with pytest.raises(InputError, match=r"junk\.onnx"):
        onnx_ops(path)
