"""Views: the same crop for teacher and student, out of a seed alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dimefm_edge.data.augment import crop_batch
from dimefm_edge.data.images import decode_batches, open_images
from dimefm_edge.data.views import Views, ViewSpec
from dimefm_edge.embed import embed_images
from dimefm_edge.errors import StoreError
from dimefm_edge.preprocess import PreprocessSpec

SPEC = ViewSpec(1, 0.4, True)
ROWS = np.asarray([5, 0, 11, 5])


def test_a_crop_is_of_seed_view_and_row_alone():
    crops = SPEC.crops(ROWS)
    assert crops.shape == (4, 2, 3)
    assert torch.equal(crops[0], crops[3])
    assert torch.equal(SPEC.crops(ROWS[2:]), crops[2:])
    for change in ({"view": 0}, {"seed": 1}):
        other = dataclasses.replace(SPEC, **change)
        assert not torch.equal(other.crops(ROWS), crops)
        assert other.digest() != SPEC.digest()


def test_crops_are_spread_as_asked():
    crops = ViewSpec(0, 0.4, True).crops(np.arange(2000))
    area = (crops[:, 0, 0] * crops[:, 1, 1]).abs()
    assert 0.39 < area.min() < 0.45
    assert area.max() > 0.9
    assert 0.45 < (crops[:, 0, 0] < 0).float().mean() < 0.55
    assert not (ViewSpec(0, 0.4, False).crops(np.arange(200))[:, 0, 0] < 0).any()
    moved = crops[:, 0, 2][crops[:, 0, 2] != 0]  # 0: as wide as the image
    assert len(moved.unique()) == len(moved) > 1500  # neighbours share no numbers


class MeanColours:
    """A teacher that answers with the colours of four quarters: it tells views apart."""

    name, weights_hash, preprocess = "means", "0" * 16, PreprocessSpec(image_size=32)
    embed_dim, logit_scale = 12, 10.0

    def encode_images(self, pixels):
        quarters = pixels.reshape(len(pixels), 2, 16, 2, 16, 3).mean((2, 4)).reshape(-1, 12)
        return (quarters / np.linalg.norm(quarters, axis=1, keepdims=True)).astype(np.float32)


def test_the_teacher_saw_what_the_student_sees(tmp_path):
    teacher, pool = MeanColours(), open_images(["scenes:12"])
    specs = tuple(ViewSpec(v, 0.4, True) for v in range(3))
    stores = tuple(
        embed_images(teacher, pool, tmp_path / str(s.view), view=s, batch_size=5) for s in specs
    )
    views = Views(specs, stores)
    (batch,) = decode_batches(pool, [ROWS], teacher.preprocess)
    seen = set()
    for seed in range(8):
        embeds, crops = views.gather(ROWS, np.random.default_rng(seed))
        images = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float()
        student = crop_batch(images, crops).permute(0, 2, 3, 1).numpy()
        assert embeds == pytest.approx(teacher.encode_images(student), abs=4e-3)
        seen.add(crops[1].numpy().tobytes())
    assert len(seen) == 3
    again = views.gather(ROWS, np.random.default_rng(7))
    assert np.array_equal(again[0], embeds)
    assert torch.equal(again[1], crops)


def test_a_store_of_another_view_is_refused(tmp_path):
    teacher, pool = MeanColours(), open_images(["scenes:12"])
    embed_images(teacher, pool, tmp_path / "v", view=SPEC)
    for view in (None, ViewSpec(2, 0.4, True)):
        with pytest.raises(StoreError, match="holds other images"):
            embed_images(teacher, pool, tmp_path / "v", view=view)


def test_a_fingerprint_says_how_many_views_there_are_and_tells_them_apart():
    two, other, three = (
        Views(tuple(ViewSpec(v, crop, True) for v in range(count)), ()).fingerprint
        for count, crop in ((2, 0.4), (2, 0.5), (3, 0.4))
    )
    assert [mark.partition(" ")[0] for mark in (two, other, three)] == ["2", "2", "3"]
    assert len({two, other, three}) == 3
