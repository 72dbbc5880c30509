"""Multinomial logistic regression in torch: scikit-learn's objective, to its end, in seconds.

On frozen embeddings of tens of thousands of images and hundreds of classes scikit-learn takes
minutes a fit, and a linear probe makes fifteen. Full batches, float64, L-BFGS with strong Wolfe
line search (Nocedal and Wright, Numerical Optimization, chapter 7), preconditioned: embeddings
vary far more in some directions than in others, so the search runs in coordinates
where the Hessian at equal probabilities, covariance / classes + penalty, is 1. Used by studies.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

GRADIENT_TOLERANCE = 1e-4
"""Largest gradient of the mean loss at the end, in the search's coordinates."""


class TorchLogisticRegression:
    """What a linear probe asks of scikit-learn's LogisticRegression, on any device of torch."""

    def __init__(self, c: float, *, max_iter: int = 1000, device: str = "cpu") -> None:
        self.c, self.max_iter, self.device = c, max_iter, device

    def fit(
        self, embeds: npt.NDArray[Any], labels: npt.NDArray[np.int64]
    ) -> TorchLogisticRegression:
        """Minimise C times the sum of cross-entropies plus half of |W|^2; intercepts are free.

        Args:
            embeds: (N, E).
            labels: (N,) integers of two values or more.
        """
        self.classes_, targets = np.unique(labels, return_inverse=True)
        x = torch.from_numpy(embeds).to(self.device, torch.float64)
        x = F.pad(x, (0, 1), value=1.0)  # the intercept's column
        y = torch.from_numpy(targets).to(self.device)
        # Of two classes scikit-learn has one vector, the difference of ours.
        strength = (2.0 if len(self.classes_) == 2 else 1.0) / (self.c * len(x))
        penalty = torch.full_like(x[0], strength)
        penalty[-1] = 0.0
        values, vectors = torch.linalg.eigh(
            x.T @ x / (len(x) * len(self.classes_)) + penalty.diag()
        )
        scale = (vectors * values.clamp_min(values[-1] * 1e-12).rsqrt()) @ vectors.T
        found = torch.zeros(len(self.classes_), len(scale)).to(x).requires_grad_()
        solver = torch.optim.LBFGS(
            [found], max_iter=self.max_iter, history_size=10, line_search_fn="strong_wolfe",
            tolerance_grad=GRADIENT_TOLERANCE, tolerance_change=0,
        )  # fmt: skip

        def loss() -> torch.Tensor:
            solver.zero_grad()
            weights = found @ scale
            value = F.cross_entropy(x @ weights.T, y) + 0.5 * (weights.square() @ penalty).sum()
            value.backward()
            return value

        solver.step(loss)
        self.n_iter_ = np.array([solver.state[found]["n_iter"]])
        self.weights = found.detach() @ scale
        return self

    def decision_function(self, embeds: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """(N, E) -> (N, C) logits; of two classes (N,), the margin of the second."""
        x = torch.from_numpy(embeds).to(self.weights)
        logits = (x @ self.weights[:, :-1].T + self.weights[:, -1]).cpu().numpy()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict(self, embeds: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """(N, E) -> (N,) labels."""
        logits = self.decision_function(embeds)
        index = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)
        chosen: npt.NDArray[np.int64] = self.classes_[index]
        return chosen
