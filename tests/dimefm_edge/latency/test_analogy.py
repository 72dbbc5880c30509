"""The analogy: exact where a Gaussian process is, near for models alike, silent about others."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dimefm_edge.latency.analogy import (
    LEVELS,
    NUM_FEATURES,
    Constants,
    build_analogy,
    model_features,
)
from dimefm_edge.latency.operators import PRIORS, cost_vector
from dimefm_edge.latency.published import load_published, parse_published
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.students import student_spec

NAMES = [f"vit-p8-w{width}-d{depth}" for width in (32, 64, 96, 128) for depth in (1, 2, 4)]


@pytest.fixture(scope="module")
def costs():
    specs = [student_spec(name, image_size=64, embed_dim=32) for name in NAMES]
    return np.array([cost_vector(trace_student(spec)) for spec in specs])


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    yield importlib.import_module("fit_analogy")
    sys.modules.pop("fit_analogy", None)


def contexts(count):
    """Two devices of one runtime, by turns: level -> key of each row."""
    device = [f"d{i % 2}" for i in range(count)]
    return {
        "all": ["all"] * count, "hardware": ["npu"] * count, "device": device,
        "hardware-precision": ["npu/fp16"] * count, "runtime-precision": ["qnn/fp16"] * count,
        "context": [f"{d} | qnn | fp16" for d in device],
    }  # fmt: skip


def rows_of(costs, models=NAMES):
    """Each model on both devices; the second is three times slower."""
    both = np.repeat(costs, 2, axis=0)
    keys = contexts(len(both))
    log_ms = np.log(both @ np.exp(PRIORS)) + np.tile([0.0, np.log(3.0)], len(costs))
    return both, log_ms, keys, list(np.repeat(models, 2))


def test_features_are_sizes_and_shares(costs):
    features = model_features(costs)
    assert features.shape == (len(NAMES), NUM_FEATURES)
    assert np.isfinite(features).all()
    twice = model_features(2 * costs)
    assert twice[:, :4] - features[:, :4] == pytest.approx(np.log(2.0))
    assert twice[:, 4:] == pytest.approx(features[:, 4:])
    assert features[:, 4:].min() >= 0
    assert model_features(np.zeros(costs.shape[1])).shape == (NUM_FEATURES,)  # nothing to divide by


def test_a_model_left_out_is_told_by_its_likes(costs, script):
    is_out = np.array([name == "vit-p8-w64-d2" for name in NAMES])
    rows = rows_of(costs[~is_out], [name for name in NAMES if name != "vit-p8-w64-d2"])
    constants, mean, weights = script.fit_analogy(*rows)
    values = script.to_dict(constants, mean, weights, rows[0], rows[2]["context"], rows[3])
    values = json.loads(json.dumps(values))
    assert len(values["models"]) == len(NAMES) - 1
    published = {"offsets": {level: {} for level in LEVELS}, "residuals": {}, "spreads": {}}
    analogy = parse_published(published | {"analogy": values}).analogy
    (out,) = costs[is_out]
    for device, slower in (("d0", 1.0), ("d1", 3.0)):
        keys = {level: rows[2][level][0] for level in LEVELS}
        keys |= {"device": device, "context": f"{device} | qnn | fp16"}
        predicted, near = analogy.predict_near(keys, out)
        assert np.exp(predicted) == pytest.approx(slower * (out @ np.exp(PRIORS)), rel=0.1)
        assert 0.5 < near <= 1.0
    assert analogy.predict_near(keys, 1e6 * out)[1] < near


def test_the_kernel_is_the_one_that_was_learned_with(costs, script):
    """Interpolation: with hardly any noise, predictions at the rows are K times the weights."""
    both, log_ms, keys, names = rows_of(costs)
    constants, mean, weights = script.fit_analogy(both, log_ms, keys, names)
    places = [(i // 2, {level: keys[level][i] for level in LEVELS}, names[i], float(w))
              for i, w in enumerate(weights)]  # fmt: skip
    analogy = build_analogy(constants, mean, model_features(costs), places)
    predicted = [analogy.predict_near(p[1], both[i], model=p[2])[0] for i, p in enumerate(places)]
    # (K + noise) weights = target, but for rows that are trusted less
    assert predicted == pytest.approx(log_ms - constants.noise * weights, abs=0.02)


def test_constants_come_back_from_json(costs, script):
    constants, _, _ = script.fit_analogy(*rows_of(costs))
    again = Constants.from_dict(json.loads(json.dumps(constants.to_dict())))
    for name, value in vars(constants).items():
        assert np.asarray(getattr(again, name)) == pytest.approx(np.asarray(value), abs=1e-4)


def test_what_ships_has_an_analogy_of_real_models():
    analogy = load_published().analogy
    assert analogy is not None
    assert len(analogy.models) > 100
    assert np.isfinite(analogy.models).all()
