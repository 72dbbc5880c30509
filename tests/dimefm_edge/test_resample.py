"""Resampling: Pillow's own answers, within its rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dimefm_edge.resample import FILTERS, fit_bands, resample

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def ours(pixels, box, size, name):
    (left, top, right, bottom), (width, height) = box, size
    rows = fit_bands(pixels.shape[0], (top, bottom), height, name)
    columns = fit_bands(pixels.shape[1], (left, right), width, name)
    part = pixels[rows.start : rows.stop, columns.start : columns.stop]
    out = np.full((3, height, width), np.nan, np.float32)
    resample(list(part.transpose(2, 0, 1)), rows, columns, out=out)
    return out.transpose(1, 2, 0)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_as_pillow_resizes(data):
    """Black and white noise is the worst case: every edge overshoots and is clipped."""
    width, height, *size = (data.draw(st.integers(1, 90)) for _ in range(4))
    name = data.draw(st.sampled_from(sorted(FILTERS)))
    edges = st.floats(0, 1, width=16)
    left, right = sorted((data.draw(edges) * width, data.draw(edges) * width))
    top, bottom = sorted((data.draw(edges) * height, data.draw(edges) * height))
    if right - left < 0.1 or bottom - top < 0.1:
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    box = (left, top, right, bottom)
    pixels = (noise(width, height, data.draw(st.integers(0, 9))) > 127).astype(np.uint8) * 255
    image = Image.fromarray(pixels).resize(tuple(size), PILLOW[name], box=box)
    found = ours(pixels, box, size, name)
    assert found.dtype == np.float32
    assert found.shape == (size[1], size[0], 3)
    # Pillow rounds after each axis, and its bicubic weighs by up to 1.3 in all what was rounded.
    assert np.abs(found - np.asarray(image)).max() < 1.3


@pytest.mark.parametrize("size", [(224, 224), (600, 17), (1, 900), (1100, 1030)])
def test_large_and_thin(size):
    """More lines than one product takes, and sizes that leave a rest in the last block."""
    pixels = noise(1300, 700)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    found = ours(pixels, (0.0, 0.0, 1300.0, 700.0), size, "bicubic")
    assert np.abs(found - np.asarray(image)).max() < 1.3


def test_the_same_size_is_the_same_picture():
    pixels = noise(40, 30)
    found = ours(pixels, (0.0, 0.0, 40.0, 30.0), (40, 30), "bicubic")
    np.testing.assert_allclose(found, pixels, atol=1e-4)


def test_threads_do_not_share_their_memory():
    jobs = [(noise(200 + 9 * i, 150 - 7 * i, i), (40 + i, 30 + 3 * i)) for i in range(12)] * 4

    def run(job):
        pixels, size = job
        box = (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))
        return ours(pixels, box, size, "bicubic")

    wanted = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as executor:
        for found, one in zip(executor.map(run, jobs), wanted, strict=True):
            assert np.array_equal(found, one)


def test_only_what_a_box_needs_is_read():
    bands = fit_bands(1000, (400.0, 500.0), 50, "bicubic")
    assert (bands.start, bands.stop) == (397, 503)  # two output samples' reach beyond the box
    assert bands.blocks[0][1].start == 0
    assert bands.blocks[-1][1].stop == bands.stop - bands.start
    assert [out.stop - out.start for out, _, _ in bands.blocks] == [16] * 3 + [2]


def test_products_stay_below_what_openblas_takes_threads_for(monkeypatch):
    sizes = []
    matmul = np.matmul

    def counted(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", counted)
    pixels = noise(1500, 1500)  # four samples for each: the most that `model_input` leaves
    ours(pixels, (0.0, 0.0, 1500.0, 1500.0), (384, 384), "bicubic")
    assert max(sizes) < 2**18
