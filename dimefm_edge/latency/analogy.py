"""Latency by analogy: what models alike take in contexts alike, from published latencies.

A Gaussian process over log ms (Rasmussen and Williams, "Gaussian Processes for Machine Learning",
2006, chapter 2). Two rows are as alike as their models (sizes and shares of a model's counts) and
as their contexts (levels of published.py that they share):

    k = sum over shared levels of  constant + linear x sizes and shares + rbf x nearness
        + a constant for the very model on the hardware, ... that both share

It knows nothing of how costs add up and so errs otherwise than the sum of costs does: published.py
goes by both. `benchmarks/fit_latencies.py` learns the constants by marginal likelihood. No torch
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dimefm_edge.latency.operators import COST_NAMES, Vector

LEVELS = ("all", "hardware", "hardware-precision", "runtime-precision", "device", "context")
MODEL_LEVELS = LEVELS[:4]
"""Where the very same model counts for more than its likes."""

_MACS = ("macs_conv", "macs_linear", "macs_grouped", "macs_depthwise", "macs_attention")
_KERNELS = tuple(name for name in COST_NAMES if name.startswith("kernels"))
_ACTIVATIONS = tuple(
    name for name in COST_NAMES if name.startswith("activations") and name != "activations_spilled"
)
_SHARES = {
    _MACS: ("macs_depthwise", "macs_grouped", "macs_attention", "macs_linear", "macs_pointwise",
            "macs_padding"),
    _KERNELS: ("kernels_depthwise", "kernels_attention", "kernels_activation", "kernels_norm",
               "kernels_mean", "kernels_move", "kernels_permute"),
    _ACTIVATIONS: ("activations_softmax", "activations_norm", "activations_batch_norm",
                   "activations_gelu", "activations_activation", "activations_depthwise"),
}  # fmt: skip
NUM_SIZES = 4
NUM_FEATURES = NUM_SIZES + sum(map(len, _SHARES.values()))


def model_features(costs: Vector) -> Vector:
    """Of a model's counts (..., len(COSTS)): logs of multiply-adds, weights, activations and
    kernels, then roots of shares of them; (..., NUM_FEATURES)."""

    def total(*names: str) -> Vector:
        return np.asarray(costs[..., [COST_NAMES.index(name) for name in names]].sum(-1))

    def positive(*names: str) -> Vector:
        return np.maximum(total(*names), 1e-9)

    sizes = [np.log(positive(*names)) for names in (_MACS, ("weights",), _ACTIVATIONS, _KERNELS)]
    shares = [
        np.sqrt(total(name) / positive(*of)) for of, names in _SHARES.items() for name in names
    ]
    return np.stack([*sizes, *shares], axis=-1)


@dataclass(frozen=True)
class Constants:
    """What was learned of how likeness counts; logs but for the scaling."""

    center: Vector
    """(NUM_FEATURES,)"""
    scale: Vector
    """(NUM_FEATURES,): features are centred and divided by it."""
    reach: Vector
    """(NUM_FEATURES,): log weight of each in `nearness` and `linear`."""
    shares_linear: float
    """Shares in `linear`, beside sizes."""
    sizes_near: float
    """Sizes in `nearness`, beside shares."""
    by_level: Vector
    """(3, len(LEVELS)): constant, linear, rbf."""
    by_model: Vector
    """(len(MODEL_LEVELS),)"""
    noise: float
    """Variance of one row."""

    def scaled(self, features: Vector) -> Vector:
        """Features as likeness weighs them."""
        return np.asarray((features - self.center) / self.scale * np.exp(self.reach))

    def likeness(self, first: Vector, second: Vector) -> tuple[Vector, Vector]:
        """`linear` and `nearness` of scaled features (N, F) and (M, F): two (N, M)."""
        sizes = first[:, :NUM_SIZES], second[:, :NUM_SIZES]
        shares = first[:, NUM_SIZES:], second[:, NUM_SIZES:]
        linear = sizes[0] @ sizes[1].T + np.exp(self.shares_linear) * (shares[0] @ shares[1].T)
        far = np.exp(2 * self.sizes_near) * _squared(*sizes) + _squared(*shares)
        return linear, np.exp(-far / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: np.asarray(value).round(4).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Constants:
        """From `to_dict`."""
        arrays: Any = {
            name: value if isinstance(value, float) else np.array(value)
            for name, value in values.items()
        }
        return cls(**arrays)


def _squared(first: Vector, second: Vector) -> Vector:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.asarray(np.maximum(squares, 0.0))


@dataclass(frozen=True)
class Analogy:
    """The process, given its rows."""

    constants: Constants
    mean: float
    """log ms of all rows."""
    models: Vector
    """(M, F) scaled features of the models of the rows."""
    weights: Mapping[str, Mapping[str, Vector]]
    """level -> key -> (M,): sums of the rows' weights by model."""
    by_name: Mapping[str, Mapping[str, float]]
    """level -> "key model" -> sum of weights."""

    def predict_near(
        self, keys: Mapping[str, str], costs: Vector, *, model: str = ""
    ) -> tuple[float, float]:
        """log ms of a model where the context's levels have these keys, and how near the nearest
        model of the rows is, in (0, 1]."""
        own = self.constants.scaled(model_features(costs))[None]
        linear, near = (part[0] for part in self.constants.likeness(own, self.models))
        total = self.mean
        for place, level in enumerate(LEVELS):
            weights = self.weights[level].get(keys[level])
            if weights is not None:
                constant, slope, bump = np.exp(self.constants.by_level[:, place])
                total += float(weights @ (constant + slope * linear + bump * near))
        for place, level in enumerate(MODEL_LEVELS):
            found = self.by_name[level].get(f"{keys[level]} {model}", 0.0)
            total += float(np.exp(self.constants.by_model[place])) * found
        return total, float(near.max())


def build_analogy(
    constants: Constants,
    mean: float,
    features: Vector,
    rows: Sequence[tuple[int, Mapping[str, str], str, float]],
) -> Analogy:
    """Sum up rows.

    Args:
        constants: As they were learned.
        mean: log ms of all rows.
        features: (M, NUM_FEATURES) of the models, not scaled.
        rows: (model's place in `features`, keys of its context by level, model's name, weight).
    """
    weights: dict[str, dict[str, Vector]] = {level: {} for level in LEVELS}
    by_name: dict[str, dict[str, float]] = {level: {} for level in MODEL_LEVELS}
    for place, keys, name, weight in rows:
        for level in LEVELS:
            sums = weights[level].setdefault(keys[level], np.zeros(len(features)))
            sums[place] += weight
        for level in MODEL_LEVELS:
            key = f"{keys[level]} {name}"
            by_name[level][key] = by_name[level].get(key, 0.0) + weight
    return Analogy(constants, mean, constants.scaled(features), weights, by_name)
