"""What an ONNX graph does for one batch, as a list of kernels, after shape inference.

The same rules as trace.py: pointwise nodes join the kernel before them, two matmuls of
activations with a softmax between are one attention, views are free.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from dimefm_edge.errors import InputError, MissingExtraError
from dimefm_edge.latency.estimate import FLOAT_BYTES, OpCost

_MOVES_MEMORY = {
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization",
    "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "Concat",
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Pad", "Gather",
    "LpNormalization",
}  # fmt: skip
_FREE = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "Shape",
    "Constant", "ConstantOfShape", "Slice", "Split", "Range", "Dropout", "Size",
}  # fmt: skip
_KEEPS_CONSTANT = _FREE | {"DequantizeLinear", "QuantizeLinear", "Cast"}
_MATMULS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "FusedMatMul": 1}
_CONVS = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}


def onnx_ops(path: Path, *, batch: int = 1, image_size: int | None = None) -> list[OpCost]:
    """List the kernels of one run of an ONNX file.

    Args:
        path: The file; weights beside it are not read.
        batch: Taken where the first dimension of an input is free.
        image_size: Taken where its other dimensions are free, in pixels.

    Raises:
        InputError: If the file is missing or not ONNX, or an input's shape stays unknown.
        MissingExtraError: If the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "estimating an ONNX file needs the onnx package",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no nodes")
    except FileNotFoundError as error:
        raise InputError(f"no ONNX file at {path}") from error
    except Exception as error:  # protobuf's DecodeError is not exported by name
        raise InputError(f"{path} is not an ONNX file: {error}") from error
    free = _fix_inputs(model, batch=batch, image_size=image_size, path=path)
    known = _shapes(model.graph, free, batch)
    del model.graph.value_info[:]
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        raise InputError(f"{path}: shapes cannot be inferred: {error}") from error
    known |= {k: v for k, v in _shapes(model.graph, {}, None).items() if k not in known or v}
    return _Walk(model.graph, known).ops


def _fix_inputs(model: Any, *, batch: int, image_size: int | None, path: Path) -> dict[str, int]:
    """Give every input a size; returns what each free dimension was set to."""
    free: dict[str, int] = {}
    weights = {w.name for w in model.graph.initializer}
    for value in model.graph.input:
        if value.name in weights:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0 and not (axis == 0 and batch > 1):
                continue
            size = batch if axis == 0 else image_size
            if size is None:
                raise InputError(
                    f"{path}: dimension {axis} of input {value.name} has no fixed size",
                    hint="--image-size PIXELS",
                )
            if dim.dim_param:
                free[dim.dim_param] = size
            dim.dim_value = size
    return free


def _shapes(graph: Any, free: dict[str, int], batch: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes by value name; free dimensions by name, else left out unless `batch` is given."""
    shapes = {w.name: tuple(w.dims) for w in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if not value.type.tensor_type.HasField("shape"):
            continue
        dims = [
            d.dim_value if d.HasField("dim_value") else free.get(d.dim_param, batch)
            for d in value.type.tensor_type.shape.dim
        ]
        if None not in dims:
            shapes[value.name] = tuple(int(d) for d in dims if d is not None)
    return shapes


class _Walk:
    """Turns nodes into kernels, in the graph's order."""

    def __init__(self, graph: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.constants = {w.name for w in graph.initializer}
        self.sizes: set[str] = set()  # values that are arithmetic on shapes
        self.counted: set[str] = set()
        self.ops: list[OpCost] = []
        self.scores_idx: int | None = None  # a softmax: the kernel that it follows
        for node in graph.node:
            self._visit(node)

    def _visit(self, node: Any) -> None:
        kind, inputs = node.op_type, [name for name in node.input if name]
        if all(name in self.constants for name in inputs):
            if kind in _KEEPS_CONSTANT or not inputs:
                self.constants.update(node.output)
            return
        if kind in ("Shape", "Size") or all(i in self.constants | self.sizes for i in inputs):
            self.sizes.update(node.output)
            return
        if kind in _FREE:
            return
        params = self._new_params(inputs)
        moved = self._bytes(*inputs, node.output[0])
        if kind in _MATMULS:
            self._matmul(node, moved, params)
        elif kind in _CONVS:
            weight = self.shapes.get(node.input[_CONVS[kind]], (1, 1))
            flops = 2.0 * self._numel(node.output[0]) * math.prod(weight[1:])
            is_depthwise = weight[1] == 1 and weight[0] > 1
            self._add(kind, flops, moved, "depthwise" if is_depthwise else "dense", params)
        elif kind == "Attention":
            query, key = (self.shapes.get(name, (1, 1, 1)) for name in node.input[:2])
            flops = 4.0 * math.prod(query) * key[-2]
            self._add(kind, flops, moved, "attention", params)
        elif kind == "Softmax" and self.ops and self.ops[-1].kind == "attention":
            self.scores_idx = len(self.ops) - 1
            scores_bytes = self._bytes(node.output[0])  # they stay on the chip
            self.ops[-1] = replace(self.ops[-1], bytes=self.ops[-1].bytes - scores_bytes)
        elif kind in _MOVES_MEMORY or not self.ops:
            self._add(kind, 0.0, moved, "memory", params)
        else:
            extra = sum(sorted(self._bytes(name) for name in inputs)[:-1])
            self.ops[-1] = self.ops[-1].with_epilogue(kind, extra, params)

    def _matmul(self, node: Any, moved: float, params: int) -> None:
        right = node.input[_MATMULS[node.op_type]]
        inner = self.shapes.get(node.input[0], (1,))
        is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
        depth = inner[0] if is_transposed else inner[-1]
        flops = 2.0 * self._numel(node.output[0]) * depth
        if right in self.constants or node.input[0] in self.constants:
            self._add(node.op_type, flops, moved, "dense", params)
        elif self.scores_idx is None:
            self._add("Attention", flops, moved, "attention", params)
        else:
            first = self.ops[self.scores_idx]
            moved = first.bytes + self._bytes(right, node.output[0])
            self.ops[self.scores_idx] = OpCost(
                first.name, first.flops + flops, moved, "attention", first.params + params
            )
            self.scores_idx = None

    def _add(self, name: str, flops: float, moved: float, kind: str, params: int) -> None:
        self.ops.append(OpCost(name, flops, moved, kind, params))

    def _new_params(self, inputs: list[str]) -> int:
        fresh = {i for i in inputs if i in self.constants and i not in self.counted}
        self.counted |= fresh
        return sum(self._numel(name) for name in fresh)

    def _numel(self, name: str) -> int:
        return math.prod(self.shapes.get(name, (0,)))

    def _bytes(self, *names: str) -> float:
        return float(FLOAT_BYTES * sum(self._numel(name) for name in names))
