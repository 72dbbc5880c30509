"""Who makes and who reads each tensor of a graph."""

from __future__ import annotations

import numpy as np
from onnx import helper, numpy_helper

from dimefm_edge.export.graph_view import GraphView, prepared
from tests.dimefm_edge.export.int8_case import hand_made


def view() -> GraphView:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(values))
    nodes = [
        constant,
        helper.make_node("MatMul", ["image", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Add", ["z", "z"], ["image_embeds"]),
    ]
    return GraphView(prepared(hand_made(nodes, {}, shape=["B", 2], out=["B", 3])))


def test_constants_are_weights_and_nodes_have_names():
    graph = view()
    assert [node.op_type for node in graph.proto.node] == ["MatMul", "Relu", "Add"]
    assert all(node.name for node in graph.proto.node)
    np.testing.assert_array_equal(graph.array("w"), [[0, 1, 2], [3, 4, 5]])


def test_makers_readers_and_widths():
    graph = view()
    assert graph.producers["y"].op_type == "MatMul"
    assert graph.only_reader("y").op_type == "Relu"
    assert graph.only_reader("image_embeds") is None
    assert graph.width("y") == 3
    assert graph.width("nothing") == 0
