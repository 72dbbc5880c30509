"""Search finds what it should, from uploads and from the server's own pictures."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from dimefm_demo.heat_map import as_seen
from dimefm_demo.inputs import UploadPool
from dimefm_demo.search import ServerIndexes, index_uploads
from dimefm_edge.data.scenes import held_out_objects, scene_name
from dimefm_edge.errors import DataError
from tests.demos import bad_files as bad

NAMES = [scene_name(combo) for combo in held_out_objects()][::8]


def ignore(count: int) -> None:
    pass


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    members = {f"<i>{name}</i>.png": bad.encoded(bad.scene(name), "PNG") for name in NAMES}
    (folder / "many.zip").write_bytes(bad.zipped({**members, "broken.jpg": b"no picture"}))
    return folder


def test_words_and_pictures_find_what_was_uploaded(uploads, models, tmp_path):
    model, done = models.wait_for("sample"), []
    pool = UploadPool([uploads / "many.zip"])
    index = index_uploads(model, pool, tmp_path, done.append)
    assert (len(index), sum(done)) == (len(NAMES), len(NAMES))
    assert index.describe_bad() == (
        "broken.jpg (it is no JPEG, PNG, WebP, GIF, BMP or TIFF picture)"
    )
    (uploads / "many.zip").unlink()  # the server deletes uploads before long
    words = models.label_bank(model, NAMES, ("a picture of a {c}.",)).embeds
    found = [index.search(row, count=1)[0].name for row in words]
    right = [name == f"<i>{wanted}</i>.png" for name, wanted in zip(found, NAMES, strict=True)]
    assert np.mean(right) >= 0.8
    pixels = as_seen(model, bad.scene(NAMES[3]))
    hits = index.search(model.subject.encode_pixels(pixels[None])[0], count=50)
    assert len(hits) == len(NAMES)
    assert hits[0].name == f"<i>{NAMES[3]}</i>.png"
    assert hits[0].cosine == pytest.approx(1, abs=1e-3)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
    assert hits[0].thumbnail.size == (64, 64)


def test_an_index_takes_its_folder_with_it(uploads, models, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    pool = UploadPool([uploads / "many.zip"])
    index = index_uploads(models.wait_for("baked"), pool, own, ignore)
    assert len(list(own.iterdir())) == 1
    del index
    gc.collect()
    assert list(own.iterdir()) == []
    (uploads / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the pictures can be read: bad\.png \(it is no"):
        index_uploads(models.wait_for("baked"), UploadPool([uploads / "bad.png"]), own, ignore)
    assert list(own.iterdir()) == []


def test_the_servers_pictures_are_indexed_once(models, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, done = models.wait_for("sample"), []
    indexes = ServerIndexes(["scenes:24"])
    index = indexes.index_of(model, done.append)
    assert indexes.index_of(model, done.append) is index
    again = ServerIndexes(["scenes:24"]).index_of(model, done.append)  # another day
    assert sum(done) == 24
    assert len(again) == 24
    words = models.label_bank(model, ["a red star"], ("{c}",)).embeds[0]
    assert [h.name for h in again.search(words, count=5)] == [
        h.name for h in index.search(words, count=5)
    ]
    assert ServerIndexes([]).sources == ("scenes:240",)
