"""Batches of a text student's step: which sentences and images, their tokens and embeddings.

Sentences pass by in shuffled epochs, images are drawn: the sides of batches.py exchanged, and as
there a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dimefm_edge.config import TrainConfig
from dimefm_edge.data.epochs import Epochs, Rows, rows_fingerprints
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.data.tokens import TokenTable
from dimefm_edge.distributed import Ranks

if TYPE_CHECKING:
    from dimefm_edge.students.text import TextSpec

# Streams of random numbers; batches.py and distill.py have 0 to 6.
_SENTENCES, _IMAGES = 7, 8


@dataclass(frozen=True)
class TextData:
    """What a text student is distilled on: tokens, and the teacher's embeddings by row."""

    texts: EmbeddingStore
    images: EmbeddingStore
    tokens: TokenTable
    """Of the sentences of `texts`, row by row."""
    spec: TextSpec
    """The student, which says how much of a sentence it needs."""
    logit_scale: float
    text_rows: Rows | None = None
    """Rows of `texts` that are trained on, ascending (corpus.py chooses); None: all."""
    image_rows: Rows | None = None
    """Rows of `images` that are drawn from, ascending; None: all that could be read."""

    def usable_texts(self) -> Rows:
        """Rows to train on."""
        return np.arange(len(self.texts)) if self.text_rows is None else self.text_rows

    def usable_images(self) -> Rows:
        """Rows to compare with: asked for, and readable."""
        return self.images.usable_rows(self.image_rows)

    def extras(self) -> dict[str, str]:
        """Fingerprints of what not every run has, by name."""
        rows = rows_fingerprints(text_rows=self.text_rows, image_rows=self.image_rows)
        return {"tokens": self.tokens.fingerprint, **rows}


@dataclass(frozen=True)
class TextBatch:
    """One step's data; tokens are of this rank, embeddings of the global batch."""

    tokens: Tensor
    """(B, N) int64, N up to the context length."""
    text_rows: Rows
    image_rows: Rows
    text_embeds: Tensor
    image_embeds: Tensor

    def save(self, path: Path) -> None:
        """Write everything as safetensors, to look at."""
        tensors = {
            "tokens": self.tokens,
            "text_rows": torch.from_numpy(self.text_rows),
            "image_rows": torch.from_numpy(self.image_rows),
            "text_embeds": self.text_embeds,
            "image_embeds": self.image_embeds,
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)


class TextBatchPlan:
    """Which rows belong to a step: pure functions of (seed, step)."""

    def __init__(
        self, data: TextData, train: TrainConfig, ranks: Ranks, *, num_images: int
    ) -> None:
        """`train.batch_size` sentences and `num_images` images a step."""
        self._data, self._train, self._ranks = data, train, ranks
        self._num_images = num_images
        self._images = data.usable_images()
        self._epochs = Epochs(
            data.usable_texts(), batch_size=train.batch_size, seed=train.seed, stream=_SENTENCES
        )

    def batch(self, step: int) -> TextBatch:
        """A step's batch."""
        data = self._data
        text_rows = self._epochs.rows(step)
        rng = np.random.default_rng([self._train.seed, _IMAGES, step])
        drawn = rng.integers(0, len(self._images), self._num_images)
        image_rows = np.sort(self._images[drawn])
        tokens = data.tokens.gather(text_rows[self._ranks.slice(self._train.batch_size)])
        return TextBatch(
            tokens=torch.from_numpy(tokens[:, : data.spec.needed_length(tokens)]),
            text_rows=text_rows,
            image_rows=image_rows,
            text_embeds=torch.from_numpy(data.texts.gather(text_rows)).float(),
            image_embeds=torch.from_numpy(data.images.gather(image_rows)).float(),
        )

    def batches(self, start: int, stop: int) -> Iterator[TextBatch]:
        """The batches of steps [start, stop), in order."""
        return map(self.batch, range(start, stop))
