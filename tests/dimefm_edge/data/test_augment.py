from __future__ import annotations

import pytest
import torch

from dimefm_edge.data.augment import crop_batch, random_crops, seeded_generator


def crops(count: int = 64, **settings):
    values = {"min_crop": 0.3, "flip": True, "generator": seeded_generator(0, 1), **settings}
    return random_crops(count, **values)


def test_crops_belong_to_their_key():
    assert torch.equal(crops(), crops())
    assert not torch.equal(crops(), crops(generator=seeded_generator(0, 2)))


def test_a_prefix_of_a_batch_has_the_same_crops():
    # Two ranks of half the batch see what one rank would.
    assert torch.equal(crops(64)[:32], crops(32))


def test_crop_stays_inside_and_keeps_its_area():
    theta = crops(2000, min_crop=0.25)
    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
    assert (theta[:, 0, 2].abs() + width <= 1 + 1e-6).all()
    assert (theta[:, 1, 2].abs() + height <= 1 + 1e-6).all()
    assert (width * height).min() > 0.2
    assert (width * height).max() <= 1


@pytest.mark.parametrize("flip", [True, False])
def test_flip_mirrors_half_or_none(flip):
    share = (crops(2000, flip=flip)[:, 0, 0] < 0).float().mean()
    assert share == pytest.approx(0.5 if flip else 0, abs=0.05)


def test_whole_image_crop_is_the_image():
    images = torch.rand(2, 3, 16, 16)
    whole = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).repeat(2, 1, 1)
    torch.testing.assert_close(crop_batch(images, whole), images)
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]).repeat(2, 1, 1)
    torch.testing.assert_close(crop_batch(images, mirror), images.flip(-1))
