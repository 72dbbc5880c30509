"""Images to embeddings: order, rows, and images that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.data.images import open_labelled
from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.features import embed_pool
from dimefm_edge.preprocess import PreprocessSpec, resize_image

SPEC = PreprocessSpec(image_size=4)


def flat(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).astype(np.float32)


def test_all_rows_and_some(labelled_dir):
    pool = open_labelled(str(labelled_dir)).pool
    seen = []
    every = embed_pool(flat, SPEC, pool, name="pets", batch_size=5, advance=seen.append)
    wanted = flat(np.stack([resize_image(pool.load(row), SPEC) for row in range(12)]))
    assert np.array_equal(every.embeds, wanted)
    assert every.rows.tolist() == list(range(12))
    assert seen == [5, 5, 2]
    some = embed_pool(flat, SPEC, pool, name="pets", rows=np.asarray([7, 2, 9]))
    assert np.array_equal(some.embeds, wanted[[7, 2, 9]])
    assert some.rows.tolist() == [7, 2, 9]


def test_unreadable_images_are_counted(labelled_dir, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((labelled_dir / name / "0.png").read_bytes())
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    pool = open_labelled(str(tmp_path)).pool
    found = embed_pool(flat, SPEC, pool, name="pets", batch_size=1)
    assert (found.rows.tolist(), found.num_bad) == ([0, 2], 1)
    with pytest.raises(DataError, match="no image of the test set 'pets' could be read"):
        embed_pool(flat, SPEC, pool, name="pets", rows=np.asarray([1]))
