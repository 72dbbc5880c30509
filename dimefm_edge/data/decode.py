"""Decode images into batches of pixels: in order, ahead of the consumer, on threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.image_files import BadImageError as BadImageError
from dimefm_edge.image_files import read_image
from dimefm_edge.preprocess import PreprocessSpec, resize_image

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

_CHUNK_IMAGES = 16  # per task of a thread
_BATCHES_AHEAD = 2
_MAX_THREADS = 16


class ImagePool(Protocol):
    """Images by row, in an order that does not change."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the names and sizes of all images."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What to call the image in a message."""

    def load(self, row: int) -> Image.Image:
        """The image, RGB.

        Raises:
            BadImageError: If it cannot be read.
        """


class WrappedPool:
    """The images of another pool, by its names: whoever inherits says how they are loaded."""

    def __init__(self, pool: ImagePool) -> None:
        self.pool = pool

    @property
    def fingerprint(self) -> str:
        return self.pool.fingerprint

    def __len__(self) -> int:
        return len(self.pool)

    def name(self, row: int) -> str:
        return self.pool.name(row)


@dataclass(frozen=True)
class DecodedBatch:
    """Pixels of the rows that could be read, in the order asked for."""

    rows: Rows
    """(B,) rows of the pool."""
    pixels: Pixels
    """(B, S, S, 3) uint8, RGB."""
    bad_rows: list[tuple[int, str]]
    """(row, reason) of those that could not."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file's bytes to RGB, as a person sees it: see `image_files`.

    Raises:
        BadImageError: If it is truncated, no image, or a decompression bomb.
    """
    return read_image(data, name)


def sample_rows(num_rows: int, count: int) -> Rows:
    """Some rows of a pool, by chance but the same each time, in an order of chance: any part of
    them stands for all. A pool's first rows are often of one kind.

    Returns:
        (min(count, num_rows),) int64.
    """
    return np.random.default_rng(0).choice(num_rows, min(count, num_rows), replace=False)


def some_images(pool: ImagePool, count: int) -> tuple[list[Image.Image], list[str]]:
    """Up to `count` images of a pool, as `sample_rows` chooses, and why others cannot be read."""
    images: list[Image.Image] = []
    bad: list[str] = []
    for row in sample_rows(len(pool), 10 * count):
        try:
            images.append(pool.load(int(row)))
        except BadImageError as error:
            bad.append(error.args[0])
        if len(images) == count:
            break
    return images, bad


def row_batches(ranges: Iterable[range], batch_size: int) -> Iterator[Rows]:
    """Cut ranges of rows into (B,) int64 pieces for `decode_batches`; none spans two ranges."""
    for rows in ranges:
        for start in range(rows.start, rows.stop, batch_size):
            yield np.arange(start, min(start + batch_size, rows.stop), dtype=np.int64)


def decode_batches(
    pool: ImagePool, batches: Iterable[Rows], spec: PreprocessSpec, *, workers: int = 0
) -> Iterator[DecodedBatch]:
    """Decode batches of rows, in order, some batches ahead.

    On threads: Pillow decodes and resizes without the GIL, and nothing is copied between
    processes (benchmarks/bench_data.py compares).

    Args:
        pool: Where the images come from.
        batches: (B,) int64 rows each; drawn lazily, so it may be endless.
        spec: Resize and crop.
        workers: Threads; 0 takes one per core that this process may use, at most 16.

    Yields:
        One DecodedBatch per batch; its rows may be none.
    """
    threads = workers if workers > 0 else min(available_cores(), _MAX_THREADS)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    pending: deque[_PendingBatch] = deque()
    try:
        for rows in batches:
            pending.append(_submit(executor, pool, np.asarray(rows, np.int64), spec))
            if len(pending) > _BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _PendingBatch:
    rows: Rows
    pixels: Pixels
    chunks: list[Future[list[tuple[int, str]]]]

    def result(self) -> DecodedBatch:
        bad = [item for chunk in self.chunks for item in chunk.result()]
        if not bad:
            return DecodedBatch(self.rows, self.pixels, [])
        is_good = np.ones(len(self.rows), bool)
        is_good[[place for place, _ in bad]] = False
        bad_rows = [(int(self.rows[place]), reason) for place, reason in bad]
        return DecodedBatch(self.rows[is_good], self.pixels[is_good], bad_rows)


def _submit(
    executor: ThreadPoolExecutor, pool: ImagePool, rows: Rows, spec: PreprocessSpec
) -> _PendingBatch:
    pixels = np.empty((len(rows), spec.image_size, spec.image_size, 3), np.uint8)

    def decode(start: int) -> list[tuple[int, str]]:
        bad = []
        for place in range(start, min(start + _CHUNK_IMAGES, len(rows))):
            try:
                image = pool.load(int(rows[place]))
                _check_shape(image, spec, name=str(rows[place]))
                pixels[place] = resize_image(image, spec)
            except BadImageError as error:
                bad.append((place, error.reason))
        return bad

    chunks = [executor.submit(decode, start) for start in range(0, len(rows), _CHUNK_IMAGES)]
    return _PendingBatch(rows, pixels, chunks)


def _check_shape(image: Image.Image, spec: PreprocessSpec, *, name: str) -> None:
    """Refuse an image so thin that bringing its short side to size would fill the memory."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or spec.resize_mode != "shortest":
        return
    short, long = sorted(image.size)
    if spec.image_size**2 * long / short > limit:
        raise BadImageError(name, f"{image.width} x {image.height} pixels are too thin to resize")
