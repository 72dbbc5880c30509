"""The table of nearest sentences: right, made once, and made on where it was stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dimefm_edge.data import neighbours
from dimefm_edge.data.nearest import NearestRows
from dimefm_edge.data.neighbours import open_neighbours

_spec = importlib.util.spec_from_file_location(
    "nearest_case", Path(__file__).with_name("test_nearest.py")
)
case = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(case)


@pytest.fixture
def stores(tmp_path):
    return (
        case.write_store(tmp_path / "images", case.unit_rows(230, 5), kind="images"),
        case.write_store(tmp_path / "texts", case.unit_rows(400, 6)),
    )


def test_each_image_has_its_nearest_sentences(stores, tmp_path):
    images, texts = stores
    table = open_neighbours(images, texts, tmp_path / "n", count=4)
    assert (table.rows.shape, table.rows.dtype) == ((230, 4), np.int32)
    queries = images.gather(np.arange(230)).astype(np.float32)
    assert np.array_equal(table.rows, case.brute(texts, queries, np.arange(400), 4)[1])
    of = table.of(np.asarray([7, 7, 200]))
    assert of.tolist() == sorted({*table.rows[7].tolist(), *table.rows[200].tolist()})
    assert of.dtype == np.int64


def test_it_is_made_once_and_for_these_rows(stores, tmp_path):
    table = open_neighbours(*stores, tmp_path / "n", count=4)
    (path,) = (tmp_path / "n").iterdir()
    begun = path.stat().st_mtime_ns
    assert open_neighbours(*stores, tmp_path / "n", count=4).fingerprint == table.fingerprint
    assert path.stat().st_mtime_ns == begun
    some = open_neighbours(*stores, tmp_path / "n", count=4, text_rows=np.arange(0, 400, 5))
    assert (some.rows % 5 == 0).all()
    assert some.fingerprint != table.fingerprint


def test_a_stopped_table_goes_on_from_its_last_block(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", 50)
    whole = open_neighbours(*stores, tmp_path / "whole", count=4)
    real, asked = NearestRows.search, []

    def stop_at_third(self, queries, count):
        asked.append(len(queries))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, queries, count)

    monkeypatch.setattr(NearestRows, "search", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        open_neighbours(*stores, tmp_path / "n", count=4)
    (part,) = (tmp_path / "n").iterdir()
    part.write_bytes(part.read_bytes() + b"torn")  # a block that was being written
    assert open_neighbours(*stores, tmp_path / "n", count=4).rows.tolist() == whole.rows.tolist()
    assert asked == [50, 50, 50, 50, 50, 30]  # two blocks, the stop, the remaining three
