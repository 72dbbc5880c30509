"""Ranges that training learned, in the place of calibration: which product of a graph has which.

A fake-quantised student (quantize/) and the graph that is traced from it hold the same weights,
bit for bit, so a product is known by its weight; those without one stand in the same order.
Used by int8.py, which so has one way to place Q/DQ for calibrated and for learned ranges.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError
from dimefm_edge.export.calibration import Range

if TYPE_CHECKING:
    from torch import nn

MIN_LEARNED_COSINE = {"int8": 0.999, "fp8": 0.99}
"""Of a graph's embeddings to those of the fake-quantised student that it was made from. A sum that
ends a hair beside rounds to the next number, in fp8 one 8th to one 16th away: a small convolutional
student and itself on pixels 1e-6 brighter agree at 0.9975."""


@dataclass(frozen=True, eq=False)
class LearnedProduct:
    """A product as it was trained to run in integers."""

    name: str
    weight: npt.NDArray[np.float32] | None
    """(O, ...) float, output channels first; None for a product of two activations."""
    inputs: tuple[Range, ...]
    output: Range | None


@runtime_checkable
class FakeQuantised(Protocol):
    """A student whose answers are rounded as its int8 graph will round them."""

    def deployed(self) -> nn.Module:
        """The float student inside."""

    def learned(self) -> list[LearnedProduct]:
        """Its products, in the order in which they run."""


def match_products(
    weights: Sequence[npt.NDArray[np.float32] | None], learned: Sequence[LearnedProduct]
) -> list[LearnedProduct | None]:
    """Find each product of a graph among those that were trained.

    Args:
        weights: One for each product of the graph in its order, output channels first; None
            for a product of two activations.
        learned: What was trained.

    Returns:
        One for each of the graph's; None for what was not trained in integers and stays float.

    Raises:
        ExportError: If the graph lacks a product that was trained.
    """
    waiting: dict[Any, deque[LearnedProduct]] = defaultdict(deque)
    for product in learned:
        waiting[_key(product.weight)].append(product)
    found = [waiting[key].popleft() if waiting[key := _key(weight)] else None for weight in weights]
    lost = [product.name for rest in waiting.values() for product in rest]
    if lost:
        raise ExportError(
            f"the graph lacks {len(lost)} of {len(learned)} products that were trained in int8: "
            f"{', '.join(lost[:3])}",
            hint="dimefm-edge export RUN --precision int8 --calibration minmax",
        )
    return found


def _key(weight: npt.NDArray[np.float32] | None) -> Any:
    if weight is None:
        return None
    # A patch embedding is a convolution there, and a product of matrices here (patches.py).
    values = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1)
    return values.shape, hashlib.sha256(values.tobytes()).digest()
