"""Shapes of ONNX graphs: worked out to the end; what cannot be is refused, and junk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.errors import InputError
from dimefm_edge.latency.onnx_shapes import read_shapes


def save_product(path: Path, shape):
    """x, of that shape, times a matrix of 8 by 8."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    matrix = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [matrix])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_free_dimensions_are_the_batch_and_the_image_size(tmp_path):
    path = tmp_path / "free.onnx"
    save_product(path, ("N", 3, "H", 8))
    graph, shapes = read_shapes(path, batch=2, image_size=5)
    assert [node.op_type for node in graph.node] == ["MatMul"]
    assert shapes == {"x": (2, 3, 5, 8), "w": (8, 8), "y": (2, 3, 5, 8)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 7), "shapes do not fit: .*MatMul"),
        ((0, 8), "dimension 0 of input x is 0"),
        (None, "input x has no shape"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shape, message, tmp_path):
    save_product(tmp_path / "bad.onnx", shape)
    with pytest.raises(InputError, match=message):
        read_shapes(tmp_path / "bad.onnx")


def test_a_graph_without_input_is_refused(tmp_path):
    node = helper.make_node("Constant", [], ["y"], value_float=1.0)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    path = tmp_path / "alone.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [y])), path)
    with pytest.raises(InputError, match="takes no input"):
        read_shapes(path)


def test_bad_onnx_files_are_refused(tmp_path):
    path = tmp_path / "free.onnx"
    save_product(path, ("N", "H"))
    with pytest.raises(InputError, match=r"dimension 1 of input x has no fixed size") as caught:
        read_shapes(path)
    assert caught.value.hint == "--image-size PIXELS"
    with pytest.raises(InputError, match="no ONNX file at"):
        read_shapes(tmp_path / "missing.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="is not an ONNX file: it has no nodes"):
        read_shapes(tmp_path / "empty.onnx")


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_never_taken_for_onnx(junk, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "junk.onnx"
    path.write_bytes(junk)
    with pytest.raises(InputError, match=r"junk\.onnx"):
        read_shapes(path)


def test_sizes_that_hang_on_one_another_are_worked_out_to_the_end(tmp_path):
    """Each block's shape is arithmetic on the one before, which onnx itself does not follow."""
    nodes, last, blocks = [], "x", 9
    for i in range(blocks):
        nodes += [
            helper.make_node("Shape", [last], [f"s{i}"]),
            helper.make_node("Cast", [f"s{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            helper.make_node("Floor", [f"f{i}"], [f"g{i}"]),
            helper.make_node("Cast", [f"g{i}"], [f"h{i}"], to=TensorProto.INT64),
            helper.make_node("Reshape", [last, f"h{i}"], [f"r{i}"]),
            helper.make_node("MatMul", [f"r{i}", "w"], [f"y{i}"]),
        ]
        last = f"y{i}"
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8]),
        helper.make_tensor_value_info(last, TensorProto.FLOAT, None),
    ]
    weight = numpy_helper.from_array(np.zeros((8, 8), np.float32), "w")
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], [weight])
    path = tmp_path / "deep.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    _, shapes = read_shapes(path)
    assert [shapes[f"y{i}"] for i in range(blocks)] == [(1, 4, 8)] * blocks
