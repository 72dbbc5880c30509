"""An ONNX graph as quantisation reads it: constants in one place, makers and readers by tensor.

Used by int8.py, patches.py, rows.py and weight_only.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with shapes, initializers for Constant nodes, and a name for each node."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    kept = []
    for index, node in enumerate(graph.node):
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
            continue
        node.name = node.name or f"{node.op_type}_{index}"
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return inferred


class GraphView:
    """A graph with who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Look at a graph that `prepared` gave; it may be changed afterwards."""
        self.proto = model.graph
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}

    def width(self, name: str) -> int:
        """Size of a tensor's last dimension; 0 if it is not known."""
        dims = self.shapes[name].dim if name in self.shapes else ()
        return int(dims[-1].dim_value) if dims else 0

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A constant's values."""
        from onnx.numpy_helper import to_array

        values: npt.NDArray[np.float32] = to_array(self.weights[name])
        return values

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None where there are more, or it is an answer."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def drop_unread_weights(graph: onnx.GraphProto) -> None:
    """Drop the initializers that no node reads and that are no answer."""
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
