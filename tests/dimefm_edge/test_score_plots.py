"""Plots: the files are whole and say what they should."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.errors import MissingExtraError
from dimefm_edge.evaluate.calibration import measure_calibration
from dimefm_edge.score_plots import ScorePoint, plot_reliability, plot_scores

POINTS = [
    ScorePoint("sample", 94.3, 14.6, 3.6),
    ScorePoint("/a/very/long/path/to/a/run/of/some/student/runs/$first", 86.2, 3.4, 1.4),
]


def test_accuracy_against_latency_and_parameters(tmp_path):
    paths = plot_scores(POINTS, tmp_path / "accuracy", accuracy="zero-shot (%)", latency="EPYC")
    assert [p.name for p in paths] == ["accuracy.png", "accuracy.svg"]
    with Image.open(paths[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn
    assert paths[1].read_text().startswith("<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "accuracy.svg"]


def test_models_without_a_latency_or_a_count(tmp_path):
    points = [ScorePoint("a", 50, None, 1.0), ScorePoint("b", 60, None, None)]
    paths = plot_scores(points, tmp_path / "accuracy", accuracy="x", latency="y")
    drawn = plot_scores(POINTS, tmp_path / "full", accuracy="x", latency="y")
    assert paths[0].read_bytes() != drawn[0].read_bytes()


def test_reliability(tmp_path):
    rng = np.random.default_rng(0)
    reports = [
        (name, measure_calibration("pets", rng.normal(size=(200, 3)), rng.integers(0, 3, 200), s))
        for name, s in (("teacher", 1.0), ("student", 5.0))
    ]
    paths = plot_reliability(reports, tmp_path / "reliability")
    with Image.open(paths[0]) as image:
        assert image.size[0] > 500


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError) as caught:
        plot_scores(POINTS, tmp_path / "x", accuracy="a", latency="b")
    assert caught.value.hint == "pip install 'dimefm_edge[eval]'"
    assert not list(tmp_path.iterdir())
