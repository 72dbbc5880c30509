"""Calibration: what each method makes of known values, and that batches do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from dimefm_edge.errors import ExportError, UnknownNameError
from dimefm_edge.export.calibration import Range, calibrate
from tests.dimefm_edge.export.int8_case import hand_made

NODES = [
    helper.make_node("Relu", ["image"], ["x"]),
    helper.make_node("Identity", ["x"], ["image_embeds"]),
]


def ranges(values: np.ndarray, method: str, *, batch: int | str = "B") -> dict[str, Range]:
    model = hand_made(NODES, {}, shape=[batch, values.shape[1]], out=[batch, values.shape[1]])
    return calibrate(model, values, tensors=["image", "x"], method=method)  # type: ignore[arg-type]


def test_minmax_is_exact_and_holds_zero():
    values = np.array([[1, 2], [3, 7], [2, 5]], np.float32)
    assert ranges(values, "minmax") == {"image": Range(0, 7), "x": Range(0, 7)}
    assert ranges(-values, "minmax") == {"image": Range(-7, 0), "x": Range(0, 0)}


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_the_order_and_the_batch_do_not_matter(method):
    """The histogram widens when larger values come; so it has counted what came before."""
    rows = np.random.default_rng(0).normal(size=(9, 500)).astype(np.float32)
    rows *= np.geomspace(0.01, 100, 9, dtype=np.float32)[:, None]
    found = ranges(rows, method)
    assert ranges(rows[::-1].copy(), method) == found
    assert ranges(rows, method, batch=9) == found
    assert ranges(rows, method, batch=1) == found
    assert found["x"].low == 0


def test_percentile_leaves_out_what_is_one_in_a_hundred_thousand():
    values = np.random.default_rng(0).uniform(-1, 1, size=(8, 100_000)).astype(np.float32)
    values[0, :3] = 50
    values[1, :3] = -70
    found = ranges(values, "percentile")["image"]
    assert -1.1 < found.low < -0.98
    assert 0.98 < found.high < 1.1
    assert ranges(values, "minmax")["image"] == Range(-70, 50)
    few = ranges(values[:, :1000], "percentile")["image"]  # of 8000, none may be left out
    assert few.high == pytest.approx(50, rel=1e-3)
    assert few.low == pytest.approx(-70, rel=1e-3)


def test_mse_clips_to_where_the_squared_error_is_least():
    """The optimum of 256 steps on a Laplace distribution, by brute force, within a grid step."""
    values = np.random.default_rng(0).laplace(size=(4, 20_000)).astype(np.float32)

    def error(clip: float) -> float:
        step = 2 * clip / 255
        rounded = np.clip(np.round((values + clip) / step), 0, 255) * step - clip
        return float(((rounded - values) ** 2).mean())

    found = ranges(values, "mse")["image"]
    best = min(np.linspace(2, np.abs(values).max(), 200), key=error)
    assert found.low == -found.high
    assert error(found.high) <= 1.05 * error(float(best))
    assert found.high < 0.9 * np.abs(values).max()


def test_zeros_everywhere():
    for method in ("minmax", "percentile", "mse"):
        assert ranges(np.zeros((2, 4), np.float32), method)["x"] == Range(0, 0)


def test_errors_say_what():
    with pytest.raises(UnknownNameError, match=r"method 'percentil'\. Did you mean"):
        ranges(np.ones((1, 2), np.float32), "percentil")
    with pytest.raises(ExportError, match="calibration needs at least one image\n  try: --images"):
        ranges(np.ones((0, 2), np.float32), "minmax")
    values = np.ones((6, 2), np.float32)
    values[5, 1] = np.nan
    with pytest.raises(ExportError, match="'x' is not finite on one of 4 images from number 4"):
        ranges(values, "minmax")
