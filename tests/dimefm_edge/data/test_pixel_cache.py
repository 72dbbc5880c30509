from __future__ import annotations

import json

import numpy as np
import pytest

from dimefm_edge.data import pixel_cache
from dimefm_edge.data.decode import decode_batches
from dimefm_edge.data.pixel_cache import DecodedPool, PixelCache
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec

SPEC = PreprocessSpec(image_size=6)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store" / "pixels.u8"


def filled(path) -> PixelCache:
    cache = PixelCache.create(path, 20, SPEC, "pool")
    cache.write(np.arange(20), PIXELS)
    cache.mark_complete()
    return cache


def test_what_is_written_is_gathered(path):
    cache = filled(path)
    rows = np.asarray([19, 0, 7, 7])
    assert np.array_equal(cache.gather(rows), PIXELS[rows])
    opened = PixelCache.open(path, 20, SPEC, "pool")
    assert len(opened) == 20
    gathered = opened.gather(rows)
    assert np.array_equal(gathered, PIXELS[rows])
    gathered[:] = 0  # a copy
    assert np.array_equal(opened.gather(rows), PIXELS[rows])
    assert sorted(p.name for p in path.parent.iterdir()) == ["pixels.u8", "pixels.u8.json"]


def test_row_outside(path):
    with pytest.raises(IndexError):
        filled(path).gather(np.asarray([20]))


def test_unfinished_cache_goes_on(path):
    first = PixelCache.create(path, 20, SPEC, "pool")
    first.write(np.arange(10), PIXELS[:10])
    first.flush()
    assert not first.is_complete
    with pytest.raises(DataError, match="was not finished"):
        PixelCache.open(path, 20, SPEC, "pool")
    second = PixelCache.create(path, 20, SPEC, "pool")
    assert not second.is_complete
    second.write(np.arange(10, 20), PIXELS[10:])
    second.mark_complete()
    assert second.is_complete
    assert np.array_equal(PixelCache.open(path, 20, SPEC, "pool").gather(np.arange(20)), PIXELS)
    assert PixelCache.create(path, 20, SPEC, "pool").is_complete


@pytest.mark.parametrize("open_cache", [PixelCache.create, PixelCache.open])
@pytest.mark.parametrize(
    ("num_rows", "spec", "pool", "message"),
    [
        (20, SPEC, "other", "pool pool, not other"),
        (19, SPEC, "pool", "num_rows 20, not 19"),
        (20, PreprocessSpec(image_size=7), "pool", "image_size 6, not 7"),
        (20, PreprocessSpec(image_size=6, resize_mode="squash"), "pool", "preprocess"),
    ],
)
def test_another_pools_cache_is_refused(path, open_cache, num_rows, spec, pool, message):
    filled(path)
    with pytest.raises(DataError, match=f"belongs to other images .*{message}") as caught:
        open_cache(path, num_rows, spec, pool)
    assert "another --store or --out" in str(caught.value)
    assert np.array_equal(PixelCache.open(path, 20, SPEC, "pool").gather(np.arange(20)), PIXELS)


def test_truncated_file_is_refused(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is truncated: 2159 of 2160 bytes"):
        PixelCache.open(path, 20, SPEC, "pool")


@pytest.mark.parametrize("meta", [None, "{", "[]", "{}"])
def test_file_without_its_json_is_refused(path, meta):
    filled(path)
    beside = path.with_name("pixels.u8.json")
    beside.unlink()
    if meta is not None:
        beside.write_text(meta)
    for open_cache in (PixelCache.create, PixelCache.open):
        with pytest.raises(DataError, match=r"is no pixel cache: pixels\.u8\.json"):
            open_cache(path, 20, SPEC, "pool")


def test_killed_between_the_json_and_the_pixels(path):
    filled(path)
    path.unlink()
    cache = PixelCache.create(path, 20, SPEC, "pool")
    assert not cache.is_complete
    assert json.loads(path.with_name("pixels.u8.json").read_text())["complete"] is False


def test_no_cache_there(path):
    with pytest.raises(DataError, match="there is no pixel cache at"):
        PixelCache.open(path, 20, SPEC, "pool")


def test_full_disk(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixel_cache.os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"pixel cache of 0 MiB .* No space left on device"):
        PixelCache.create(path, 20, SPEC, "pool")
    assert [p.name for p in path.parent.iterdir()] == ["pixels.u8.json"]


def test_a_decoded_pool_gives_the_cache_and_remembers_what_was_bad(path):
    class Files:
        fingerprint = "pool"

        def __len__(self):
            return 20

        def name(self, row):
            return f"{row}.jpg"

        def load(self, row):
            raise AssertionError("decoded again")

    pool = DecodedPool(Files(), filled(path), {3: "truncated"})
    assert (pool.fingerprint, len(pool), pool.name(4)) == ("pool", 20, "4.jpg")
    (batch,) = decode_batches(pool, [np.asarray([19, 3, 0])], SPEC)
    assert batch.rows.tolist() == [19, 0]
    assert np.array_equal(batch.pixels, PIXELS[[19, 0]])
    assert batch.bad_rows == [(3, "truncated")]
