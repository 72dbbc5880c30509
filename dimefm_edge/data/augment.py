"""Random crop and mirror of a batch, on the device that trains.

The random numbers belong to (seed, step) and the place in the global batch, not to a worker
or a rank: a resumed run, and two ranks of half the batch, see the same crops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of non-negative integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def random_crops(count: int, *, min_crop: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Draw crops as affine maps (RandomResizedCrop's distribution, Inception).

    Args:
        count: Number of images.
        min_crop: Smallest area as a share of the image, in (0, 1].
        flip: Mirror half of the images.
        generator: Source of every random number.

    Returns:
        (count, 2, 3) float32 for `torch.nn.functional.affine_grid`.
    """
    draws = torch.rand(count, 5, generator=generator)
    return crops_of_draws(draws, min_crop=min_crop, flip=flip)


def crops_of_draws(draws: Tensor, *, min_crop: float, flip: bool) -> Tensor:
    """The crops that (B, 5) uniform numbers in [0, 1) stand for: see `random_crops`."""
    area = min_crop + (1 - min_crop) * draws[:, 0]
    aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1.0)
    height = (area / aspect).sqrt().clamp(max=1.0)
    theta = torch.zeros(len(draws), 2, 3)
    theta[:, 0, 2] = (2 * draws[:, 2] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * draws[:, 3] - 1) * (1 - height)
    mirror = torch.where((draws[:, 4] < 0.5) & flip, -1.0, 1.0)
    theta[:, 0, 0] = width * mirror
    theta[:, 1, 1] = height
    return theta


def crop_batch(images: Tensor, theta: Tensor) -> Tensor:
    """Cut one crop from each image, resized to the image's own size.

    Args:
        images: (B, 3, S, S) float.
        theta: (B, 2, 3) from `random_crops`.

    Returns:
        (B, 3, S, S), bilinear.
    """
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
