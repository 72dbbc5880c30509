"""What an ONNX graph does for one batch, as a list of operators, after shape inference.

The same list as trace.py makes of the module: see operators.py. Operators that nothing is known
of, and those with a graph inside (If, Loop, Scan), are in no list: `graph_costs` names them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dimefm_edge.latency.onnx_shapes import ATTENTIONS, DOMAINS, read_shapes
from dimefm_edge.latency.operators import Operator, attention, convolution, product

_log = logging.getLogger(__name__)

_KINDS = {
    "elementwise": {
        "Add", "Mul", "Sub", "Div", "Pow", "Sqrt", "Exp", "Where", "Neg", "Abs", "Reciprocal",
        "ReduceL2", "LpNormalization", "Max", "Min", "Sum", "Mean", "Log", "Sin", "Cos", "Sign",
        "Floor", "Ceil", "Round", "Mod", "Not", "And", "Or", "Xor", "IsNaN", "IsInf", "Equal",
        "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Trilu", "QLinearAdd", "QLinearMul",
    },
    "activation": {
        "QuickGelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Elu", "LeakyRelu",
        "Mish", "Softplus", "PRelu", "Celu", "Selu", "Softsign", "Swish",
        "ThresholdedRelu", "QLinearSigmoid", "QLinearLeakyRelu",
    },
    "gelu": {"Gelu", "FastGelu", "BiasGelu", "Erf"},
    "norm": {
        "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization",
        "SkipLayerNormalization", "SimplifiedLayerNormalization", "LRN",
    },
    "softmax": {"Softmax", "LogSoftmax", "QLinearSoftmax"},
    "mean": {
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1",
        "ReduceSumSquare", "ReduceLogSumExp", "ArgMax", "ArgMin", "GlobalAveragePool",
        "GlobalMaxPool", "QLinearGlobalAveragePool",
    },
    "pool": {"MaxPool", "AveragePool", "LpPool", "QLinearAveragePool"},
    "move": {
        "Concat", "Resize", "Upsample", "Pad", "Gather", "GatherND", "GatherElements", "ScatterND",
        "GatherBlockQuantized", "Tile", "DepthToSpace", "SpaceToDepth", "QLinearConcat",
    },
    "permute": {"Transpose"},
    "batch_norm": {"BatchNormalization"},
}  # fmt: skip
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}
_FREE = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Identity", "Shape",
    "Constant", "ConstantOfShape", "Slice", "Split", "Range", "Dropout", "Size",
}  # fmt: skip
_FUSED = {
    "Relu", "Clip", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear",
    "DynamicQuantizeLinear",
}  # fmt: skip
"""What runtimes do on the way, with the operator beside it."""
_KEEPS_CONSTANT = _FREE | {"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose"}
_MATMULS = {
    "MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "FusedMatMul": 1, "QGemm": 3,
    "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "MatMulNBits": 1,
}  # fmt: skip
_CONVS = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}
_COUNTED = {*_KIND, *_MATMULS, *_CONVS, *ATTENTIONS}


@dataclass(frozen=True)
class GraphCosts:
    """What one run of a graph does, and what of it cannot be told."""

    ops: list[Operator]
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """Nodes by operator: of unknown kind, with a graph inside, or of unknown shapes."""

    def warn(self, path: Path | str) -> None:
        """Tell that an estimate is too low, if it is."""
        if self.uncounted:
            named = ", ".join(f"{name} ({count})" for name, count in self.uncounted.items())
            _log.warning(
                "%s: what these operators cost cannot be told, so the estimate is too low: %s",
                path, named,
            )  # fmt: skip


def onnx_ops(path: Path, *, batch: int = 1, image_size: int | None = None) -> list[Operator]:
    """List the operators of one run of an ONNX file: `graph_costs` without what is uncounted."""
    return graph_costs(path, batch=batch, image_size=image_size).ops


def graph_costs(path: Path, *, batch: int = 1, image_size: int | None = None) -> GraphCosts:
    """List the operators of one run of an ONNX file, and what of it is in no list.

    Args:
        path: The file; weights beside it are not read.
        batch: Taken where the first dimension of an input is free.
        image_size: Taken where its other dimensions are free, in pixels.

    Raises:
        InputError: If the file is missing or not ONNX, has no input or one whose shape stays
            unknown or is empty, or if shapes do not fit one another.
        MissingExtraError: If the onnx package is not installed.
    """
    graph, shapes = read_shapes(path, batch=batch, image_size=image_size)
    walk = _Walk(graph, shapes)
    return GraphCosts(walk.ops, dict(walk.uncounted))


class _Walk:
    """Turns nodes into operators, in the graph's order."""

    def __init__(self, graph: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.constants = {w.name for w in graph.initializer}
        self.sizes: set[str] = set()  # values that are arithmetic on shapes
        self.counted: set[str] = set()
        self.gates: dict[str, str] = {}  # sigmoids, and what they were taken of
        self.products: set[str] = set()  # what a bias may be added to, for nothing
        self.linears: dict[str, int] = {}  # inputs of products with a weight, and their places
        self.ops: list[Operator] = []
        self.uncounted: Counter[str] = Counter()
        for node in graph.node:
            self._visit(node)

    def _visit(self, node: Any) -> None:
        kind, inputs = node.op_type, [name for name in node.input if name]
        has_graph = any(a.HasField("g") or a.graphs for a in node.attribute)
        if has_graph or node.domain not in DOMAINS:
            self._leave_out(node, inputs)
            return
        if all(name in self.constants for name in inputs):
            if kind in _KEEPS_CONSTANT or not inputs:
                self.constants.update(node.output)
            return
        if kind in ("Shape", "Size") or all(i in self.constants | self.sizes for i in inputs):
            self.sizes.update(node.output)
            return
        is_free = (
            self._is_gate(node, inputs) or self._is_bias(node, inputs) or self._is_by_one(node)
        )
        if kind not in _FREE | _FUSED and not (is_free or self._can_count(node, inputs)):
            self._leave_out(node, inputs)
            return
        op = None if is_free else self._operator(node, inputs)
        params = self._new_params(inputs)
        if op is not None and op.kind in ("linear", "conv", "grouped", "depthwise"):
            self.products.update(node.output)
        if op is not None:
            self._append(replace(op, params=params), node.input[0])
        else:
            self._add_params(params)

    def _add_params(self, params: int) -> None:
        """Of a node that is no operator of its own."""
        if params and self.ops:
            self.ops[-1] = replace(self.ops[-1], params=self.ops[-1].params + params)

    def _can_count(self, node: Any, inputs: list[str]) -> bool:
        """Whether it is of a known kind, and its tensors of known shapes."""
        tensors = {*inputs, node.output[0]} - self.constants - self.sizes
        return node.op_type in _COUNTED and tensors <= self.shapes.keys()

    def _leave_out(self, node: Any, inputs: list[str]) -> None:
        is_own = node.domain in DOMAINS[:2]
        self.uncounted[node.op_type if is_own else f"{node.domain}.{node.op_type}"] += 1
        self._add_params(self._new_params(inputs))

    def _append(self, op: Operator, source: str) -> None:
        """Products of one input with weights, such as q, k and v, are one wide product."""
        if op.kind != "linear" or source in self.constants:
            self.ops.append(op)
            return
        place = self.linears.setdefault(source, len(self.ops))
        if place == len(self.ops):
            self.ops.append(op)
            return
        first = self.ops[place]
        sums = {name: getattr(first, name) + getattr(op, name)
                for name in ("macs", "weights", "written", "params")}  # fmt: skip
        self.ops[place] = replace(first, **sums)

    def _is_gate(self, node: Any, inputs: list[str]) -> bool:
        """Whether it is the Mul of x * sigmoid(x): one activation, counted at the sigmoid."""
        if node.op_type in ("Sigmoid", "HardSigmoid"):
            self.gates[node.output[0]] = inputs[0]
        return node.op_type == "Mul" and any(
            self.gates.get(a) == b for a, b in (inputs, inputs[::-1])
        )

    def _is_bias(self, node: Any, inputs: list[str]) -> bool:
        """Whether it adds a bias to a product, which every runtime does on the way."""
        return node.op_type == "Add" and (
            bool(self.products.intersection(inputs)) and bool(self.constants.intersection(inputs))
        )

    def _is_by_one(self, node: Any) -> bool:
        """Whether it multiplies by one number, which the product before takes in, or takes one
        slice, such as the class token, which is a view."""
        places = {"Mul": (0, 1), "Gather": (1,)}.get(node.op_type, ())
        single = {node.input[place] for place in places} & self.constants
        return any(self._numel(name) == 1 for name in single)

    def _operator(self, node: Any, inputs: list[str]) -> Operator | None:
        kind = node.op_type
        read = float(sum(self._numel(n) for n in inputs if n not in self.constants))
        written = float(self._numel(node.output[0]))
        if kind in _MATMULS:
            return self._matmul(node, read, written)
        if kind in _CONVS:
            weight = self.shapes.get(node.input[_CONVS[kind]], (1, 1, 1, 1))
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            shape = self.shapes.get(node.output[0], (0,))
            op = convolution(kind, weight, groups, read=read, written=shape)
            return replace(op, weights=self._weights(inputs))
        if kind in ATTENTIONS:
            return self._attention(node, read, written)
        known = _KIND.get(kind)
        return Operator(kind, known, read=read, written=written) if known else None

    def _matmul(self, node: Any, read: float, written: float) -> Operator:
        left = self.shapes.get(node.input[0], (1,))
        is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
        inner = left[0] if is_transposed else left[-1]
        right = node.input[_MATMULS[node.op_type]]
        if right in self.constants or node.input[0] in self.constants:
            weights = self._weights(node.input)
            return Operator(node.op_type, "linear", written * inner, 0.0, weights, read, written)
        shape = self.shapes.get(node.output[0], (0,))
        return product(node.op_type, inner, read=read, written=shape)

    def _attention(self, node: Any, read: float, written: float) -> Operator:
        """(B, S, heads x D) or (B, heads, S, D) queries, keys and values likewise; or all three in
        one (B, S, heads, 3, D)."""
        query, key = (self.shapes.get(name, (1, 1, 1)) for name in [*node.input, ""][:2])
        named = {a.name: a.i for a in node.attribute}
        heads = named.get("num_heads") or named.get("q_num_heads") or query[1]
        if len(query) == 5:
            query = key = (query[0], heads, query[1], query[4])
        elif len(query) == 3:
            query = (query[0], heads, query[1], query[2] // heads)
        return attention(node.op_type, query, key[-2], query[-1], read=read, written=written)

    def _weights(self, inputs: Iterable[str]) -> float:
        return float(sum(self._numel(name) for name in inputs if name in self.constants))

    def _new_params(self, inputs: list[str]) -> int:
        fresh = {i for i in inputs if i in self.constants and i not in self.counted}
        self.counted |= fresh
        return sum(self._numel(name) for name in fresh)

    def _numel(self, name: str) -> int:
        return math.prod(self.shapes.get(name, (0,)))
