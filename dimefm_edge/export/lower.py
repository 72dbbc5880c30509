"""One attention operator in, the form that a runtime likes out; and no arithmetic on shapes.

torch's `scaled_dot_product_attention` is traced as the operator `dimefm::Attention`, whoever
calls it. `lower_attentions` then writes each as one of `ATTENTION_FORMS`:

- `packed`: MatMul, Softmax, MatMul, which TensorRT matches and fuses, on queries, keys and values
  from one projection, biases added there: of ViT-S/16 in fp16 NVIDIA's compiler
  (runtime/tensorrt_rtx.py) makes 106 kernels, and 128 where each has a projection of its own.
- `decomposed`: the same with three projections, and as few transposes as there can be.
- `MultiHeadAttention`: ONNX Runtime's own operator (com.microsoft), on (B, N, H * D).
- `Attention`: ONNX's, of opset 23, on (B, N, H * D).
- `plugin`: `dimefm::fused_attention_qkv` on packed (B, N, 3 * H * D), straight from one
  projection: our own kernel in TensorRT (plugin.py). Masks and poolings are decomposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from dimefm_edge.errors import ExportError, lookup
from dimefm_kernels.tensorrt_plugin import PLUGIN_NAME, PLUGIN_NAMESPACE

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDER_DOMAIN = "dimefm"
ORT_DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]  # (B, N, H, D) to (B, H, N, D), and back


def translation_table() -> dict[Any, Callable[..., Any]]:
    """How torch's exporter shall write `scaled_dot_product_attention`."""
    import torch
    from onnx.defs import OpSchema
    from onnxscript import values

    tensor, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    number = OpSchema.Attribute
    schema = OpSchema(
        "Attention",
        PLACEHOLDER_DOMAIN,
        1,
        inputs=[tensor(x, "T") for x in "qkv"] + [tensor("mask", "T", param_option=optional)],
        outputs=[tensor("out", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            number("scale", OpSchema.AttrType.FLOAT, required=True),
            number("is_causal", OpSchema.AttrType.INT, required=True),
        ],
    )
    attention = values.Op(values.Opset(PLACEHOLDER_DOMAIN, 1), "Attention", schema)

    def translate(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        scale = float(query.shape[-1]) ** -0.5 if scale is None else scale
        return attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))

    return {torch.ops.aten.scaled_dot_product_attention.default: translate}


def lower_attentions(model: ir.Model, form: str) -> int:
    """Write every attention in one form, in place.

    Args:
        model: With `dimefm::Attention` nodes, (B, H, M, D), (B, H, N, D), (B, H, N, D) and
            perhaps a mask, of known H, M, N and D.
        form: A name in `ATTENTION_FORMS`.

    Returns:
        How many there were.

    Raises:
        UnknownNameError: If there is no such form.
        ExportError: If an attention's shape is not known.
    """
    lower = lookup(ATTENTION_FORMS, form, kind="attention form")
    nodes = [node for node in model.graph if node.domain == PLACEHOLDER_DOMAIN]
    for node in nodes:
        q, k, v, mask = (*node.inputs, None)[:4]
        assert q is not None
        assert k is not None
        assert v is not None
        if node.attributes["is_causal"].as_int():
            mask = _causal_mask(model.graph, _side(q, 2), _side(k, 2))
        edit = _Edit(model.graph, node)
        lower(edit, q, k, v, mask, node.attributes["scale"].as_float())
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    if nodes and form == "MultiHeadAttention":
        model.opset_imports[ORT_DOMAIN] = 1
    if nodes and form == "plugin":
        model.opset_imports[PLUGIN_NAMESPACE] = 1
    return len(nodes)


class _Edit:
    """New nodes in the place of one node."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self.out = node.outputs[0]

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        shape: Sequence[Any] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Insert a node before the one that is replaced; gives its output."""
        made = ir.node(op_type, inputs, attributes or None, domain=domain)
        if self.out.dtype is not None:
            made.outputs[0].dtype = self.out.dtype
        made.outputs[0].shape = None if shape is None else ir.Shape(shape)
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    def split(
        self, x: ir.Value, count: int, *, axis: int, shape: Sequence[Any]
    ) -> Sequence[ir.Value]:
        """Insert a Split into equal parts of a shape."""
        sizes = self.constant(np.full(count, shape[axis], np.int64))
        made = ir.node("Split", [x, sizes], {"axis": axis}, num_outputs=count)
        for part in made.outputs:
            part.shape = ir.Shape(shape)
            if self.out.dtype is not None:
                part.dtype = self.out.dtype
        self._graph.insert_before(self._node, made)
        return made.outputs

    def constant(self, values: Any) -> ir.Value:
        """An initializer."""
        return _initializer(self._graph, np.asarray(values))

    def replace(self, new: ir.Value) -> None:
        """Let what read the node read the new value; the node goes."""
        new.shape = self.out.shape
        ir.convenience.replace_all_uses_with(self.out, new, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)


def _decompose(
    edit: _Edit, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> None:
    batch, heads, queries, _ = _dims(q)
    logits_shape = (batch, heads, queries, _side(k, 2))
    logits = edit.add("MatMul", [q, _transposed(edit, k)], shape=logits_shape)
    if scale != 1.0:
        logits = edit.add("Mul", [logits, edit.constant(np.float32(scale))], shape=logits_shape)
    if mask is not None:
        logits = edit.add("Add", [logits, mask], shape=logits_shape)
    probs = edit.add("Softmax", [logits], shape=logits_shape, axis=-1)
    edit.replace(edit.add("MatMul", [probs, v]))


def _packed(
    edit: _Edit, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> None:
    batch, heads, tokens, dim = _dims(q)
    shape = (batch, tokens, 3 * heads * dim)
    rows = [_as_rows(edit, x) for x in (q, k, v)] if _are_alike(q, k, v) else []
    projected = _packed_projection(edit, rows, shape) if rows else None
    if projected is None:
        _decompose(edit, q, k, v, mask, scale)
        return
    by_head = edit.constant(np.array([-1, tokens, 3 * heads, dim], np.int64))
    split = edit.add("Reshape", [projected, by_head], shape=(batch, tokens, 3 * heads, dim))
    parts = edit.split(split, 3, axis=2, shape=(batch, tokens, heads, dim))
    moved = [
        edit.add("Transpose", [part], shape=(batch, heads, tokens, dim), perm=_HEADS_FIRST)
        for part in parts
    ]
    _decompose(edit, moved[0], moved[1], moved[2], mask, scale)


def _transposed(edit: _Edit, k: ir.Value) -> ir.Value:
    """(B, H, N, D) as (B, H, D, N), in one transpose with what made it where that can be."""
    batch, heads, tokens, dim = _dims(k)
    shape = (batch, heads, dim, tokens)
    before = k.producer()
    if before is not None and before.op_type == "Transpose":
        perm = list(before.attributes["perm"].as_ints())
        perm[2], perm[3] = perm[3], perm[2]
        return edit.add("Transpose", [before.inputs[0]], shape=shape, perm=perm)
    return edit.add("Transpose", [k], shape=shape, perm=[0, 1, 3, 2])


def _multi_head(
    edit: _Edit, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> None:
    heads = _side(q, 1)
    rows = [_as_rows(edit, x) for x in (q, k, v)]
    extra = [] if mask is None else [None, None, _in_four_dims(edit, mask)]
    out = edit.add(
        "MultiHeadAttention", [*rows, *extra], domain=ORT_DOMAIN, num_heads=heads, scale=scale
    )
    _replace_rows(edit, q, out)


def _attention(
    edit: _Edit, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> None:
    heads = _side(q, 1)
    rows: list[ir.Value | None] = [_as_rows(edit, x) for x in (q, k, v)]
    if mask is not None:
        rows.append(mask)
    out = edit.add("Attention", rows, q_num_heads=heads, kv_num_heads=heads, scale=scale)
    _replace_rows(edit, q, out)


def _plugin(
    edit: _Edit, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> None:
    if mask is not None or not _are_alike(q, k, v):
        _decompose(edit, q, k, v, mask, scale)
        return
    batch, heads, tokens, dim = _dims(q)
    rows = [_as_rows(edit, x) for x in (q, k, v)]
    shape = (batch, tokens, 3 * heads * dim)
    packed = _packed_projection(edit, rows, shape) or edit.add("Concat", rows, shape=shape, axis=-1)
    # TensorRT finds a plugin by these names; its attributes are those of tensorrt_plugin.py.
    out = edit.add(
        PLUGIN_NAME, [packed], domain=PLUGIN_NAMESPACE, num_heads=heads, logit_scale=scale,
        value_scale=1.0, plugin_namespace=PLUGIN_NAMESPACE, plugin_version="1",
    )  # fmt: skip
    _replace_rows(edit, q, out)


def _packed_projection(
    edit: _Edit, rows: Sequence[ir.Value], shape: Sequence[Any]
) -> ir.Value | None:
    """Three projections of the same tokens as one product, or None if they are not that."""
    adds = [row.producer() for row in rows]
    weights, biases, tokens = [], [], set()
    for add in adds:
        if add is None or add.op_type != "Add":
            return None
        product, bias = add.inputs
        matmul = None if product is None else product.producer()
        if matmul is None or matmul.op_type != "MatMul" or bias is None:
            return None
        weight = matmul.inputs[1]
        if weight is None or weight.const_value is None or bias.const_value is None:
            return None
        weights.append(weight.const_value.numpy())
        biases.append(bias.const_value.numpy())
        tokens.add(matmul.inputs[0])
    shapes = [(weight.shape[1:], bias.shape) for weight, bias in zip(weights, biases, strict=True)]
    if len(tokens) != 1 or any(len(columns) != 1 or columns != bias for columns, bias in shapes):
        return None
    weight, bias = (edit.constant(np.concatenate(parts, axis=-1)) for parts in (weights, biases))
    product = edit.add("MatMul", [tokens.pop(), weight], shape=shape)
    return edit.add("Add", [product, bias], shape=shape)


ATTENTION_FORMS: dict[str, Callable[..., None]] = {
    "packed": _packed,
    "decomposed": _decompose,
    "MultiHeadAttention": _multi_head,
    "Attention": _attention,
    "plugin": _plugin,
}


def _as_rows(edit: _Edit, x: ir.Value) -> ir.Value:
    """(B, H, N, D) as (B, N, H * D): what stood before it was split, where that can be."""
    batch, heads, tokens, dim = _dims(x)
    before = x.producer()
    if before is not None and _is_heads_first(before):
        split = before.inputs[0]
        assert split is not None
        reshape = split.producer()
        if reshape is not None and reshape.op_type == "Reshape":
            rows = reshape.inputs[0]
            assert rows is not None
            if rows.shape is not None and list(rows.shape)[1:] == [tokens, heads * dim]:
                return rows
    moved = edit.add("Transpose", [x], shape=(batch, tokens, heads, dim), perm=_HEADS_FIRST)
    rows_shape = edit.constant(np.array([-1, tokens, heads * dim], np.int64))
    return edit.add("Reshape", [moved, rows_shape], shape=(batch, tokens, heads * dim))


def _replace_rows(edit: _Edit, q: ir.Value, out: ir.Value) -> None:
    """Put (B, M, H * D) in the place of (B, H, M, D), or of what is made of it."""
    batch, heads, tokens, dim = _dims(q)
    out.shape = ir.Shape((batch, tokens, heads * dim))
    users = list(edit.out.consumers())
    if len(users) == 1 and _is_heads_first(users[0]):
        after = list(users[0].outputs[0].consumers())
        if len(after) == 1 and after[0].op_type == "Reshape":
            merged = after[0].outputs[0]
            if merged.shape is not None and list(merged.shape)[1:] == [tokens, heads * dim]:
                ir.convenience.replace_all_uses_with(merged, out, replace_graph_outputs=True)
                return
    split = edit.constant(np.array([-1, tokens, heads, dim], np.int64))
    apart = edit.add("Reshape", [out, split], shape=(batch, tokens, heads, dim))
    edit.replace(edit.add("Transpose", [apart], perm=_HEADS_FIRST))


def _in_four_dims(edit: _Edit, mask: ir.Value) -> ir.Value:
    """A mask as the operator wants it: (1 or B, 1 or H, M, N)."""
    rank = 4 if mask.shape is None else len(mask.shape)
    if rank == 4:
        return mask
    return edit.add("Unsqueeze", [mask, edit.constant(np.arange(4 - rank))])


def _is_heads_first(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _dims(x: ir.Value) -> tuple[Any, int, int, int]:
    """Batch, heads, tokens and the size of a head."""
    batch = None if x.shape is None or len(x.shape) != 4 else x.shape[0]
    return batch, _side(x, 1), _side(x, 2), _side(x, 3)


def _are_alike(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    """Whether queries, keys and values are of one shape, as those of one projection are."""
    return _dims(q)[1:] == _dims(k)[1:] == _dims(v)[1:]


def _side(x: ir.Value, axis: int) -> int:
    size = None if x.shape is None or len(x.shape) != 4 else x.shape[axis]
    if not isinstance(size, int):
        raise ExportError(f"an attention's shape {x.shape} is not known before it runs")
    return size


def _causal_mask(graph: ir.Graph, queries: int, keys: int) -> ir.Value:
    mask = np.triu(np.full((queries, keys), -np.inf, np.float32), k=1)
    return _initializer(graph, mask)


def _initializer(graph: ir.Graph, values: Any) -> ir.Value:
    name = f"lowered_{len(graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape = ir.Shape(values.shape)
    value.dtype = ir.DataType.from_numpy(values.dtype)
    graph.register_initializer(value)
    return value
