"""Resampling with antialiasing as products of small matrices: Pillow's filters on BLAS.

Each output row is a weighted sum of a few input rows. Sixteen neighbouring ones share most of
theirs, so that they are one dense product, which BLAS does several times faster than Pillow's
loop over taps (benchmarks/bench_preprocess.py). Weights are those of Pillow's `Image.resize`
(its src/libImaging/Resample.c); answers are not rounded to 8 bits in between.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]

_OUTPUTS_PER_BLOCK = 16
"""More waste products on zeros, fewer waste time between products: 8 to 16 are the fastest."""
_MAX_PRODUCT = 2**18
"""Multiplications from which on OpenBLAS takes several threads (its interface/gemm.c): to wake
them takes longer than the product, on a busy machine 100 times so."""


def _triangle(x: Weights) -> Weights:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(x: Weights) -> Weights:
    """Keys' cubic (1981) with a = -0.5."""
    x = np.minimum(np.abs(x), 2)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


FILTERS: dict[str, tuple[Callable[[Weights], Weights], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
}
"""By name: the filter, and how far it reaches to each side, in samples of the coarser grid."""


@dataclass(frozen=True)
class Bands:
    """How one axis is resampled: a band matrix, cut into dense blocks along its diagonal."""

    size: int
    """Samples that come out."""
    start: int
    """The first sample that goes in; none before it matters."""
    stop: int
    """The end of those."""
    blocks: tuple[tuple[slice, slice, Floats], ...]
    """(which come out, which of [start, stop) go in, (out, in) weights)."""


@functools.lru_cache(maxsize=256)
def fit_bands(length: int, box: tuple[float, float], size: int, filter_name: str) -> Bands:
    """The weights that bring a stretch of an axis to a size.

    Args:
        length: Samples of the axis.
        box: Where the stretch begins and ends, in [0, length].
        size: Samples that it becomes.
        filter_name: A name in `FILTERS`.
    """
    kernel, reach = FILTERS[filter_name]
    scale = (box[1] - box[0]) / size
    stretch = max(scale, 1.0)  # enlarging interpolates, reducing averages
    centres = box[0] + (np.arange(size) + 0.5) * scale
    first = np.maximum((centres - reach * stretch + 0.5).astype(int), 0)
    last = np.minimum((centres + reach * stretch + 0.5).astype(int), length)
    taps = first[:, None] + np.arange((last - first).max())
    weights = kernel((taps + 0.5 - centres[:, None]) / stretch)
    weights[taps >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)

    begins = np.arange(0, size, _OUTPUTS_PER_BLOCK)
    low = first[begins]
    places = taps - low.repeat(_OUTPUTS_PER_BLOCK)[:size, None]
    dense = np.zeros((size, int(places.max()) + 1), np.float32)
    np.put_along_axis(dense, places, weights, axis=1)
    start, blocks = int(first[0]), []
    for begin, lowest in zip(begins.tolist(), low.tolist(), strict=True):
        end = min(begin + _OUTPUTS_PER_BLOCK, size)
        highest = int(last[end - 1])
        out, taken = slice(begin, end), slice(lowest - start, highest - start)
        blocks.append((out, taken, dense[out, : highest - lowest]))
    return Bands(size, start, int(last[-1]), tuple(blocks))


def resample(
    planes: Sequence[npt.NDArray[np.uint8]], rows: Bands, columns: Bands, *, out: Floats
) -> None:
    """Resample planes along both axes, columns first as Pillow does.

    Args:
        planes: C of (rows.stop - rows.start, columns.stop - columns.start) uint8.
        rows: How the height is resampled.
        columns: How the width is.
        out: (C, rows.size, columns.size) float32 that becomes the answer, in [0, 255].
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    pieces = _pieces(height, columns)
    lines = _scratch.take("lines", (pieces[0].stop, width))
    narrow = _scratch.take("narrow", (len(planes), height, columns.size))
    for plane, answer in zip(planes, narrow, strict=True):
        for some in pieces:  # which stay in the cache from the first step to the last
            made = answer[some]
            taken = lines[: len(made)]
            taken[...] = plane[some]
            for outs, reads, weights in columns.blocks:
                np.matmul(taken[:, reads], weights.T, out=made[:, outs])
            # A cubic overshoots at edges; Pillow clips here too.
            np.clip(made, 0, 255, out=made)
    for some in _pieces(columns.size, rows):
        for outs, reads, weights in rows.blocks:
            np.matmul(weights, narrow[:, reads, some], out=out[:, outs, some])
    np.clip(out, 0, 255, out=out)


def _pieces(lines: int, bands: Bands) -> list[slice]:
    """Lines in as few equal pieces as keep each product small."""
    largest = max(weights.size for _, _, weights in bands.blocks)
    count = -(-lines * largest // (_MAX_PRODUCT - 1))
    length = -(-lines // count)
    return [slice(at, at + length) for at in range(0, lines, length)]


class _Scratch(threading.local):
    """Memory that each thread keeps for its next picture.

    Fresh memory of this size comes from the operating system page by page, again for each
    picture: that took longer than the products.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Floats] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Floats:
        """An array of the shape, of what the last one of the name left."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].size < size:
            self._kept[name] = np.empty(size, np.float32)
        return self._kept[name][:size].reshape(shape)


_scratch = _Scratch()
