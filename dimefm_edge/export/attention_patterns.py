"""Attention in an ONNX graph, in whatever form it has: one node, or products around a softmax.

Used where an export reports what fused and where TensorRT's rules are checked (tensorrt.py).
The rules about Q/DQ are those of NVIDIA/TensorRT issue 4167: before the first product (BMM1),
after the softmax, and around the second product (BMM2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dimefm_kernels.tensorrt_plugin import PLUGIN_NAME, PLUGIN_NAMESPACE

if TYPE_CHECKING:
    import onnx

AttentionForm = Literal["onnx", "microsoft", "plugin", "decomposed"]

_MICROSOFT = "com.microsoft"
_FUSED_OPS: dict[tuple[str, str], AttentionForm] = {
    (PLUGIN_NAMESPACE, PLUGIN_NAME): "plugin",
    ("", "Attention"): "onnx",
    (_MICROSOFT, "MultiHeadAttention"): "microsoft",
    (_MICROSOFT, "Attention"): "microsoft",
}
_PRODUCTS = ("MatMul", "FusedMatMul")
# What may stand between the first product and the softmax: scale, mask or bias, types.
_BEFORE_SOFTMAX = (
    "Mul", "Div", "Add", "Sub", "Where", "Cast", "Identity", "Reshape", "Clip",
    "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
# Between the softmax and the second product; torch guards a row that is masked whole.
_AFTER_SOFTMAX = (
    "Cast", "Identity", "Dropout", "IsNaN", "Where", "Reshape", "QuantizeLinear",
    "DequantizeLinear",
)  # fmt: skip
# What TensorRT moves Q/DQ across.
_MOVABLE = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
# Operators of ONNX Runtime that onnx cannot infer and whose output is shaped as their input.
_SHAPED_AS_INPUT = (
    "MultiHeadAttention", "Attention", "BiasGelu", "FastGelu", "Gelu", "QuickGelu",
    "SkipLayerNormalization",
)  # fmt: skip
_MAX_STEPS = 12


@dataclass(frozen=True)
class AttentionMatch:
    """One attention of a graph; a size is None where the graph's shapes do not tell it."""

    form: AttentionForm
    """onnx (Attention, opset 23 and later), microsoft (MultiHeadAttention or Attention of ONNX
    Runtime), plugin (plugin.py's), or decomposed (MatMul, Softmax, MatMul)."""
    nodes: tuple[str, ...]
    """Names, in the graph's order; a node without a name is called after its first output."""
    num_heads: int | None
    num_tokens: int | None
    """Keys; queries are as many but in attention pooling."""
    head_dim: int | None
    has_qdq_before_bmm1: bool = False
    """Queries and keys both come from a DequantizeLinear."""
    has_qdq_after_softmax: bool = False
    has_qdq_around_bmm2: bool = False
    """Probabilities and values come from a DequantizeLinear, and a QuantizeLinear follows."""

    @property
    def is_int8(self) -> bool:
        """Whether Q/DQ stand everywhere that TensorRT's int8 attention wants them."""
        return self.has_qdq_before_bmm1 and self.has_qdq_after_softmax and self.has_qdq_around_bmm2


def find_attentions(model: onnx.ModelProto) -> list[AttentionMatch]:
    """Find every attention of a graph.

    Args:
        model: Any opset, with or without ONNX Runtime's operators and Q/DQ pairs; not changed.

    Returns:
        In the graph's order. A softmax that belongs to none: `find_unmatched_softmaxes`.
    """
    graph = _Graph(model)
    found = []
    for node in graph.nodes:
        form = _FUSED_OPS.get((_domain(node), node.op_type))
        if form is not None:
            found.append(_fused(graph, node, form))
        elif node.op_type == "Softmax":
            found.extend(_decomposed(graph, node))
    return found


def find_unmatched_softmaxes(
    model: onnx.ModelProto, matches: Sequence[AttentionMatch] | None = None
) -> list[str]:
    """Names of the Softmax nodes that are part of no attention.

    Args:
        model: As for `find_attentions`.
        matches: What that found, where it is known: finding costs a shape inference.
    """
    matches = find_attentions(model) if matches is None else matches
    matched = {name for match in matches for name in match.nodes}
    softmaxes = [node_name(node) for node in model.graph.node if node.op_type == "Softmax"]
    return [name for name in softmaxes if name not in matched]


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or its first output's where it has none."""
    return str(node.name or node.output[0])


class _Graph:
    """A graph's nodes with who makes and who reads each tensor, and the tensors' shapes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.order = {id(node): i for i, node in enumerate(self.nodes)}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.constants = {tensor.name for tensor in model.graph.initializer} | {
            node.output[0] for node in self.nodes if node.op_type == "Constant"
        }
        self.shapes = _infer_shapes(model)

    def shape(self, name: str) -> tuple[int | None, ...]:
        """Known sizes of a tensor; () where even its rank is unknown."""
        return self.shapes.get(name, ())

    def size(self, name: str, axis: int) -> int | None:
        shape = self.shape(name)
        return shape[axis] if len(shape) >= abs(axis) + (axis >= 0) else None

    def source(self, name: str) -> onnx.NodeProto | None:
        """What makes a tensor, moves and casts left out."""
        node = self.producers.get(name)
        while node is not None and node.op_type in _MOVABLE:
            node = self.producers.get(node.input[0])
        return node

    def is_dequantised(self, name: str) -> bool:
        node = self.source(name)
        return node is not None and node.op_type == "DequantizeLinear"

    def is_quantised_next(self, name: str) -> bool:
        """Whether whatever reads a tensor quantises it first."""
        readers = self.consumers.get(name, [])
        return bool(readers) and all(
            node.op_type == "QuantizeLinear"
            or (node.op_type in _MOVABLE and self.is_quantised_next(node.output[0]))
            for node in readers
        )


def _fused(graph: _Graph, node: onnx.NodeProto, form: AttentionForm) -> AttentionMatch:
    """Sizes of a node that is an attention by itself.

    onnx: queries (B, heads, N, head_dim) or (B, N, heads * head_dim), then keys and values.
    MultiHeadAttention: (B, N, heads * head_dim), or (B, N, heads, 3, head_dim) packed.
    ONNX Runtime's Attention: (B, N, D) and the weights (D, 3 * heads * head_dim).
    plugin: (B, N, 3 * heads * head_dim).
    """
    query = node.input[0]
    is_self_contained = (form, node.op_type) == ("microsoft", "Attention")
    has_key = not is_self_contained and len(node.input) > 1 and node.input[1]
    key = node.input[1] if has_key else query
    rank = len(graph.shape(query))
    num_heads = _attribute(node, "q_num_heads") or _attribute(node, "num_heads")
    width: int | None = None
    if form == "onnx" and rank == 4:
        num_heads, head_dim = graph.size(query, 1), graph.size(query, -1)
    elif rank == 5:
        head_dim = graph.size(query, -1)
    else:
        width = graph.size(node.input[1] if is_self_contained else query, -1)
        width = width // 3 if width and (is_self_contained or form == "plugin") else width
        head_dim = width // num_heads if width and num_heads else None
    return AttentionMatch(
        form,
        (node_name(node),),
        num_heads,
        graph.size(key, 2 if form == "onnx" and rank == 4 else 1),
        head_dim,
        has_qdq_before_bmm1=graph.is_dequantised(query) and graph.is_dequantised(key),
    )


def _decomposed(graph: _Graph, softmax: onnx.NodeProto) -> Iterator[AttentionMatch]:
    up = _walk(graph, softmax, _BEFORE_SOFTMAX, is_up=True)
    down = _walk(graph, softmax, _AFTER_SOFTMAX, is_up=False)
    if up is None or down is None:
        return
    (bmm1, before), (bmm2, after) = up, down
    scores, probabilities, values = bmm1.output[0], bmm2.input[0], bmm2.input[1]
    rank = len(graph.shape(scores))
    head_dim = graph.size(bmm1.input[0], -1)
    num_heads = graph.size(scores, -3) if rank >= 4 else _heads_of_3d(graph, values, head_dim)
    scales = [n for name in bmm1.input if (n := _scale_of(graph, name)) is not None]
    nodes = [*scales, bmm1, *before, softmax, *after, bmm2]
    nodes.sort(key=lambda node: graph.order[id(node)])
    is_dequantised = graph.is_dequantised(probabilities)
    yield AttentionMatch(
        "decomposed",
        tuple(dict.fromkeys(map(node_name, nodes))),
        num_heads,
        graph.size(scores, -1),
        head_dim,
        has_qdq_before_bmm1=all(map(graph.is_dequantised, bmm1.input[:2])),
        has_qdq_after_softmax=is_dequantised,
        has_qdq_around_bmm2=is_dequantised
        and graph.is_dequantised(values)
        and graph.is_quantised_next(bmm2.output[0]),
    )


def _walk(
    graph: _Graph, start: onnx.NodeProto, passed: tuple[str, ...], *, is_up: bool
) -> tuple[onnx.NodeProto, list[onnx.NodeProto]] | None:
    """The nearest product of two activations above or below a node, and what lies between."""
    pending: list[tuple[onnx.NodeProto, list[onnx.NodeProto]]] = [(start, [])]
    seen = {id(start)}
    while pending:
        node, path = pending.pop(0)
        for near in _neighbours(graph, node, is_up=is_up):
            if near.op_type in _PRODUCTS and not graph.constants & set(near.input[:2]):
                # Probabilities come first in the second product.
                if is_up or near.input[0] in node.output:
                    return near, path
            elif near.op_type in passed and id(near) not in seen and len(path) < _MAX_STEPS:
                seen.add(id(near))
                pending.append((near, [*path, near]))
    return None


def _neighbours(graph: _Graph, node: onnx.NodeProto, *, is_up: bool) -> list[onnx.NodeProto]:
    if is_up:
        return [graph.producers[name] for name in node.input if name in graph.producers]
    return [reader for name in node.output for reader in graph.consumers.get(name, [])]


def _scale_of(graph: _Graph, name: str) -> onnx.NodeProto | None:
    """The node that scales a factor of the first product by a constant, if there is one."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in (*_MOVABLE, "QuantizeLinear", "DequantizeLinear"):
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    return node if graph.constants & set(node.input) else None


def _heads_of_3d(graph: _Graph, values: str, head_dim: int | None) -> int | None:
    """Heads of (B * heads, N, head_dim) values: the width they were cut from, over head_dim."""
    node = graph.producers.get(values)
    for _ in range(_MAX_STEPS):
        if node is None or not head_dim:
            return None
        width = graph.size(node.input[0], -1) if node.input else None
        if node.op_type == "Reshape" and width and width != head_dim and not width % head_dim:
            return width // head_dim
        node = graph.producers.get(node.input[0]) if node.input else None
    return None


def _infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for node in probe.graph.node:
        if _domain(node) == _MICROSOFT and node.op_type in _SHAPED_AS_INPUT:
            first = node.input[0]
            node.ClearField("input")
            node.ClearField("attribute")
            del node.output[1:]
            node.domain, node.op_type = "", "Identity"
            node.input.append(first)
    try:
        probe = onnx.shape_inference.infer_shapes(probe, data_prop=True)
    except Exception:  # over 2 GiB, or shapes that contradict: what is written there remains
        probe = model
    graph = probe.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            dims = tensor.shape.dim
            shapes[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in dims
            )
    return shapes


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else str(node.domain)


def _attribute(node: onnx.NodeProto, name: str) -> int | None:
    return next((int(a.i) for a in node.attribute if a.name == name), None)
