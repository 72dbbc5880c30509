"""benchmarks/torch_logistic.py against scikit-learn: one objective, one answer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
linear_model = pytest.importorskip("sklearn.linear_model")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def regression(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("torch_logistic").TorchLogisticRegression
    sys.modules.pop("torch_logistic", None)


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_it_answers_as_scikit_learn(regression, strength, num_classes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 12)).astype(np.float32)
    noise = rng.normal(size=(500, num_classes))
    y = 3 * (x @ rng.normal(size=(12, num_classes)) + noise).argmax(1)  # labels with gaps
    ours = regression(strength).fit(x[:400], y[:400])
    theirs = linear_model.LogisticRegression(C=strength, max_iter=1000).fit(x[:400], y[:400])
    assert ours.classes_.tolist() == theirs.classes_.tolist()
    assert 0 < ours.n_iter_.max() < 1000
    found, expected = ours.decision_function(x[400:]), theirs.decision_function(x[400:])
    assert found.shape == expected.shape
    if num_classes > 2:  # a shift of all logits changes no probability
        found, expected = (v - v.mean(1, keepdims=True) for v in (found, expected))
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert (ours.predict(x[400:]) == theirs.predict(x[400:])).mean() > 0.98


def test_it_reaches_the_minimum_where_embeddings_lie_along_few_directions(regression):
    rng = np.random.default_rng(2)
    y = rng.integers(0, 20, 1000)
    spread = np.exp(-np.arange(40) / 6)
    x = (rng.normal(size=(20, 40))[y] + rng.normal(size=(1000, 40))) * spread
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    def objective(weights, intercept):
        logits = x @ weights.T + intercept
        top = logits.max(1)
        lost = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(1000), y]
        return lost.mean() + np.square(weights).sum() / (2 * 100.0 * 1000)

    ours = regression(100.0).fit(x, y)
    theirs = linear_model.LogisticRegression(C=100.0, max_iter=10_000, tol=1e-8).fit(x, y)
    least = objective(theirs.coef_, theirs.intercept_)
    found = objective(ours.weights[:, :-1].numpy(), ours.weights[:, -1].numpy())
    assert found == pytest.approx(least, rel=1e-3)
    assert ours.n_iter_[0] < theirs.n_iter_[0] / 2


def test_a_linear_probe_takes_it(regression):
    from dimefm_edge.evaluate.linear_probe import fit_linear_probe

    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] + rng.normal(size=(300, 3)) * 0.2).astype(np.float32)
    probe = fit_linear_probe(
        x, y, 3, name="three", solve=lambda e, labels, c: regression(c).fit(e, labels)
    )
    assert probe.has_converged
    assert probe.val_pct > 95
    assert (probe.scores(x).argmax(1) == y).mean() > 0.95
