"""Which sentences are nearest to each image, told once: a step then gathers its hard negatives.

DIME-FM (arXiv 2303.18232) builds batches whose sentences are near neighbours of their images.
The table is (N_images, k) int32 in one memory-mapped file beside the stores. No torch here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.nearest import MAX_EXACT_ROWS, NearestRows, store_key
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.progress import counting

DEFAULT_NEIGHBOURS = 16
_BLOCK_ROWS = 4096

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NeighbourTable:
    """The nearest sentences of every image."""

    rows: npt.NDArray[np.int32]
    """(N_images, k) rows of the store of sentences, nearest first."""
    fingerprint: str

    def of(self, image_rows: Rows) -> Rows:
        """Each sentence that is near to one of the images, once, ascending: int64."""
        return np.unique(self.rows.take(image_rows, axis=0)).astype(np.int64)


def open_neighbours(
    images: EmbeddingStore,
    texts: EmbeddingStore,
    folder: Path,
    *,
    count: int = DEFAULT_NEIGHBOURS,
    text_rows: Rows | None = None,
    max_exact: int = MAX_EXACT_ROWS,
) -> NeighbourTable:
    """Open the table, made first where it is missing; a killed run loses one block.

    Args:
        images: The teacher's image embeddings.
        texts: Its text embeddings.
        folder: Where table and index are kept.
        count: Sentences of each image.
        text_rows: Rows of `texts` that may be drawn, ascending; default: all.
        max_exact: As `NearestRows.open`.

    Raises:
        MissingExtraError: If faiss is not installed.
    """
    key = store_key(texts, text_rows, store_key(images, None), count, max_exact)
    path = folder / f"neighbours-{key}.i32"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        nearest = NearestRows.open(texts, folder, rows=text_rows, max_exact=max_exact)
        _fill(images, nearest, path, count)
    table = np.memmap(path, np.int32, "r", shape=(len(images), count))
    return NeighbourTable(table, key)


def _fill(images: EmbeddingStore, nearest: NearestRows, path: Path, count: int) -> None:
    part = path.with_name(f".{path.name}.part")
    block_bytes = _BLOCK_ROWS * count * 4
    done = part.stat().st_size // block_bytes if part.is_file() else 0
    with part.open("ab") as stream, counting("nearest sentences", len(images)) as advance:
        stream.truncate(done * block_bytes)
        advance(done * _BLOCK_ROWS)
        for start in range(done * _BLOCK_ROWS, len(images), _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, len(images)))
            _, found = nearest.search(images.gather(rows).astype(np.float32), count)
            stream.write(np.ascontiguousarray(found, "<i4").data)
            stream.flush()
            advance(len(rows))
        os.fsync(stream.fileno())
    os.replace(part, path)
