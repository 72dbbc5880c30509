"""Nearest rows of an embedding store by cosine, through faiss.

A small store is searched exactly. A large one has an inverted file of product-quantised rows
(IVF-PQ, Jegou et al. 2011), built once into a file beside the store and memory-mapped; what it
finds is ranked again by the store's own rows. No torch here.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.errors import MissingExtraError
from dimefm_edge.progress import counting

MAX_EXACT_ROWS = 100_000
_BLOCK_ROWS = 65_536
_ROWS_PER_LIST = 40  # faiss warns below 39 training rows a list
_MAX_LISTS = 16_384  # bounds what training holds: 2 GB at 768 dimensions
_NUM_ITERATIONS = 10  # of k-means, whose cost grows with the square of the lists
_GRAPH_LISTS = 4096  # from here on the nearest lists are found by a graph, not one by one
_NUM_PROBES = 32
_CANDIDATES = 8
"""Rows that are ranked again, for each that is asked for."""

Rows = npt.NDArray[np.int64]


class NearestRows:
    """An index over the rows of a store, or over some of them."""

    def __init__(self, store: EmbeddingStore, rows: Rows | None, index: Any) -> None:
        """Use `open`; `index` is None for exact search."""
        self._store, self._rows, self._index = store, rows, index
        self._exact: Any = None

    @classmethod
    def open(
        cls,
        store: EmbeddingStore,
        folder: Path,
        *,
        rows: Rows | None = None,
        max_exact: int = MAX_EXACT_ROWS,
    ) -> NearestRows:
        """Open the index, built first where it is missing.

        Args:
            store: L2-normalised embeddings.
            folder: Where the file of a large store's index is kept.
            rows: Rows that may be found, ascending; default: all that could be read.
            max_exact: Stores of up to this many rows are searched exactly, without a file.

        Raises:
            MissingExtraError: If faiss is not installed.
        """
        faiss = import_faiss()
        usable = store.valid_rows() if rows is None else rows
        if len(usable) <= max_exact:
            found = cls(store, usable, None)
            found._exact = faiss.IndexFlatIP(store.embed_dim)
            for start in range(0, len(usable), _BLOCK_ROWS):
                found._exact.add(_block(store, usable[start : start + _BLOCK_ROWS]))
            return found
        path = folder / f"index-{store_key(store, rows)}.faiss"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _build(store, usable, path)
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        index.nprobe = _NUM_PROBES
        return cls(store, None, index)

    def search(
        self, queries: npt.NDArray[np.float32], count: int
    ) -> tuple[npt.NDArray[np.float32], Rows]:
        """The nearest rows of each query, nearest first.

        Args:
            queries: (B, E), L2-normalised.
            count: Rows wanted; where fewer are found the last is repeated.

        Returns:
            (B, count) float32 cosines and (B, count) int64 rows of the store.
        """
        if self._exact is not None:
            assert self._rows is not None
            wanted = min(count, len(self._rows))
            cosines, places = self._exact.search(queries, wanted)
            rows = self._rows[places]
        else:
            _, candidates = self._index.search(queries, _CANDIDATES * count)
            cosines, rows = self._rank_again(queries, candidates, count)
        short = count - rows.shape[1]
        if short > 0:
            cosines, rows = (np.pad(a, ((0, 0), (0, short)), mode="edge") for a in (cosines, rows))
        return cosines, rows

    def _rank_again(
        self, queries: npt.NDArray[np.float32], candidates: Rows, count: int
    ) -> tuple[npt.NDArray[np.float32], Rows]:
        """By the store's own rows; -1 stands for a candidate that was not found."""
        known = np.where(candidates < 0, candidates[:, :1], candidates)
        embeds = self._store.gather(known.ravel()).astype(np.float32)
        cosines = np.einsum("be,bce->bc", queries, embeds.reshape(*known.shape, -1))
        cosines[candidates < 0] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        rows = np.take_along_axis(known, order, 1)
        best = np.take_along_axis(cosines, order, 1)
        missing = ~np.isfinite(best)
        last = np.maximum.accumulate(np.where(missing, 0, np.arange(best.shape[1])), axis=1)
        return np.take_along_axis(best, last, 1), np.take_along_axis(rows, last, 1)


def store_key(store: EmbeddingStore, rows: Rows | None, *more: object) -> str:
    """16 hex digits of whose embeddings, of what, which rows, and anything else."""
    manifest = store.manifest
    parts = (manifest.kind, manifest.weights_hash, manifest.source, manifest.num_rows, *more)
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    if rows is not None:
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()[:16]


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "nearest neighbours need faiss, which is not installed",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    return faiss


def _block(store: EmbeddingStore, rows: Rows) -> npt.NDArray[np.float32]:
    return store.gather(rows).astype(np.float32)


def _build(store: EmbeddingStore, rows: Rows, path: Path) -> None:
    faiss = import_faiss()
    lists = min(_MAX_LISTS, 2 ** round(math.log2(4 * math.sqrt(len(rows)))))
    sub_vectors = math.gcd(store.embed_dim, max(1, store.embed_dim // 8))
    graph = "_HNSW32" if lists >= _GRAPH_LISTS else ""
    index = faiss.index_factory(
        store.embed_dim, f"IVF{lists}{graph},PQ{sub_vectors}", faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = _NUM_ITERATIONS
    sample = np.random.default_rng(0).choice(
        len(rows), min(len(rows), _ROWS_PER_LIST * lists), replace=False
    )
    with counting("index", len(rows)) as advance:
        index.train(_block(store, rows[np.sort(sample)]))
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = rows[start : start + _BLOCK_ROWS]
            index.add_with_ids(_block(store, part), part)
            advance(len(part))
    temporary = path.with_name(f".{path.name}.tmp")  # faiss writes files only by name
    try:
        faiss.write_index(index, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
