"""Learn `dimefm_edge.latency.analogy` from rows: constants by marginal likelihood, then weights.

Used by fit_latencies.py. The kernel here is the one of analogy.py, in torch for its gradient;
tests hold them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dimefm_edge.latency.analogy import (
    LEVELS,
    MODEL_LEVELS,
    NUM_FEATURES,
    NUM_SIZES,
    Constants,
    model_features,
)

LEARNING_ROWS, ITERATIONS, SEED = 450, 30, 0
"""The constants are learned on that many rows by chance: the cost is cubic in them."""
DEGREES, REWEIGHTINGS = 4.0, 3
"""Of the Student-t residuals, by iteratively reweighted least squares."""
_JITTER = 1e-6
_SHRINK = 0.05  # of the constants to 0, in squares

_START = {
    "reach": [0.0] * NUM_SIZES + [-1.5] * (NUM_FEATURES - NUM_SIZES),
    "shares_linear": -3.0,
    "sizes_near": -0.5,
    "by_level": [
        [0.0, 0.0, -1.0, -1.0, 0.0, -2.0],
        [0.0, -1.0, -2.0, -2.0, -3.0, -4.0],
        [-1.0, -1.0, -2.0, -2.0, -4.0, -4.0],
    ],
    "by_model": [-4.0] * len(MODEL_LEVELS),
    "log_noise": -4.5,
}


def fit_analogy(
    costs: np.ndarray, log_ms: np.ndarray, keys: Mapping[str, Sequence[str]], names: Sequence[str]
) -> tuple[Constants, float, np.ndarray]:
    """Learn from rows.

    Args:
        costs: (N, len(COSTS)) of each row's model.
        log_ms: (N,)
        keys: Level -> its key of each row.
        names: Each row's model by name.

    Returns:
        The constants, the mean of log_ms, and each row's weight (N,).
    """
    raw = model_features(costs)
    center, spread = raw.mean(0), raw.std(0)
    scale = np.where(spread > 1e-4, spread, 1.0)  # what no model has tells none apart
    rows = _Rows(
        torch.from_numpy((raw - center) / scale),
        torch.stack([_codes(keys[level]) for level in LEVELS]),
        _codes(names),
        torch.from_numpy(log_ms - log_ms.mean()),
    )
    rng = np.random.default_rng(SEED)
    few = rng.choice(len(log_ms), min(LEARNING_ROWS, len(log_ms)), replace=False)
    learned = _learn(rows.take(torch.from_numpy(np.sort(few))))
    with torch.no_grad():
        weights = _weights(learned, rows)
    constants = Constants(
        center=center, scale=scale, noise=float(learned["log_noise"].exp()),
        **{k: v.numpy() if v.ndim else float(v) for k, v in learned.items() if k != "log_noise"},
    )  # fmt: skip
    return constants, float(log_ms.mean()), weights.numpy()


class _Rows:
    def __init__(self, features: Tensor, levels: Tensor, names: Tensor, target: Tensor) -> None:
        self.features, self.levels, self.names, self.target = features, levels, names, target

    def take(self, where: Tensor) -> _Rows:
        return _Rows(
            self.features[where], self.levels[:, where], self.names[where], self.target[where]
        )


def _codes(keys: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.unique(np.asarray(keys, dtype=str), return_inverse=True)[1])


def kernel(constants: Mapping[str, Tensor], rows: _Rows) -> Tensor:
    """(N, N): see analogy.py."""
    own = rows.features * constants["reach"].exp()
    sizes, shares = own[:, :NUM_SIZES], own[:, NUM_SIZES:]
    linear = sizes @ sizes.T + constants["shares_linear"].exp() * (shares @ shares.T)
    far = (2 * constants["sizes_near"]).exp() * _squared(sizes) + _squared(shares)
    near, by_level = (-far / 2).exp(), constants["by_level"].exp()
    same = rows.levels[:, :, None] == rows.levels[:, None, :]
    total = torch.zeros_like(linear)
    for place in range(len(LEVELS)):
        constant, slope, bump = by_level[:, place]
        total = total + same[place] * (constant + slope * linear + bump * near)
    is_model = rows.names[:, None] == rows.names[None]
    for place in range(len(MODEL_LEVELS)):
        total = total + (is_model & same[place]) * constants["by_model"][place].exp()
    return total


def _squared(values: Tensor) -> Tensor:
    squares = values.square().sum(1)
    return (squares[:, None] + squares[None] - 2 * values @ values.T).clamp(min=0)


def _learn(rows: _Rows) -> dict[str, Tensor]:
    constants = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in _START.items()
    }
    optimizer = torch.optim.LBFGS(
        list(constants.values()), max_iter=ITERATIONS, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        noise = constants["log_noise"].exp() + _JITTER
        factor = torch.linalg.cholesky(kernel(constants, rows) + noise * torch.eye(len(rows.names)))
        solved = torch.cholesky_solve(rows.target[:, None], factor)[:, 0]
        value = rows.target @ solved / 2 + factor.diagonal().log().sum()
        value = value + _SHRINK * sum(c.square().sum() for c in constants.values())
        value.backward()
        return value

    optimizer.step(loss)
    return {name: value.detach() for name, value in constants.items()}


def _weights(constants: Mapping[str, Tensor], rows: _Rows) -> Tensor:
    prior, noise = kernel(constants, rows), float(constants["log_noise"].exp()) + _JITTER
    trust = torch.ones(len(rows.names))
    for _ in range(REWEIGHTINGS):
        solved: Tensor = torch.linalg.solve(prior + torch.diag(noise / trust), rows.target)
        miss = noise / trust * solved
        trust = (DEGREES + 1) / (DEGREES + miss.square() / noise)
    return solved


def to_dict(
    constants: Constants, mean: float, weights: np.ndarray, costs: np.ndarray,
    contexts: Sequence[str], names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """As published.json has it: models and contexts once, rows by their places."""
    models: dict[tuple[float, ...], int] = {}
    places = [models.setdefault(tuple(np.round(f, 4)), len(models)) for f in model_features(costs)]
    context_list, name_list = sorted(set(contexts)), sorted(set(names))
    return {
        "constants": constants.to_dict(),
        "mean": mean,
        "models": [list(features) for features in models],
        "contexts": context_list,
        "names": name_list,
        "rows": [
            [place, context_list.index(c), name_list.index(n), float(f"{w:.5g}")]
            for place, c, n, w in zip(places, contexts, names, weights, strict=True)
        ],
    }
