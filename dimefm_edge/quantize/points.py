"""Where a student is fake-quantised: the products that the exporter quantises, found in torch.

export/int8.py reads the same rules and does the same on the ONNX graph; tests hold the two
together, and learned.py refuses to match what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dimefm_edge.export.quant_rules import QuantRules

_ATEN = torch.ops.aten
_LINEARS = (_ATEN.linear.default,)
CONVS = (_ATEN.conv2d.default, _ATEN.conv2d.padding)
GELU_SHARE_KEY = "dimefm_edge_gelu_share"
_SOFTMAXES = (_ATEN.softmax.int, _ATEN._softmax.default)
_CLIPS = (_ATEN.relu.default, _ATEN.relu_.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default)
_VIEWS = (_ATEN.flatten.using_ints, _ATEN.reshape.default, _ATEN.view.default)
_SWAPS = (_ATEN.transpose.int, _ATEN.permute.default)
_LAST_TWO = ((1, 2), (2, 1), ([0, 2, 1],))
_AROUND_SOFTMAX = (_ATEN.mul.Tensor, _ATEN.add.Tensor, _ATEN.div.Tensor)


@dataclass(frozen=True)
class Product:
    """A node that multiplies in integers."""

    name: str
    """Of its module, `trunk.blocks.0.mlp.fc1`; of a product of activations, its node's."""
    node: fx.Node
    inputs: tuple[fx.Node, ...]
    """Activations that it reads."""
    weight: fx.Node | None = None
    output: fx.Node | None = None
    """What its integer kernel writes, when that answers in integers."""
    has_integer_bias: bool = False
    """Whether its kernel adds a bias: a convolution's, or a linear layer's of (B, C), which becomes
    Gemm; others, patch embeddings among them, are a MatMul and a float Add."""


def find_products(
    graph: fx.Graph, rules: QuantRules, keep_float: Collection[str] = ()
) -> list[Product]:
    """What the rules quantise of an exported student, in the order of the graph.

    Args:
        graph: Of `torch.export`: aten operators, parameters as `get_attr`.
        rules: One of `QUANT_RULES`.
        keep_float: Names of products to leave out.
    """
    found = (_product(node, rules) for node in graph.nodes if node.op == "call_function")
    return [p for p in found if p is not None and p.name not in keep_float]


def gelus_in_integers(graph: fx.Graph, products: Sequence[Product]) -> list[fx.Node]:
    """The GELUs that int8.py makes of the integer sigmoid: between products in integers."""
    written = {p.output for p in products if p.output is not None}
    reading = {p.node for p in products}
    return [
        node
        for node in graph.nodes
        if node.target is _ATEN.gelu.default and node.args[0] in written
        and all(user in reading for user in node.users)
    ]  # fmt: skip


def is_gelu_share(node: fx.Node) -> bool:
    """Whether a node is the sigmoid of a GELU that qat.py made for integers: a QuickGELU's own is
    not, which stays float."""
    return GELU_SHARE_KEY in node.meta


def _product(node: fx.Node, rules: QuantRules) -> Product | None:
    if node.target in _LINEARS or node.target in CONVS:
        source, weight = node.args[:2]
        if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
            return None
        is_conv = node.target in CONVS
        if is_conv and rules.are_patches_products and _are_patches(node):
            is_conv = False
        if weight.op != "get_attr" or (is_conv and not _is_wanted(source, weight, rules)):
            return None
        name = str(weight.target).removesuffix(".weight")
        is_integer = is_conv and "Conv" in rules.output_op_types
        has_bias = len(node.args) > 2 and isinstance(node.args[2], fx.Node)
        return Product(
            name, node, (source,), weight, _integer_output(node) if is_integer else None,
            has_integer_bias=has_bias and (is_conv or node.meta["val"].ndim == 2),
        )  # fmt: skip
    if node.target is _ATEN.matmul.default and _is_attention(node, rules):
        left, right = node.args
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        return Product(node.name, node, (left, right))
    return None


def _is_wanted(source: fx.Node, weight: fx.Node, rules: QuantRules) -> bool:
    """As int8.py's: not every convolution is for every runtime."""
    return rules.takes_convolution(weight.meta["val"].shape, is_stem=source.op == "placeholder")


def _are_patches(node: fx.Node) -> bool:
    """Whether patches.py makes a product of it: windows of the image that touch but never overlap,
    and whose answers are then moved into tokens."""
    if node.target is not _ATEN.conv2d.default:
        return False
    defaults: list[Any] = [None, None, None, [1, 1], [0, 0], [1, 1], 1]
    given: list[Any] = list(node.args)
    source, weight, _, strides, *others = given + defaults[len(given) :]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    patch, sides = list(weight.meta["val"].shape[2:]), source.meta["val"].shape[2:]
    is_cut = patch[0] == patch[1] > 1 and list(strides) == patch and others == defaults[4:]
    is_whole = source.op == "placeholder" and all(side % patch[0] == 0 for side in sides)
    tokens = _only_user(_only_user(node, _VIEWS), _SWAPS)
    return is_cut and is_whole and tokens is not None and tokens.args[1:] in _LAST_TWO


def _only_user(node: fx.Node | None, targets: Sequence[Any]) -> fx.Node | None:
    """The only reader of a tensor, if it is of a kind and gives three dimensions."""
    users = [] if node is None else list(node.users)
    if len(users) != 1 or users[0].target not in targets:
        return None
    return users[0] if users[0].meta["val"].ndim == 3 else None


def _integer_output(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    if len(users) == 1 and users[0].target in _CLIPS:
        node = users[0]
    return None if any(user.op == "output" for user in node.users) else node


def _is_attention(node: fx.Node, rules: QuantRules) -> bool:
    left, right = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if is_softmax(left):
        tokens, head_dim = right.meta["val"].shape[-2:]
    elif any(is_softmax(user) for user in _behind(node)):
        head_dim, tokens = right.meta["val"].shape[-2:]
    else:
        return False
    return int(tokens) <= rules.attention_max_tokens and int(head_dim) in rules.attention_head_dims


def is_softmax(node: fx.Node) -> bool:
    """Whether a node's values lie in 0 to 1 whatever it is asked."""
    return node.target in _SOFTMAXES


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """Users, through scales and masks."""
    for user in node.users:
        yield user
        if user.target in _AROUND_SOFTMAX:
            yield from _behind(user)
