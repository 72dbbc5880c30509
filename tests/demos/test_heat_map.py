"""The heat map lies where the thing is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dimefm_demo.heat_map import GRID, as_seen, draw, relevance
from dimefm_edge.data.scenes import scene_test_set
from tests.demos import bad_files as bad


def centre_of(image: Image.Image) -> tuple[float, float]:
    """Of what is red, as shares of the height and width."""
    values = np.asarray(image).astype(int)
    is_red = (values[..., 0] > 130) & (values[..., 1] < 90) & (values[..., 2] < 90)
    ys, xs = np.nonzero(is_red)
    return float(np.median(ys)) / 64, float(np.median(xs)) / 64


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_it_is_hot_where_the_thing_is(turn, models):
    drawn = scene_test_set()
    row = drawn.classnames.index("red ladder") + turn * len(drawn.classnames)
    image, model = drawn.image(row), models.wait_for("sample")
    label = models.label_bank(model, ["red ladder"], drawn.templates).embeds[0]
    shares: list[float] = []
    heat = relevance(model, as_seen(model, image), label, advance=shares.append)
    assert heat.shape == (GRID, GRID)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    hot = (np.unravel_index(heat.argmax(), heat.shape) + np.float64(0.5)) / GRID
    assert np.abs(hot - centre_of(image)).max() < 0.25


def test_it_is_drawn_red_over_grey(models):
    model = models.wait_for("sample")
    pixels = as_seen(model, bad.scene())
    heat = np.zeros((GRID, GRID), np.float32)
    assert np.ptp(np.asarray(draw(pixels, heat)).astype(int), axis=2).mean() < 60
    heat[2, 5] = 0.1
    heat[6, 1] = -0.4  # a gain is not shown
    shown = np.asarray(draw(pixels, heat)).astype(int)
    red = shown[..., 0] - shown[..., 2]
    assert np.unravel_index(red.argmax(), red.shape) == pytest.approx((120, 264), abs=40)
