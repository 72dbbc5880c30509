"""Outlier channels moved from activations into weights, where each channel has its own scale.

SmoothQuant's step (arXiv 2211.10438, eq. 4) and cross-layer equalisation's (Nagel et al., arXiv
1906.04721) are one: what a LayerNorm or a convolution writes is divided by a number per channel,
and what the next layer multiplies it with is multiplied by it. The answers stay, as long as what
stands between is positively homogeneous: nothing, a ReLU, a pooling. GELU, SiLU and HardSwish are
not (f(s x) is not s f(x)), and ReLU6 clips at 6 whatever the channel: such pairs are left out, in
hybrids and convnets all but those of a depthwise convolution and the next one.

The number evens out what is seen to pass, not two weights as Nagel's does: with a scale for each
output channel, rows of weights need no evening. A depthwise convolution has a scale for each
channel that it reads, and so takes all of a channel's reach.

Measured, 1 - cosine to fp32 in ONNX Runtime, without and with, by the rules of x86 and of TensorRT
(benchmarks/bench_equalise.py). ImageNet's EfficientNet-Lite0, its ReLU6 taken for ReLU, 34 pairs:
3.8e-2 and 2.3e-2, 1.0e-1 and 2.4e-2. Students of 160 steps on scenes, whose channels have hardly
spread: a hybrid 3.6e-4 and 3.3e-4, 1.33e-3 and 1.27e-3; mobilenetv3_small_050 1.7e-3 and 1.4e-3,
4.3e-3 and 4.3e-3; resnet10t 0.85e-4 and 0.93e-4, 1.32e-4 and 1.36e-4: nothing. A ViT, longer
trained: 1.01e-4 and 0.86e-4, 1.43e-3 and 1.45e-3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dimefm_edge.quantize.deployed import export_graph
from dimefm_edge.quantize.points import CONVS

_ATEN = torch.ops.aten
_PARAMETERS: dict[Any, slice] = {
    _ATEN.layer_norm.default: slice(2, 4),
    **{conv: slice(1, 3) for conv in CONVS},
}
"""Where a node that scales each channel of what it writes has its weight and bias."""
_VIEWS = (_ATEN.slice.Tensor, _ATEN.select.int, _ATEN.dropout.default)
_HOMOGENEOUS = (
    _ATEN.relu.default, _ATEN.relu_.default, _ATEN.leaky_relu.default, _ATEN.leaky_relu_.default,
    _ATEN.max_pool2d.default, _ATEN.avg_pool2d.default,
)  # fmt: skip
"""f(s x) = s f(x) for s > 0, channel by channel."""
_LEAST = 1e-2
"""Of the widest channel's reach: a channel that images hardly use is not blown up."""
_TINY = 1e-12


@torch.no_grad()
def smooth(deployed: nn.Module, images: Tensor, *, strength: float = 0.5) -> int:
    """Even out the channels between a LayerNorm or convolution and the products that read it.

    In the order of the graph: what one pair does to a weight, the next one sees.

    Args:
        deployed: What `deployed_form` gave; changed in place, its answers are not.
        images: (B, 3, S, S) preprocessed, to see how far each channel reaches.
        strength: 0 to 1: how much of a channel's reach goes into the weights; all of it where
            they are depthwise.

    Returns:
        How many pairs were evened out.
    """
    graph = export_graph(deployed, images.shape[-1])
    weights = deployed.state_dict()
    pairs = _pairs(graph.graph)
    reaches = _Reaches(graph, [reader for _, readers in pairs for reader in readers])
    reaches.run(images)
    for node, readers in pairs:
        seen = [reaches.found[reader.args[0].name] for reader in readers]
        reach = torch.stack(seen).amax(0)
        reach = reach.clamp_min(max(_LEAST * float(reach.max()), _TINY))
        mixed = [_by_input(weights[str(r.args[1].target)], _groups(r)) for r in readers]
        peak = torch.stack([w.abs().amax((1, 3)).flatten() for w in mixed]).amax(0)
        share = 1.0 if all(map(_is_depthwise, readers)) else strength
        scale = reach**share / peak.clamp_min(_TINY) ** (1 - share)
        for argument in _parameters(node):
            written = weights[str(argument.target)]
            written.div_(scale.view(-1, *[1] * (written.ndim - 1)))
        for weight in mixed:
            weight.mul_(scale.view(weight.shape[0], 1, -1, 1))
    return len(pairs)


class _Reaches(fx.Interpreter):
    """Runs a graph and keeps the largest magnitude of each channel of what some products read."""

    def __init__(self, graph: fx.GraphModule, products: Sequence[Any]) -> None:
        """Keep them by the name of the node that is read."""
        super().__init__(graph)
        self.axes = {node.args[0].name: 1 if node.target in CONVS else -1 for node in products}
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and look at what it answers."""
        value = super().run_node(n)
        if n.name in self.axes:
            assert isinstance(value, Tensor)
            self.found[n.name] = value.transpose(0, self.axes[n.name]).flatten(1).abs().amax(1)
        return value


def _pairs(graph: fx.Graph) -> list[tuple[Any, list[Any]]]:
    """Nodes that write channels, and the products that read them, all with weights of their own."""
    uses = Counter(
        argument.target
        for node in graph.nodes
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    )
    found = []
    for node in graph.nodes:
        readers = _readers(node)
        used = [*_parameters(node), *(reader.args[1] for reader in readers)]
        own = [isinstance(a, fx.Node) and a.op == "get_attr" and uses[a.target] == 1 for a in used]
        if readers and all(own):
            found.append((node, readers))
    return found


def _readers(node: fx.Node) -> list[Any]:
    """The products that read a node; none if something else does, or it is no such node."""
    if node.target not in _PARAMETERS:
        return []
    is_conv = node.target in CONVS
    wanted = CONVS if is_conv else (_ATEN.linear.default,)
    between = _HOMOGENEOUS if is_conv else _VIEWS
    readers: list[Any] = []
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in between:
            waiting += user.users
        elif user.target in wanted:
            readers.append(user)
        else:
            return []
    return readers


def _parameters(node: Any) -> tuple[Any, ...]:
    """Weight and bias of a node that scales each channel of what it writes."""
    return tuple(node.args[_PARAMETERS[node.target]]) if node.target in _PARAMETERS else ()


def _groups(node: Any) -> int:
    return int(node.args[6]) if node.target in CONVS and len(node.args) > 6 else 1


def _is_depthwise(node: Any) -> bool:
    return _groups(node) > 1 and node.args[1].meta["val"].shape[1] == 1


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """A view of a weight (O, I / groups, ...) as (groups, O / groups, I / groups, rest)."""
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
