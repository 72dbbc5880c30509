"""What a model does for one batch, as a list of operators, and what of it costs time.

trace.py lists a torch module's operators, onnx_costs.py an ONNX graph's. `cost_vector` sums them
into the counts that the latency model (published.py, calibrate.py) has a coefficient for:
multiply-adds, weights and activations by kind of operator, and how many kernels there are. What
runtimes fuse is free here: ReLU, clamps and factors (such as attention's scale) after a product,
batch norm after a convolution, views, casts.

No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TILE = 32
"""Channels, or rows of a matrix, that tensor cores and NPUs work on at a time; fewer cost as
much."""
ON_CHIP_ELEMENTS = 1e6
"""Of a tensor larger than this, the rest counts as `spilled`: it leaves the chip's memory."""

COUNTING = 4
"""Raised when a model's counts change: caches of them, and fits on them, are made anew."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Operator:
    """One operator that costs time."""

    name: str
    kind: str
    """conv, grouped, depthwise, linear, matmul (of two activations), attention, softmax, norm,
    batch_norm (one that no convolution takes in), gelu, activation (all others but ReLUs, which
    cost NPUs less: SiLU at 380 px told by GELU was 6 times too dear), elementwise, pool,
    mean, move (concatenations, copies, paddings) or permute."""
    macs: float = 0.0
    """Multiply-adds."""
    padded_macs: float = 0.0
    """The same with sizes filled up to `TILE`: channels of a convolution; all three sizes of a
    product of two activations."""
    weights: float = 0.0
    """Elements of weights read."""
    read: float = 0.0
    """Elements of activations read."""
    written: float = 0.0
    """Elements written."""
    padded_moved: float = 0.0
    """Elements read and written with rows filled up to `TILE`; products of two activations, alone
    or in an attention, only: EfficientViT's heads are 16 wide."""
    scores: float = 0.0
    """Elements of the softmax inside an attention."""
    is_pointwise: bool = False
    """A 1 x 1 convolution."""
    params: int = 0
    """Parameters that it is the first to use."""


@dataclass(frozen=True)
class Cost:
    """One count that takes time."""

    name: str
    rate: str
    """Whose speed it mostly depends on: one of `RATES`."""
    prior: float
    """log of what one costs, in units of the rate; set by hand before any fitting."""


RATES = {"call": -1.0, "kernel": -4.0, "mac": -8.5, "weight": -3.5, "activation": -4.0}
"""log ms of one call, one kernel, 1e6 multiply-adds, 1e6 weights, 1e6 activations: where fits
start, about a phone's NPU in fp16."""

COSTS = (
    Cost("calls", "call", 0.0),
    Cost("kernels", "kernel", 0.0),
    Cost("kernels_depthwise", "kernel", 0.3),
    Cost("kernels_attention", "kernel", -1.0),
    Cost("kernels_elementwise", "kernel", -0.5),
    Cost("kernels_activation", "kernel", -0.5),
    Cost("kernels_norm", "kernel", 0.0),
    Cost("kernels_move", "kernel", 0.0),
    Cost("kernels_permute", "kernel", -2.5),
    Cost("kernels_mean", "kernel", 0.0),
    Cost("macs_conv", "mac", 0.0),
    Cost("macs_padding", "mac", -0.7),
    Cost("macs_pointwise", "mac", -1.0),
    Cost("macs_linear", "mac", 0.2),
    Cost("macs_grouped", "mac", 0.5),
    Cost("macs_grouped_padded", "mac", -0.3),
    Cost("macs_depthwise", "mac", 2.0),
    Cost("macs_attention", "mac", 0.7),
    Cost("weights", "weight", 0.0),
    Cost("activations", "activation", 0.0),
    Cost("activations_spilled", "activation", 0.0),
    Cost("activations_depthwise", "activation", 0.3),
    Cost("activations_attention", "activation", 0.3),
    Cost("activations_elementwise", "activation", -0.7),
    Cost("activations_batch_norm", "activation", 0.0),
    Cost("activations_pool", "activation", -0.7),
    Cost("activations_softmax", "activation", 1.5),
    Cost("activations_norm", "activation", 1.5),
    Cost("activations_gelu", "activation", 0.5),
    Cost("activations_activation", "activation", 0.0),
    Cost("activations_move", "activation", 0.0),
    Cost("macs_fallback", "mac", 3.0),
)
"""What `cost_vector` counts, in its order. `macs_fallback` is left at 0: see published.py."""

COST_NAMES = tuple(cost.name for cost in COSTS)
PRIORS: Vector = np.array([RATES[cost.rate] + cost.prior for cost in COSTS])
"""log ms of one unit of each cost before any fitting."""

_KERNELS = {
    "conv": "kernels", "grouped": "kernels", "linear": "kernels",
    "depthwise": "kernels_depthwise", "matmul": "kernels_attention",
    "softmax": "kernels_attention", "norm": "kernels_norm", "batch_norm": "kernels_elementwise",
    "gelu": "kernels_activation", "activation": "kernels_activation",
    "elementwise": "kernels_elementwise",
    "pool": "kernels_move", "mean": "kernels_mean", "move": "kernels_move",
    "permute": "kernels_permute",
}  # fmt: skip
_SPILLS = {"conv", "grouped", "depthwise", "elementwise", "move"}
_MILLION = 1e6


def cost_vector(ops: Iterable[Operator]) -> Vector:
    """Sum operators into `COSTS`: kernels by number, all else in millions; shape (len(COSTS),)."""
    total = dict.fromkeys(COST_NAMES, 0.0)
    for op in ops:
        if op.kind in _KERNELS:
            total[_KERNELS[op.kind]] += 1
        for name, count in _counts(op).items():
            total[name] += count / _MILLION
        if op.kind in _SPILLS and op.written > ON_CHIP_ELEMENTS:
            total["activations_spilled"] += (op.written - ON_CHIP_ELEMENTS) / _MILLION
        if op.kind == "attention":  # two products and a softmax
            total["kernels_attention"] += 3
    total["calls"] = 1.0
    return np.array([total[name] for name in COST_NAMES])


def _counts(op: Operator) -> dict[str, float]:
    moved = op.read + op.written
    if op.kind == "conv":
        return {
            "macs_conv": op.macs,
            "macs_padding": op.padded_macs - op.macs,
            "macs_pointwise": op.macs if op.is_pointwise else 0.0,
            "weights": op.weights,
            "activations": moved,
        }
    if op.kind == "grouped":
        padded = {"macs_grouped": op.macs, "macs_grouped_padded": op.padded_macs}
        return padded | {"weights": op.weights, "activations": moved}
    if op.kind == "depthwise":
        counts = {"macs_depthwise": op.macs, "weights": op.weights}
        return counts | {"activations_depthwise": moved}
    if op.kind == "linear":
        return {"macs_linear": op.macs, "weights": op.weights, "activations": moved}
    if op.kind in ("matmul", "attention"):
        counts = {"macs_attention": op.padded_macs, "activations_attention": op.padded_moved}
        return counts | {"activations_softmax": op.scores}
    if op.kind in ("softmax", "norm", "gelu", "activation"):
        return {f"activations_{op.kind}": op.written}
    if op.kind == "batch_norm":
        return {"activations_batch_norm": 2 * op.written}
    if op.kind in ("pool", "mean"):
        return {"activations_pool": moved}
    if op.kind == "permute":
        return {"activations_move": op.written}
    return {f"activations_{op.kind}": moved}  # elementwise, move


def convolution(
    name: str, weight: tuple[int, ...], groups: int, *, read: float, written: tuple[int, ...]
) -> Operator:
    """A convolution as an operator.

    Args:
        name: For people.
        weight: (out, in / groups, *kernel).
        groups: 1 for a dense one.
        read: Elements of its input.
        written: Its output, (B, out, *size).
    """
    size, kernel = math.prod(written), math.prod(weight[2:])
    outputs, inputs = weight[0] // groups, weight[1]
    macs = float(size * inputs * kernel)
    padded = size / outputs * _filled(outputs) * _filled(inputs) * kernel
    kind = "conv" if groups == 1 else "depthwise" if inputs == 1 else "grouped"
    elements = float(math.prod(weight))
    return Operator(
        name, kind, macs, padded, elements, read, float(size), is_pointwise=kernel == 1
    )  # fmt: skip


def product(name: str, inner: int, *, read: float, written: tuple[int, ...]) -> Operator:
    """A product of two activations as an operator.

    Args:
        name: For people.
        inner: The size that is summed over.
        read: Elements of both.
        written: Its output, (..., rows, columns).
    """
    *batches, rows, columns = (1, 1, *written)
    times, size = math.prod(batches), math.prod(written)
    padded = times * _filled(rows) * _filled(inner) * _filled(columns)
    moved = times * (rows * _filled(inner) + (inner + rows) * _filled(columns))
    return Operator(name, "matmul", float(size * inner), padded, 0.0, read, float(size), moved)


def attention(
    name: str, query: tuple[int, ...], keys: int, values: int, *, read: float, written: float
) -> Operator:
    """An attention as one operator.

    Args:
        name: For people.
        query: Shape of the queries, (..., tokens, channels of a head).
        keys: How many tokens are asked.
        values: Channels of a head's values.
        read: Elements of queries, keys and values.
        written: Elements of the output.
    """
    tokens, channels = query[-2:]
    heads = math.prod(query[:-2])
    scores, wide = float(heads * tokens * keys), _filled(channels) + _filled(values)
    padded = heads * _filled(tokens) * _filled(keys) * wide
    moved = heads * ((tokens + keys) * wide + 4 * tokens * _filled(keys))
    macs = scores * (channels + values)
    return Operator(name, "attention", macs, padded, 0.0, read, written, moved, scores)


def _filled(size: int) -> int:
    """Up to whole tiles."""
    return -(-size // TILE) * TILE


def total_gmacs(ops: Iterable[Operator]) -> float:
    """1e9 multiply-adds."""
    return sum(op.macs for op in ops) / 1e9


def total_params_m(ops: Iterable[Operator]) -> float:
    """1e6 parameters."""
    return sum(op.params for op in ops) / 1e6


def memory_elements(ops: Iterable[Operator]) -> float:
    """Elements that must be held at once: all weights, and the largest operator's tensors."""
    ops = list(ops)
    largest = max((op.read + op.written + op.scores for op in ops), default=0.0)
    return sum(op.params for op in ops) + largest
