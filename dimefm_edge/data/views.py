"""Views that the teacher saw: its embeddings of augmented images, and the crops they are of.

"Dataset reinforcement" (MobileCLIP, arXiv 2311.17049): a student that sees a crop is told what
the teacher answered to that crop, not to the whole image. A view's random numbers belong to
(seed, view, row), so its store keeps a seed and no crops.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dimefm_edge.data.augment import crop_batch, crops_of_draws
from dimefm_edge.data.store import EmbeddingStore

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ViewSpec:
    """One augmentation of every image of a pool."""

    view: int
    """Number of the view, from 0 on."""
    min_crop: float
    flip: bool
    seed: int = 0

    def crops(self, rows: Rows) -> Tensor:
        """The crop of each row's image: (B, 2, 3), as `data.augment.random_crops` gives."""
        draws = np.empty((len(rows), 5))
        for place, row in enumerate(rows):
            # The high words of the counter: each (row, view) has a stream of its own.
            bits = np.random.Philox(key=self.seed, counter=[0, 0, int(row), self.view])
            draws[place] = np.random.Generator(bits).random(5)
        return crops_of_draws(
            torch.from_numpy(draws).float(), min_crop=self.min_crop, flip=self.flip
        )

    def apply(self, rows: Rows, pixels: Pixels) -> Pixels:
        """The views of (B, S, S, 3) uint8 pixels, as large as these."""
        images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()
        cut = crop_batch(images, self.crops(rows)).round_().clamp_(0, 255)
        return cut.byte().permute(0, 2, 3, 1).contiguous().numpy()

    def digest(self) -> str:
        """16 hex digits."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Views:
    """Several views of every image, each with a store of its own."""

    specs: tuple[ViewSpec, ...]
    stores: tuple[EmbeddingStore, ...]

    @property
    def fingerprint(self) -> str:
        """Their number, for people, and a hash that tells these views from others."""
        digests = " ".join(spec.digest() for spec in self.specs)
        return f"{len(self.specs)} ({hashlib.sha256(digests.encode()).hexdigest()[:8]})"

    def gather(
        self, rows: Rows, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float16], Tensor]:
        """One view of each image, drawn at random.

        Args:
            rows: (B,) rows of the images.
            rng: Chooses the views, and nothing else.

        Returns:
            The teacher's embeddings of them, (B, E) float16, and their crops, (B, 2, 3).
        """
        chosen = rng.integers(0, len(self.specs), len(rows))
        embeds = np.empty((len(rows), self.stores[0].embed_dim), np.float16)
        crops = torch.empty(len(rows), 2, 3)
        for view, (spec, store) in enumerate(zip(self.specs, self.stores, strict=True)):
            places = np.flatnonzero(chosen == view)
            embeds[places] = store.gather(rows[places])
            crops[torch.from_numpy(places)] = spec.crops(rows[places])
        return embeds, crops
