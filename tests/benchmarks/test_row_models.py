"""The detectors of the fit have the parameters and products that ultralytics publishes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.row_models import build_detector
from dimefm_edge.latency.operators import total_gmacs
from dimefm_edge.latency.trace import trace_ops


@pytest.mark.parametrize(
    ("name", "params_m", "gflops"),
    [  # docs.ultralytics.com at 640 px, batch norms merged
        ("yolov8n", 3.2, 8.7), ("yolov8s", 11.2, 28.6), ("yolov8m", 25.9, 78.9),
        ("yolov8l", 43.7, 165.2), ("yolov8x", 68.2, 257.8),
        ("yolo11n", 2.6, 6.5), ("yolo11s", 9.4, 21.5), ("yolo11m", 20.1, 68.0),
        ("yolo11l", 25.3, 86.9), ("yolo11x", 56.9, 194.9),
    ],
)  # fmt: skip
def test_detectors_are_as_published(name, params_m, gflops):
    with torch.device("meta"):
        detector = build_detector(name)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(params_m, abs=0.06)
    assert 2 * total_gmacs(trace_ops(detector, 640)) == pytest.approx(gflops, rel=0.01)
