"""Images to embeddings, once for all measures: zero-shot, probe, retrieval, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.images import ImagePool, decode_batches
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec

EncodePixels = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Features:
    """Embeddings of the images of a pool that could be read."""

    rows: npt.NDArray[np.int64]
    """(N,) rows of the pool."""
    embeds: npt.NDArray[np.float32]
    """(N, E), L2-normalised."""
    num_bad: int
    """Images that could not be read."""


def embed_pool(
    encode_pixels: EncodePixels,
    preprocess: PreprocessSpec,
    pool: ImagePool,
    *,
    name: str,
    rows: npt.NDArray[np.int64] | None = None,
    batch_size: int = 250,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Features:
    """Decode and embed images.

    Args:
        encode_pixels: (B, S, S, 3) uint8 -> (B, E), L2-normalised.
        preprocess: How the images become S x S pixels: the model's own.
        pool: The images.
        name: Of the set, for the error.
        rows: (N,) rows of the pool; default: all.
        batch_size: Images per call.
        workers: Decoding threads; 0 chooses.
        advance: Told how many images each batch had.

    Raises:
        DataError: If no image can be read.
    """
    wanted = np.arange(len(pool), dtype=np.int64) if rows is None else rows
    batches = (wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size))
    kept, embeds, bad = [], [], 0
    for batch in decode_batches(pool, batches, preprocess, workers=workers):
        bad += len(batch.bad_rows)
        if len(batch.rows):
            kept.append(batch.rows)
            embeds.append(np.asarray(encode_pixels(batch.pixels), np.float32))
        if advance is not None:
            advance(len(batch.rows) + len(batch.bad_rows))
    if not kept:
        raise DataError(f"no image of the test set '{name}' could be read")
    return Features(np.concatenate(kept), np.concatenate(embeds), bad)
