"""Nearest rows: exact ones against a product in numpy, indexed ones by how many are found."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from dimefm_edge.data.nearest import NearestRows, store_key
from dimefm_edge.data.store import EmbeddingStore, StoreManifest, StoreWriter
from dimefm_edge.errors import MissingExtraError

E = 32


def unit_rows(count: int, seed: int, *, centres: int = 0) -> np.ndarray:
    """Random unit vectors; around so many centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, E))
    if centres:
        rows = rng.normal(size=(centres, E))[rng.integers(0, centres, count)] + 0.5 * rows
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_store(folder: Path, rows: np.ndarray, *, kind="texts", bad=(), source="s"):
    manifest = StoreManifest(
        kind, "random", "0" * 16, "", source, rows.shape[1], 20.0, len(rows), shard_rows=65_536
    )
    writer = StoreWriter.create_or_resume(folder, manifest)
    for shard in writer.missing_shards():
        part = writer.manifest.rows_of(shard)
        of_shard = [(row, "broken") for row in bad if row in part]
        writer.write_shard(
            shard, rows[part.start : part.stop].astype(np.float16), bad_rows=of_shard
        )
    return writer.finish()


def brute(store: EmbeddingStore, queries: np.ndarray, rows: np.ndarray, count: int):
    cosines = queries @ store.gather(rows).astype(np.float32).T
    order = np.argsort(-cosines, axis=1)[:, :count]
    return np.take_along_axis(cosines, order, 1), rows[order]


def test_a_small_store_is_searched_exactly(tmp_path):
    store = write_store(tmp_path / "s", unit_rows(500, 0), bad=(3, 70))
    queries = unit_rows(40, 1)
    cosines, rows = NearestRows.open(store, tmp_path / "i").search(queries, 7)
    expected = brute(store, queries, store.valid_rows(), 7)
    assert np.array_equal(rows, expected[1])
    assert cosines == pytest.approx(expected[0], abs=1e-6)
    assert not (tmp_path / "i").exists()


def test_only_the_rows_asked_for_are_found_and_few_are_repeated(tmp_path):
    store = write_store(tmp_path / "s", unit_rows(100, 0))
    nearest = NearestRows.open(store, tmp_path / "i", rows=np.asarray([4, 50, 99]))
    cosines, rows = nearest.search(unit_rows(5, 1), 6)
    assert cosines.shape == rows.shape == (5, 6)
    assert all(set(row) == {4, 50, 99} for row in rows.tolist())
    assert (rows[:, 2:] == rows[:, 2:3]).all()


@pytest.mark.parametrize("chosen", [None, np.arange(0, 8_000, 2)])
def test_a_large_store_has_an_index_on_disk_that_finds_nearly_all(tmp_path, chosen):
    store = write_store(tmp_path / "s", unit_rows(8_000, 0, centres=200), bad=(8, 9))
    queries = unit_rows(200, 1, centres=200)
    nearest = NearestRows.open(store, tmp_path / "i", rows=chosen, max_exact=1000)
    (path,) = (tmp_path / "i").iterdir()
    begun = path.stat().st_mtime_ns
    cosines, rows = nearest.search(queries, 10)
    usable = store.valid_rows() if chosen is None else chosen
    assert np.isin(rows, usable).all()
    expected = brute(store, queries, usable, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected[1], strict=True)])
    assert recall > 0.85
    exact = np.einsum("be,bke->bk", queries, store.gather(rows.ravel()).reshape(200, 10, E))
    assert cosines == pytest.approx(exact, abs=1e-5)  # ranked again by the rows themselves
    assert (np.diff(cosines, axis=1) <= 0).all()
    again = NearestRows.open(store, tmp_path / "i", rows=chosen, max_exact=1000)
    assert np.array_equal(again.search(queries, 10)[1], rows)
    assert path.stat().st_mtime_ns == begun  # built once


def test_keys_tell_stores_and_rows_apart(tmp_path):
    one = write_store(tmp_path / "a", unit_rows(10, 0))
    same = write_store(tmp_path / "b", unit_rows(10, 0))
    other = write_store(tmp_path / "c", unit_rows(10, 0), source="t")
    assert store_key(one, None) == store_key(same, None) != store_key(other, None)
    keys = {store_key(one, rows) for rows in (None, np.arange(3), np.arange(4))}
    assert len(keys) == 3


def test_without_faiss_the_command_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    store = write_store(tmp_path / "s", unit_rows(10, 0))
    monkeypatch.setattr(builtins, "__import__", no_faiss)
    with pytest.raises(MissingExtraError, match=r"pip install 'dimefm_edge\[train\]'"):
        NearestRows.open(store, tmp_path / "i")
